"""Checks of numbers that users give as flags."""

from collections.abc import Mapping
from typing import Any

from fastvideo.errors import UserError

SMALLEST, LARGEST = 1e-12, 1e6  # beyond, arithmetic breaks down or memory runs out, and nobody means it
BOUNDS = {
    "at least 2": lambda value: value >= 2,
    "above 0": lambda value: value > 0,
    "1 or more": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
}


def check_numbers(values: Mapping[str, Any], rules: Mapping[str, str]) -> None:
    """Raise UserError for the first of `values` (by flag name) that breaks its rule, or is no number to compute with; None is no value.

    rules: a key of `BOUNDS` -> the names of the flags that it is for, separated by blanks.
    """
    for bound, flags in rules.items():
        for flag in flags.split():
            value = values[flag]
            if value is None:
                continue
            if not isinstance(value, int | float) or not BOUNDS[bound](value):
                raise UserError(f"--{flag} is {str(value)[:60]}, but must be {bound}")
            if value and not SMALLEST <= abs(value) <= LARGEST:
                raise UserError(f"--{flag} is {str(value)[:60]}, but must be {bound}, from {SMALLEST:g} to {LARGEST:g}")


def check_size(values: Mapping[str, Any], pixels: int, frames: int | None = None) -> None:
    """Raise UserError unless the flags height and width are multiples of `pixels`, and num_frames one more than a multiple of `frames`."""
    height, width, model = values["height"], values["width"], values["model"]
    if height % pixels or width % pixels:
        raise UserError(f"--height {height} and --width {width} must be multiples of {pixels} for {model}")
    if frames and (values["num_frames"] - 1) % frames:
        raise UserError(f"--num_frames {values['num_frames']} must be one more than a multiple of {frames} for {model}")
