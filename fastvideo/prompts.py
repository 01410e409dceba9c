"""Prompt files: one prompt a line, or one JSON object a line."""

import json
import os
from pathlib import Path

import torch

from fastvideo.distributed import UserError, keyed_generator


def read_prompts(path: str | Path, identity: tuple[str, ...] = ("prompt",)) -> tuple[list[dict], dict[str, list[int]]]:
    """Read a prompt file: `.txt`, a prompt a line, or `.jsonl`, an object a line with a "prompt" and any other fields, which are kept.

    An "image" is a path relative to the prompt file's folder, and is made absolute. Rows with images are told apart by
    `identity=("prompt", "image")`.
    Returns the rows and a report of line numbers, counted from 1: "lines" of the rows, "empty" prompts (skipped), "duplicates" (dropped),
    which have the same strings as an earlier row under every key of `identity`. Raises UserError for a file that is missing, not UTF-8 or
    without prompts, and for a JSON line that is not an object with a string under each key of `identity`, or whose "image" is not a file.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file {path} must end in .txt or .jsonl")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # splitlines() would also split at characters that prompts may hold
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from error

    rows, seen, report = [], set(), {"lines": [], "empty": [], "duplicates": []}
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        row = {"prompt": line}
        if path.suffix == ".jsonl" and line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # fails on half a character, such as a lone "\ud83d"
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {path} is not valid JSON: {error}") from error
            for key in identity:
                if not isinstance(row, dict) or not isinstance(row.get(key), str):
                    raise UserError(f'line {number} of {path} must be an object with a string as "{key}", not {line.strip()[:60]}')
        row["prompt"] = row["prompt"].strip()
        if "image" in row:
            row["image"] = _absolute_image(row["image"], path, number)
        key = tuple(row.get(name) for name in identity)
        kind = "empty" if not row["prompt"] else "duplicates" if key in seen else "lines"
        report[kind].append(number)
        if kind == "lines":
            seen.add(key)
            rows.append(row)
    if not rows:
        raise UserError(f"prompt file {path} holds no prompts, only {len(report['empty'])} empty lines")
    return rows, report


def _absolute_image(image: object, path: Path, number: int) -> str:
    """The absolute path of the image that a prompt file names in its line `number`."""
    if not isinstance(image, str):
        raise UserError(f'line {number} of {path} must have a string as "image", not {json.dumps(image, ensure_ascii=False)[:60]}')
    absolute = os.path.abspath(path.parent / image)
    if not os.path.isfile(absolute):
        raise UserError(f"line {number} of {path} names the image {image!r}, but there is no file {absolute}")
    return absolute


def draw_prompts(num_prompts: int, prompts_per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts of one iteration: every epoch goes once through all prompts in an order of its own."""
    places = range((iteration - 1) * prompts_per_iteration, iteration * prompts_per_iteration)
    epochs = {place // num_prompts for place in places}
    orders = {epoch: torch.randperm(num_prompts, generator=keyed_generator(seed, "prompt_order", epoch)) for epoch in epochs}
    return [orders[place // num_prompts][place % num_prompts].item() for place in places]
