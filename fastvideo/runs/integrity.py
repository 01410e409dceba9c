"""Which checkpoints of a run are whole, and which one the same command goes on from."""

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastvideo.errors import UserError
from fastvideo.files import crc32

STATE_TYPES = {"iteration": int, "updates": int, "dtype": str, "ema": bool, "files": dict, "parameters": dict}


def checksum(state: dict[str, Any]) -> int:
    """Of state.json: of all that is in it but the checksum."""
    return zlib.crc32(json.dumps({key: value for key, value in state.items() if key != "crc32"}).encode())


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """What is in state.json. UserError unless it and this process's share of the files are what was saved."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_bytes())
        if not isinstance(state, dict) or state.get("crc32") != checksum(state):
            raise UserError(f"{path} is damaged, or of an earlier version: it does not have its checksum")
        for key, kind in STATE_TYPES.items():
            if not isinstance(state.get(key), kind):
                raise TypeError(f"its {key} is no {kind.__name__}")
        for name, saved in sorted(state["files"].items())[rank::world_size]:
            if not re.fullmatch(r"shard_\d+\.safetensors", name):  # a path in place of a name could lead out of the folder
                raise ValueError(f"it names the file {name!r}")
            path = checkpoint / name
            if path.stat().st_size != saved["size"]:
                raise UserError(f"{path} has {path.stat().st_size} bytes, but {saved['size']} were saved: the checkpoint is damaged")
            if crc32(path) != saved["crc32"]:
                raise UserError(f"{path} is damaged: it does not have the checksum that was saved")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return state


def latest(folder: Path) -> Path | None:
    """The checkpoint under `folder` that `latest` names, or the newest one where a kill came before `latest` was written; None without.

    Raises UserError where `latest` names none, or one that is gone.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return max(folder.glob("iteration_*"), default=None)
    name = pointer.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"iteration_\d+", name):
        raise UserError(f"{pointer} is damaged: it holds {name[:60]!r} and not the name of a checkpoint; {way_back(folder)}")
    if not (folder / name / "state.json").exists():
        raise UserError(f"{pointer} names {name}, which is not there or has no state.json; {way_back(folder, name)}")
    return folder / name


def way_back(folder: Path, damaged: str | None = None) -> str:
    """What to do: the newest checkpoint that is whole, of those before the one named `damaged`."""
    for checkpoint in sorted(folder.glob("iteration_*"), reverse=True):
        with suppress(UserError):
            if damaged is None or checkpoint.name < damaged:
                verify(checkpoint)
                return f"to go on from the newest whole checkpoint before, write {checkpoint.name} into {folder / 'latest'}"
    return "there is no whole checkpoint before it: begin anew in another --output_dir"


@contextmanager
def naming_the_last(output_dir: Path) -> Iterator[None]:
    """UserError that is raised inside also says which checkpoint the same command will go on from."""
    try:
        yield
    except UserError as error:
        newest = latest(output_dir / "checkpoints")
        raise UserError(f"{error}; {f'the last whole checkpoint is {newest.name}' if newest else 'there is no checkpoint yet'}") from error
