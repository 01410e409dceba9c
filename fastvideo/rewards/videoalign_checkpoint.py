"""The folder of a VideoAlign checkpoint, read strictly: settings, tokenizer, and Qwen2-VL with its LoRA merged and its reward head.

    FOLDER/model_config.json
    FOLDER/checkpoint-N/model.pth                       every weight, with LoRA pairs as peft has them, or merged; or else
    FOLDER/checkpoint-N/adapter_model.safetensors       LoRA pairs alone, with adapter_config.json, and
    FOLDER/checkpoint-N/non_lora_state_dict.pth         what was trained without LoRA, the reward head at least
    FOLDER/Qwen2-VL-2B-Instruct or FOLDER/../Qwen2-VL-2B-Instruct    the base model; of it a model.pth needs no weights

Names of weights may be those of transformers 4 (`visual.`, `model.layers.`), as published, or of 5.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from fastvideo.errors import UserError
from fastvideo.models.tokenizers import load_tokenizer

HEADS = ("VQ", "MQ", "TA")
REWARD_TOKENS = [f"<|{head}_reward|>" for head in HEADS]
NUMBER = (int, float)  # above 0
NEEDED = {  # of model_config.json
    "model_config": {"model_name_or_path": str},
    "data_config": {"fps": NUMBER, "max_frame_pixels": NUMBER},
    "peft_lora_config": {"lora_r": NUMBER, "lora_alpha": NUMBER},
}
SUPPORTED = {  # of how it was trained, what this code takes for granted
    "model_config": {"use_special_tokens": True, "output_dim": 1},
    "data_config": {"prompt_template_type": "detailed_special", "sample_type": "uniform", "num_frames": None},
}


def load_checkpoint(folder: Path, base: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, torch.Tensor, Any, dict]:
    """Qwen2VLModel in `dtype` on `device`, frozen; its reward head (1, hidden) float32; its tokenizer; model_config.json.

    base: folder of the base model, "" to look for it inside and beside `folder`.
    Raises UserError for anything missing, damaged, left over or of another shape than the model's, naming file and weight.
    """
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

    settings = _read_settings(folder / "model_config.json")
    base = _base_folder(folder, base, settings)
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    if not checkpoints:
        raise UserError(f"--rewards: {folder} has no checkpoint-N folder")
    checkpoint = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    try:
        config = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
    except Exception as error:  # transformers raises all sorts
        raise UserError(f"--rewards: {base} can't be read as a Qwen2-VL folder: {type(error).__name__}: {error}") from error
    tokenizer = load_tokenizer(base, Qwen2Tokenizer, "--rewards")
    tokenizer.add_tokens(REWARD_TOKENS, special_tokens=True)
    config.text_config.vocab_size = len(tokenizer)

    path = checkpoint / "model.pth"
    if path.is_file():
        weights = _read_weights(path)
    else:
        path = checkpoint / "adapter_model.safetensors"
        if not path.is_file() and not (checkpoint / "adapter_config.json").is_file():
            raise UserError(f"--rewards: {checkpoint} has neither model.pth nor adapter_model.safetensors: download it again")
        weights = _base_weights(base, len(tokenizer)) | _read_weights(checkpoint / "non_lora_state_dict.pth")
        pairs = _read_weights(path)
        targets = _read_json(checkpoint / "adapter_config.json").get("target_modules")
        if not isinstance(targets, (list, str)) or not all(isinstance(target, str) for target in targets):
            raise UserError(
                f"--rewards: {checkpoint / 'adapter_config.json'} must have target_modules, as names or one pattern, not {targets!r}"
            )
        _check_targets(pairs, targets, weights, path)
        weights |= pairs
    weights = _merge_lora(weights, settings["peft_lora_config"], dtype, path)

    weights.pop("lm_head.weight", None)  # the reward reads hidden states, not words
    head = weights.pop("rm_head.weight", None)
    if head is None or head.shape != (1, config.text_config.hidden_size):
        found = "none" if head is None else tuple(head.shape)
        raise UserError(
            f"--rewards: {path} must have a reward head rm_head.weight of (1, {config.text_config.hidden_size}), but has {found}"
        )
    try:
        with torch.device("meta"):
            expected = {name: weight.shape for name, weight in Qwen2VLModel(config).state_dict().items()}
    except Exception as error:  # as above
        raise UserError(f"--rewards: {base} has settings of no Qwen2-VL: {type(error).__name__}: {error}") from error
    for what, names in (("lacks", expected.keys() - weights.keys()), ("has unknown weights:", weights.keys() - expected.keys())):
        if names:
            raise UserError(f"--rewards: {path} {what} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(f"--rewards: {path}: {name} is {tuple(weights[name].shape)}, but {base} makes it {tuple(shape)}")
    model, report = Qwen2VLModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.to(device).eval().requires_grad_(False), head.to(device, torch.float32), tokenizer, settings


def _read_settings(path: Path) -> dict:
    settings = _read_json(path)
    for section, kinds in NEEDED.items():
        for name, kind in kinds.items():
            part = settings.get(section)
            if not isinstance(part, dict) or name not in part:
                raise UserError(f"--rewards: {path} has no {section}.{name}")
            if not isinstance(part[name], kind) or (kind is NUMBER and not 0 < part[name] < math.inf):
                what = "a number above 0" if kind is NUMBER else "a string"
                raise UserError(f"--rewards: {path}: {section}.{name} is {part[name]!r}, but must be {what}")
    for section, values in SUPPORTED.items():
        for name, value in values.items():
            found = settings[section].get(name, value)
            if found != value:
                raise UserError(f"--rewards: {path}: {section}.{name} is {found!r}, but only {value!r} is supported")
    return settings


def _base_folder(folder: Path, base: str, settings: dict) -> Path:
    name = settings["model_config"]["model_name_or_path"].rstrip("/").rpartition("/")[2]
    places = [Path(base)] if base else [folder / name, folder.resolve().parent / name]
    for place in places:
        if all((place / file).is_file() for file in ("config.json", "tokenizer.json")):  # without it transformers makes an empty tokenizer
            return place
    looked = " or ".join(map(str, places))
    raise UserError(
        f"--rewards: VideoAlign needs the folder of {name} with config.json and tokenizer.json, and it isn't {looked}: say base=FOLDER"
    )


def _read_json(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--rewards: {path} can't be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--rewards: {path} holds a {type(settings).__name__}, not an object")
    return settings


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors under the names that Qwen2VLModel has for them in transformers 5."""
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {_rename(name): weight.detach() for name, weight in weights.items()}
    except Exception as error:  # of damaged files they raise all sorts
        reason = re.split(r"\.\s|\n", str(error))[0]  # torch goes on to recommend unpickling
        raise UserError(f"--rewards: {path} can't be read as weights: {type(error).__name__}: {reason}") from error


def _rename(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    for old, new in (("model.language_model.", "language_model."), ("model.visual.", "visual."), ("model.", "language_model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _base_weights(base: Path, num_tokens: int) -> dict[str, torch.Tensor]:
    """The base model's weights, its vocabulary cut to the tokenizer's with the reward tokens in it, as for training."""
    weights = {}
    for path in sorted(base.glob("*.safetensors")):
        weights |= _read_weights(path)
    embeddings = weights.get("language_model.embed_tokens.weight")
    if embeddings is None or len(embeddings) < num_tokens:
        found = "none" if embeddings is None else len(embeddings)
        raise UserError(f"--rewards: the *.safetensors of {base} must have embeddings of at least {num_tokens} tokens, but have {found}")
    return weights | {"language_model.embed_tokens.weight": embeddings[:num_tokens]}


def _check_targets(pairs: dict[str, torch.Tensor], targets: list[str] | str, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Every module that peft trained by LoRA must have its pair in the file. targets: full names, ends of names, or a pattern."""
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    for module in modules:
        name = module.replace("language_model.", "model.", 1)
        if isinstance(targets, str):
            wanted = re.fullmatch(targets, name)
        else:
            wanted = any(f".{name}".endswith(f".{_rename(target).replace('language_model.', 'model.', 1)}") for target in targets)
        if wanted and f"{module}.lora_A.weight" not in pairs:
            raise UserError(f"--rewards: {path} lacks {module}.lora_A.weight")


def _merge_lora(weights: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype, path: Path) -> dict[str, torch.Tensor]:
    """Without LoRA pairs: W + scale B A in their place, added in float32 and kept in `dtype`. settings: lora_r, lora_alpha, use_rslora."""
    merged = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        match = re.fullmatch(r"(.+)\.(base_layer|lora_A|lora_B)(\.default)?\.weight", name)
        if match:
            parts.setdefault(match[1], {})[match[2]] = weight
        else:
            merged[name.replace(".base_layer.bias", ".bias")] = weight
    rank = settings["lora_r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    for module, part in parts.items():
        if "base_layer" not in part and f"{module}.weight" in merged:
            part["base_layer"] = merged[f"{module}.weight"]
        for name in ("base_layer", "lora_A", "lora_B"):
            if name not in part:
                raise UserError(f"--rewards: {path} lacks {module}.{name}.weight")
        W, A, B = part["base_layer"], part["lora_A"], part["lora_B"]
        if A.shape != (rank, W.shape[1]) or B.shape != (W.shape[0], rank):
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise UserError(
                f"--rewards: {path}: lora_A and lora_B of {module} are {shapes}, but rank {rank} and {tuple(W.shape)} were expected"
            )
        merged[f"{module}.weight"] = (W.float() + scale * (B.float() @ A.float())).to(dtype)
    return merged
