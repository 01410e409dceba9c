"""HPS-v2: how people would like a picture for its prompt, by the checkpoints of v2.0 and v2.1. The package hpsv2 is not needed.

Xiaoshi Wu et al.: Human Preference Score v2, https://arxiv.org/abs/2306.09341.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from fastvideo.errors import UserError
from fastvideo.rewards import Reward
from fastvideo.rewards.clip import cosine_reward
from fastvideo.rewards.clip_pictures import normalise, pad, saved
from fastvideo.rewards.open_clip import MEAN, STD, build_clip, load_tokenizer, read_checkpoint


def load_hpsv2(path: str | None, device: torch.device, *, dtype: str = "float32") -> Reward:
    """The reward: cosine in [-1, 1], (B,); about 0.2 to 0.4 of real pictures.

    path: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt. dtype: as of `load_clip`.
    """
    if path is None:
        raise UserError("--rewards: hpsv2 needs its checkpoint, written as hpsv2=HPS_v2.1_compressed.pt")
    if not Path(path).is_file():
        what = "that is a folder; name the file in it, such as HPS_v2.1_compressed.pt" if Path(path).is_dir() else "there is no such file"
        raise UserError(f"--rewards: hpsv2={path}: {what}")
    weights = read_checkpoint("hpsv2", Path(path)).get("state_dict")
    if not isinstance(weights, dict):
        raise UserError(f'--rewards: hpsv2={path} has no "state_dict", as HPS_v2.1_compressed.pt has: it is another kind of checkpoint')
    network = _network(path, weights)
    model = build_clip("hpsv2", Path(path), weights, network)
    size = network["vision_cfg"]["image_size"]
    return cosine_reward("hpsv2", model, load_tokenizer(), lambda media: preprocess(media, size), device, dtype)


def preprocess(images: torch.Tensor, size: int) -> torch.Tensor:
    """What hpsv2 does with saved pictures: (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), the longer side resized, black around it.

    Unlike CLIP's and open_clip's: no cropping, and no rounding after the resizing.
    """
    images = saved(images) / 255
    scale = size / max(images.shape[2:])
    if scale != 1:
        target = tuple(round(edge * scale) for edge in images.shape[2:])
        images = F.interpolate(images, target, mode="bicubic", antialias=True)
    return normalise(pad(images, size), MEAN, STD)


def _network(path: str, weights: dict[str, torch.Tensor]) -> dict:
    """open_clip's ViT-H-14, of the width and depth that the weights have: tests use it narrower and shallower."""
    try:
        vision_width, _, patch_size, _ = weights["visual.conv1.weight"].shape
        positions, _ = weights["visual.positional_embedding"].shape
        embed_dim, text_width = weights["visual.proj"].shape[1], weights["text_projection"].shape[0]
    except KeyError as error:
        raise UserError(f"--rewards: hpsv2={path} is no HPS-v2 checkpoint: it lacks {error}") from error
    except (ValueError, AttributeError, IndexError) as error:  # no tensor, or one of other dimensions
        raise UserError(f"--rewards: hpsv2={path} is no HPS-v2 checkpoint: {error}") from error
    if patch_size != 14 or vision_width % 80 or text_width % 64:
        raise UserError(
            f"--rewards: hpsv2={path} is no HPS-v2 checkpoint, which is a ViT-H-14 with heads of 80 (text: 64) and patches of 14: "
            f"its widths are {vision_width} and {text_width}, its patches {patch_size}"
        )
    layers = len([key for key in weights if key.startswith("visual.") and key.endswith(".ln_1.weight")])
    text_layers = len([key for key in weights if key.startswith("transformer.") and key.endswith(".ln_1.weight")])
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": round((positions - 1) ** 0.5) * patch_size,
            "layers": layers,
            "width": vision_width,
            "head_width": 80,
            "patch_size": 14,
        },
        "text_cfg": {"layers": text_layers, "width": text_width, "heads": text_width // 64},
    }
