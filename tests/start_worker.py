"""What tests/test_start.py compares, on as many processes as it is started with: python start_worker.py OUTPUT.json FOLDER...

Each FOLDER is a model folder, whose network is loaded as training does. Rank 0 writes {"FOLDER DTYPE": [what each rank has]}.
"""

import hashlib
import json
import sys
from pathlib import Path

import diffusers
import torch

from fastvideo.models.pretrained import load_network
from fastvideo.parallel import distributed, zero

SETTINGS = {"stage": 1, "offload": False, "learning_rate": 1e-5, "weight_decay": 0.0, "lr_multiplier": lambda update: 1.0}
SETTINGS |= {"max_grad_norm": 1.0, "micro_batch_size": 1, "accumulation_steps": 1}


def digest(model: torch.nn.Module) -> str:
    """Of the names, dtypes, shapes and contents of all that is in a network."""
    checksum = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


def start(folder: Path, dtype: torch.dtype, ranks: distributed.Ranks) -> list[dict]:
    subfolder = "unet" if (folder / "unet").is_dir() else "transformer"
    model_class = getattr(diffusers, json.loads((folder / subfolder / "config.json").read_bytes())["_class_name"])
    model = load_network(model_class, folder, subfolder, dtype, ranks)
    row = {"meta": all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))}
    alone = model_class.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype)
    row["dtypes"] = [str(tensor.dtype) for tensor in (*model.parameters(), *model.buffers())]
    row["expected_dtypes"] = [str(tensor.dtype) for tensor in (*alone.parameters(), *alone.buffers())]
    engine = zero.initialize(model, dtype=dtype, **SETTINGS)
    expected = alone if dtype == torch.float32 else zero.initialize(alone, dtype=dtype, **SETTINGS).module  # DeepSpeed casts the rest
    return distributed.all_gather_object(row | {"digest": digest(engine.module), "expected_digest": digest(expected)})


def main() -> None:
    output, *folders = map(Path, sys.argv[1:])
    ranks = distributed.init(timeout_minutes=2)
    started = {f"{folder} {dtype}": start(folder, dtype, ranks) for folder in folders for dtype in (torch.float32, torch.bfloat16)}
    if ranks.is_main:
        output.write_text(json.dumps(started))


if __name__ == "__main__":
    distributed.run(main)
