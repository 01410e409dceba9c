"""Rewards: `REWARDS` maps a name to a loader; a loaded reward maps media and prompt rows to one number a sample.

To add one, write a file beside this one with a loader and enter it in `REWARDS` (docs/rewards.md has an example).

A loader is called as `load(path, device)`, where `path` is what the user wrote after "=" (None if nothing), and returns a reward:
`reward(media, rows) -> (B,) tensor`, higher is better. Keyword-only parameters of a loader, with defaults, are options that the user may
give: `def load(path, device, *, fps: float = 2.0)` takes `NAME=PATH,fps=4`.
    media: float32 in [-1, 1], images (B, 3, H, W) or clips (B, 3, frames, H, W), on `device`.
    rows: B dicts, one a sample, with "prompt" and whatever further fields the prompt file had.
A reward that can't score every prompt has an attribute `check_rows(rows)`, which raises UserError; it is called once, on all rows.
"""

import copy
import functools
import inspect
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvideo.errors import UserError
from fastvideo.rewards.clip import load_clip
from fastvideo.rewards.hpsv2 import load_hpsv2
from fastvideo.rewards.http import load_http
from fastvideo.rewards.isolation import undisturbed
from fastvideo.rewards.ocr import load_ocr
from fastvideo.rewards.pickscore import load_pickscore
from fastvideo.rewards.shapes import load_aesthetic, load_fidelity, load_motion, load_shapes, load_shapes_strict, load_visual
from fastvideo.rewards.videoalign import load_videoalign_mq, load_videoalign_ta, load_videoalign_vq

Reward = Callable[[torch.Tensor, list[dict]], torch.Tensor]

REWARDS: dict[str, Callable[..., Reward]] = {
    "shapes": load_shapes,
    "shapes_strict": load_shapes_strict,
    "aesthetic": load_aesthetic,
    "motion": load_motion,
    "visual": load_visual,
    "fidelity": load_fidelity,
    "clip": load_clip,
    "hpsv2": load_hpsv2,
    "pickscore": load_pickscore,
    "ocr": load_ocr,
    "videoalign.vq": load_videoalign_vq,
    "videoalign.mq": load_videoalign_mq,
    "videoalign.ta": load_videoalign_ta,
    "http": load_http,
}


@dataclass(frozen=True)
class RewardSpec:
    """One `NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]` from the command line."""

    name: str
    path: str | None = None
    threshold: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_rewards(texts: Sequence[str]) -> list[RewardSpec]:
    """`["clip=shapes/models/clip@0.3"]` -> `[RewardSpec("clip", "shapes/models/clip", 0.3)]`.

    A path ends where options begin, or else at its last "@", unless a "/" comes after that.
    Raises UserError for an unknown or repeated name, an empty path, an unknown option, or a number that is none.
    """
    if not texts:
        raise UserError("--rewards needs at least one reward")
    specs = []
    for text in texts:
        match = re.fullmatch(r"(?P<name>[^=@,]+)(=(?P<path>.*?))?(?P<options>(,\w+=[^,@]*)*)(@(?P<threshold>[^@/]+))?", text)
        if match is None or _loader(match["name"]) is None:
            form = "NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]"
            name = re.split("[=@,]", text)[0]
            if name in REWARDS:
                raise UserError(f"--rewards: {text!r} is not of the form {form}: something is empty in it, or stands twice")
            known = [other for other in REWARDS if other.startswith(f"{name}.")] or REWARDS
            raise UserError(f"--rewards: unknown reward {text!r}; known names are {', '.join(known)}, written as {form}")
        kind, _, label = match["name"].rpartition(".")
        if match["name"] not in REWARDS and not re.fullmatch("[A-Za-z0-9_]+", label):
            raise UserError(f"--rewards: the label {label!r} in {text!r} must have letters, digits and _ alone, as {kind}.LABEL")
        if match["path"] == "":
            raise UserError(f"--rewards: nothing stands after = in {text!r}, where the path should be")
        try:
            threshold = None if match["threshold"] is None else _finite(float(match["threshold"]))
        except ValueError:
            raise UserError(f"--rewards: the threshold {match['threshold']!r} in {text!r} is not a number") from None
        if match["name"] in [spec.name for spec in specs]:
            raise UserError(f"--rewards: {match['name']!r} is given twice")
        specs.append(RewardSpec(match["name"], match["path"], threshold, _options(match["name"], match["options"], text)))
    return specs


def _loader(name: str) -> Callable[..., Reward] | None:
    """Of NAME or NAME.LABEL: with labels a reward can be given several times."""
    return REWARDS.get(name) or REWARDS.get(name.rpartition(".")[0])


def _options(name: str, words: str, text: str) -> dict[str, Any]:
    """`",fps=4"` -> `{"fps": 4.0}`, of the type of the default that the reward's loader has for it."""
    parameters = inspect.signature(_loader(name)).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}
    options = {}
    for option, value in (word.split("=", 1) for word in words.split(",")[1:]):
        if option in options:
            raise UserError(f"--rewards: {text!r} gives the option {option!r} twice")
        if option not in defaults:
            raise UserError(f"--rewards: {text!r} has an unknown option {option!r}; {name} knows {', '.join(defaults) or 'none'}")
        try:
            options[option] = _finite(type(defaults[option])(value))
        except ValueError:
            raise UserError(f"--rewards: the option {option!r} in {text!r} is not a number") from None
    return options


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


def load_rewards(specs: list[RewardSpec], device: torch.device, rows: Sequence[dict] = ()) -> dict[str, Reward]:
    """Load each reward onto `device`, with its threshold applied: 1 above it, else 0 (the paper's binary reward).

    rows: all that will be scored. Raises UserError if a reward can't be loaded or can't score one of them, as far as it can know.
    """
    rewards = {}
    for spec in specs:
        try:
            with undisturbed():
                reward = _loader(spec.name)(spec.path, device, **spec.options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {spec.name!r} cannot be loaded: {type(error).__name__}: {error} ({_place(error)})") from error
        if hasattr(reward, "check_rows"):
            reward.check_rows(rows)
        rewards[spec.name] = _with_threshold(reward, spec.threshold)
    return rewards


def _with_threshold(reward: Reward, threshold: float | None) -> Reward:
    if threshold is None:
        return reward

    @functools.wraps(reward)
    def binary(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        values = reward(media, rows)
        if not isinstance(values, torch.Tensor):
            return values  # which `score` refuses
        return torch.where(values.isfinite(), (values > threshold).to(values.dtype), values)  # a NaN stays one, to be reported

    return binary


def score(rewards: dict[str, Reward], media: torch.Tensor, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Each reward's scores of a batch: name -> (B,) float32 on the CPU.

    media: (B, 3, H, W) or (B, 3, frames, H, W) in [-1, 1]. rows: B prompt rows. Rewards get copies, which they may change.
    Raises UserError where a reward raises, returns another shape than (B,) or anything not finite: nothing is replaced by a default.
    """
    scores, given = {}, media.clone()
    for name, reward in rewards.items():
        try:
            with undisturbed(), torch.no_grad():
                values = reward(given, [copy.deepcopy(row) for row in rows])
        except UserError as error:
            raise UserError(f"reward {name!r} failed: {error}") from error
        except Exception as error:
            batch = f"a batch of {len(rows)} that begins with the prompt {rows[0]['prompt']!r}"
            what = f"{type(error).__name__}: {error} ({_place(error)})"
            raise UserError(f"reward {name!r} failed on {batch}: {what}") from error
        if not isinstance(values, torch.Tensor):
            raise UserError(f"reward {name!r} returned a {type(values).__name__}; it must be a tensor of shape ({len(rows)},)")
        if values.is_meta or values.is_complex() or values.layout != torch.strided:
            kind = "without values (meta)" if values.is_meta else f"of {values.dtype}, {values.layout}"
            raise UserError(f"reward {name!r} returned a tensor {kind}; it must be dense and of real numbers")
        values = values.detach().float().cpu()
        if values.shape != (len(rows),):
            raise UserError(f"reward {name!r} returned shape {tuple(values.shape)} for {len(rows)} samples; it must be ({len(rows)},)")
        for value, row in zip(values.tolist(), rows):
            if not torch.isfinite(torch.tensor(value)):
                raise UserError(f"reward {name!r} is {value} for a sample of the prompt {row['prompt']!r}")
        scores[name] = values
        if not torch.equal(given, media):  # else it stays the same tensor, by which rewards of one model share a forward pass
            given = media.clone()
    return scores


def _place(error: Exception) -> str:
    """Where a reward failed: the last line of its own file, or of one beside it, rather than of a library that it called."""
    frames, torch_folder = traceback.extract_tb(error.__traceback__), Path(torch.__file__).parent  # torch.no_grad wraps rewards
    own = next((frame for frame in frames if frame.filename != __file__ and torch_folder not in Path(frame.filename).parents), frames[-1])
    last = [frame for frame in frames if Path(frame.filename).parent == Path(own.filename).parent][-1]
    return f"{last.filename}, line {last.lineno}"
