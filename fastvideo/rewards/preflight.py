"""Before training: does each reward work on media of the run's own shape?"""

import inspect
import time

import torch
from PIL import Image, ImageDraw, ImageFont

from fastvideo.errors import UserError, launch_rank
from fastvideo.parallel.devices import peak_memory_gib
from fastvideo.rewards import Reward, score

# Rewards that must prefer a plain drawing to noise, and of which prompt: who cannot has no trained weights, or the wrong preprocessing.
CIRCLE, SIGN = "a red circle", 'a sign that says "OPEN"'
KNOWN = {
    **dict.fromkeys(("shapes", "shapes_strict", "aesthetic", "visual", "clip", "hpsv2", "pickscore"), CIRCLE),
    "ocr": SIGN,
}
OF_MOTION = ("shapes", "shapes_strict")  # ask how the object of a clip moves, and the drawing does not
SMALL = ("shapes", "shapes_strict", "aesthetic", "motion", "visual")  # take nothing but 32 x 32
UNCHECKED = {"fidelity", "geneval", "http"}  # by `preflight_alone`: more than a prompt is needed, or another server, which checks itself


def preflight(rewards: dict[str, Reward], media: torch.Tensor, row: dict) -> None:
    """Score `media` (B, 3, H, W) or (B, 3, F, H, W) in [-1, 1], as they leave the decoder, for the prompt of `row`; say what it costs.

    Raises UserError for a reward that fails, is not finite, has the wrong shape (as `score` does), changes when asked again, or, where it
    can be known, does not tell a plain drawing from noise.
    """
    for name, reward in rewards.items():
        memory = peak_memory_gib()
        first = score({name: reward}, media, [row] * len(media))[name]
        start = time.perf_counter()
        again = score({name: reward}, media.clone(), [row] * len(media))[name]
        seconds = (time.perf_counter() - start) / len(media)
        if not torch.allclose(first, again, rtol=1e-3, atol=1e-4):
            raise UserError(f"preflight: reward {name!r} gave {first.tolist()} and then {again.tolist()} for the same samples")
        told = ""
        plain = inspect.unwrap(reward)  # without a threshold, below which all are equal
        served = getattr(plain, "served", "")  # of `http`: which of a server's rewards it was
        kind = kind_of(served or name)
        if kind in KNOWN and not (kind in OF_MOTION and media.ndim == 5):
            pair = torch.stack([drawing(KNOWN[kind], media), noise(media)])
            drawn, random = score({name: plain}, pair, [{"prompt": KNOWN[kind]}] * 2)[name].tolist()
            if drawn < random or (drawn == random and not served):  # the server may have a threshold
                raise UserError(
                    f"preflight: reward {name!r} gives a drawing of {KNOWN[kind]!r} {drawn:.4g} and noise {random:.4g}: its weights, "
                    "or what is done to pictures before, are wrong"
                )
            told = f"; {drawn:.4g} for a drawing of {KNOWN[kind]!r}, {random:.4g} for noise"
        if launch_rank() == 0:
            print(f"preflight: {name}: {seconds:.3f} s a sample, {peak_memory_gib() - memory:+.1f} GiB{told}", flush=True)


def preflight_alone(rewards: dict[str, Reward], device: torch.device) -> None:
    """`preflight` where no run says what is scored: on a plain picture of 256 x 256 or, for a reward that fails on it, a clip of 9 frames.

    Raises UserError as `preflight` does. Rewards in UNCHECKED are left out.
    """
    for name, reward in rewards.items():
        kind = kind_of(name)
        if kind in UNCHECKED:
            print(f"preflight: {name}: not checked before it is asked", flush=True)
            continue
        side = 32 if kind in SMALL else 256
        picture, clip = torch.zeros(1, 3, side, side, device=device), torch.zeros(1, 3, 9, side, side, device=device)
        tries = [(picture, {"prompt": KNOWN.get(kind, CIRCLE)}), (clip, {"prompt": f"{CIRCLE} moving right"})]
        errors = []
        for media, row in tries:
            try:
                score({name: reward}, media, [row])
            except UserError as error:
                errors.append(str(error))
            else:
                preflight({name: reward}, media, row)
                break
        else:
            hint = "a reward that takes neither has to be entered in fastvideo.rewards.preflight.UNCHECKED"
            raise UserError(f"preflight, on a picture and a clip of {side} x {side}: {'; and '.join(errors)}; {hint}")


def kind_of(name: str) -> str:
    """The name of a reward that has one in KNOWN or elsewhere, without a label."""
    return name if name in {*KNOWN, *SMALL, *UNCHECKED} else name.rpartition(".")[0]


def drawing(prompt: str, like: torch.Tensor) -> torch.Tensor:
    """A picture of CIRCLE or SIGN, or a clip that stands still, shaped as a sample of `like`: (3, H, W) or (3, F, H, W) in [-1, 1]."""
    height, width = like.shape[-2:]
    image = Image.new("RGB", (4 * width, 4 * height), "white")  # drawn larger, for smooth edges
    if prompt == CIRCLE:
        radius = 1.25 * min(height, width)
        ImageDraw.Draw(image).circle((2 * width, 2 * height), radius, fill=(255, 0, 0))
    else:
        ImageDraw.Draw(image).text((2 * width, 2 * height), "OPEN", "black", ImageFont.load_default(1.2 * width), anchor="mm")
    pixels = torch.frombuffer(bytearray(image.resize((width, height), Image.Resampling.BOX).tobytes()), dtype=torch.uint8)
    picture = pixels.view(height, width, 3).permute(2, 0, 1).to(like) / 127.5 - 1
    return picture if like.ndim == 4 else picture[:, None].expand(like.shape[1:])


def noise(like: torch.Tensor) -> torch.Tensor:
    """Of the shape of a sample of `like`, uniform in [-1, 1]."""
    return torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(0)).to(like) * 2 - 1
