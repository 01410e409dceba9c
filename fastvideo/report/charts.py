"""Curves as SVG that fills its place, with labels that keep their size, and the numbers that the page's script shows under the pointer."""

import math
from html import escape

import numpy as np

from fastvideo.report.read import RunFiles, moving_average

MOST_POINTS = 600  # of a curve: longer ones show the lowest and the highest value of each of half as many stretches
SIDE = 1000  # of the drawing, in its own units
COLOURS, DASHES = 8, 4  # as page.css has them, c0 to c7, and d1 to d3 beside solid lines: so many runs at most are told apart


def colour(number: int) -> str:
    """The classes by which a run's curve, bar and key are drawn: its colour, and its dashes where the colours are taken."""
    return f"c{number % COLOURS}" + (f" d{number // COLOURS}" if number >= COLOURS else "")


def chart(keys: tuple[str, ...], title: str, note: str, runs: list[RunFiles], window: int) -> tuple[str, dict]:
    """A figure of one metric, and what the pointer shows: {"first", "last", "curves": [{"run", "x", "value", "mean"}]}.

    keys: names of the metric; a run has one of them. Its values are drawn thin, and their moving average thick. What is not finite is left
    out and counted.
    """
    series = {run.number: found for run in runs if (found := run.series(*keys))[0].size}
    values = np.concatenate([values for _, values in series.values()])
    x_range = 1.0, max(2.0, *(float(iterations.max()) for iterations, _ in series.values()))
    low, high = _limits(values[np.isfinite(values)])
    paths, curves = [], []
    for number, (iterations, values) in series.items():
        average, kept = moving_average(values, window), _kept(values)
        places = [SIDE * (iterations[kept] - x_range[0]) / (x_range[1] - x_range[0])]
        places += [SIDE * (high - line[kept]) / (high - low) for line in (values, average)]
        paths.append(f'<path class="thin c{number % COLOURS}" d="{_path(places[0], places[1])}"/>')
        paths.append(f'<path class="{colour(number)}" d="{_path(places[0], places[2])}"/>')
        shown = {"value": values[kept], "mean": average[kept]}
        curves.append({"run": number, "x": iterations[kept].astype(int).tolist()} | {name: _rounded(line) for name, line in shown.items()})
    across = {at: 100 * (high - at) / (high - low) for at in _ticks(low, high)}
    along = {at: 100 * (at - x_range[0]) / (x_range[1] - x_range[0]) for at in _ticks(*x_range) if at == int(at)}
    grid = "".join(f'<path class="rule" d="M0 {10 * place:.0f}h{SIDE}"/>' for place in across.values())
    labels = "".join(f'<span class="y" style="top:{place:.2f}%">{at:.6g}</span>' for at, place in across.items())
    labels += "".join(f'<span class="x" style="left:{place:.2f}%">{at:.0f}</span>' for at, place in along.items())
    missing = int(sum((~np.isfinite(values)).sum() for _, values in series.values()))
    note = f"{note} {missing} values are not finite, and left out.".strip() if missing else note
    figure = (
        f'<figure class="chart"><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>'
        f'<div class="plot" data-key="{escape(keys[0])}">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">{grid}{"".join(paths)}</svg>'
        f'{labels}<div class="cursor"></div><div class="tip"></div></div></figure>'
    )
    return figure, {"first": x_range[0], "last": x_range[1], "curves": curves}


def _limits(finite: np.ndarray) -> tuple[float, float]:
    """Of the vertical axis: with some room, but none below 0 if nothing is negative."""
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(at) for at in MaxNLocator(4).tick_values(low, high) if low <= at <= high]


def _kept(values: np.ndarray) -> np.ndarray:
    """Indices of the points that are drawn."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    chosen = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        finite = part[np.isfinite(values[part])]
        chosen |= {part[0]} if not finite.size else {finite[values[finite].argmin()], finite[values[finite].argmax()]}
    return np.array(sorted(chosen))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Lines through the finite points; one that stands alone is a dot."""
    parts: list[list[str]] = [[]]
    for across, down in zip(x, y):
        if math.isfinite(down):
            parts[-1].append(f"{across:.0f} {down:.0f}")
        elif parts[-1]:
            parts.append([])
    return "".join(f"M{'L'.join(part)}" + ("h0" if len(part) == 1 else "") for part in parts if part)


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
