"""Trained models by the names that the command line has for them, and the sampling settings of the runs that made them."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.errors import UserError
from fastvideo.flags import check_numbers
from fastvideo.models.families.family import Family
from fastvideo.models.model_folder import check_weights

BASE = "base"


@dataclass(frozen=True)
class Checkpoint:
    """A run's export folder, and what it is called in all that is written."""

    name: str
    export: Path

    @property
    def run(self) -> Path:
        return self.export.parent

    @property
    def manifest(self) -> Path:
        return self.run / "manifest.json"


def parse_checkpoints(texts: Sequence[str]) -> list[Checkpoint]:
    """`["trained=runs/a/export", "runs/b/export"]` -> `[Checkpoint("trained", ...), Checkpoint("b", ...)]`.

    A name stands before the first "=" that no "/" precedes. Without one it is the run folder's, with a number if that is taken.
    Raises UserError for a name that is taken, that no file can have, or with nothing behind it.
    """
    given = [re.fullmatch(r"(?:(?P<name>[^/=]*)=)?(?P<path>.*)", text, re.DOTALL) for text in texts]
    taken, checkpoints = {BASE, *(match["name"] for match in given if match["name"])}, []
    for text, match in zip(texts, given):
        name = match["name"]
        if not match["path"] or (name is not None and not re.fullmatch(r"\w[\w.-]*", name)):
            raise UserError(f"--checkpoints: {text!r} is not of the form [NAME=]RUN/export, with a NAME of letters, digits, _ . -")
        if name in [BASE, *(checkpoint.name for checkpoint in checkpoints)]:
            raise UserError(
                f"--checkpoints: the name {name!r} is given twice" if name != BASE else f"--checkpoints: {BASE!r} is --model's name"
            )
        path = Path(match["path"])
        if name is None:
            folder = re.sub(r"[^\w.-]", "_", path.resolve().parent.name) or "run"
            name = next(one for one in (folder, *(f"{folder}_{i}" for i in range(2, len(texts) + 3))) if one not in taken)
            taken.add(name)
        checkpoints.append(Checkpoint(name, path))
    return checkpoints


def check_exports(checkpoints: Sequence[Checkpoint], family: Family) -> None:
    """Raises UserError for an export without the network of the family, or whose weights are not whole; none of them are read."""
    for checkpoint in checkpoints:
        network = checkpoint.export / family.network_folder
        if not network.is_dir():
            raise UserError(f"--checkpoints: there is no folder {network}")
        check_weights(network, family.parts("evaluation")[family.network_folder], "--checkpoints")


def settings_of_runs(
    checkpoints: Sequence[Checkpoint], pipeline: str, known: Collection[str], given: Collection[str], rules: dict[str, str]
) -> dict[str, Any]:
    """The sampling settings with which the runs were trained, by the name of their flag; none without checkpoints.

    pipeline: its class. known: the settings that it has. given: the flags that the user gives, in which runs may differ. rules: as
    `check_numbers` takes them.
    Raises UserError for a folder that is no export of a run, a damaged manifest, another model's run, and runs that do not agree.
    """
    found: dict[str, Any] = {}
    for checkpoint in checkpoints:
        settings = _settings_of_run(checkpoint, rules)
        if settings.keys() != set(known):
            raise UserError(f"--checkpoints {checkpoint.export} is not of a {pipeline} as --model is: see {checkpoint.manifest}")
        for name in settings.keys() - set(given):
            if found and found[name] != settings[name]:
                raise UserError(
                    f"--checkpoints {checkpoints[0].export} and {checkpoint.export} were trained with {name} {found[name]} and "
                    f"{settings[name]}: give --{name}, for all of them"
                )
        found = found or settings
    return found


def _settings_of_run(checkpoint: Checkpoint, rules: dict[str, str]) -> dict[str, Any]:
    manifest = checkpoint.manifest
    if not manifest.is_file():
        raise UserError(f"--checkpoints {checkpoint.export} must be the export folder inside a run folder: there is no {manifest}")
    try:
        settings = dict(json.loads(manifest.read_bytes())["sampling"])
        check_numbers({name: settings.get(name) for names in rules.values() for name in names.split()}, rules)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError) as error:
        raise UserError(f"{manifest} is damaged: {type(error).__name__}: {error}") from error
    return settings
