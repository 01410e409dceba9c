"""What tests/test_start.py has measured, on as many processes as it is started with: python start_worker.py OUTPUT.json FOLDER...

Each FOLDER is a model folder, whose network is loaded as training does. Rank 0 writes {folder: [measurements of each rank]}.
"""

import hashlib
import json
import sys
from pathlib import Path

import diffusers
import torch

from fastvideo import distributed, zero
from fastvideo.pretrained import load_network

DTYPES = (torch.float32, torch.bfloat16)


def memory(name: str) -> int:
    """Bytes of this process: RssAnon is its own memory, RssFile what it has read of files that are mapped into memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def bytes_read() -> int:
    """By calls of read, from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def digest(model: torch.nn.Module) -> str:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    described = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors]
    contents = [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in tensors]
    return hashlib.sha256("".join(described).encode() + b"".join(contents)).hexdigest()


def measure(folder: Path, dtype: torch.dtype, ranks: distributed.Ranks) -> list[dict]:
    subfolder = "unet" if (folder / "unet").is_dir() else "transformer"
    model_class = getattr(diffusers, json.loads((folder / subfolder / "config.json").read_bytes())["_class_name"])
    before = {"read": bytes_read(), "mapped": memory("RssFile"), "own": memory("RssAnon")}
    model = load_network(model_class, folder, subfolder, dtype, ranks)
    row = {"read": bytes_read() - before["read"], "mapped": memory("RssFile") - before["mapped"], "own": memory("RssAnon") - before["own"]}
    row["meta"] = sum(tensor.is_meta for tensor in model.parameters()) / len(list(model.parameters()))
    if memory_only := sum(weight.nbytes for weight in model.parameters()) > 2**28:
        return distributed.all_gather_object(row | {"memory_only": memory_only})
    loaded = digest(model) if ranks.is_main else ""
    settings = {"offload": False, "learning_rate": 1e-5, "weight_decay": 0.0, "lr_multiplier": lambda update: 1.0, "max_grad_norm": 1.0}
    settings |= {"micro_batch_size": 1, "accumulation_steps": 1, "stage": 1}
    engine = zero.initialize(model.to(torch.float32), dtype=torch.float32, **settings) if dtype == torch.float32 else None
    row |= {"loaded": loaded, "digest": digest(engine.module) if engine else ""}
    row["layout"] = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    return distributed.all_gather_object(row)


def main() -> None:
    output, *folders = map(Path, sys.argv[1:])
    ranks = distributed.init(timeout_minutes=2)
    measured = {f"{folder} {dtype}": measure(folder, dtype, ranks) for folder in folders for dtype in DTYPES}
    if ranks.is_main:
        output.write_text(json.dumps(measured))


if __name__ == "__main__":
    distributed.run(main)
