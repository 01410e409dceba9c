"""Checkpoints that are whole or absent, and the export of trained weights in diffusers format."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from diffusers import ModelMixin
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from fastvideo.distributed import Ranks, UserError, on_main
from fastvideo.ema import EMA
from fastvideo.files import rename_folder, whole_file, whole_folder
from fastvideo.tracking import check_arguments
from fastvideo.zero import full_state_dict


def save(engine: DeepSpeedEngine, ema: EMA | None, output_dir: Path, iteration: int, keep: int, ranks: Ranks) -> None:
    """Collective. Write `checkpoints/iteration_NNNNNN` under `output_dir`, point `checkpoints/latest` at it, keep the newest `keep`.

    A process killed at any moment leaves the previous checkpoint in force: the new one gets its name only once all of it is on disk.
    Checkpoints of later iterations, left by someone who went back to an earlier one, are deleted too. All nodes must share `output_dir`.
    """
    folder = output_dir / "checkpoints"
    name = f"iteration_{iteration:06d}"
    if on_main(lambda: latest(folder) == folder / name):
        return
    temporary = folder / f".{name}.tmp"
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag="deepspeed", save_latest=False)
    if ema is not None:
        ema.save(temporary / f"ema_{ranks.rank:05d}.safetensors")
    dist.barrier()
    if ranks.is_main:
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in temporary.rglob("*") if path.is_file()}
        state = {"iteration": iteration, "world_size": ranks.world_size, "zero_stage": engine.zero_optimization_stage()}
        state |= {"dtype": str(engine.module.dtype), "files": sizes}
        (temporary / "state.json").write_text(json.dumps(state, indent=2))
        rename_folder(temporary, folder / name)
        with whole_file(folder / "latest") as path:
            path.write_text(name)
        others = sorted(path for path in folder.glob("iteration_*") if path.name != name)
        earlier = [path for path in others if path.name < name]
        for old in set(others) - set(earlier[len(earlier) - (keep - 1) :]):
            shutil.rmtree(old)
        for abandoned in folder.glob(".iteration_*"):
            shutil.rmtree(abandoned)
    dist.barrier()


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, None if there is none. Raises UserError where `latest` names one that is gone."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    checkpoint = folder / pointer.read_text().strip()
    if not (checkpoint / "state.json").exists():
        raise UserError(f"{pointer} names {checkpoint.name!r}, which is not there; write an existing iteration_* folder's name into it")
    return checkpoint


def to_resume(output_dir: Path, resume: Literal["auto", "never"], arguments: dict[str, Any]) -> Path | None:
    """The checkpoint that a run in `output_dir` goes on from, None for a new run; warns of arguments that have changed since.

    Raises UserError where there is a run but `resume` is "never", and for changed arguments that the checkpoint decides.
    """
    checkpoint = latest(output_dir / "checkpoints")
    if resume == "never" and (checkpoint or (output_dir / "metrics.jsonl").exists()):
        raise UserError(f"--output_dir {output_dir} has a run in it and --resume is never: choose another folder")
    if checkpoint:
        check_arguments(output_dir, arguments)
    return checkpoint


def load(engine: DeepSpeedEngine, ema: EMA | None, checkpoint: Path, ranks: Ranks) -> int:
    """Collective. Restore weights, optimiser, schedule and EMA; returns the checkpoint's iteration.

    Raises UserError if a file is missing or truncated, or the checkpoint is of another number of processes or ZeRO stage.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        for name, size in state["files"].items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                raise UserError(f"{checkpoint / name} has {actual} bytes, but {size} were saved: the checkpoint is damaged")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {error}") from error
    for key, flag, now in (
        ("world_size", "number of processes", ranks.world_size),
        ("zero_stage", "--zero_stage", engine.zero_optimization_stage()),
        ("dtype", "--dtype", str(engine.module.dtype)),
    ):
        if state.get(key, now) != now:
            raise UserError(f"checkpoint {checkpoint} was saved with {flag} {state[key]} and cannot be resumed with {now}")
    ema_file = f"ema_{ranks.rank:05d}.safetensors"
    if (ema is not None) != (ema_file in state["files"]):
        saved, now = ("with", "without") if ema is None else ("without", "with")
        raise UserError(f"checkpoint {checkpoint} was saved {saved} EMA and cannot be resumed {now} it: see --ema_decay")
    engine.load_checkpoint(str(checkpoint), tag="deepspeed")
    if ema is not None:
        ema.load(checkpoint / ema_file)
    return state["iteration"]


def export(engine: DeepSpeedEngine, folder: Path, subfolder: str) -> None:
    """Collective. Write the network's weights to `folder/subfolder` for diffusers' `from_pretrained`.

    With a LoRA adapter its weights also go to `folder/lora` (for `pipeline.load_lora_weights`), and `folder/subfolder` has them merged.
    """
    state = full_state_dict(engine)
    if state:
        _write_export(engine.module, state, folder, subfolder)
    dist.barrier()


def _write_export(model: ModelMixin, state: dict[str, torch.Tensor], folder: Path, subfolder: str) -> None:
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
        for name, lora_config in getattr(model, "peft_config", {}).items():
            copy.add_adapter(lora_config, adapter_name=name)
    copy.load_state_dict(state, assign=True)
    with whole_folder(folder) as temporary:
        if getattr(model, "peft_config", None):
            (temporary / "lora").mkdir()
            adapter = {f"{subfolder}.{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(copy).items()}
            save_file(adapter, temporary / "lora" / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
            copy.fuse_lora()
            copy.unload_lora()
        copy.save_pretrained(temporary / subfolder)
