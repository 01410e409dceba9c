"""How different the pictures of one prompt are: the mean distance of its pairs, whatever noise seeds they are of.

`diversity.pixels`: the root of the mean squared difference of two pictures' pixels, of which black is 0 and white 1, once each picture is
no larger than 32 pixels: of layout and colours, not of fine structure. `diversity.clip`: 1 - the cosine of their CLIP features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastvideo.rewards.clip import load_clip_folder
from fastvideo.rewards.open_clip import find_weights, load_open_clip

SIDE = 32  # pixels
FRAMES = 8  # of a clip, evenly spread
PREFIX = "diversity."
Features = Callable[[torch.Tensor], np.ndarray]


def frames_of(media: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W), or (B, 3, F, H, W), in [-1, 1] -> (B, frames, 3, H, W): one, or at most FRAMES of a clip."""
    if media.ndim == 4:
        return media[:, None]
    chosen = torch.linspace(0, media.shape[2] - 1, min(media.shape[2], FRAMES)).round().long()
    return media[:, :, chosen.to(media.device)].transpose(1, 2)


def pixels(media: torch.Tensor) -> np.ndarray:
    """(B, frames * 3 * h * w) of bytes; areas are averaged where a side is longer than SIDE."""
    frames = frames_of(media.float().clamp(-1, 1))
    height, width = frames.shape[-2:]
    factor = min(1, SIDE / max(height, width))
    size = [max(1, round(side * factor)) for side in (height, width)]
    small = F.interpolate(frames.flatten(0, 1), size, mode="area") if factor < 1 else frames.flatten(0, 1)
    return (small * 127.5 + 127.5).round().to(torch.uint8).reshape(len(media), -1).cpu().numpy()


def load_features(clip: Path | None, device: torch.device) -> dict[str, Features]:
    """By measure: those of pixels, and of CLIP if a folder is given."""
    of_clip = {f"{PREFIX}clip": _load_clip_features(clip, device)} if clip else {}
    return {f"{PREFIX}pixels": pixels} | of_clip


def _load_clip_features(path: Path, device: torch.device) -> Features:
    """CLIP's features of pictures, or the mean of a clip's frames', (B, length), of length 1. path: as the reward `clip` takes it."""
    weights = find_weights(str(path))
    model, _, prepare = load_open_clip("clip", weights) if weights else load_clip_folder("clip", str(path))
    model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(media: torch.Tensor) -> np.ndarray:
        frames = frames_of(media.to(device))
        found = model.get_image_features(pixel_values=prepare(frames.flatten(0, 1))).pooler_output.float()
        found = F.normalize(F.normalize(found, dim=-1).unflatten(0, frames.shape[:2]).mean(1), dim=-1)
        return found.half().cpu().numpy()

    return features


def mean_distance(features: Sequence[np.ndarray]) -> float:
    """Of all pairs of one prompt's pictures. features: two or more of one kind, (length,) each."""
    rows = np.stack(features).astype(float)
    is_pixels = features[0].dtype == np.uint8
    rows /= 255 if is_pixels else np.linalg.norm(rows, axis=1, keepdims=True)
    products = rows @ rows.T
    squares = np.maximum(np.add.outer(products.diagonal(), products.diagonal()) - 2 * products, 0)[np.triu_indices(len(rows), 1)]
    return float(np.mean(np.sqrt(squares / rows.shape[1]) if is_pixels else squares / 2))
