"""Whether a model folder is what a script needs, told in seconds: from its JSON files and the heads of its safetensors files.

No weights are read. docs/models.md says what each folder is made of and where it comes from.
"""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from fastvideo.errors import UserError, first_line
from fastvideo.models.families import FAMILIES
from fastvideo.models.families.family import Family, Use
from fastvideo.models.pretrained import reading
from fastvideo.models.tokenizers import check_tokenizer

# What a model_index.json may have beside the parts: nothing that changes a sample. The safety checker is switched off in evaluation.
HARMLESS = {"safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder"}
# Inputs of a network that its script does not give, though the network would run without some of them: silently another model.
INPUTS = (
    "time_cond_proj_dim", "addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "image_condition_type", "image_dim",
    "added_kv_proj_dim", "num_class_embeds",
)  # fmt: skip

ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
HUNYUAN = "HunyuanVideoTransformer3DModel"  # of SkyReels too, with more channels
SKYREELS = "docs/models.md#skyreels-v1-i2v"


def check_model(folder: str | Path, family: str | None = None, use: Use = "evaluation", flag: str = "--model") -> dict[str, int]:
    """Bytes of each part's weights. Raises UserError, naming the file, unless `folder` has all that `use` needs of it.

    family: of `FAMILIES`; None: that of the pipeline in model_index.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{flag}: " + (f"{folder} is a file, not a model's folder" if folder.exists() else f"there is no folder {folder}"))
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{flag} {folder} is no diffusers folder: it has no model_index.json{_what_it_is(folder, flag)}")
    index = _settings(folder / "model_index.json", flag)
    pipeline = str(index.get("_class_name"))
    known = {kind.pipeline: name for name, kind in FAMILIES.items()}
    family = family or known.get(pipeline)
    if family is None:
        raise UserError(f"{flag} {folder} is a {pipeline}, but these can be trained and evaluated: {', '.join(known)}")
    kind = FAMILIES[family]
    if pipeline != kind.pipeline:
        elsewhere = f": see train_grpo_{known[pipeline]}.py" if pipeline in known else ""
        config = folder / "transformer" / "config.json"
        channels = _settings(config, flag).get("in_channels") if config.is_file() else None
        if family == "skyreels" and channels == 32:  # its own transformer: this is not all HunyuanVideo
            elsewhere = f": name it there, by the sed command of {SKYREELS}"
        raise UserError(f"{flag} {folder} is a {pipeline} by its model_index.json, not the {kind.pipeline} that is needed here{elsewhere}")
    known_parts = HARMLESS | kind.parts("evaluation").keys()
    further = {k: v for k, v in index.items() if k not in known_parts and not k.startswith("_") and v not in (None, False, [None, None])}
    if further:
        listed = " and ".join(f"{name} {json.dumps(value)}" for name, value in sorted(further.items()))
        raise UserError(f"{flag} {folder}: its model_index.json has {listed}, which training does not support")
    sizes = {}
    for name, model_class in kind.parts(use).items():
        if not (folder / name).is_dir():
            raise UserError(f"{flag}: there is no folder {folder / name}: {_again(folder)}")
        if model_class:
            sizes[name] = check_weights(folder / name, model_class, flag)
        elif name.startswith("tokenizer"):
            check_tokenizer(folder / name, folder / name.replace("tokenizer", "text_encoder"), flag)
        elif name == "scheduler" and not (folder / name / "scheduler_config.json").is_file():
            raise UserError(f"{flag}: {folder / name} has no scheduler_config.json: {_again(folder)}")
    if kind.network_folder in sizes:
        _check_variant(folder, kind, flag)
    return sizes


def _settings(path: Path, flag: str) -> dict[str, Any]:
    """What a JSON file has. UserError if that is no object."""
    try:
        return dict(json.loads(path.read_bytes()).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{flag}: {path.parent} cannot be loaded: {path.name} is damaged: {first_line(error)}") from error


def _again(folder: Path) -> str:
    if any(folder.glob(".cache/huggingface/download/**/*.incomplete")):
        return "its download was interrupted: give the same hf download command again, and it goes on"
    return "download the folder again"


def _what_it_is(folder: Path, flag: str) -> str:
    """What a folder without model_index.json may be instead."""
    if snapshots := [path.parent for pattern in ("snapshots/*", "*") for path in folder.glob(f"{pattern}/model_index.json")]:
        return f"; {snapshots[-1]} has one: give that"
    if own := [*folder.glob("*.pth"), *folder.glob("*/transformers/*.pt"), *folder.glob("*/vae/*.pt")]:
        file = own[0].relative_to(folder)
        return f", but {file}: it is in its authors' layout, and another repository has that of diffusers (docs/models.md)"
    if (folder / "config.json").is_file():
        name = _settings(folder / "config.json", flag).get("_class_name", "network")
        return f", but a {name} at its root, which belongs into a folder transformer/ beside the model's other parts (docs/models.md)"
    if adapters := [name for name in ADAPTERS if (folder / name).is_file()]:
        return f", and {adapters[0]} is an adapter (LoRA), not a model: give the folder of the model that it was made for"
    single = sorted(folder.glob("*.safetensors"))
    return f", and {single[0].name} is a file for other programs (docs/models.md)" if single else f": {_again(folder)}"


def _check_variant(folder: Path, kind: Family, flag: str) -> None:
    """UserError for a network that has the right class and other inputs than the script gives it."""
    network, vae = (_settings(folder / name / "config.json", flag) for name in (kind.network_folder, "vae"))
    with torch.device("meta"):
        network = getattr(diffusers, kind.network.class_name).from_config(network).config
        vae = getattr(diffusers, kind.vae.class_name).from_config(vae).config
    given = kind.channels * vae.get("latent_channels", vae.get("z_dim"))
    predicted = given if kind.packed else given // kind.channels
    has = network.in_channels, network.get("out_channels") or network.in_channels
    what = f"{flag} {folder}: its {kind.network_folder}"
    if has != (given, predicted):
        why = "it is a variant that is given pictures or masks too"
        if has[0] < given:
            why = "it is not given the first frame" if kind.channels > 1 else "it is another model's"
        if kind.network.class_name == HUNYUAN and has[0] in (given // 2, given * 2):
            why += f": SkyReels' has another than HunyuanVideo; see {SKYREELS}"
        raise UserError(f"{what} takes {has[0]} channels and predicts {has[1]}, not {given} and {predicted} as a {kind.pipeline}'s: {why}")
    for name in INPUTS:
        if network.get(name) is not None:
            raise UserError(f"{what} has {name} {network[name]}: it is a variant with an input that a {kind.pipeline} does not give")


def check_weights(folder: Path, class_name: str, flag: str) -> int:
    """Bytes of a part's weights. UserError unless its files are whole and have all tensors that its config.json asks for."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag}: {folder} has no config.json: {_again(folder.parent)}")
    config, of_diffusers, tensors, size = _settings(folder / "config.json", flag), hasattr(diffusers, class_name), {}, 0
    try:
        if of_diffusers and config.get("_class_name") != class_name:
            raise ValueError(f"its config.json is of a {config.get('_class_name')}")
        if "quantization_config" in config:
            raise ValueError("its config.json has a quantization_config, and quantised weights cannot be trained: take the original")
        for file in _weight_files(folder, class_name, "diffusion_pytorch_model" if of_diffusers else "model"):
            tensors |= _head(file)
            size += file.stat().st_size
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # of JSON with other contents too
        raise UserError(f"{flag}: {folder} cannot be loaded as {class_name}: {first_line(error)}") from error
    with reading(folder, f"{flag}: {folder} cannot be loaded as {class_name}"):
        wrong = (_diffusers_mismatch if of_diffusers else _transformers_mismatch)(class_name, config, tensors)
    for what, names in wrong.items():
        if names:
            raise UserError(f"{flag}: the weights in {folder} do not fit its config: {what} {', '.join(sorted(map(str, names))[:3])}")
    return size


def _weight_files(folder: Path, class_name: str, stem: str) -> list[Path]:
    """The safetensors files that are loaded. ValueError, with what to do, if there are none or not all."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file() and (stem != "model" or not single.is_file()):  # the two libraries prefer different ones
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if lost := [name for name in names if not (folder / name).is_file()]:
            _check_link(folder / lost[0])
            raise ValueError(
                f"{lost[0]}, named in {index.name}, is missing ({len(lost)} of {len(names)} files are): download the folder again"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    _check_link(single)
    of_variant = re.compile(rf"{stem}\.(?:safetensors\.index\.(\w+)\.json|(?!safetensors\.)(\w+)\.safetensors)")
    variants = [match[1] or match[2] for path in sorted(folder.iterdir()) if (match := of_variant.fullmatch(path.name))]
    if variants or list(folder.glob("*.bin")):
        library, variant = (
            "diffusers" if hasattr(diffusers, class_name) else "transformers",
            f", variant={variants[0]!r}" if variants else "",
        )
        convert = f"from {library} import {class_name} as M; M.from_pretrained({str(folder)!r}{variant}).save_pretrained({str(folder)!r})"
        found = f"only the variant {variants[0]}" if variants else "only .bin files"
        raise ValueError(f'it has no {single.name}, {found}; to convert: python -c "{convert}"')
    found = ", ".join(sorted(path.name for path in folder.iterdir() if path.name != "config.json")[:3])
    raise ValueError(f"it has no {single.name}" + (f", only {found}" if found else "") + ": download the folder again")


def _check_link(file: Path) -> None:
    """ValueError if it is a link whose end is gone, as of the hub's cache that was cleared, or copied without what it points to."""
    if file.is_symlink():
        raise ValueError(f"{file.name} is a link to {file.readlink()}, which is not there: copy the folder by cp -rL, or download it again")


def _head(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a safetensors file. ValueError if it is no such file, or not as long as its head says."""
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise ValueError(f"{file.name} is a pointer of Git LFS, not weights: run git lfs pull, or download by hf download")
        length, size = int.from_bytes(start, "little"), file.stat().st_size
        if not 2 <= length <= min(size - 8, 100_000_000):  # the format's own limit
            raise ValueError(f"{file.name} is no safetensors file, or cut off at {size} bytes: download it again")
        head = json.loads(opened.read(length))
    head.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in head.values()), default=0)
    if end != size:
        raise ValueError(f"{file.name} has {size} bytes, not the {end} of its tensors: download it again")
    return {name: entry["shape"] for name, entry in head.items()}


def _diffusers_mismatch(class_name: str, config: dict, tensors: dict[str, list[int]]) -> dict[str, Any]:
    with torch.device("meta"):
        model = getattr(diffusers, class_name).from_config(config)
    model._fix_state_dict_keys_on_load(tensors)  # only renames, in place, as loading does
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ["$^"])
    return {
        "missing keys": wanted.keys() - tensors.keys(),
        "unexpected keys": [name for name in tensors.keys() - wanted.keys() if not re.search(ignored, name)],
        "mismatched keys": [name for name in wanted.keys() & tensors.keys() if wanted[name] != tensors[name]],
    }


def _transformers_mismatch(class_name: str, config: dict, tensors: dict[str, list[int]]) -> dict[str, Any]:
    """By loading tensors without contents, since what transformers renames and shares differs between its versions."""
    transformers.logging.disable_progress_bar()
    model_class = getattr(transformers, class_name)
    empty = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
    options = {"output_loading_info": True, "device_map": "meta", "ignore_mismatched_sizes": True}
    _, info = model_class.from_pretrained(None, config=model_class.config_class(**config), state_dict=empty, **options)
    info["mismatched_keys"] = [name for name, *_ in info["mismatched_keys"]]
    return {name.replace("_", " "): info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
