"""What each process reads, and the host memory it needs, until the network is loaded: every process by itself, against rank 0 alone.

python benchmarks/startup.py [--processes 4] [--directory /on/a/file/system] writes a FLUX transformer with random weights, loads it in both
ways and removes it. It starts its own processes; started by torchrun it uses those. Prints a table, and as the last line a JSON object with
the same numbers: benchmarks/README.md.
"""

import dataclasses
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import diffusers
import torch
import tyro
from common import become_torchrun, check_sizes, make_transformer, print_table
from diffusers import FluxTransformer2DModel, ModelMixin

from fastvideo.errors import UserError
from fastvideo.models.pretrained import load_network, load_pretrained
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks, all_gather_object, on_main

MIB = 2**20
FORK = multiprocessing.get_context("fork")
NOTES = """\
before: each process maps the files into its memory and touches every page. after: rank 0 reads them, the others know names and shapes.
Measured until the weights are in host memory, and no further: then DeepSpeed sends those of rank 0 to all, before as after. On a GPU
that is GPU memory, and rank 0's host memory is free again; on a CPU each process gets the network in host memory here.
read: by calls of read. mapped: growth of the pages of mapped files; the processes of a node share them, and the system may drop them.
peak: the most that was resident at once beyond what was before, mapped pages included. own: what is left of it that is not of a file."""


@dataclass
class Args:
    """Measure what the processes read, and need, to load a network."""

    processes: int = 4
    """Processes to start."""
    directory: Path | None = None
    """Where to write the network's files; default: the system's folder for temporary ones. Give the file system that models are on."""
    files: int = 4
    """To write the network in, of about the same size."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network, and of its files; auto: bfloat16 on GPUs, float32 on CPUs."""
    layers: int = 6
    """Transformer blocks. Half of them, rounded down, are double-stream ones."""
    heads: int = 16
    """Attention heads."""
    head_dim: int = 64
    """Numbers a head, a multiple of 8."""

    def __post_init__(self) -> None:
        check_sizes(self.heads, self.head_dim, layers=self.layers, processes=self.processes, files=self.files)


def in_child(function: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
    """Fork a process, which waits. What is returned lets it compute function(what it is given, *arguments), and returns that.

    A process of its own, since memory that one has used and freed would hide what it uses next.
    """
    ours, theirs = FORK.Pipe()

    def work() -> None:
        theirs.send(function(theirs.recv(), *arguments))

    child = FORK.Process(target=work, daemon=True)
    child.start()
    theirs.close()  # so that its death ends the waiting below

    def run(argument: Any) -> Any:
        ours.send(argument)
        result = ours.recv()
        child.join()
        return result

    return run


def write_network(folder: Path, args: Args, dtype: torch.dtype) -> int:
    """Returns the bytes of the weights."""
    cpu = Ranks(0, 1, torch.device("cpu"))
    model, _ = make_transformer("flux", args.layers, args.heads, args.head_dim, 16, 8, 1, str(dtype).removeprefix("torch."), cpu)
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder / "transformer", max_shard_size=-(-size // args.files) + size // 50)
    return size


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache, so that they are read anew. It may not: on tmpfs it cannot."""
    for path in folder.glob("*/*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def state() -> dict[str, int]:
    """Bytes that this process has read by calls, and of its resident memory: now, the most, of mapped files, of its own."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    resident = {name: 1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssFile", "RssAnon")}
    return resident | {"read": int(Path("/proc/self/io").read_text().split()[1])}


def measure(load: Callable[[], ModelMixin]) -> dict[str, float]:
    """One process's row of the results."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most from now on
    before, start = state(), time.perf_counter()
    model = load()
    for weight in model.parameters():
        if not weight.is_meta:  # mapped pages are read when they are touched; the strides touch each
            weight.detach().flatten()[:: 4096 // weight.itemsize].sum()
    seconds, after = time.perf_counter() - start, state()
    return {
        "read_bytes": after["read"] - before["read"],
        "mapped_bytes": after["RssFile"] - before["RssFile"],
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "own_bytes": after["RssAnon"] - before["RssAnon"],
        "seconds": seconds,
    }


def by_itself(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    return measure(lambda: load_pretrained(FluxTransformer2DModel, folder, "transformer", torch_dtype=dtype))


def table_row(row: dict) -> dict[str, str]:
    sizes = {name: f"{row[f'{name}_bytes'] / MIB:.1f}" for name in ("read", "mapped", "peak", "own")}
    return (
        {"": row["way"], "rank": str(row["rank"])} | {f"{name} MiB": size for name, size in sizes.items()} | {"s": f"{row['seconds']:.1f}"}
    )


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    become_torchrun(args.processes)
    diffusers.utils.logging.disable_progress_bar()
    dtype = distributed.compute_dtype(args.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    load_before, write = in_child(by_itself, dtype), in_child(write_network, args, dtype)  # before there are threads
    ranks = distributed.init(timeout_minutes=5)
    if ranks.world_size != args.processes:
        raise UserError(f"--processes {args.processes} is not the number of processes, {ranks.world_size}")
    with tempfile.TemporaryDirectory(dir=args.directory) as own_folder:
        folder = Path(on_main(lambda: own_folder))
        size = on_main(lambda: write(folder))
        on_main(lambda: forget(folder))
        before = all_gather_object(load_before(folder))
        on_main(lambda: forget(folder))
        after = all_gather_object(measure(lambda: load_network(FluxTransformer2DModel, folder, "transformer", dtype, ranks)))
        files = on_main(lambda: len(list(folder.glob("*/*.safetensors"))))
    if not ranks.is_main:
        return
    results = [{"way": way, "rank": rank} | row for way, rows in (("before", before), ("after", after)) for rank, row in enumerate(rows)]
    print_table([table_row(row) for row in results])
    print(f"A network of {size / MIB:.1f} MiB in {dtype}, in {files} files, {ranks.world_size} processes.\n{NOTES}")
    print(
        json.dumps({"arguments": dataclasses.asdict(args) | {"directory": str(folder.parent)}, "network_bytes": size, "results": results})
    )


if __name__ == "__main__":
    distributed.run(main)
