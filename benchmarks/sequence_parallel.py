"""Traffic, activation memory and speed of sequence parallelism against one process, for transformers with random weights.

python benchmarks/sequence_parallel.py [--model flux wan] [--sp_size 2 4] ... starts its own processes, on GPUs (one each) or CPUs;
started by torchrun it uses those. Prints a table, and as the last line a JSON object with the same numbers: benchmarks/README.md.
"""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import torch
import torch.distributed as dist
import tyro
from common import MODELS, become_torchrun, check_sizes, make_transformer, parallelize, print_table

from fastvideo.errors import UserError
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks

KIB, MIB = 2**10, 2**20


@dataclass
class Args:
    """Measure sequence parallelism: traffic, activation memory, and the time of forward and backward."""

    model: tuple[Literal[MODELS], ...] = ("flux",)
    """Which of diffusers' transformers."""
    sp_size: tuple[int, ...] = (2, 4)
    """Numbers of processes that share the tokens. One process alone is always measured."""
    layers: int = 4
    """Transformer blocks. Half of FLUX's and HunyuanVideo's, rounded down, are double-stream ones."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 32
    """Numbers a head, a multiple of 8."""
    tokens: int = 1024
    """Image tokens a sample."""
    text_tokens: int = 64
    """Text tokens a sample."""
    batch_size: int = 1
    """Samples."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network; auto: bfloat16 on GPUs, float32 on CPUs."""
    repeats: int = 5
    """Timed steps, of which the median counts."""

    def __post_init__(self) -> None:
        names = ("layers", "tokens", "text_tokens", "batch_size", "repeats")
        check_sizes(self.heads, self.head_dim, **{name: getattr(self, name) for name in names})
        for sp_size in self.sp_size:
            if not 2 <= sp_size <= self.heads:
                raise UserError(f"--sp_size must be from 2 to --heads, {self.heads}, not {sp_size}")


def elements_sent(name: str, sp_size: int, args: Args) -> tuple[float, float]:
    """Elements that a process sends to others for a layer, in either direction: by the formula, and exactly, as mean over processes.

    These differ where heads or tokens do not divide: the first processes have more of both, and what is theirs need not travel.
    """
    P, H, N, element = sp_size, args.heads, args.tokens, args.batch_size * args.head_dim
    T = 0 if name == "wan" else args.text_tokens  # Wan's text does not travel
    formula = H * (P - 1) / P * (4 * N / P + T) * element
    heads, tokens = ([count // P + (rank < count % P) for rank in range(P)] for count in (H, N))
    remain = sum(h * n for h, n in zip(heads, tokens))
    return formula, (4 * (H * N - remain) + (P - 1) * H * T) * element / P


class Traffic:
    """Bytes sent to other processes, where they are sent, in `total[phase]`; whoever knows sets the phase."""

    def __init__(self):
        self.total, self.phase = Counter(), ""

    @contextmanager
    def count(self) -> Iterator[None]:
        all_to_all = dist.all_to_all_single

        def counted(output, input, output_split_sizes, input_split_sizes, group):
            own = input_split_sizes[dist.get_rank(group)]
            self.total[self.phase] += (len(input) - own) * input.element_size()
            return all_to_all(output, input, output_split_sizes, input_split_sizes, group=group)

        dist.all_to_all_single = counted
        yield
        dist.all_to_all_single = all_to_all


class Activations:
    """What autograd saves for the backward pass: bytes of each storage by its address, which is unique while the graph lives."""

    def __init__(self, model: torch.nn.Module):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def measure(name: str, sp_size: int, ranks: Ranks, group: dist.ProcessGroup, args: Args) -> dict[str, float]:
    """Collective over `group`, of sp_size processes. Bytes that this process sent and saved in one step; median seconds of others."""
    on_gpu = ranks.device.type == "cuda"
    sizes = args.layers, args.heads, args.head_dim, args.tokens, args.text_tokens, args.batch_size
    model, inputs = make_transformer(name, *sizes, args.dtype, ranks)
    traffic, activations = Traffic(), Activations(model)
    model.proj_out.register_forward_pre_hook(lambda module, args: setattr(traffic, "phase", "gather"))  # all layers are done
    parallelize(name, model, Ranks(ranks.rank, sp_size, ranks.device, sp_size, group))

    def step() -> None:
        traffic.phase = "forward"
        loss = model(**inputs, return_dict=False)[0].float().square().mean()
        traffic.phase = "backward"
        loss.backward()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with traffic.count(), torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda tensor: tensor):
        step()
    measured = {phase: traffic.total[phase] for phase in ("forward", "backward", "gather")}
    measured["activation"] = sum(activations.storages.values())
    measured["peak"] = torch.cuda.max_memory_allocated() - before if on_gpu else 0

    seconds = []
    for _ in range(args.repeats):
        model.zero_grad()
        dist.barrier(group)
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return measured | {"seconds": median(seconds)}


def summary(name: str, sp_size: int, processes: list[dict[str, float]], ranks: Ranks, args: Args) -> dict:
    """One row of the results: of traffic the mean over processes, of all else the largest."""
    itemsize = distributed.compute_dtype(args.dtype, ranks.device).itemsize
    formula, exact = (itemsize * elements for elements in elements_sent(name, sp_size, args))
    mean = {phase: sum(process[phase] for process in processes) / sp_size for phase in ("forward", "backward", "gather")}
    largest = {key: max(process[key] for process in processes) for key in ("activation", "peak", "seconds")}
    return {
        "model": name,
        "sp_size": sp_size,
        "forward_bytes_per_layer": mean["forward"] / args.layers,
        "backward_bytes_per_layer": mean["backward"] / args.layers,
        "formula_bytes_per_layer": formula,
        "exact_bytes_per_layer": exact,
        "gather_bytes": mean["gather"],
        "activation_bytes": largest["activation"],
        "peak_bytes": largest["peak"] if ranks.device.type == "cuda" else None,
        "seconds": largest["seconds"],
    }


def table_row(row: dict, one: dict) -> dict[str, str]:
    """A row of the results beside `one`, that of one process alone."""
    forward, backward, formula, exact = (row[f"{of}_bytes_per_layer"] for of in ("forward", "backward", "formula", "exact"))
    parallel = row["sp_size"] > 1
    cells = {
        "model": row["model"],
        "sp": str(row["sp_size"]),
        "forward KiB": f"{forward / KIB:.0f}",
        "fwd/formula": f"{forward / formula:.4f}" if parallel else "",
        "backward KiB": f"{backward / KIB:.0f}",
        "bwd/formula": f"{backward / formula:.4f}" if parallel else "",
        "both/exact": f"{(forward + backward) / (2 * exact):.4f}" if parallel else "",
        "gather KiB": f"{row['gather_bytes'] / KIB:.0f}",
        "saved MiB": f"{row['activation_bytes'] / MIB:.1f}",
        "of one": f"{row['activation_bytes'] / one['activation_bytes']:.3f}",
        "x sp": f"{row['sp_size'] * row['activation_bytes'] / one['activation_bytes']:.2f}",
        "step s": f"{row['seconds']:.3f}",
        "speedup": f"{one['seconds'] / row['seconds']:.2f}",
    }
    return cells if row["peak_bytes"] is None else cells | {"peak MiB": f"{row['peak_bytes'] / MIB:.1f}"}


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    become_torchrun(max(args.sp_size))
    ranks = distributed.init(timeout_minutes=5)
    if ranks.world_size < max(args.sp_size):
        raise UserError(f"--sp_size {max(args.sp_size)} is more than the number of processes, {ranks.world_size}")
    results = []
    for sp_size in (1, *args.sp_size):
        group = distributed.new_group(range(sp_size))
        for name in args.model:
            measured = measure(name, sp_size, ranks, group, args) if ranks.rank < sp_size else None
            processes = distributed.all_gather_object(measured)[:sp_size]  # here the others wait
            results.append(summary(name, sp_size, processes, ranks, args))
    if not ranks.is_main:
        return
    alone = {row["model"]: row for row in results if row["sp_size"] == 1}
    print_table([table_row(row, alone[row["model"]]) for row in results])
    where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{os.cpu_count()} CPU cores, which all processes share"
    print(
        f"forward, backward: sent to other processes, by each and for each layer. {torch.get_num_threads()} threads a process on {where}."
    )
    print(json.dumps({"arguments": dataclasses.asdict(args), "device": ranks.device.type, "results": results}))


if __name__ == "__main__":
    distributed.run(main)
