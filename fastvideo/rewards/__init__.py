"""Rewards: `load_rewards` makes those that the command line names (names.py has the table), `score` calls them, `preflight.py` tries them.

One file for each, imported when it is asked for, or a user's own (plugins.py): from media and prompt rows to one number a sample.
Nothing of training may live here, and nothing of the shapes world but the names of its rewards.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence

import torch

from fastvideo.errors import UserError
from fastvideo.rewards.isolation import told, undisturbed
from fastvideo.rewards.names import REWARDS, RewardSpec, check_rewards, find_loader, parse_rewards

__all__ = ["REWARDS", "Reward", "RewardSpec", "check_rewards", "load_rewards", "parse_rewards", "score"]

Reward = Callable[[torch.Tensor, list[dict]], torch.Tensor]


def load_rewards(specs: list[RewardSpec], device: torch.device, rows: Sequence[dict] = ()) -> dict[str, Reward]:
    """Load each reward onto `device`, with its threshold applied: 1 above it, else 0 (the paper's binary reward).

    rows: all that will be scored. Raises UserError if a reward can't be loaded or can't score one of them, as far as it can know.
    """
    rewards = {}
    for spec in specs:
        try:
            with undisturbed():
                reward = find_loader(spec.name, spec.file)(spec.path, device, **spec.options)
                if hasattr(reward, "check_rows"):
                    reward.check_rows(copy.deepcopy(list(rows)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {spec.name!r} cannot be loaded: {told(error)}") from error
        if not callable(reward):
            raise UserError(f"reward {spec.name!r} cannot be loaded: its loader returned a {type(reward).__name__}, not a function")
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
        return torch.where(values.isfinite(), (values > threshold).to(values.dtype), values).detach()  # a NaN stays one, to be reported

    return binary


def score(rewards: dict[str, Reward], media: torch.Tensor, rows: list[dict], with_gradient: bool = False) -> dict[str, torch.Tensor]:
    """Each reward's scores of a batch: name -> (B,) float32 on the CPU.

    media: (B, 3, H, W) or (B, 3, frames, H, W) in [-1, 1]. rows: B prompt rows. Rewards get copies, which they may change.
    with_gradient: gradients flow from the scores to media, which require one.
    Raises UserError where a reward raises, returns another shape than (B,), anything not finite, or no gradient that is asked for:
    nothing is replaced by a default.
    """
    scores, given = {}, media.clone()
    for name, reward in rewards.items():
        try:
            with undisturbed(), torch.set_grad_enabled(with_gradient):
                values = reward(given, [copy.deepcopy(row) for row in rows])
                kind = _unusable(values)
                if not kind:
                    values = values.float().cpu().clone()  # a reward may give the same tensor each time
                    values = values if with_gradient else values.detach()
        except UserError as error:
            raise UserError(f"reward {name!r} failed: {error}") from error
        except Exception as error:
            batch = f"a batch of {len(rows)} that begins with the prompt {rows[0]['prompt']!r}"
            raise UserError(f"reward {name!r} failed on {batch}: {told(error)}") from error
        if not isinstance(values, torch.Tensor):
            raise UserError(f"reward {name!r} returned a {type(values).__name__}; it must be a tensor of shape ({len(rows)},)")
        if kind:
            raise UserError(f"reward {name!r} returned a tensor {kind}; it must be dense and of real numbers")
        if values.shape != (len(rows),):
            raise UserError(f"reward {name!r} returned shape {tuple(values.shape)} for {len(rows)} samples; it must be ({len(rows)},)")
        for value, row in zip(values.tolist(), rows):
            if not math.isfinite(value):
                raise UserError(f"reward {name!r} is {value} for a sample of the prompt {row['prompt']!r}")
        if with_gradient and not values.requires_grad:
            raise UserError(
                f"reward {name!r} has no gradient to learn from: clip, hpsv2, pickscore and aesthetic have one, and your own in torch, "
                "without a threshold"
            )
        scores[name] = values
        if not _unchanged(given, media):  # else it stays the same tensor, by which rewards of one model share a forward pass
            given = media.clone()
    return scores


def _unusable(values: object) -> str:
    """What no scores can be, said of it; empty for a plain tensor of real numbers."""
    if not isinstance(values, torch.Tensor):
        return type(values).__name__
    if values.is_meta:
        return "without values (meta)"
    plain = values.layout == torch.strided and not (values.is_complex() or values.is_nested or values.is_quantized)
    return "" if plain else f"of {values.dtype}, {values.layout}"


def _unchanged(given: torch.Tensor, media: torch.Tensor) -> bool:
    kinds = [(tensor.dtype, tensor.device, tensor.requires_grad) for tensor in (given, media)]
    return kinds[0] == kinds[1] and torch.equal(given, media)
