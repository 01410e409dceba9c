"""CLIP score: cosine similarity of a picture and its prompt, by any CLIPModel folder in transformers' format."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastvideo.distributed import UserError

RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json has them


def load_clip(path: str | None, device: torch.device) -> Callable[[torch.Tensor, list[dict]], torch.Tensor]:
    """The reward: cosine in [-1, 1], (B,). `path`: a folder with a CLIPModel, its tokenizer and its preprocessor_config.json."""
    model, tokenizer, config = load_clip_folder(path, device)
    length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        if media.ndim != 4:
            raise UserError(f"clip scores pictures (B, 3, H, W), not clips of shape {tuple(media.shape)}")
        prompts = [row["prompt"] for row in rows]
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(device)
        text = model.get_text_features(**tokens).pooler_output
        image = model.get_image_features(pixel_values=preprocess(media.to(device), config)).pooler_output
        return F.cosine_similarity(image, text)

    return reward


def load_clip_folder(path: str | None, device: torch.device) -> tuple:
    """Model (float32, frozen, in evaluation mode), tokenizer and the preprocessing's settings of a CLIP folder."""
    if path is None:
        raise UserError("--rewards: clip needs a folder with a CLIP model, written as clip=FOLDER")
    if not Path(path).is_dir():
        raise UserError(f"--rewards: clip={path}: there is no such folder")
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # transformers would make an empty tokenizer
        raise UserError(f"--rewards: clip={path} has no tokenizer.json")
    from transformers import AutoTokenizer, CLIPModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, report = CLIPModel.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers raises all sorts: OSError, KeyError, SafetensorError, ...
        raise UserError(f"--rewards: clip={path} can't be read as a CLIP folder: {type(error).__name__}: {error}") from error
    if report["missing_keys"]:
        raise UserError(
            f"--rewards: clip={path} lacks {len(report['missing_keys'])} of CLIP's weights, such as {sorted(report['missing_keys'])[0]}"
        )
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise UserError(
            f"--rewards: clip={path}: its tokenizer has {len(tokenizer)} tokens, its model only {model.config.text_config.vocab_size}"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer, config


def preprocess(images: torch.Tensor, config: dict) -> torch.Tensor:
    """What CLIP's image processor does with saved pictures: (B, 3, H, W) in [-1, 1] -> (B, 3, h, w), resized, cropped and normalised.

    Values are rounded to 8 bits, so a picture scores the same here and once it is saved. config: what preprocessor_config.json says.
    """
    images = _to_8_bits(images.float() * 127.5 + 127.5)
    if config.get("do_resize", True):
        images = _resize(images, config)
    if config.get("do_center_crop", True):
        images = _center_crop(images, config["crop_size"])
    images = images / 255
    if config.get("do_normalize", True):
        mean, std = (torch.tensor(config[key], device=images.device).view(3, 1, 1) for key in ("image_mean", "image_std"))
        images = (images - mean) / std
    return images


def _to_8_bits(images: torch.Tensor) -> torch.Tensor:
    return images.round().clamp(0, 255)


def _resize(images: torch.Tensor, config: dict) -> torch.Tensor:
    """To size["shortest_edge"] keeping the aspect ratio, or to size["height"] x size["width"]; an integer is a shortest edge."""
    size, (height, width) = config["size"], images.shape[2:]
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        new_height, new_width = (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
    else:
        new_height, new_width = size["height"], size["width"]
    mode = RESAMPLING[config.get("resample", 3)]
    for target in ((height, new_width), (new_height, new_width)):  # as PIL: first the rows, then the columns, each rounded
        if target != images.shape[2:]:
            images = _to_8_bits(F.interpolate(images, target, mode=mode, antialias=mode != "nearest-exact"))
    return images


def _center_crop(images: torch.Tensor, size: dict | int) -> torch.Tensor:
    """The middle of the images; where they are smaller than `size`, zeros are added around them."""
    crop_height, crop_width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    height, width = images.shape[2:]
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    # negative padding crops
    return F.pad(images, (-left, left - width + crop_width, -top, top - height + crop_height))
