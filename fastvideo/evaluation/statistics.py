"""What may be said of scores: how far a mean may be from the truth, and who wins.

Pictures of one prompt are not independent of each other, so each prompt is one observation, the mean over its pictures, and prompts are
what the bootstrap draws. An interval is for the mean over all prompts of which these are a sample, at any noise.
"""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 9999  # one less than a multiple of 20, so that a resample stands exactly at 95 %
CHUNK = 2**22  # prompts drawn at once, for memory's sake
SAME = 1e-12  # of the variance: below is rounding


def means(values: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """values: (prompts, columns). Returns (columns,): the mean over prompts or, where `groups` names that of each, of the groups' means."""
    return np.mean([part.mean(0) for part in _parts(values, groups)], axis=0)


def margins(values: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0) -> np.ndarray:
    """What is added to `means` and taken from them for their 95 % intervals: (columns,), infinite where nothing can be said.

    A symmetric studentized bootstrap over prompts: the width in standard errors within which 95 % of resamples' means are, each in its own
    standard errors. Percentile intervals are too short for few prompts: of 16 they hold the truth in 91 % of cases, and these in 95 %.
    Groups are drawn each for itself, as a benchmark has so many prompts of each. Infinite: for one prompt, for a group of one, and where
    more than 5 % of resamples are without spread, as less than three prompts differ from the rest.
    """
    generator = np.random.default_rng(seed)
    parts = _parts(values, groups)
    if min(map(len, parts)) < 2:
        return np.full(values.shape[1], np.inf)
    shift, variance, drawn_variance = 0.0, 0.0, 0.0
    for part in parts:
        centred = part - part.mean(0)
        drawn = _draw_sums(np.concatenate((centred, centred**2), axis=1), generator) / len(part)
        mean, square = np.split(drawn, 2, axis=1)
        shift = shift + mean / len(parts)
        scale = (len(part) - 1) * len(parts) ** 2  # from a mean square to the variance of the mean, and of a mean over groups
        variance = variance + (centred**2).mean(0) / scale
        drawn_variance = drawn_variance + (square - mean**2) / scale
    spread = drawn_variance > SAME * variance
    errors = np.full(spread.shape, np.inf)
    np.divide(np.abs(shift), np.sqrt(np.maximum(drawn_variance, 0)), out=errors, where=spread)
    place = round(LEVEL * (RESAMPLES + 1)) - 1
    widths = np.partition(errors, place, axis=0)[place]
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(widths), widths * np.sqrt(variance), np.inf)


def wins(scores: np.ndarray, against: np.ndarray) -> np.ndarray:
    """1 where `scores` are higher than those of the same prompts and noise in `against`, 1/2 where they are equal, else 0."""
    return (scores > against) + 0.5 * (scores == against)


def _parts(values: np.ndarray, groups: Sequence[str] | None) -> list[np.ndarray]:
    if groups is None:
        return [values]
    labels = np.array(groups)
    return [values[labels == label] for label in dict.fromkeys(groups)]


def _draw_sums(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw as many rows of `values` (n, columns) as it has, with replacement, and add them up; RESAMPLES times: (RESAMPLES, columns)."""
    n, sums = len(values), []
    for start in range(0, RESAMPLES, max(1, CHUNK // n)):
        number = min(RESAMPLES - start, max(1, CHUNK // n))
        drawn = generator.integers(n, size=(number, n)) + n * np.arange(number)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=number * n).reshape(number, n)
        sums.append(counts.astype(float) @ values)
    return np.concatenate(sums)
