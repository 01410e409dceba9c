"""CLIP score: cosine similarity of a picture and its prompt, by a CLIPModel folder in transformers' format or by open_clip's files."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastvideo.errors import UserError
from fastvideo.models.tokenizers import load_tokenizer
from fastvideo.parallel.distributed import compute_dtype
from fastvideo.rewards import Reward
from fastvideo.rewards.clip_pictures import check_prepare, normalise, resize, saved, shortest_edge
from fastvideo.rewards.open_clip import find_weights, load_open_clip

RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json has them


def load_clip(path: str | None, device: torch.device, *, dtype: str = "float32") -> Reward:
    """The reward: cosine in [-1, 1], (B,).

    path: a folder with a CLIPModel, its tokenizer and its preprocessor_config.json; or open_clip's, with open_clip_config.json and
        open_clip_pytorch_model.bin or open_clip_model.safetensors (read as such where both are); or one such file, beside its config.
    dtype: what the network computes in: "float32", "bfloat16", or "auto", which is bfloat16 on a GPU.
    """
    if path is None:
        raise UserError("--rewards: clip needs a folder with a CLIP model, written as clip=FOLDER")
    weights = find_weights(path)
    parts = load_open_clip("clip", weights) if weights else load_clip_folder("clip", path)
    return cosine_reward("clip", *parts, device, dtype)


def cosine_reward(
    name: str, model: torch.nn.Module, tokenize: Callable, prepare: Callable, device: torch.device, dtype: str, scale: float = 1.0
) -> Reward:
    """The reward by a CLIPModel: `scale` times the cosine of picture and prompt, (B,) float32, with a gradient to the picture if that
    requires one. `model` is moved, cast and frozen.

    tokenize: prompts -> keyword arguments of `get_text_features`. prepare: (B, 3, H, W) in [-1, 1] -> pixel values.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--rewards: {name} has dtype={dtype}; it can be auto, float32 or bfloat16")
    model.to(device, compute_dtype(dtype, device)).eval().requires_grad_(False)

    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        if media.ndim != 4:
            raise UserError(f"{name} scores pictures (B, 3, H, W), not clips of shape {tuple(media.shape)}")
        tokens = {key: value.to(device) for key, value in tokenize([row["prompt"] for row in rows]).items()}
        text = model.get_text_features(**tokens).pooler_output
        image = model.get_image_features(pixel_values=prepare(media.to(device))).pooler_output
        return scale * F.cosine_similarity(image.float(), text.float())

    return reward


def load_clip_folder(name: str, path: str, processor: str | None = None) -> tuple[torch.nn.Module, Callable, Callable]:
    """Model (float32, on the CPU), tokenize and prepare, as `cosine_reward` takes them, of a folder in transformers' format.

    processor: the folder of the tokenizer and of preprocessor_config.json, "" for `path`; None if the user cannot say.
    """
    given = f"--rewards: {name}={path}"
    if not Path(path).is_dir():
        raise UserError(f"{given}: there is no such folder")
    hint = "" if processor is None else ": processor=FOLDER says where the tokenizer is"
    processor = processor or path
    if not (Path(path) / "config.json").is_file():  # transformers would take some CLIP's for it
        raise UserError(f"{given}: {path} has no config.json")
    if not any((Path(processor) / file).is_file() for file in ("tokenizer.json", "vocab.json")):  # transformers would make an empty one
        raise UserError(f"{given}: {processor} has no tokenizer.json{hint}")
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(processor, local_files_only=True)
        model, report = CLIPModel.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers raises all sorts: OSError, KeyError, SafetensorError, ...
        raise UserError(f"{given} can't be read as a CLIP folder: {type(error).__name__}: {error}") from error
    for kind, keys in (("lacks", report["missing_keys"]), ("has, but CLIPModel has not,", report["unexpected_keys"])):
        if keys:
            raise UserError(f"{given} {kind} {len(keys)} weights, such as {sorted(keys)[0]}")
    tokenizer = load_tokenizer(Path(processor), CLIPTokenizer, given)
    text = model.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise UserError(f"{given}: the tokenizer of {processor} has {len(tokenizer)} tokens, the model only {text.vocab_size}")

    def tokenize(prompts: list[str]) -> dict[str, torch.Tensor]:
        return tokenizer(prompts, padding="max_length", max_length=text.max_position_embeddings, truncation=True, return_tensors="pt")

    def prepare(media: torch.Tensor) -> torch.Tensor:
        return preprocess(media, config)

    check_prepare(f"{given}: preprocessor_config.json in {processor}", prepare, model)
    return model, tokenize, prepare


def preprocess(images: torch.Tensor, config: dict) -> torch.Tensor:
    """What CLIP's image processor does with saved pictures: (B, 3, H, W) in [-1, 1] -> (B, 3, h, w), resized, cropped and normalised.

    Values are rounded to 8 bits, so a picture scores the same here and once it is saved. config: what preprocessor_config.json says.
    """
    images = saved(images)
    if config.get("do_resize", True):
        images = resize(images, _target_size(images, config["size"]), RESAMPLING[config.get("resample", 3)])
    if config.get("do_center_crop", True):
        images = _center_crop(images, config["crop_size"])
    images = images / 255
    if config.get("do_normalize", True):
        images = normalise(images, config["image_mean"], config["image_std"])
    return images


def _target_size(images: torch.Tensor, size: dict | int) -> tuple[int, int]:
    """size["shortest_edge"] keeps the aspect ratio, size["height"] and ["width"] do not; an integer is a shortest edge."""
    if isinstance(size, int):
        size = {"shortest_edge": size}
    return shortest_edge(images, size["shortest_edge"]) if "shortest_edge" in size else (size["height"], size["width"])


def _center_crop(images: torch.Tensor, size: dict | int) -> torch.Tensor:
    """The middle of the images; where they are smaller than `size`, zeros are added around them."""
    crop_height, crop_width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    height, width = images.shape[2:]
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    # negative padding crops
    return F.pad(images, (-left, left - width + crop_width, -top, top - height + crop_height))
