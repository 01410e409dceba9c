"""Rewards of the shapes world, exact and without a model: does a picture show what its caption says, and does it suit a taste."""

from collections.abc import Callable

import numpy as np
import torch

from fastvideo.distributed import UserError
from shapes.checker import aesthetic, check
from shapes.world import parse

Reward = Callable[[torch.Tensor, list[dict]], torch.Tensor]


def load_shapes(path: str | None, device: torch.device) -> Reward:
    """How much of the caption is right (count, colours, shapes, both together, position), in [0, 1]: it tells near misses apart."""
    _takes_no_path("shapes", path)
    return lambda media, rows: _check(media, rows, "soft")


def load_shapes_strict(path: str | None, device: torch.device) -> Reward:
    """1 if count, colours, shapes and position are all as the caption says, else 0."""
    _takes_no_path("shapes_strict", path)
    return lambda media, rows: _check(media, rows, "strict")


def load_aesthetic(path: str | None, device: torch.device) -> Reward:
    """A taste that doesn't read the caption, in [0, 1]: large, vivid, centred objects, clean background; see `shapes.checker.aesthetic`."""
    _takes_no_path("aesthetic", path)
    return lambda media, rows: torch.from_numpy(aesthetic(_pixels(media)))


def _check(media: torch.Tensor, rows: list[dict], name: str) -> torch.Tensor:
    return torch.from_numpy(check(_pixels(media), [parse(row["prompt"]) for row in rows])[name])


def _pixels(media: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] on any device -> the same in [0, 1] as NumPy."""
    return (media.detach().float().cpu() / 2 + 0.5).clamp(0, 1).numpy()


def _takes_no_path(name: str, path: str | None) -> None:
    if path is not None:
        raise UserError(f"--rewards: {name} takes no path, but was given {name}={path}")
