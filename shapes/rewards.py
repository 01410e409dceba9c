"""Rewards of the shapes world, exact and without a model: does a picture or clip show what its caption says, and is it well made."""

import numpy as np
import torch
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.rewards import Reward
from shapes import video_checker
from shapes.checker import check, taste
from shapes.video import parse_video
from shapes.world import SIZE, parse


def load_shapes(path: str | None, device: torch.device) -> Reward:
    """How much of the caption is right, in [0, 1]: it tells near misses apart.

    Of a picture: count, colours, shapes, both together, position. Of a clip: object and motion; see `shapes.video_checker.check_clips`.
    """
    _takes_no_path("shapes", path)
    return lambda media, rows: _check(media, rows, "soft")


def load_shapes_strict(path: str | None, device: torch.device) -> Reward:
    """1 if all is as the caption says, in a clip all the time, else 0."""
    _takes_no_path("shapes_strict", path)
    return lambda media, rows: _check(media, rows, "strict")


def load_aesthetic(path: str | None, device: torch.device) -> Reward:
    """A taste that doesn't read the caption, in [0, 1]: large, vivid, centred objects, clean background; see `shapes.checker.taste`.

    A clip has the mean of its frames. Gradients flow to media that require them.
    """
    _takes_no_path("aesthetic", path)

    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        frames = _unit_range(media if media.ndim == 4 else media.transpose(1, 2).flatten(0, 1))
        return taste(frames).view(len(rows), -1).mean(1)

    return reward


def load_motion(path: str | None, device: torch.device) -> Reward:
    """How smoothly and straight a clip's object moves as asked, at the asked speed, in [0, 1]; see `motion_quality`."""
    _takes_no_path("motion", path)
    return lambda media, rows: torch.from_numpy(video_checker.motion_quality(_clips("motion", media), _video_specs(rows)))


def load_visual(path: str | None, device: torch.device) -> Reward:
    """How well a clip is drawn, whatever it shows, in [0, 1]; see `visual_quality`."""
    _takes_no_path("visual", path)
    return lambda media, rows: torch.from_numpy(video_checker.visual_quality(_clips("visual", media)))


def load_fidelity(path: str | None, device: torch.device) -> Reward:
    """How well a clip keeps to the image it was made from, the file row["image"], in [0, 1]; see `shapes.video_checker.fidelity`."""
    _takes_no_path("fidelity", path)

    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        references = np.stack([_reference(row) for row in rows])
        return torch.from_numpy(video_checker.fidelity(_clips("fidelity", media), references))

    return reward


def _check(media: torch.Tensor, rows: list[dict], name: str) -> torch.Tensor:
    if media.ndim == 5 and media.shape[2] == 1:
        media = media[:, :, 0]  # a clip of one frame is a picture
    if media.ndim == 4:
        scores = check(_pixels(media), [parse(row["prompt"]) for row in rows])
    else:
        scores = video_checker.check_clips(_pixels(media), _video_specs(rows))
    return torch.from_numpy(scores[name])


def _video_specs(rows: list[dict]) -> list:
    return [parse_video(row["prompt"]) for row in rows]


def _reference(row: dict) -> np.ndarray:
    """The picture a row names: (3, SIZE, SIZE) in [0, 1]."""
    if "image" not in row:
        raise UserError(f'the prompt {row["prompt"]!r} has no "image" to compare with')
    try:
        with Image.open(row["image"]) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    except OSError as error:
        raise UserError(f"the image {row['image']} cannot be read: {error}") from error
    if pixels.shape != (SIZE, SIZE, 3):
        raise UserError(f"the image {row['image']} has {pixels.shape[1]} x {pixels.shape[0]} pixels, not {SIZE} x {SIZE}")
    return pixels.transpose(2, 0, 1)


def _clips(name: str, media: torch.Tensor) -> np.ndarray:
    """Clips (B, 3, frames, H, W) in [-1, 1] as `_pixels` gives them. Raises UserError for pictures."""
    if media.ndim == 4:
        raise UserError(f"{name} judges clips, batch x 3 x frames x height x width, not pictures of {' x '.join(map(str, media.shape))}")
    return _pixels(media)


def _pixels(media: torch.Tensor) -> np.ndarray:
    """Pictures or clips in [-1, 1] on any device -> the same in [0, 1] as NumPy."""
    return _unit_range(media.detach()).numpy()


def _unit_range(media: torch.Tensor) -> torch.Tensor:
    """[-1, 1] on any device -> [0, 1] on the CPU, float32."""
    return (media.float().cpu() / 2 + 0.5).clamp(0, 1)


def _takes_no_path(name: str, path: str | None) -> None:
    if path is not None:
        raise UserError(f"--rewards: {name} takes no path, but was given {name}={path}")
