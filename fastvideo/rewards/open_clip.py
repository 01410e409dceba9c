"""Files of open_clip (its vision transformers) as transformers' CLIPModel, with open_clip's tokenizer and preprocessing."""

import gzip
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvideo.errors import UserError
from fastvideo.rewards.clip_pictures import check_prepare, normalise, pad, resize, saved, shortest_edge

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MERGES = Path(__file__).with_name("clip_merges.txt.gz")  # clip_merges.LICENSE.txt says where it is from
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own, and open_clip's defaults

# What CLIPModel can be told of open_clip's configurations. Others (pooling, layer scale, timm or Hugging Face towers) are refused.
NETWORK = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}

NAMES = (  # of weights: transformers', open_clip's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def find_weights(path: str) -> Path | None:
    """The file with open_clip's weights that `path` is, or has as a folder; None where there is none."""
    files = [Path(path), *(Path(path) / name for name in WEIGHTS)]
    return next((file for file in files if file.is_file()), None)


def load_open_clip(name: str, file: Path) -> tuple[torch.nn.Module, Callable, Callable]:
    """Model, tokenize and prepare, as `fastvideo.rewards.clip.cosine_reward` takes them, of weights beside an open_clip_config.json."""
    try:
        config = json.loads(file.with_name(CONFIG).read_text())
        network, preprocessing = config["model_cfg"], config.get("preprocess_cfg") or {}
        image_size = network["vision_cfg"]["image_size"]
        if isinstance(image_size, list) and len(set(image_size)) == 1:
            image_size = network["vision_cfg"]["image_size"] = image_size[0]
        interpolation, resize_mode = preprocessing.get("interpolation") or "bicubic", preprocessing.get("resize_mode") or "shortest"
        unknown = [
            key
            for section, known in ((network, NETWORK), (network["vision_cfg"], VISION), (network["text_cfg"], TEXT))
            for key, value in section.items()
            if value and key not in known
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--rewards: {name}={file} needs its {CONFIG} beside it: {type(error).__name__}: {error}") from error
    if unknown:
        raise UserError(f"--rewards: {name}={file}: {CONFIG} has {unknown[0]!r}, which transformers' CLIPModel can't do")
    if interpolation not in ("bicubic", "bilinear") or resize_mode not in ("shortest", "longest", "squash"):
        raise UserError(f"--rewards: {name}={file}: {CONFIG} has {interpolation=}, {resize_mode=}, which is not known here")
    weights = read_checkpoint(name, file)
    model = build_clip(name, file, weights.get("state_dict", weights), network)
    length = network["text_cfg"].get("context_length", 77)

    def prepare(media: torch.Tensor) -> torch.Tensor:
        return preprocess(media, image_size, preprocessing)

    check_prepare(f"--rewards: {name}={file}: preprocess_cfg in {CONFIG}", prepare, model)
    return model, load_tokenizer(length), prepare


def read_checkpoint(name: str, file: Path) -> dict[str, Any]:
    """What a .safetensors or PyTorch file holds. Nothing but tensors and plain numbers is unpickled."""
    from safetensors.torch import load_file

    try:
        checkpoint = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files they raise all sorts; what PyTorch says further on is no advice for strangers' files
        reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        raise UserError(f"--rewards: {name}={file} can't be read as a file of weights, download it again: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"--rewards: {name}={file} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def build_clip(name: str, file: Path, weights: dict[str, torch.Tensor], network: dict) -> torch.nn.Module:
    """CLIPModel (float32, on the CPU) of open_clip's weights. network: "model_cfg" of an open_clip_config.json."""
    from transformers import CLIPModel

    try:
        config = clip_config(network)
        with torch.device("meta"):
            expected = CLIPModel(config).state_dict()
    except Exception as error:  # KeyError, TypeError, those of transformers' own checks
        raise UserError(f"--rewards: {name}={file}: its settings are of no vision transformer: {type(error).__name__}: {error}") from error
    try:
        converted = convert(weights, expected)
    except ValueError as error:
        raise UserError(f"--rewards: {name}={file} does not fit its network: {error}") from error
    return CLIPModel.from_pretrained(None, config=config, state_dict=converted, dtype=torch.float32)


def clip_config(network: dict) -> Any:
    """transformers' CLIPConfig of open_clip's "model_cfg"."""
    from transformers import CLIPConfig

    vision, text = {"head_width": 64, "patch_size": 16} | network["vision_cfg"], {"context_length": 77, "heads": 8} | network["text_cfg"]
    common = {"hidden_act": "quick_gelu" if network.get("quick_gelu") else "gelu", "projection_dim": network["embed_dim"]}

    def sizes(tower: dict, heads: int) -> dict:
        width = tower["width"]
        return common | {
            "hidden_size": width,
            "num_hidden_layers": tower["layers"],
            "num_attention_heads": heads,
            "intermediate_size": int(width * tower.get("mlp_ratio", 4)),
        }

    return CLIPConfig(
        vision_config=sizes(vision, vision["width"] // vision["head_width"])
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        text_config=sizes(text, text["heads"]) | {"max_position_embeddings": text["context_length"]},
        projection_dim=network["embed_dim"],
    )


def convert(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's weights under the names of transformers. Raises ValueError unless they are `expected`'s, all of them, in its shapes."""
    converted, used = {}, set()
    for name, parameter in expected.items():
        key = re.sub(r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_", name)
        for new, old in NAMES:
            key = key.replace(new, old)
        if key not in weights:
            raise ValueError(f"it lacks {key}")
        tensor = weights[key]
        if ".in_proj_" in key:  # q, k and v in one
            tensor = tensor.chunk(3)["qkv".index(name.split(".self_attn.")[1][0])]
        elif key in ("visual.proj", "text_projection"):
            tensor = tensor.T
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{key} has shape {tuple(weights[key].shape)}, which gives {name} {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            )
        converted[name] = tensor
        used.add(key)
    if weights.keys() - used:
        raise ValueError(f"{sorted(weights.keys() - used)[0]} has no place in it")
    return converted


def load_tokenizer(length: int = 77) -> Callable[[list[str]], dict[str, torch.Tensor]]:
    """open_clip's tokenizer: B prompts -> {"input_ids": (B, length)}, padded with 0; a longer prompt is cut and keeps its end token."""
    import ftfy
    import regex
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode().strip().split("\n")]
    start, end = special = ["<start_of_text>", "<end_of_text>"]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges), *special]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    start, end = (tokenizer.token_to_id(token) for token in special)
    word = regex.compile("|".join(special) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def tokenize(prompts: list[str]) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            text = html.unescape(html.unescape(ftfy.fix_text(prompt))).lower()
            body = tokenizer.encode(word.findall(text), is_pretokenized=True).ids[: length - 2]
            row[: len(body) + 2] = torch.tensor([start, *body, end])
        return {"input_ids": ids}

    return tokenize


def preprocess(images: torch.Tensor, size: int, config: dict) -> torch.Tensor:
    """What open_clip does with saved pictures: (B, 3, H, W) in [-1, 1] -> (B, 3, size, size). config: "preprocess_cfg"."""
    images = saved(images)
    mode, how = config.get("interpolation") or "bicubic", config.get("resize_mode") or "shortest"
    if how == "squash":
        images = resize(images, (size, size), mode)
    elif how == "longest":
        ratio = max(images.shape[2:]) / size
        images = resize(images, tuple(round(edge / ratio) for edge in images.shape[2:]), mode)
        fill = torch.tensor(config.get("fill_color") or 0, device=images.device).reshape(-1, 1, 1)  # one for all channels, or three
        images = pad(images - fill, size) + fill
    else:
        images = resize(images, shortest_edge(images, size), mode)
        top, left = (round((edge - size) / 2) for edge in images.shape[2:])
        images = images[:, :, top : top + size, left : left + size]
    return normalise(images / 255, config.get("mean") or MEAN, config.get("std") or STD)
