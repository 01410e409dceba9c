"""Prompt-embedding caches: the text encoders run once, before training, which then reads a few rows at a time.

A cache is a folder. `shard-00002-of-00010.safetensors` stacks `shard_size` rows, each tensor key as (n, ...), and carries the rows, their
checksums and the fingerprint of the encoders in its own header, so that a killed run can be resumed. `index.json`, written last, says that
the cache is complete and what each shard must look like.
"""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from fastvideo.distributed import Ranks, UserError, on_main, together

INDEX_FORMAT = 1
INDEX_TYPES = {"format": int, "fingerprint": dict, "shard_size": int, "tensors": dict, "shards": list, "rows": list, "crc32": list}


@dataclass
class PromptReport:
    """What `read_prompts` saw, as line numbers counted from 1: of the rows it returned, of empty prompts, and of dropped duplicates."""

    lines: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)


def read_prompts(path: str | Path, identity: tuple[str, ...] = ("prompt",)) -> tuple[list[dict], PromptReport]:
    """Rows of a prompt file: `.txt`, one prompt a line, or `.jsonl`, one object a line with a "prompt" and any other fields, which are kept.

    Empty prompts are skipped. Rows with the same strings under all keys of `identity` are duplicates: the first is kept. Raises UserError for a
    file that is missing, not UTF-8 or without prompts, and for a line that is not an object with a string under each key of `identity`.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file {path} must end in .txt or .jsonl")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not splitlines(), which also splits at characters that prompts may hold
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from error
    if lines[-1] == "":  # what follows the last newline is no line
        lines.pop()

    rows, report, seen = [], PromptReport(), set()
    for number, line in enumerate(lines, start=1):
        row = {"prompt": line}
        if path.suffix == ".jsonl" and line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f'line {number} of {path} must be an object like {{"prompt": "..."}}, not {line.strip()[:60]}')
            for key in identity:
                if not isinstance(row.get(key), str):
                    raise UserError(f'line {number} of {path} must have a string under "{key}", not {row.get(key)!r}')
        row["prompt"] = row["prompt"].strip()
        key = tuple(row[name] for name in identity)
        if not row["prompt"]:
            report.empty.append(number)
        elif key in seen:
            report.duplicates.append(number)
        else:
            seen.add(key)
            rows.append(row)
            report.lines.append(number)
    if not rows:
        raise UserError(f"prompt file {path} holds no prompts ({len(lines)} lines, all empty)")
    return rows, report
