"""From the scores of single pictures to what is reported: means, groups, differences of models, win rates, each with its interval."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fastvideo.evaluation.benchmarks import Benchmark
from fastvideo.evaluation.diversity import mean_distance
from fastvideo.evaluation.statistics import margins, means, wins
from fastvideo.evaluation.store import Job, Record


@dataclass(frozen=True)
class Scored:
    """What one model has got on one benchmark.

    scores: reward -> (prompts, seeds, images_per_prompt). diversity: measure -> (prompts,); empty for single pictures.
    """

    scores: dict[str, np.ndarray]
    diversity: dict[str, np.ndarray]


def scored(records: dict[Job, Record], jobs: Sequence[Job]) -> Scored:
    """Of `jobs`: all of some seeds, prompts and k. Raises KeyError if one is missing; `records` may hold more."""
    shape = [place + 1 for place in map(max, zip(*jobs))]
    found = [records[job] for job in sorted(jobs)]
    scores = {name: np.array([record.scores[name] for record in found]).reshape(shape).swapaxes(0, 1) for name in found[0].scores}
    pictures = np.arange(len(found)).reshape(shape).swapaxes(0, 1).reshape(shape[1], -1)  # a prompt a row
    diversity = {
        name: np.array([mean_distance([found[i].features[name] for i in row]) for row in pictures])
        for name in (found[0].features if pictures.shape[1] > 1 else ())
    }
    return Scored(scores, diversity)


def summarise(found: dict[str, dict[str, Scored]], benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """found: model -> benchmark -> what it has got. Returns
    scores: model -> benchmark -> reward or measure -> {mean, interval, groups, seed_means, seed_std} (the last two for rewards), and
    differences: model -> an earlier one -> benchmark -> reward or measure -> {mean, interval, groups, win_rate} (the last for rewards).
    """
    scores = {model: {benchmark.name: {} for benchmark in benchmarks} for model in found}
    pairs = [(model, against) for against, model in combinations(found, 2)]
    differences: dict[str, Any] = {}
    for model, against in pairs:
        differences.setdefault(model, {})[against] = {benchmark.name: {} for benchmark in benchmarks}
    for benchmark in benchmarks:
        here = {model: parts[benchmark.name] for model, parts in found.items()}
        groups = [str(row[benchmark.group]) for row in benchmark.rows] if benchmark.group else None
        number = None if groups and benchmark.total == "groups" else len(benchmark.rows)
        first = next(iter(here.values()))
        for name in [*first.scores, *first.diversity]:
            is_reward = name in first.scores
            whole = {model: part.scores[name] if is_reward else part.diversity[name][:, None, None] for model, part in here.items()}
            columns = {model: values.mean((1, 2)) for model, values in whole.items()}
            columns |= {pair: columns[pair[0]] - columns[pair[1]] for pair in pairs}
            won = {(*pair, "wins"): wins(whole[pair[0]], whole[pair[1]]).mean((1, 2)) for pair in pairs if is_reward}
            # A reward's range is not known; but one that gives 0 and 1 and nothing between has rates for means.
            is_rate = is_reward and np.array_equal(np.unique(np.stack([*whole.values()])), (0, 1))
            entry = dict(zip([*columns, *won], _entries(np.stack([*columns.values(), *won.values()]), groups, benchmark.total)))
            for model, values in whole.items():
                mean = _of_rate(entry[model], number) if is_rate else entry[model]
                scores[model][benchmark.name][name] = mean | (_of_seeds(values, groups, benchmark.total) if is_reward else {})
            for pair in pairs:
                win_rate = {"win_rate": _of_rate(entry[*pair, "wins"], number)} if is_reward else {}
                differences[pair[0]][pair[1]][benchmark.name][name] = (_of_difference(entry[pair]) if is_rate else entry[pair]) | win_rate
    return {"scores": scores, "differences": differences}


def _entries(values: np.ndarray, groups: list[str] | None, total: str) -> list[dict[str, Any]]:
    """values: (rows, prompts). {"mean", "interval": [low, high] or None, "groups": the same of each, with its number of prompts}."""

    def entries(values: np.ndarray, groups: list[str] | None) -> list[dict[str, Any]]:
        pairs = zip(means(values, groups).tolist(), margins(values, groups).tolist())
        return [{"mean": mean, "interval": [mean - margin, mean + margin] if margin < np.inf else None} for mean, margin in pairs]

    found = [entry | {"groups": {}} for entry in entries(values, groups if total == "groups" else None)]
    for group in dict.fromkeys(groups or ()):
        inside = np.array(groups) == group
        for entry, part in zip(found, entries(np.ascontiguousarray(values[:, inside]), None)):
            entry["groups"][group] = part | {"prompts": int(inside.sum())}
    return found


def _of_seeds(values: np.ndarray, groups: list[str] | None, total: str) -> dict[str, Any]:
    """Mean of each noise seed, and their standard deviation (0 for one seed). values: (prompts, seeds, pictures)."""
    seed_means = means(np.ascontiguousarray(values.mean(2).T), groups if total == "groups" else None).tolist()
    return {"seed_means": seed_means, "seed_std": statistics.stdev(seed_means) if len(seed_means) > 1 else 0.0}


def _of_rate(entry: dict[str, Any], prompts: int | None) -> dict[str, Any]:
    """Intervals without what no rate can be; and exact ones where all of a number of `prompts` have 1, or all have 0, and so no spread.

    Then the bound is the rate at which that many in a row have a chance of at most 2.5 %.
    """
    interval, rate = _between(0.0, entry["interval"]), entry["mean"]
    if not interval and prompts and rate in (0, 1):
        bound = 0.025 ** (1 / prompts)
        interval = [bound, 1.0] if rate else [0.0, 1 - bound]
    return entry | {
        "interval": interval,
        "groups": {name: part | _of_rate(part | {"groups": {}}, part["prompts"]) for name, part in entry["groups"].items()},
    }


def _of_difference(entry: dict[str, Any]) -> dict[str, Any]:
    """Intervals without what no difference of two rates can be."""
    groups = {name: part | {"interval": _between(-1.0, part["interval"])} for name, part in entry["groups"].items()}
    return entry | {"interval": _between(-1.0, entry["interval"]), "groups": groups}


def _between(low: float, interval: list[float] | None) -> list[float] | None:
    """What of an interval, if there is one, is between `low` and 1."""
    return interval and [max(low, interval[0]), min(1.0, interval[1])]
