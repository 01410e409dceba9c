"""What this process computes on: a GPU where there are any, and the CPU only where it is meant."""

import json
import os
import re
import resource
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.store import synchronize

DEV, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
CPU_ASKED = os.environ.get("DS_ACCELERATOR") == "cpu"  # by who starts the run: later `fastvideo.parallel.zero` sets it for DeepSpeed


def on_gpu() -> bool:
    return torch.cuda.is_available() and not CPU_ASKED


def peak_memory_gib() -> float:
    """Peak GPU memory of this process in GiB; without a GPU, its peak resident memory."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kibibytes / 2**20


def own_fault() -> str:
    """Why this process cannot compute where it should; "" if it can."""
    if on_gpu():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        few = (
            f"LOCAL_RANK {local} has no GPU, of which {count} can be seen here: start as many processes a node as it has (--nproc_per_node)"
        )
        return few if local >= count else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    signs = [str(path) for path in sorted(DEV.glob("nvidia[0-9]*"))[:1]]
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        value = os.environ.get(name, "")
        if value not in ("", "-1", "NoDevFiles") and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            signs.append(f"{name}={value}")
    if CPU_ASKED or not signs:
        return ""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    driver = re.search(r"\d{3}\.[\d.]+", DRIVER.read_text()) if DRIVER.exists() else None
    state = f"the driver is {driver[0]}" if driver else "no driver's version can be read"
    hidden = f", CUDA_VISIBLE_DEVICES is '{visible}'" if visible in ("", "-1", "NoDevFiles") else ""
    return (
        f"there are GPUs ({', '.join(signs)}), but PyTorch {torch.__version__}, built {built}, finds none ({state}{hidden}): CUDA 13, for "
        "which PyPI's is built, needs driver 580 or newer, an older one PyTorch's wheel for CUDA 12; DS_ACCELERATOR=cpu runs on the CPU"
    )


def fault(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Collective, by `store` alone: there is no group yet. Why the processes cannot compute together, the same on all; "" if they can."""
    own = json.dumps([socket.gethostname(), "GPU" if on_gpu() else "CPU", own_fault()])
    told = [json.loads(text) for text in synchronize(store, own.encode(), rank, world_size, "device/", timeout.total_seconds())]
    for place, (host, _, reason) in enumerate(told):
        if reason:
            return f"rank {place} on {host}: {reason}"
    first = {kind: f"rank {place} on {host}" for place, (host, kind, _) in reversed(list(enumerate(told)))}
    if len(first) == 1:
        return ""
    return f"{first['CPU']} computes on the CPU, {first['GPU']} on a GPU: start all with GPUs, or all with DS_ACCELERATOR=cpu"
