"""Processes: who am I, which device do I own, how do I draw random numbers, how do I stop."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from fastvideo.errors import UserError, launch_rank
from fastvideo.parallel import devices
from fastvideo.parallel.process import end_with
from fastvideo.parallel.watch import FINISHED, Watch, from_collective

T = TypeVar("T")
_watch: Watch | None = None  # of the process group, which is global too


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes.

    rank: 0 to world_size - 1.
    world_size: number of processes.
    device: the device this process computes on.
    sp_size: neighbouring processes that compute each sample together, by sequence parallelism. Such a group holds the same prompts,
        noise and rewards; each of the dp_size groups has its own share of an iteration's prompts.
    sp_group: this process's group for that, None if sp_size is 1.
    """

    rank: int
    world_size: int
    device: torch.device
    sp_size: int = 1
    sp_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def layout(self) -> str:
        return f"{self.world_size} process{'es' * (self.world_size > 1)}" + (f" in groups of {self.sp_size}" if self.sp_size > 1 else "")

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.sp_size


def init(sp_size: int = 1, timeout_minutes: float = 30) -> Ranks:
    """Join the process group and return this process's place in it. GPU tensors travel by NCCL, CPU tensors and objects by gloo.

    Works under torchrun and under plain python, where the group has one member. `timeout_minutes` bounds every collective; a process
    lost or hanging for that long ends the job, and is named (watch.py). Raises UserError if groups of `sp_size` do not fit the number of
    processes, and for a missing GPU (devices.py).
    """
    timeout = timedelta(minutes=timeout_minutes)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it under plain python too
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts the processes again: what an earlier attempt left there is not ours
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set_timeout(timeout)
        if world_size > 1:
            global _watch
            _watch = Watch(store, rank, world_size, timeout)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("srun started several processes that do not know of each other: start torchrun in one task a node")
    if fault := devices.fault(store, rank, world_size, timeout):
        error = UserError(fault)
        error.on_all_ranks = True
        raise error
    device = torch.device("cpu")
    if devices.on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    settings = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    dist.init_process_group(**settings, timeout=timeout, store=store, rank=rank, world_size=world_size)
    if world_size % sp_size:
        raise UserError(f"--sp_size {sp_size} does not divide the number of processes, {world_size}")
    if sp_size == 1:
        return Ranks(rank, world_size, device)
    groups = [new_group(range(first, first + sp_size)) for first in range(0, world_size, sp_size)]
    return Ranks(rank, world_size, device, sp_size, groups[rank // sp_size])


def new_group(ranks: range) -> dist.ProcessGroup:
    """Collective over all processes. A group of `ranks` with the backends of all processes' and their timeout, not PyTorch's own."""
    return dist.new_group(ranks, timeout=dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What networks compute in: "float32", "bfloat16", or "auto", which is bfloat16 on a GPU and float32 on a CPU."""
    return getattr(torch, name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and end the process: with exit code 0, with 1 after an error's traceback, with a `UserError`'s code and its sentence.

    The environment variable FASTVIDEO_ERROR_FILE names a file that gets the sentence too, if its exit code is 2.

    A collective that fails because a process is lost becomes one sentence that names it, from the lowest rank left, and exit code 1.
    """
    end_with(lambda: exit_code_of(main))


def exit_code_of(main: Callable[[], None]) -> int:
    """Call `main` as `run` does, and give the exit code; other exceptions than UserError are raised."""
    try:
        main()
    except KeyboardInterrupt:
        if launch_rank() == 0:
            print("interrupted; the same command goes on from what is finished", file=sys.stderr, flush=True)
        os._exit(130)  # the process group's threads would wait for each other
    except UserError as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever listened for it has ended
        if _watch:
            _watch.stop(FINISHED if error.on_all_ranks else str(error))
        if launch_rank() != 0 and error.exit_code == 2:
            # An error of all ranks is told by rank 0, after which torchrun ends this process; else it is ours to tell. Before they have
            # met, rank 0 may be far behind.
            time.sleep(10 if _watch else 60)
            error.on_all_ranks |= _watch is not None and _watch.last_word(0) == str(error)
        elif error.exit_code == 2 and (file := os.environ.get("FASTVIDEO_ERROR_FILE")):
            Path(file).write_text(f"{error}\n")  # for who starts it again: that would be in vain
        if launch_rank() == 0 or not error.on_all_ranks:
            print(f"error: {error}" if error.exit_code == 2 else error, file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        if _watch and from_collective(error):
            _watch.give_up(error)
        if _watch:
            _watch.stop(f"{type(error).__name__}: {error}")
        raise
    if _watch:
        _watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def first_error(error: UserError | None) -> UserError | None:
    """Collective. The first of the errors that processes bring, on all of them, so that all stop together and rank 0 can say why."""
    first = next((raised for raised in all_gather_object(error) if raised is not None), None)
    if first is not None:
        first.on_all_ranks = True
    return first


def together(function: Callable[[], T]) -> T:
    """Collective. Call `function` on every process and return its value; if it raises UserError on any, raise the first one on all."""
    value = error = None
    try:
        value = function()
    except UserError as raised:
        error = raised
    if error := first_error(error):
        raise error
    return value


def on_main(function: Callable[[], T]) -> T:
    """Collective. Call `function` on rank 0 alone and give its value, a small Python object, or its UserError to every process."""
    return all_gather_object(together(function if dist.get_rank() == 0 else lambda: None))[0]


def all_gather_object(value: object) -> list:
    """Collective. `value` of every process, in rank order; for small Python objects."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Collective. The sum of `values` over all processes, on each. Where all but one have zeros it is that one's value, exactly."""
    dist.all_reduce(values)
    return values


def collect_on_main(own: dict[int, torch.Tensor], owners: list[int]) -> torch.Tensor | None:
    """Collective. Rows that different processes hold, concatenated on the CPU of rank 0; None on others.

    own: place -> this process's row (1, ...), all rows of one shape. owners: the rank that has each place; place 0 is rank 0's.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Not by send and receive: those count as collectives of the two alone, and by these counts `fastvideo.parallel.watch` finds who hangs.
    rows = [own[place].cpu().contiguous().view(torch.uint8).flatten() for place in sorted(own)]
    sent = torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8)
    sizes = [owners.count(owner) * rows[0].numel() if rank == 0 else 0 for owner in range(world_size)]  # bytes from each
    received = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, sizes, [len(sent)] + [0] * (world_size - 1))
    if rank != 0:
        return None
    places = sorted(range(len(owners)), key=owners.__getitem__)  # in the order in which the rows have come
    rows = received.view(own[0].dtype).view(len(owners), *own[0].shape[1:])
    return rows[torch.tensor(places).argsort()]


def keyed_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator that depends on its key alone, never on the rank or on earlier draws.

    The same (seed, purpose, key) gives the same numbers on any number of processes, at any batch size, and after a resume.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
