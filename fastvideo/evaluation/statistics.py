"""What may be said of scores: how far a mean may be from the truth, and who wins.

Pictures of one prompt are not independent of each other, so each prompt is one observation, the mean over its pictures, and prompts are
what the bootstrap draws. An interval is for the mean over all prompts of which these are a sample, at any noise.
"""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 9999  # one less than a multiple of 20, so that a resample stands exactly at 95 %
CHUNK = 2**22  # prompts drawn at once, for memory's sake
FLOOR = 1 / 3  # a resample's standard error in those of the sample, at least: a resample can miss the few prompts that differ
ROUNDING = 1e-12


def means(values: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """values: (rows, prompts). Returns (rows,): the mean over prompts or, where `groups` names that of each, of the groups' means."""
    return sum(part.mean(1) for part in _parts(values, groups)) / (len(set(groups)) if groups else 1)


def margins(values: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0) -> np.ndarray:
    """What is added to `means` and taken from them for their 95 % intervals: (rows,), infinite where nothing can be said.

    A symmetric studentized bootstrap over prompts: how many of its own standard errors a resample's mean is away from the sample's, in 95 %
    of resamples, times the sample's standard error. Percentile intervals are too short for few prompts: with 16 they hold the truth in 87
    to 92 % of cases, and these in 93 to 97 %. Groups are drawn each for itself, as a benchmark has so many prompts of each. Infinite: for
    a single prompt, for a group of one, and where all prompts have the same.
    """
    generator = np.random.default_rng(seed)
    parts = _parts(values, groups)
    if min(part.shape[1] for part in parts) < 2:
        return np.full(len(values), np.inf)
    shift, variance, drawn_variance = 0.0, 0.0, 0.0
    for part in parts:
        n = part.shape[1]
        centred = part - part.mean(1, keepdims=True)
        mean, square = np.split(_draw_sums(np.concatenate((centred, centred**2)), generator) / n, 2)
        shift = shift + mean / len(parts)
        scale = (n - 1) * len(parts) ** 2  # from a mean square to the variance of the mean, and of a mean over groups
        variance = variance + (centred**2).mean(1) / scale
        drawn_variance = drawn_variance + (square - mean**2) / scale
    error = np.sqrt(variance)
    same = error <= ROUNDING * np.abs(values).max(1)
    ratios = np.abs(shift) / np.maximum(np.sqrt(np.maximum(drawn_variance, 0)), np.where(same, 1.0, FLOOR * error)[:, None])
    place = round(LEVEL * (RESAMPLES + 1)) - 1
    return np.where(same, np.inf, np.partition(ratios, place)[:, place] * error)


def wins(scores: np.ndarray, against: np.ndarray) -> np.ndarray:
    """1 where `scores` are higher than those of the same prompts and noise in `against`, 1/2 where they are equal, else 0."""
    return (scores > against) + 0.5 * (scores == against)


def _parts(values: np.ndarray, groups: Sequence[str] | None) -> list[np.ndarray]:
    if groups is None:
        return [values]
    labels = np.array(groups)
    return [np.ascontiguousarray(values[:, labels == label]) for label in dict.fromkeys(groups)]


def _draw_sums(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw as many prompts as `values` (rows, n) has, with replacement, and add them up, RESAMPLES times: (rows, RESAMPLES)."""
    n, sums = values.shape[1], []
    for start in range(0, RESAMPLES, max(1, CHUNK // n)):
        number = min(RESAMPLES - start, max(1, CHUNK // n))
        drawn = generator.integers(n, size=(number, n)) + n * np.arange(number)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=number * n).reshape(number, n).astype(float)
        sums.append(values @ counts.T)
    return np.concatenate(sums, axis=1)
