"""Prompt files: one prompt a line, or one JSON object a line."""

import json
import os
import re
import unicodedata
from pathlib import Path

import torch

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.errors import UserError
from fastvideo.parallel.distributed import keyed_generator, together

# Control characters that a prompt may not have: in a text file all but tabs, in JSON all but tabs and line breaks.
CONTROL = {".txt": re.compile(r"[\x00-\x08\n-\x1f\x7f-\x9f]"), ".jsonl": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")}
NOT_UTF_8 = dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "UTF-16 or UTF-32: save it as UTF-8") | {b"\x1f\x8b": "compressed: gunzip it"}


def read_prompts(path: str | Path, identity: tuple[str, ...] = ("prompt",)) -> tuple[list[dict], dict[str, list[int]]]:
    """Read a prompt file: `.txt`, a prompt a line, or `.jsonl`, an object a line with a "prompt" and any other fields, which are kept.

    An "image" is a path relative to the prompt file's folder, and is made absolute. Rows with images are told apart by
    `identity=("prompt", "image")`.
    Returns the rows and a report of line numbers, counted from 1: "lines" of the rows, "empty" prompts (skipped), "duplicates" (dropped),
    which have the same strings as an earlier row under every key of `identity`. Raises UserError for a file that is missing, not UTF-8 or
    without prompts, for a control character in a prompt other than a tab (in JSON also line breaks), and for a JSON line that is not an
    object with a string under each key of `identity`, or whose "image" is not a file.
    """
    path = Path(path)
    if path.suffix not in CONTROL:
        raise UserError(f"prompt file {path} must end in .txt or .jsonl")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror}") from error
    if data[:2] in NOT_UTF_8:
        raise UserError(f"prompt file {path} is {NOT_UTF_8[data[:2]]}")
    try:
        lines = data.decode().split("\n")  # splitlines() would also split at characters that prompts may hold
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompt file {path} is not UTF-8: byte {error.start} is {data[error.start]:#x}, in line {line}") from error

    rows, seen, report = [], set(), {"lines": [], "empty": [], "duplicates": []}
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        line = line.lstrip("\ufeff")  # Windows begins files with it, which may have been joined
        row = {"prompt": line}
        if path.suffix == ".jsonl" and line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # fails on half a character, such as a lone "\ud83d"
            except (ValueError, RecursionError) as error:
                hint = ", and a list must become an object a line" if line.startswith("[") else ""
                raise UserError(f"line {number} of {path} is not valid JSON{hint}: {error}") from error
            for key in identity:
                if not isinstance(row, dict) or not isinstance(row.get(key), str):
                    raise UserError(f'line {number} of {path} must be an object with a string as "{key}", not {line.strip()[:60]}')
        row["prompt"] = row["prompt"].strip()
        if control := CONTROL[path.suffix].search(row["prompt"]):
            raise UserError(f"line {number} of {path} has the control character U+{ord(control[0]):04X} in its prompt")
        if "image" in row:
            row["image"] = _absolute_image(row["image"], path, number)
        key = tuple(row.get(name) for name in identity)
        visible = any(unicodedata.category(character) not in ("Zs", "Zl", "Zp", "Cf") for character in row["prompt"])
        kind = "empty" if not visible else "duplicates" if key in seen else "lines"
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


def shuffled_prompts(num_prompts: int, prompts_per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts of one iteration: every epoch goes once through all prompts in an order of its own."""
    places = range((iteration - 1) * prompts_per_iteration, iteration * prompts_per_iteration)
    epochs = {place // num_prompts for place in places}
    orders = {epoch: torch.randperm(num_prompts, generator=keyed_generator(seed, "prompt_order", epoch)) for epoch in epochs}
    return [orders[place // num_prompts][place % num_prompts].item() for place in places]


def by_text_length(prompts: dict[int, int], cache: EmbeddingCache) -> dict[int, int]:
    """Collective. Prompts, place -> index in `cache`, from the shortest text to the longest if the cache has them padded, else as given.

    So a batch seldom has texts of several lengths, which a network would have to pad.
    """
    if "prompt_attention_mask" not in cache.tensors:
        return prompts
    lengths = together(lambda: cache.get(list(prompts.values())))["prompt_attention_mask"].sum(1).tolist()
    return {place: prompts[place] for _, place in sorted(zip(lengths, prompts))}
