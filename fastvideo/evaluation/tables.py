"""What evaluation found, as tables: for the terminal, as Markdown, as CSV, and the score of each picture."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvideo.evaluation.benchmarks import Benchmark
from fastvideo.evaluation.results import Scored
from fastvideo.files import whole_file

INTERVALS = "95 % intervals are of a symmetric studentized bootstrap over prompts, each with all its pictures"
MANY = 5  # models, beyond which a table for each would not be read
COLUMNS = ("model", "benchmark", "reward", "group", "prompts", "mean", "low", "high", "seed_std")
AGAINST = ("difference", "low", "high", "win_rate", "win_low", "win_high")


def write_tables(folder: Path, results: dict[str, Any], found: dict[str, dict[str, Scored]], benchmarks: Sequence[Benchmark]) -> None:
    """results.json, results.csv, results.md and scores.csv in `folder`."""
    with whole_file(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=2))
    others = list(results["scores"])[:-1]
    header = [*COLUMNS, *(f"{column}_to_{other}" for other in others for column in AGAINST)]
    _write_csv(folder / "results.csv", [header, *(row + [""] * (len(header) - len(row)) for row in _flat(results))])
    _write_csv(folder / "scores.csv", _single(found, benchmarks))
    with whole_file(folder / "results.md") as path:
        path.write_text(as_markdown(results), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _cells(entry: dict[str, Any]) -> list[Any]:
    return [entry["mean"], *(entry["interval"] or ["", ""])]


def _flat(results: dict[str, Any]) -> Iterator[list[Any]]:
    """A row a model, benchmark, reward and group (empty: the whole), with the differences to the models before it at the end."""
    for model, benchmark, name, entry in each_entry(results):
        against = [other[benchmark][name] for other in results["differences"].get(model, {}).values()]
        prompts = results["benchmarks"][benchmark]["prompts"]
        for group in ("", *entry["groups"]):
            part = entry["groups"][group] if group else entry | {"prompts": prompts}
            row = [model, benchmark, name, group, part["prompts"], *_cells(part), "" if group else entry.get("seed_std", "")]
            for difference in against:
                row += _cells(difference["groups"][group] if group else difference)
                wins = difference.get("win_rate")
                row += _cells(wins["groups"][group] if group else wins) if wins else [""] * 3
            yield row


def each_entry(results: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """model, benchmark, reward or measure, and what it has got."""
    for model, parts in results["scores"].items():
        for benchmark, rewards in parts.items():
            for name, entry in rewards.items():
                yield model, benchmark, name, entry


def _single(found: dict[str, dict[str, Scored]], benchmarks: Sequence[Benchmark]) -> list[list[Any]]:
    """A row a picture: model, benchmark, place of the prompt, noise seed, k, scores (empty for rewards of other benchmarks), prompt."""
    names = list(dict.fromkeys(name for parts in found.values() for part in parts.values() for name in part.scores))
    rows = [["model", "benchmark", "prompt", "seed", "k", *names, "text"]]
    for model, parts in found.items():
        for benchmark in benchmarks:
            scores = parts[benchmark.name].scores
            prompts, seeds, pictures = next(iter(scores.values())).shape
            for prompt in range(prompts):
                for seed in range(seeds):
                    for k in range(pictures):
                        values = [scores[name][prompt, seed, k] if name in scores else "" for name in names]
                        rows.append([model, benchmark.name, prompt, seed, k, *values, benchmark.rows[prompt]["prompt"]])
    return rows


def _number(entry: dict[str, Any], sign: str = "") -> str:
    """`0.1234 ± 0.0056`, half the interval's width behind the sign; its ends where the mean is not its middle; `?` where there is none."""
    low, high = entry["interval"] or (math.nan, math.nan)
    if math.isnan(low):
        return f"{entry['mean']:{sign}.4f} ± ?"
    if math.isclose(low + high, 2 * entry["mean"], rel_tol=1e-9, abs_tol=1e-9):
        return f"{entry['mean']:{sign}.4f} ± {(high - low) / 2:.4f}"
    return f"{entry['mean']:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


def _rate(entry: dict[str, Any]) -> str:
    interval = entry["interval"]
    return f"{entry['mean']:.0%} " + (f"({interval[0]:.0%} to {interval[1]:.0%})" if interval else "(?)")


def _rows(results: dict[str, Any], benchmark: str, against: str, groups: bool) -> Iterator[list[str]]:
    """Reward, model, mean, difference to the model `against` and win rate; of groups too if asked for."""
    for name, entry in results["scores"][against][benchmark].items():
        for group in ("", *(entry["groups"] if groups else ())):
            for model in results["scores"]:
                own = results["scores"][model][benchmark][name]
                row = [name + (f", {group}" if group else ""), model, _number(own["groups"][group] if group else own)]
                if difference := results["differences"].get(model, {}).get(against):
                    found = difference[benchmark][name]
                    wins = found.get("win_rate")
                    row += [_number(found["groups"][group] if group else found, "+")]
                    row += [_rate(wins["groups"][group] if group else wins)] if wins else [""]
                yield row + [""] * (5 - len(row))


def counted(number: int, what: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {what}{'s' * (number != 1)}"


def heading(results: dict[str, Any], benchmark: str) -> str:
    """What has been sampled."""
    facts = results["benchmarks"][benchmark]
    return f"{benchmark}: {counted(facts['samples'], facts['kind'])} of {counted(facts['prompts'], 'prompt')} by each model"


def print_table(results: dict[str, Any]) -> None:
    """The short one: each reward of each model, with its difference to the base."""
    base = next(iter(results["scores"]))
    for benchmark in results["benchmarks"]:
        print(f"\n{heading(results, benchmark)}; mean ± half the 95 % interval over prompts, or its ends")
        columns = ["reward", "model", "mean", f"difference to {base}", "wins"][: 5 if results["differences"] else 3]
        table = [columns, *(row[: len(columns)] for row in _rows(results, benchmark, base, groups=False))]
        widths = [max(map(len, column)) for column in zip(*table)]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def as_markdown(results: dict[str, Any]) -> str:
    """Of each benchmark a table with differences to the base, and unless there are MANY models one for each other that has one after it."""
    models = list(results["scores"])
    lines = ["# Evaluation", "", f"Sampling: {', '.join(f'{name} {value}' for name, value in results['sampling'].items())}.", ""]
    lines += [
        f"{INTERVALS}; behind ± is half their width, and ? where there are none; those of rates are in brackets where 0 or 1 ends them.",
        "",
    ]
    lines[-2] += (
        " Wins: the share of pictures that score higher than the other model's from the same prompt and noise; equal ones count half."
    )
    if len(models) > MANY:
        lines += ["Differences between checkpoints are in results.json and results.csv.", ""]
    for benchmark in results["benchmarks"]:
        lines += [f"## {heading(results, benchmark)}", ""]
        for against in (models[:-1] or models)[: None if len(models) <= MANY else 1]:
            shown = [row for row in _rows(results, benchmark, against, groups=True) if against == models[0] or row[3]]
            columns = ["reward", "model", "mean", f"difference to {against}", "wins"][: 5 if len(models) > 1 else 3]
            table = [columns, ["---"] * len(columns), *(row[: len(columns)] for row in shown)]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table] + [""]
    return "\n".join(lines)
