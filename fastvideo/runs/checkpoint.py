"""Checkpoints that are whole or absent, and the export of trained weights in diffusers format.

A checkpoint holds what is trained, by parameter and not by process, so that it can be resumed on any number of processes and at any ZeRO
stage: each process writes one `shard_RRRRR.safetensors` of flat float32 tensors KIND/NAME/START, the elements from START on of the
flattened parameter NAME. The kinds are weight, exp_avg, exp_avg_sq (Adam's averages) and ema. `state.json` says what they belong to, and
has a checksum of each file and of itself.
"""

import json
import shutil
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from diffusers import ModelMixin
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastvideo.errors import UserError
from fastvideo.files import rename_folder, whole_file, whole_folder, write_tensors, writing
from fastvideo.parallel.distributed import Ranks, all_gather_object, on_main, together
from fastvideo.parallel.ema import EMA
from fastvideo.parallel.shards import Fragment, adam_shards, fragments, master_shards, parameter_shapes, refresh_weights, set_updates
from fastvideo.parallel.zero import full_state_dict
from fastvideo.runs import guards
from fastvideo.runs.integrity import checksum, latest, naming_the_last, verify, way_back


def save(engine: DeepSpeedEngine, ema: EMA | None, output_dir: Path, iteration: int, keep: int, ranks: Ranks) -> None:
    """Collective. Write `checkpoints/iteration_NNNNNN` under `output_dir`, point `checkpoints/latest` at it, keep the newest `keep`.

    A process killed at any moment, or UserError for what cannot be written, leaves the previous checkpoint in force: the new one gets its
    name only once all of it is on disk. Later ones, left by who went back to an earlier one, are deleted. All nodes share `output_dir`.
    Besides the newest, the best one by held-out rewards is kept, and `checkpoints/best` names it; without such rewards there is none.
    """
    folder = output_dir / "checkpoints"
    name = f"iteration_{iteration:06d}"
    if on_main(lambda: latest(folder) == folder / name):
        return
    temporary = folder / f".{name}.tmp"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(temporary):
            temporary.mkdir(parents=True)

    def write_shard() -> tuple[str, dict[str, int]]:
        pieces = {}
        for kind, shards in _trained(engine, ema).items():
            for shard, parts in zip(shards, _own_fragments(engine, ranks), strict=True):
                for parameter, start, offset, count in parts:
                    pieces[f"{kind}/{parameter}/{start}"] = shard.view(-1)[offset : offset + count]
        path = temporary / f"shard_{ranks.rank:05d}.safetensors"
        with writing(path):
            return path.name, write_tensors(path, pieces)

    def finish(files: dict[str, dict[str, int]]) -> None:
        dtype = str(engine.module.dtype).removeprefix("torch.")
        state = {"iteration": iteration, "updates": engine.global_steps, "dtype": dtype, "ema": ema is not None}
        # These are for people only: none of them matters to `load`.
        state |= {"world_size": ranks.world_size, "sp_size": ranks.sp_size, "zero_stage": engine.zero_optimization_stage()}
        state |= {"files": files, "parameters": parameter_shapes(engine)}
        with writing(folder / name):
            (temporary / "state.json").write_text(json.dumps(state | {"crc32": checksum(state)}, indent=2))
            rename_folder(temporary, folder / name)
            earlier = sorted(path for path in folder.glob("iteration_*") if path.name < name)
            kept = {folder / name, *earlier[max(0, len(earlier) - (keep - 1)) :]}
            if best := guards.best_checkpoint(output_dir, [*earlier, folder / name]):
                kept.add(best)
                with whole_file(folder / "best") as path:
                    path.write_text(best.name)
            else:
                (folder / "best").unlink(missing_ok=True)
            with whole_file(folder / "latest") as path:
                path.write_text(name)
            for other in {*folder.glob("iteration_*"), *folder.glob(".iteration_*")} - kept:
                shutil.rmtree(other)

    with naming_the_last(output_dir):
        try:
            on_main(prepare)
            files = all_gather_object(together(write_shard))
            on_main(lambda: finish(dict(files)))
        except UserError:
            if ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def load(engine: DeepSpeedEngine, ema: EMA | None, checkpoint: Path) -> int:
    """Collective. Restore weights, optimizer, schedule and EMA of a fresh engine; returns the checkpoint's iteration.

    Raises UserError if a file is missing or damaged, or the checkpoint is of another dtype, of other parameters, or EMA is in one only.
    """
    try:
        state = together(lambda: verify(checkpoint, dist.get_rank(), dist.get_world_size()))
    except UserError as error:
        raise UserError(f"{error}; {on_main(lambda: way_back(checkpoint.parent, checkpoint.name))}") from error
    together(lambda: _check_state(engine, ema, checkpoint, state))
    set_updates(engine, state["updates"])
    together(lambda: _read_shards(engine, ema, checkpoint, state["files"]))
    refresh_weights(engine)
    return state["iteration"]


def _trained(engine: DeepSpeedEngine, ema: EMA | None) -> dict[str, list[torch.Tensor]]:
    """All that training changes: aligned lists of float32 shards by kind."""
    kinds = {"weight": master_shards(engine), **{average: adam_shards(engine, average) for average in ("exp_avg", "exp_avg_sq")}}
    return kinds | ({"ema": ema.shards} if ema is not None else {})


def _own_fragments(engine: DeepSpeedEngine, ranks: Ranks) -> list[list[Fragment]]:
    """The fragments that this process saves. At stage 0, where all processes have all parameters, they take turns."""
    parts = fragments(engine)
    if engine.zero_optimization_stage() == 0:
        return [part if index % ranks.world_size == ranks.rank else [] for index, part in enumerate(parts)]
    return parts


def _check_state(engine: DeepSpeedEngine, ema: EMA | None, checkpoint: Path, state: dict[str, Any]) -> None:
    """UserError unless the checkpoint fits this engine."""
    dtype = str(engine.module.dtype).removeprefix("torch.")
    if state["dtype"] != dtype:
        raise UserError(f"checkpoint {checkpoint} was saved with --dtype {state['dtype']} and cannot be resumed with {dtype}")
    if state["ema"] != (ema is not None):
        saved, now = ("with", "without") if ema is None else ("without", "with")
        raise UserError(f"checkpoint {checkpoint} was saved {saved} EMA and cannot be resumed {now} it: see --ema_decay")
    saved, now = state["parameters"], parameter_shapes(engine)
    for name in saved | now:
        if saved.get(name) != now.get(name):
            shapes = f"the shape of {name} is {saved.get(name, 'absent')} there and {now.get(name, 'absent')} here"
            raise UserError(f"checkpoint {checkpoint} is of another model: {shapes}")


def _read_shards(engine: DeepSpeedEngine, ema: EMA | None, checkpoint: Path, files: list[str]) -> None:
    """Fill this process's shards from whichever files have a part of them; nothing else is read."""
    with ExitStack() as stack:
        try:
            saved = defaultdict(list)  # (kind, name) -> [(start, slice of the file)]
            for file in files:
                shard_file = stack.enter_context(safe_open(checkpoint / file, "pt"))
                for key in shard_file.offset_keys():
                    kind, name, start = key.split("/")
                    saved[kind, name].append((int(start), shard_file.get_slice(key)))
            for kind, shards in _trained(engine, ema).items():
                for shard, parts in zip(shards, fragments(engine), strict=True):
                    for parameter, start, offset, count in parts:
                        found = _fill(shard.view(-1)[offset : offset + count], start, saved[kind, parameter])
                        if found != count:
                            lost = f"elements {start + found} to {start + count} of {kind} {parameter} are in no file"
                            raise UserError(f"checkpoint {checkpoint} is damaged: {lost}")
        except (OSError, SafetensorError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"checkpoint {checkpoint} is damaged: {error}") from error


def _fill(values: torch.Tensor, start: int, pieces: list[tuple[int, Any]]) -> int:
    """Copy a parameter's elements from `start` on into `values` (n,), from its saved pieces; returns how many were found before a gap."""
    found = 0
    for first, piece in sorted(pieces, key=lambda place: place[0]):
        begin, end = start + found, min(first + piece.get_shape()[0], start + len(values))
        if first <= begin < end:
            values[found : found + end - begin] = piece[begin - first : end - first]
            found += end - begin
    return found


def export(engine: DeepSpeedEngine, folder: Path, subfolder: str) -> None:
    """Collective. Write the network's weights to `folder/subfolder` for diffusers' `from_pretrained`.

    With a LoRA adapter its weights also go to `folder/lora` (for `pipeline.load_lora_weights`), and `folder/subfolder` has them merged.
    Raises UserError for what cannot be written.
    """
    state = full_state_dict(engine)
    with naming_the_last(folder.parent):
        on_main(lambda: _write_export(engine.module, state, folder, subfolder))


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
