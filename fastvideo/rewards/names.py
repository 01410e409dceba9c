"""Rewards by the names that the command line has for them, and their loaders, which are imported once they are asked for.

A loader is called as `load(path, device, **options)`, where `path` is what the user wrote after "=" (None if nothing), and returns a
reward: `reward(media, rows) -> (B,) tensor`, higher is better. A loader's parameters after the first two, with defaults, are options that
the user may give: `def load(path, device, *, fps: float = 2.0)` takes `NAME=PATH,fps=4`.
    media: float32 in [-1, 1], images (B, 3, H, W) or clips (B, 3, frames, H, W), on `device`.
    rows: B dicts, one a sample, with "prompt" and whatever further fields the prompt file had.
A reward that can't score every prompt has an attribute `check_rows(rows)`, which raises UserError; it is called once, on all rows.
"""

import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvideo.errors import UserError
from fastvideo.rewards.plugins import load_function

REWARDS: dict[str, str | Callable] = {  # name -> loader, or MODULE:LOADER
    "shapes": "shapes.rewards:load_shapes",
    "shapes_strict": "shapes.rewards:load_shapes_strict",
    "aesthetic": "shapes.rewards:load_aesthetic",
    "motion": "shapes.rewards:load_motion",
    "visual": "shapes.rewards:load_visual",
    "fidelity": "shapes.rewards:load_fidelity",
    "clip": "fastvideo.rewards.clip:load_clip",
    "hpsv2": "fastvideo.rewards.hpsv2:load_hpsv2",
    "pickscore": "fastvideo.rewards.pickscore:load_pickscore",
    "ocr": "fastvideo.rewards.ocr:load_ocr",
    "videoalign.vq": "fastvideo.rewards.videoalign:load_videoalign_vq",
    "videoalign.mq": "fastvideo.rewards.videoalign:load_videoalign_mq",
    "videoalign.ta": "fastvideo.rewards.videoalign:load_videoalign_ta",
    "geneval": "fastvideo.rewards.geneval:load_geneval",
    "http": "fastvideo.rewards.http:load_http",
}
FORM = "NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]"
WORDS = re.compile(r"(?P<name>[^=@,]+)(=(?P<path>.*?))?(?P<options>(,\w+=[^,@]*)*)(@(?P<threshold>[^@/]+))?")  # of FORM


@dataclass(frozen=True)
class RewardSpec:
    """One `[FILE.py:]NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]` from the command line. file: of a user's own reward."""

    name: str
    path: str | None = None
    threshold: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    file: str | None = None


def split_file(text: str) -> tuple[str | None, str]:
    """`"my rewards/light.py:brightness@0.3"` -> `("my rewards/light.py", "brightness@0.3")`; a reward of the library has no file.

    No file is read: this is for who looks at the arguments of a run.
    """
    parts = re.fullmatch(r"(.+?\.py):(.+)", text)
    name = re.match(r"([\w.]+)[=@,]", text)
    return (parts[1], parts[2]) if parts and not (name and _entry(name[1])) else (None, text)


def metric_name(text: str) -> str:
    """What the reward that `text` asks for is called in metrics."""
    return re.split("[=@,]", split_file(text)[1])[0]


def parse_rewards(texts: Sequence[str]) -> list[RewardSpec]:
    """`["clip=shapes/models/clip@0.3"]` -> `[RewardSpec("clip", "shapes/models/clip", 0.3)]`.

    A path ends where options begin, or else at its last "@", unless a "/" comes after that. Users' own files are run.
    Raises UserError for an unknown or repeated name, an empty path, an unknown option, a number that is none, and as `load_function` does.
    """
    if not texts:
        raise UserError("--rewards needs at least one reward")
    specs = []
    for text in texts:
        file, words = split_file(text)
        match = WORDS.fullmatch(words)
        name = metric_name(text)
        if not file and not _entry(name):
            known = [other for other in REWARDS if other.startswith(f"{name}.")] or REWARDS
            raise UserError(
                f"--rewards: unknown reward {text!r}; known names are {', '.join(known)}, written as {FORM}, "
                "where your own are FILE.py:FUNCTION in place of NAME"
            )
        if match is None:
            raise UserError(f"--rewards: {text!r} is not of the form {FORM}: something is empty in it, or stands twice")
        kind, dot, label = name.partition(".") if file else name.rpartition(".")
        if dot and name not in REWARDS and not re.fullmatch("[A-Za-z0-9_]+", label):
            raise UserError(f"--rewards: the label {label!r} in {text!r} must have letters, digits and _ alone, as {kind}.LABEL")
        if file and kind in {known.partition(".")[0] for known in REWARDS}:
            raise UserError(f"--rewards: {text!r} has the name of a reward of this library, {kind}: call the function otherwise")
        if match["path"] == "":
            raise UserError(f"--rewards: nothing stands after = in {text!r}, where the path should be")
        try:
            threshold = None if match["threshold"] is None else _finite(float(match["threshold"]))
        except ValueError:
            raise UserError(f"--rewards: the threshold {match['threshold']!r} in {text!r} is not a number") from None
        if name in [spec.name for spec in specs]:
            raise UserError(f"--rewards: {name!r} is given twice: labels tell them apart, as NAME.LABEL")
        options = _options(name, find_loader(name, file), match["options"], text)
        specs.append(RewardSpec(name, match["path"], threshold, options, file))
    return specs


def find_loader(name: str, file: str | None) -> Callable:
    """The loader of NAME or NAME.LABEL (with labels a reward can be given several times), of the user's `file` or of this library."""
    if file:
        return load_function(file, name.partition(".")[0])
    entry = _entry(name)
    if not isinstance(entry, str):
        return entry
    module, _, function = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UserError(f"--rewards: {name} cannot be imported: {error}") from error


def _entry(name: str) -> str | Callable | None:
    return REWARDS.get(name) or REWARDS.get(name.rpartition(".")[0])


def split_options(words: str, text: str) -> dict[str, str]:
    """`",fps=4,norm=0"` of `text` -> `{"fps": "4", "norm": "0"}`. Raises UserError for an option that stands twice."""
    options = {}
    for option, value in (word.split("=", 1) for word in words.split(",")[1:]):
        if option in options:
            raise UserError(f"--rewards: {text!r} gives the option {option!r} twice")
        options[option] = value
    return options


def _options(name: str, loader: Callable, words: str, text: str) -> dict[str, Any]:
    """`",fps=4"` -> `{"fps": 4.0}`, of the type of the default that the reward's loader has for it."""
    defaults, options = option_defaults(loader), {}
    for option, value in split_options(words, text).items():
        if option not in defaults:
            raise UserError(f"--rewards: {text!r} has an unknown option {option!r}; {name} knows {', '.join(defaults) or 'none'}")
        kind = type(defaults[option])
        try:
            options[option] = {"0": False, "1": True}[value] if kind is bool else _finite(kind(value))
        except KeyError:
            raise UserError(f"--rewards: the option {option!r} in {text!r} must be 0 or 1") from None
        except ValueError:
            raise UserError(f"--rewards: the option {option!r} in {text!r} is not a number") from None
    return options


def option_defaults(loader: Callable) -> dict[str, Any]:
    """The options that a reward's loader knows, by name, with their defaults."""
    return {parameter.name: parameter.default for parameter in list(inspect.signature(loader).parameters.values())[2:]}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def check_rewards(trained: tuple[str, ...], weights: tuple[float, ...], held_out: tuple[str, ...]) -> tuple[float, ...]:
    """The weights of `trained` rewards, 1 each if none are given. Raises UserError as `parse_rewards` does, and for a wrong number."""
    parse_rewards(trained)
    parse_rewards(trained + held_out)
    if weights and len(weights) != len(trained):
        raise UserError(f"--reward_weights has {len(weights)} numbers for {len(trained)} --rewards")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--reward_weights are {', '.join(map(str, weights))}, but must be finite")
    for text, weight in zip(trained, weights):
        if weight == 0:
            raise UserError(f"--reward_weights gives {text!r} 0: what is logged and never trained on belongs to --held_out_rewards")
    return weights or (1.0,) * len(trained)
