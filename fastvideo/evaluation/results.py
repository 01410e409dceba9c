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
        first = next(iter(here.values()))
        for name in [*first.scores, *first.diversity]:
            is_reward = name in first.scores
            whole = {model: part.scores[name] if is_reward else part.diversity[name][:, None, None] for model, part in here.items()}
            columns = {model: values.mean((1, 2)) for model, values in whole.items()}
            columns |= {pair: columns[pair[0]] - columns[pair[1]] for pair in pairs}
            won = {(*pair, "wins"): wins(whole[pair[0]], whole[pair[1]]).mean((1, 2)) for pair in pairs if is_reward}
            entry = dict(zip([*columns, *won], _entries(np.stack([*columns.values(), *won.values()]), groups, benchmark.total)))
            for model, values in whole.items():
                scores[model][benchmark.name][name] = entry[model] | (_of_seeds(values, groups, benchmark.total) if is_reward else {})
            for pair in pairs:
                win_rate = {"win_rate": _at_most_1(entry[*pair, "wins"])} if is_reward else {}
                differences[pair[0]][pair[1]][benchmark.name][name] = entry[pair] | win_rate
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


def _at_most_1(entry: dict[str, Any]) -> dict[str, Any]:
    """A rate's interval without what no rate can be."""
    interval = entry["interval"] and [max(0.0, entry["interval"][0]), min(1.0, entry["interval"][1])]
    return entry | {"interval": interval} | {"groups": {name: _at_most_1(part) for name, part in entry.get("groups", {}).items()}}
