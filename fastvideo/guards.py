"""Signs in metrics.jsonl that a run goes wrong."""

import json
from itertools import pairwise
from pathlib import Path

from fastvideo.distributed import UserError, launch_rank, warn

WINDOW = 10  # iterations whose mean is one evaluation: enough prompts for their mix to matter little
EVALUATIONS = 4  # in a row, in which a held-out reward must fall each time for a warning


def check(output_dir: Path, iteration: int, clip_range: float) -> UserError | None:
    """Collective. Warn of what goes wrong in the run, as its metrics.jsonl shows after `iteration`."""
    warn_of_over_optimization(output_dir, iteration)
    return None


def warn_of_over_optimization(output_dir: Path, iteration: int) -> None:
    """Warn if, over the last EVALUATIONS means of WINDOW iterations in metrics.jsonl, all trained rewards rose while a held-out one fell.

    Looks only at the end of a window, and only on rank 0.
    """
    if launch_rank() != 0 or iteration % WINDOW or iteration < WINDOW * EVALUATIONS:
        return
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()][-WINDOW * EVALUATIONS :]
    means = {
        name: [sum(row[name] for row in rows[start : start + WINDOW]) / WINDOW for start in range(0, len(rows), WINDOW)]
        for name in rows[0]
        if name.startswith(("reward/", "held_out/")) and name.endswith("_mean") and all(name in row for row in rows)
    }
    trained = {name: values for name, values in means.items() if name.startswith("reward/")}
    for name, values in means.items():
        falls = all(later < earlier for earlier, later in pairwise(values))
        if name.startswith("held_out/") and falls and all(values[-1] > values[0] for values in trained.values()):
            warn(
                f"over-optimisation: since iteration {rows[0]['iteration']} {name} fell from {values[0]:.4g} to {values[-1]:.4g} while "
                + ", ".join(f"{other} rose from {values[0]:.4g} to {values[-1]:.4g}" for other, values in trained.items())
                + ". An earlier checkpoint may be better; a --kl_weight or another trained reward holds it back"
            )
