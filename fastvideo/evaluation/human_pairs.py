"""Pairs of two models' pictures for people to judge, and what their answers say: `python -m fastvideo.evaluation.human_pairs FOLDER`.

The folder has each pair's files, named by their side alone; pairs.csv, with the prompts, whose column "answer" takes left, right or tie;
and key.csv, which says whose they are: keep that from who judges.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro

from fastvideo.errors import UserError
from fastvideo.evaluation.checkpoints import BASE
from fastvideo.evaluation.pictures import copy_media
from fastvideo.evaluation.statistics import margins
from fastvideo.evaluation.store import Job
from fastvideo.files import whole_file
from fastvideo.parallel.distributed import keyed_generator, run

ANSWERS = {"left": 1.0, "right": 0.0, "tie": 0.5}
SIDES = ("left", "right")


def choose(jobs: dict[str, list[Job]], number: int, seed: int = 0) -> list[tuple[str, Job]]:
    """`number` of all benchmarks' jobs, shuffled: one of each prompt before a second one of any. UserError if there are not as many."""
    whole = [(name, job) for name, part in jobs.items() for job in part]
    if number > len(whole):
        raise UserError(f"--human_pairs {number} is more than the {len(whole)} that each model makes")
    order = torch.randperm(len(whole), generator=keyed_generator(seed, "human_pairs")).tolist()
    taken: dict[tuple[str, int], int] = {}
    rounds = []
    for name, job in (whole[place] for place in order):
        taken[name, job.prompt] = taken.get((name, job.prompt), -1) + 1
        rounds.append((taken[name, job.prompt], len(rounds), (name, job)))
    return [chosen for *_, chosen in sorted(rounds, key=lambda entry: entry[:2])[:number]]


def write_pairs(
    folder: Path,
    models: tuple[str, str],
    chosen: Sequence[tuple[str, Job]],
    files: Sequence[tuple[Path, Path]],
    prompts: Sequence[str],
    seed: int = 0,
) -> str:
    """Returns what was done, in words: a folder with answers is left as it is.

    files: of each chosen job that of each of the two `models`. prompts: its prompt.
    """
    if (folder / "pairs.csv").is_file() and any(row["answer"] for row in _read(folder / "pairs.csv")):
        return f"{folder} has answers, and is left as it is"
    pairs, key = [], []
    width = len(str(len(chosen)))
    for number, ((benchmark, job), both, prompt) in enumerate(zip(chosen, files, prompts, strict=True), 1):
        swapped = bool(torch.randint(2, (1,), generator=keyed_generator(seed, "human_side", number)))
        order = (1, 0) if swapped else (0, 1)
        names = [f"{number:0{width}d}_{side}{both[0].suffix}" for side in SIDES]
        for name, place in zip(names, order):
            copy_media(both[place], folder / name, link=False)
        pairs.append([number, prompt, *names, ""])
        key.append([number, *(models[place] for place in order), benchmark, *(job.prompt, job.seed, job.k)])
    _write(folder / "key.csv", ["pair", *SIDES, "benchmark", "prompt", "seed", "k"], key)
    _write(folder / "pairs.csv", ["pair", "prompt", *SIDES, "answer"], pairs)
    return f"{len(chosen)} pairs for people to judge are in {folder}"


def win_rate(folder: Path) -> tuple[str, str, int, float, float]:
    """Of a model over the base, or over the one before it in the alphabet: (that one's name, its own, number of answers, rate, margin).

    Raises UserError for an answer that is none, and if there are none at all.
    """
    key = {row["pair"]: row for row in _read(folder / "key.csv")}
    models = sorted({row[side] for row in key.values() for side in SIDES}, key=lambda name: (name != BASE, name))
    of_prompt: dict[tuple[str, str], list[float]] = {}
    for row in _read(folder / "pairs.csv"):
        answer = row["answer"].strip().lower()
        if answer and (answer not in ANSWERS or row["pair"] not in key):
            raise UserError(f"{folder / 'pairs.csv'}: the answer {answer!r} to pair {row['pair']} must be one of {', '.join(ANSWERS)}")
        if answer:
            pair = key[row["pair"]]
            wins = ANSWERS[answer] if pair["left"] == models[1] else 1 - ANSWERS[answer]
            of_prompt.setdefault((pair["benchmark"], pair["prompt"]), []).append(wins)
    if not of_prompt:
        raise UserError(f"{folder / 'pairs.csv'} has no answers yet")
    values = np.array([[np.mean(part) for part in of_prompt.values()]])
    number = sum(map(len, of_prompt.values()))
    return models[0], models[1], number, float(values.mean()), float(margins(values)[0])


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write the mark
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    needed = {"pair", "answer"} if path.name == "pairs.csv" else {"pair", *SIDES, "benchmark", "prompt"}
    if not rows or any(row.get(name) is None for row in rows for name in needed):
        raise UserError(f"{path} must have the columns {', '.join(sorted(needed))} in each row")
    return rows


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def main() -> None:
    folder = tyro.cli(Path, description="What the answers in FOLDER/pairs.csv say.")
    base, model, number, rate, margin = win_rate(folder)
    interval = (
        f"95 % interval {max(0, rate - margin):.1%} to {min(1, rate + margin):.1%}" if np.isfinite(margin) else "too few for an interval"
    )
    print(f"{model} wins over {base} in {rate:.1%} of {number} answers ({interval}; ties count half)")


if __name__ == "__main__":
    run(main)
