"""What is done to pictures before a CLIP network sees them, by the steps of which the rewards that have one make theirs."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from fastvideo.errors import UserError


def saved(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> whole numbers in [0, 255], as a file has them, float32."""
    return _to_8_bits(images.float() * 127.5 + 127.5)


class _Round(torch.autograd.Function):
    """To whole numbers, with the gradient of the number before, for who learns from a reward's gradient."""

    @staticmethod
    def forward(ctx, images: torch.Tensor) -> torch.Tensor:
        return images.round()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _to_8_bits(images: torch.Tensor) -> torch.Tensor:
    return _Round.apply(images).clamp(0, 255)


def shortest_edge(images: torch.Tensor, edge: int) -> tuple[int, int]:
    """Height and width of the pictures once their shorter side is `edge`, as CLIP's processors round them."""
    height, width = images.shape[2:]
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def resize(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Pictures of whole numbers in [0, 255], resized as PIL does: first the rows, then the columns, each rounded.

    (Pillow 13 begins with the columns of some tall pictures, which is one level off in up to a quarter of the values.)
    """
    for target in ((images.shape[2], size[1]), size):
        if target != images.shape[2:]:
            images = _to_8_bits(F.interpolate(images, target, mode=mode, antialias=mode != "nearest-exact"))
    return images


def pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, h, w) -> (B, 3, size, size), with zeros around the images; an odd row or column goes to the end."""
    height, width = (size - edge for edge in images.shape[2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalise(images: torch.Tensor, mean: Sequence[float] | float, std: Sequence[float] | float) -> torch.Tensor:
    """(B, 3, H, W), by a number for each channel, or one for all."""
    mean, std = (torch.tensor(values, device=images.device).reshape(-1, 1, 1) for values in (mean, std))
    return (images - mean) / std


def check_prepare(where: str, prepare: Callable, model: torch.nn.Module) -> None:
    """Raise UserError, which begins with `where` the settings are, unless `prepare` makes of a picture what the CLIPModel takes."""
    size = model.config.vision_config.image_size
    try:
        pixels = prepare(torch.zeros(1, 3, 40, 60))
        if pixels.shape[1:] != (3, size, size) or not pixels.isfinite().all():
            raise ValueError(f"pictures become {' x '.join(map(str, pixels.shape[2:]))}, or not finite, for a network of {size} x {size}")
    except Exception as error:  # of wrong values come all sorts
        raise UserError(f"{where} can't be followed: {type(error).__name__}: {error}") from error
