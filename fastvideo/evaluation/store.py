"""Scores on disk as they are made, so that a stopped evaluation goes on, and another one need not sample the same model again."""

import hashlib
import json
import os
import uuid
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastvideo.errors import UserError
from fastvideo.files import whole_file, writing
from fastvideo.media import save_video, to_pil

FPS = 8  # of clips as files


class Job(NamedTuple):
    """One picture or clip: its noise seed, the place of its prompt, and which it is of those with both. Its noise is drawn by these."""

    seed: int
    prompt: int
    k: int


@dataclass
class Record:
    """A job's scores by reward, and its features by measure of diversity, each (length,)."""

    scores: dict[str, float]
    features: dict[str, np.ndarray]


@dataclass
class Store:
    """What one model has made of one benchmark's prompts: lines of JSON, a file for each process that writes, and pictures on request.

    folder: its name is a digest of `key`, all that the scores depend on but the jobs, which stands in key.json. new: made by this process.
    """

    folder: Path
    new: dict[Job, Record] = field(default_factory=dict)
    file: Path | None = None

    def media(self, job: Job, clips: bool) -> Path:
        return self.folder / "media" / f"prompt{job.prompt:05d}_seed{job.seed}_{job.k}.{'mp4' if clips else 'png'}"

    def read(self) -> dict[Job, Record]:
        """All that is there, without a last line that was being written when a process ended."""
        records = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_bytes().split(b"\n")[:-1]:
                try:
                    row = json.loads(line)
                    features = {name: _unpack(*packed) for name, packed in row["features"].items()}
                    records[Job(*row["job"])] = Record(row["scores"], features)
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(f"{file} is damaged: delete it, and what it holds is sampled again") from error
        return records

    def add(self, jobs: Sequence[Job], scores: dict[str, torch.Tensor], features: dict[str, np.ndarray]) -> None:
        """Of a batch; on disk when this returns. scores: (B,) each. features: (B, length) each."""
        self.file = self.file or self.folder / f"{uuid.uuid4().hex}.jsonl"
        lines = []
        for i, job in enumerate(jobs):
            record = Record({name: values[i].item() for name, values in scores.items()}, {name: part[i] for name, part in features.items()})
            packed = {name: _pack(values) for name, values in record.features.items()}
            lines.append(json.dumps({"job": job, "scores": record.scores, "features": packed}) + "\n")
            self.new[job] = record
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())

    def add_media(self, job: Job, media: torch.Tensor) -> None:
        """A picture (3, H, W) or a clip (3, F, H, W) in [-1, 1]."""
        path = self.media(job, media.ndim == 4)
        if media.ndim == 4:
            return save_video(path, media, FPS)
        with whole_file(path) as temporary:
            to_pil(media[None])[0].save(temporary, format="PNG")


def open_store(root: Path, title: str, key: dict[str, Any]) -> tuple[Path, str]:
    """The folder under `root` for what depends on `key`, made if it is not there; and, in words, why another of its `title` is not it.

    title: what the user calls it, on which nothing depends.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = root / digest[:24]
    if (folder / "key.json").is_file():
        return folder, ""
    changed = ""
    for other in sorted(root.glob("*/key.json"), key=lambda path: path.stat().st_mtime):
        try:
            before = json.loads(other.read_bytes())
            if before["title"] == title:
                names = [name for name in key if before["key"].get(name) != json.loads(json.dumps(key[name]))]
                changed = f"{other.parent} has it with another {' and '.join(names)}"
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{other} is damaged: delete its folder") from error
    with whole_file(folder / "key.json") as temporary:
        temporary.write_text(json.dumps({"title": title, "key": key}, indent=2))
    return folder, changed


def _pack(values: np.ndarray) -> tuple[str, str]:
    return values.dtype.str, b64encode(values.tobytes()).decode()


def _unpack(kind: str, text: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), np.dtype(kind))
