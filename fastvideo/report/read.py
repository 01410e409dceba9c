"""What run folders hold, as far as it is there: metrics, manifest, samples, evaluation."""

import json
import math
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastvideo.errors import UserError
from fastvideo.runs.tracking import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """One run. rows: metrics of each iteration, at least one. manifest: {} if there is none. number: from 0, by which it is drawn."""

    number: int
    name: str
    folder: Path
    rows: list[dict[str, float]]
    manifest: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        return self.manifest.get("arguments", {})

    def metrics(self) -> list[str]:
        """Metrics that any iteration has, in their order."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key != "iteration"))

    def series(self, *keys: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations that have the metric, under one of its names, and its values, float64; not all need be finite."""
        pairs = [(row["iteration"], row[key]) for row in self.rows for key in keys if key in row]
        iterations, values = np.array(pairs, float).reshape(-1, 2).T
        return iterations, values

    def samples(self) -> list[tuple[int, Path]]:
        """Iteration and grid, first and last ones; one pair if there is one grid."""
        found = sorted((number, path) for path in self.folder.glob("samples/*.png") if (number := _number(path, "iteration")) is not None)
        return [found[0], found[-1]][: len(found)] if found else []

    def evaluation(self) -> tuple[str, list[Path], dict[str, list[Path]]]:
        """What evaluate.py wrote into RUN/evaluation: its tables in Markdown, its grids, and of each model the clips."""
        folder, clips = self.folder / "evaluation", {}
        found = {path: number for path in folder.glob("samples*/*.mp4") if (number := _number(path)) is not None}
        for path in sorted(found, key=lambda path: (path.parent, found[path])):
            clips.setdefault(path.stem.rpartition("_")[0], []).append(path)
        return "\n".join(lines_of(folder / "results.md")), sorted(folder.glob("samples*.png")), clips


def _number(path: Path, name: str = "") -> int | None:
    """Of a file that is called `NAME_NUMBER`; None if it is called otherwise."""
    before, _, digits = path.stem.rpartition("_")
    return int(digits) if digits.isdecimal() and before and name in ("", before) else None


def read_runs(folders: tuple[Path, ...]) -> list[RunFiles]:
    """In the order given, under the shortest names that tell them apart. Raises UserError for what is no run, or is given twice."""
    whole = [Path(os.path.abspath(folder)) for folder in folders]
    for i, folder in enumerate(whole):
        if folder in whole[:i]:
            raise UserError(f"the run {folders[i]} is given twice")
    most = max(len(folder.parts) for folder in whole)
    parts = next(n for n in range(1, most + 1) if len({folder.parts[-n:] for folder in whole}) == len(whole))
    return [_read(i, str(Path(*whole[i].parts[-parts:])), folder) for i, folder in enumerate(folders)]


def _read(number: int, name: str, folder: Path) -> RunFiles:
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    try:
        rows = read_metrics(folder)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no metrics.jsonl: it is no run folder, or its run has not ended an iteration yet") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/metrics.jsonl cannot be read: {error}") from error
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        manifest = {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/manifest.json cannot be read: {error}") from error
    if not rows:
        raise UserError(f"{folder}/metrics.jsonl has no iteration yet")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("arguments", {}), dict):
        raise UserError(f"{folder}/manifest.json is not the manifest of a run")
    return RunFiles(number, name, folder, rows, manifest)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and those before it, `window` in all at most, without those that are not finite; NaN where none is."""
    padded = np.concatenate([np.full(window - 1, math.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    finite = np.isfinite(windows)
    counts = finite.sum(1)
    return np.divide(np.where(finite, windows, 0).sum(1), counts, out=np.full(len(values), math.nan), where=counts > 0)


def lines_of(path: Path) -> list[str]:
    """Labels that stand beside a grid; none if the file is gone."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []


def markdown_blocks(text: str) -> list[tuple[str, Any]]:
    """("heading", text), ("text", text) and ("table", rows of cells) of Markdown as evaluate.py writes it."""
    blocks: list[tuple[str, Any]] = []
    for before, line in pairwise(["", *text.splitlines()]):
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not before.startswith("|"):
                blocks.append(("table", []))
            if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
                blocks[-1][1].append(cells)
        elif line.strip():
            blocks.append(("heading", line.lstrip("# ")) if line.startswith("#") else ("text", line))
    return blocks
