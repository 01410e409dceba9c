"""Loading diffusers and transformers folders from disk, strictly: what is missing or broken is said, never left random."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig

from fastvideo.errors import UserError, first_line
from fastvideo.models.tokenizers import load_tokenizers
from fastvideo.parallel.attention import set_attention
from fastvideo.parallel.distributed import Ranks, compute_dtype, on_main, together

MOST = 4096  # layers, positions whose angles are computed ahead, or tokens that are made up


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Whatever is raised inside becomes a UserError that begins with `what`: what diffusers and transformers raise is not documented.

    So does a settings file of `folder` that is no JSON object, which diffusers would take for the name of one, and look for on the hub.
    """
    try:
        for path in (*folder.glob("*config.json"), *folder.glob("*/*config.json"), *folder.glob("*index.json")):
            config = json.loads(path.read_bytes())
            if not isinstance(config, dict):
                raise ValueError(f"{path.relative_to(folder)} is no JSON object")
            _check_claims(path, config)
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def _check_claims(path: Path, config: dict) -> None:
    """ValueError if settings describe more than can be in the files beside them: building that could take hours, or all memory."""
    for name, value in config.items():
        if isinstance(value, int) and value > MOST and re.search("layers|depth|blocks|rope_max_seq_len|extra_ids", name):
            raise ValueError(f"its {path.name} has {name} {str(value)[:60]}, which no network has")
    if path.name != "config.json":
        return
    of_transformers = "_class_name" not in config
    library, name = (transformers, (config.get("architectures") or ["-"])[0]) if of_transformers else (diffusers, config["_class_name"])
    model_class = getattr(library, name, None)
    size = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    if model_class and size:
        with torch.device("meta"):
            model = model_class(model_class.config_class(**config)) if of_transformers else model_class.from_config(config)
        claimed = sum(weight.numel() for weight in model.parameters())
        if claimed > 2 * size:  # of 4 bits each
            raise ValueError(f"its config.json describes {claimed} weights, but its files have {size} bytes")


def load_pretrained(model_class: Any, folder: str | Path, subfolder: str, flag: str = "--model", **options: Any) -> Any:
    """`model_class.from_pretrained(folder, subfolder=subfolder, **options)`, from disk only.

    Raises UserError, naming the flag and the folder, if it is missing or broken or if weights are missing, unexpected or of another shape.
    """
    path = Path(folder) / subfolder
    if not path.is_dir():
        raise UserError(f"{flag}: there is no folder {path}")
    if not (path / "config.json").is_file():  # transformers would silently take a default one
        raise UserError(f"{flag}: {path} has no config.json")
    options |= {"subfolder": subfolder, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with reading(path, f"{flag}: {path} cannot be loaded as {model_class.__name__}"):
        model, info = model_class.from_pretrained(folder, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise UserError(f"{flag}: the weights in {path} do not fit its config: {kind.replace('_', ' ')} {names}")
    return model


def load_network(model_class: type[ModelMixin], folder: str | Path, subfolder: str, dtype: torch.dtype, ranks: Ranks) -> ModelMixin:
    """Collective. What `load_pretrained` gives, on the CPU of rank 0, which alone reads the files, each from its start to its end.

    Other processes get the same network without contents, on the meta device: `zero.initialize` sends it to them.
    """

    def load() -> ModelMixin:
        if ranks.is_main:
            # Mapped into memory, as is the default, files come page by page: minutes on a network's file system.
            return load_pretrained(model_class, folder, subfolder, torch_dtype=dtype, disable_mmap=True)
        path = Path(folder) / subfolder
        with reading(path, f"--model: {path} cannot be loaded as {model_class.__name__}"), torch.device("meta"):
            return model_class.from_config(model_class.load_config(folder, subfolder=subfolder, local_files_only=True))

    if ranks.world_size == 1:
        return load()
    model = together(load)
    dtypes = on_main(lambda: [tensor.dtype for tensor in (*model.parameters(), *model.buffers())])  # diffusers keeps some in float32
    for tensor, loaded in zip((*model.parameters(), *model.buffers()), dtypes, strict=True):
        tensor.data = tensor.data.to(loaded)
    return model


def load_pipeline(
    folder: str | Path, dtype: str, device: torch.device, flag: str = "--model", *, of_any_kind: bool = False, **components: Any
) -> DiffusionPipeline:
    """The pipeline of whatever class the folder's model_index.json names, on `device`, without progress bar.

    dtype: as `compute_dtype` takes it. of_any_kind: see `load_tokenizer`. components: None for what is not needed.
    Raises UserError if the folder cannot be loaded.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{flag} {folder} is no diffusers folder: it has no model_index.json")
    options = {"local_files_only": True, "use_safetensors": True}
    with reading(Path(folder), f"{flag} {folder} cannot be loaded"):
        options |= load_tokenizers(folder, flag, of_any_kind=of_any_kind) | components
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=compute_dtype(dtype, device), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def add_lora(model: ModelMixin, rank: int, seed: int) -> None:
    """Freeze `model` and add a trainable LoRA adapter of `rank` to its attention layers; `seed` makes it equal on all processes.

    Rank 0 means no LoRA: nothing happens.
    """
    if rank == 0:
        return
    model.requires_grad_(False)
    torch.manual_seed(seed % 2**63)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def prepare(
    network: ModelMixin, attention: str, lora_rank: int, seed: int, gradient_checkpointing: bool, device: torch.device
) -> ModelMixin:
    """`network` ready for the engine: in training mode, with its attention backend (`set_attention`) and its adapter (`add_lora`)."""
    set_attention(network, attention, device)
    add_lora(network, lora_rank, seed)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()
