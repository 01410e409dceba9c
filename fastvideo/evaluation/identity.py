"""What the scores of a model depend on, by contents and not by where they lie: weights, prompts, rewards."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvideo.embeddings.fingerprint import content_digest, encoder_fingerprint
from fastvideo.models.families.family import Family
from fastvideo.rewards import parse_rewards


def model_identity(model: Path, family: Family, export: Path | None) -> dict[str, Any]:
    """Checksums of the parts of a model's folder, the network that of a run's `export` if one is given. Large files are read once."""
    network = family.network_folder
    parts = tuple(part for part in family.parts("evaluation") if part != network or export is None)
    if export is None:
        return encoder_fingerprint(model, parts)
    return encoder_fingerprint(model, parts) | encoder_fingerprint(export, (network,))


def rows_identity(rows: Sequence[dict]) -> str:
    """Of prompts with all their fields, in their order, and with what their images hold, wherever those are."""
    known = [row | {"image": content_digest(Path(row["image"]))} if "image" in row else row for row in rows]
    return "sha256:" + hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def rewards_identity(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Of each its options, and the contents of its path and Python file, or what the user wrote where it is no file. texts: as written."""

    def contents(path: str | None) -> str | None:
        return content_digest(Path(path)) if path and Path(path).exists() else path

    return [vars(spec) | {"path": contents(spec.path), "file": contents(spec.file)} for spec in parse_rewards(texts)]
