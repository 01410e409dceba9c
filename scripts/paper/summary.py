"""Figures and tables of the experiments beside the paper's statements: `python scripts/paper/summary.py [--runs RUNS] [--docs]`.

Reads what scripts/paper/*.sh has left in RUNS (runs/paper): the runs of each arm, one a training seed, and their evaluation. Writes
RUNS/summary/results.md and a picture of each figure; with --docs also into docs/results.md, between its marks, and docs/images/.

Numbers are means over training seeds +- half their 95 % interval (Student's t), curves have it as a band. A statement is tested by the 95 %
interval of the difference of two arms (Welch's t), or of an arm and the base model (Student's t). What is not there yet is left out.
"""

# ruff: noqa: E402
import json
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from experiments import EXPERIMENTS, Claim, Grid, Panel, Table
from scipy import stats

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # from any working directory

from fastvideo.runs.tracking import read_metrics

WINDOW = 8  # iterations of the moving average, as the paper's curves have one
BASE = "base"
# What the real models are judged by in place of the tiny ones' judges.
REAL_JUDGES = {"aesthetic": "hpsv2", "visual": "videoalign.vq", "motion": "videoalign.mq"}
REAL_CHECKERS = {
    "pictures": {"shapes": "pickscore"},
    "clips": {"shapes": "videoalign.ta", "shapes_strict": "http.visionreward"},
}


@dataclass
class Args:
    runs: Path = REPOSITORY / "runs" / "paper"
    """What scripts/paper/*.sh has left."""
    full: bool = False
    """The runs are of the real models, by the commands of --full."""
    docs: bool = False
    """Write into docs/results.md and docs/images too."""
    show: str = ""
    """An experiment to print."""


class Results:
    """What the runs of a folder have measured."""

    def __init__(self, folder: Path, full: bool = False):
        self.folder, self.full = folder, full
        paths = {path.parent.name: path for path in sorted(folder.glob("evaluation/*/results.json"))}
        self.evaluations = {setting: json.loads(path.read_text())["scores"] for setting, path in paths.items()}

    def runs(self, setting: str, arm: str) -> list[Path]:
        """Finished ones, in order of their seeds."""
        return [
            path
            for path in sorted(self.folder.glob(f"{setting}/{arm}_[0-9]*"))
            if re.fullmatch(rf"{arm}_\d+", path.name) and (path / "export").exists()
        ]

    def judged(self, setting: str, metric: str) -> str:
        """The metric by the name that it has in these runs."""
        if not self.full:
            return metric
        judges = REAL_JUDGES | REAL_CHECKERS["clips" if setting in ("hunyuan", "skyreels") else "pictures"]
        return re.sub(
            "|".join(rf"\b{name}(?=\b|_mean)" for name in sorted(judges, key=len, reverse=True)), lambda found: judges[found[0]], metric
        )

    def curves(self, setting: str, arm: str, metric: str) -> np.ndarray:
        """(seeds, iterations): a metric of metrics.jsonl, as far as all seeds have come."""
        metric = self.judged(setting, metric)
        curves = [[row[metric] for row in read_metrics(run) if metric in row] for run in self.runs(setting, arm)]
        return np.array([curve[: min(map(len, curves))] for curve in curves])

    def values(self, setting: str, arm: str, metric: str) -> np.ndarray:
        """One number a seed.

        metric: a reward or measure of the evaluation, of the first benchmark that has it; "end METRIC" or "all METRIC": of metrics.jsonl,
        in the last quarter of the iterations or in all of them.
        """
        when, _, name = metric.rpartition(" ")
        if not when:
            metric = self.judged(setting, metric)
            models = self.evaluations.get(setting, {})
            names = [BASE] if arm == BASE else [run.name for run in self.runs(setting, arm)]
            found = [
                next((part[metric]["mean"] for part in models[name].values() if metric in part), None) for name in names if name in models
            ]
            return np.array([value for value in found if value is not None])
        curves = self.curves(setting, arm, name)
        return curves[:, -(curves.shape[1] // 4) if when == "end" else 0 :].mean(1) if curves.size else np.empty(0)


def half_width(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean of (n,) values; NaN for fewer than two."""
    with warnings.catch_warnings(action="ignore"):
        return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def with_interval(values: np.ndarray) -> str:
    if not values.size:
        return ""
    return f"{values.mean():.3f}" + (f" +- {half_width(values):.3f}" if len(values) > 1 else "")


def difference(values: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Mean of `values` less that of `others`, and its 95 % interval. The base model is one number: it saw the same prompts and noise."""
    change = float(values.mean() - others.mean())
    if min(len(values), len(others)) == 1:
        width = half_width(max(values, others, key=len))
        return change, change - width, change + width
    interval = stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    return change, float(interval.low), float(interval.high)


def verdict(claim: Claim, low: float, high: float) -> str:
    """Whether the interval of a difference bears the claim out."""
    if claim.alike:
        inside = max(abs(low), abs(high)) < claim.alike
        return "agrees" if inside else "disagrees" if low > 0 or high < 0 else "too weak to say"
    return "agrees" if low > 0 else "disagrees" if high < 0 else "too weak to say"


def draw(panels: tuple[Panel, ...], results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for arm, label in panel.arms.items():
            curves = results.curves(panel.setting, arm, panel.metric)
            if not curves.size:
                continue
            window = np.ones(min(WINDOW, curves.shape[1]))
            smooth = np.array([np.convolve(curve, window, "valid") for curve in curves]) / len(window)
            mean, iterations = smooth.mean(0), np.arange(len(window), curves.shape[1] + 1)
            (line,) = axis.plot(iterations, mean, label=f"{label} ({len(curves)} seeds)")
            if len(curves) > 1:
                width = np.array([half_width(column) for column in smooth.T])
                axis.fill_between(iterations, mean - width, mean + width, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(panel.title)
        axis.set_xlabel("iteration")
        axis.set_ylabel(panel.metric.partition("/")[2].removesuffix("_mean"))
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def table_lines(table: Table, results: Results) -> list[str]:
    lines = [f"| | {' | '.join(table.rewards)} |", "| --- |" + " --- |" * len(table.rewards)]
    for arm, label in {BASE: "base", **table.arms}.items():
        cells = [results.values(table.setting, arm, reward) for reward in table.rewards]
        if not cells[0].size:
            continue
        texts = [with_interval(values) for values in cells]
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return [*lines, "", *([f"The paper: {table.paper}.", ""] if table.paper else [])] if len(lines) > 3 else []


def grid_lines(grid: Grid, results: Results) -> list[str]:
    """One run each; the best of a row in bold."""
    lines = [f"| {grid.what} | {' | '.join(grid.values)} |", "| --- |" + " --- |" * len(grid.values)]
    for prefix, method in grid.methods.items():
        cells = [results.values(grid.setting, f"grid_{prefix}_{value}", grid.metric) for value in grid.values]
        if all(cell.size for cell in cells):
            best = max(cell.mean() for cell in cells)
            texts = [f"**{cell.mean():.3f}**" if cell.mean() == best else f"{cell.mean():.3f}" for cell in cells]
            lines.append(f"| {method} | {' | '.join(texts)} |")
    return [*lines, ""] if len(lines) > 2 else []


def claim_lines(claims: tuple[Claim, ...], results: Results) -> list[str]:
    lines = ["| the paper | here: difference and its 95 % interval | |", "| --- | --- | --- |"]
    for claim in claims:
        values, others = (results.values(claim.setting, arm, claim.metric) for arm in (claim.arm, claim.other))
        if not values.size or not others.size or max(len(values), len(others)) < 2:
            continue
        change, low, high = difference(values, others)
        metric = claim.metric.replace("reward/", "").replace("held_out/", "").removesuffix("_mean")
        lines.append(f"| {claim.text} | {metric}: {change:+.3f} [{low:+.3f}, {high:+.3f}] | {verdict(claim, low, high)} |")
    return [*lines, ""] if len(lines) > 2 else []


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, description=__doc__.splitlines()[0])
    results, folder = Results(args.runs, args.full), args.runs / "summary"
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {}
    for name, experiment in EXPERIMENTS.items():
        lines = []
        if any(results.runs(panel.setting, arm) for panel in experiment.panels for arm in panel.arms):
            draw(experiment.panels, results, folder / f"{name}.png")
            lines += [f"![{experiment.title}](images/paper_{name}.png)", ""]
        for table in experiment.tables:
            lines += table_lines(table, results)
        for grid in experiment.grids:
            lines += grid_lines(grid, results)
        blocks[name] = "\n".join([*lines, *claim_lines(experiment.claims, results)])
    text = "\n".join(f"## {EXPERIMENTS[name].title}\n\n{block}" for name, block in blocks.items() if block)
    (folder / "results.md").write_text(text.replace("images/paper_", ""))
    if args.docs:
        page = REPOSITORY / "docs" / "results.md"
        written = page.read_text()
        for name, block in blocks.items():
            marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
            written = re.sub(f"(?<={marks[0]}).*?(?={marks[1]})", lambda _, block=block: f"\n{block}\n", written, flags=re.DOTALL)
            if (folder / f"{name}.png").exists():
                shutil.copy(folder / f"{name}.png", REPOSITORY / "docs" / "images" / f"paper_{name}.png")
        page.write_text(written)
    if args.show in blocks:
        print(f"{EXPERIMENTS[args.show].title}\n\n{blocks[args.show]}")
    print(f"written to {folder / 'results.md'}")


if __name__ == "__main__":
    main()
