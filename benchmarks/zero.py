"""Bytes of parameters, gradients and optimiser that each process holds at each ZeRO stage, against theory.

python benchmarks/zero.py [--processes 2] [--stage 2 3] [--dtype bfloat16] [--offload] starts its own processes, on GPUs (one each) or
CPUs; started by torchrun it uses those. Prints a table, and as the last line a JSON object with the same numbers: benchmarks/README.md.
"""

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import torch
import tyro
from common import MODELS, become_torchrun, check_sizes, make_transformer, print_table
from torch.utils._pytree import tree_leaves

from fastvideo.errors import UserError
from fastvideo.parallel import distributed, zero
from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.shards import master_shards

KINDS = ("parameters", "gradients", "optimizer")
MIB = 2**20
NOTES = """\
Held between two micro-batches of the second update. Theory: weights in the network's dtype, gradients in float32.
parameters: stage 3 keeps small ones (up to 100,000 elements) whole on every process, beside their shards.
gradients: stage 2 in float32 keeps whole those that a border between shards divides; stage 1 in bfloat16 keeps the last micro-batch's
  beside the float32 sum. --offload adds float32 copies of the own shard in host memory.
optimizer: Adam's two averages, and from stage 1 on a copy of the weights, all in float32.
other: DeepSpeed's buckets for sending gradients have 200 million elements whatever the model's size, two at stages 1 and 2, one at
  stage 3, none held at stage 1 in bfloat16; real memory on a GPU, on a CPU only as far as it is written. Stage 2 frees them after each
  micro-batch, stage 1 after each update, stage 3 never."""


@dataclass
class Args:
    """Measure what each process holds at each ZeRO stage."""

    stage: tuple[Literal[0, 1, 2, 3], ...] = ()
    """ZeRO stages. Default: all that --dtype and --offload allow."""
    processes: int = 2
    """Processes to start."""
    offload: bool = False
    """Keep the optimiser's state on the CPU. DeepSpeed compiles its CPU optimiser for it, a minute at the first use."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network; auto: bfloat16 on GPUs, float32 on CPUs."""
    model: Literal[MODELS] = "flux"
    """Which of diffusers' transformers."""
    layers: int = 2
    """Transformer blocks. Half of FLUX's and HunyuanVideo's, rounded down, are double-stream ones."""
    heads: int = 16
    """Attention heads."""
    head_dim: int = 32
    """Numbers a head, a multiple of 8. Stage 3 does not shard small weights: below 320 in all heads, none."""

    def __post_init__(self) -> None:
        check_sizes(self.heads, self.head_dim, layers=self.layers, processes=self.processes)


def theory(stage: int, dtype: torch.dtype, num_parameters: int, world_size: int) -> dict[str, float]:
    """Bytes a process holds. Master weights are float32, as Adam's two averages and the sum of gradients; stage 0 has no master copy."""
    sizes = {"parameters": dtype.itemsize, "gradients": 4, "optimizer": 8 if stage == 0 else 12}
    first_sharded_at = {"parameters": 3, "gradients": 2, "optimizer": 1}
    return {kind: num_parameters * sizes[kind] / (world_size if stage >= first_sharded_at[kind] else 1) for kind in KINDS}


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that dense tensors occupy together: what several are views of counts once."""
    total = end = 0
    for start, size in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def tensors_alive() -> list[torch.Tensor]:
    """All tensors that Python knows of."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def held(engine: zero.deepspeed.DeepSpeedEngine, before: list[torch.Tensor]) -> dict[str, int]:
    """Bytes that this process holds of each of KINDS, and in other tensors that are not in `before`; host: how much of it is on the CPU."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    alive = tensors_alive()
    places = (
        "averaged_gradients",
        "all_grad_tensors",
        "accumulated_grads_in_cpu",
        "fp32_groups_gradients_flat",
        "grad_partitions_flat_buffer",
    )
    gradients = [getattr(optimizer, place, None) for place in places]  # each at some stages
    gradients += [tensor.grad for tensor in alive if tensor.is_leaf] + [getattr(parameter, "grad_accum", None) for parameter in parameters]
    averages = [state for shard_state in engine.basic_optimizer.state.values() for state in shard_state.values()]
    masters = master_shards(engine) if engine.zero_optimization_stage() > 0 else []
    kinds = {
        "parameters": [parameter.data for parameter in parameters] + [getattr(parameter, "ds_tensor", None) for parameter in parameters],
        "gradients": gradients,
        "optimizer": masters + averages,
    }
    kinds = {kind: [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)] for kind, tensors in kinds.items()}
    every = [tensor for tensors in kinds.values() for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive + every}
    for tensor in before:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    result = {kind: distinct_bytes(tensors) for kind, tensors in kinds.items()}
    result["other"] = sum(storages.values()) - distinct_bytes(every)
    return result | {"host": distinct_bytes(tensor for tensor in every if tensor.device.type == "cpu")}


def measure(stage: int, ranks: Ranks, args: Args) -> dict:
    """Collective. One row of the results: the largest of all processes beside theory."""
    dtype = distributed.compute_dtype(args.dtype, ranks.device)
    before = tensors_alive()
    model, inputs = make_transformer(args.model, args.layers, args.heads, args.head_dim, 16, 8, 1, args.dtype, ranks)
    before += inputs.values()
    counts = [parameter.numel() for parameter in model.parameters()]
    settings = {"learning_rate": 1e-4, "weight_decay": 0.0, "lr_multiplier": lambda update: 1.0, "max_grad_norm": 1.0}
    batches = {"micro_batch_size": 1, "accumulation_steps": 2}
    engine = zero.initialize(model, stage=stage, offload=args.offload, dtype=dtype, **settings, **batches)
    for _ in range(3):
        loss = engine(**inputs, return_dict=False)[0].float().square().mean() / 2
        zero.backward_and_step(engine, loss)
    del loss
    processes = distributed.all_gather_object(held(engine, before))
    engine.destroy()
    largest = {kind: max(process[kind] for process in processes) for kind in processes[0]}
    expected = theory(stage, dtype, sum(counts), ranks.world_size)
    return (
        {"stage": stage, "num_parameters": sum(counts), "largest_parameter": max(counts)}
        | {f"{kind}_bytes": largest[kind] for kind in KINDS}
        | {f"{kind}_theory_bytes": expected[kind] for kind in KINDS}
        | {"other_bytes": largest["other"], "host_bytes": largest["host"] if ranks.device.type == "cuda" else None}
    )


def table_row(row: dict) -> dict[str, str]:
    cells = {"stage": str(row["stage"])}
    for kind in KINDS:
        cells[f"{kind} MiB"] = f"{row[f'{kind}_bytes'] / MIB:.1f}"
        cells[f"{kind[:4]}/theory"] = f"{row[f'{kind}_bytes'] / row[f'{kind}_theory_bytes']:.3f}"
    total, expected = (sum(row[f"{kind}_{what}"] for kind in KINDS) for what in ("bytes", "theory_bytes"))
    cells |= {"together MiB": f"{total / MIB:.1f}", "all/theory": f"{total / expected:.3f}", "other MiB": f"{row['other_bytes'] / MIB:.1f}"}
    return cells if row["host_bytes"] is None else cells | {"on host MiB": f"{row['host_bytes'] / MIB:.1f}"}


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    become_torchrun(args.processes)
    ranks = distributed.init(timeout_minutes=5)
    if ranks.world_size != args.processes:
        raise UserError(f"--processes {args.processes} is not the number of processes, {ranks.world_size}")
    dtype = distributed.compute_dtype(args.dtype, ranks.device)
    stages = args.stage or ((1, 2, 3) if args.offload or dtype == torch.bfloat16 else (0, 1, 2, 3))
    for stage in stages:
        zero.check_stage(stage, args.offload, dtype)
    results = [measure(stage, ranks, args) for stage in stages]
    if not ranks.is_main:
        return
    print_table([table_row(row) for row in results])
    print(f"{results[0]['num_parameters']:,} parameters in {dtype}, {ranks.world_size} {ranks.device.type} processes.\n{NOTES}")
    print(json.dumps({"arguments": dataclasses.asdict(args), "device": ranks.device.type, "results": results}))


if __name__ == "__main__":
    distributed.run(main)
