"""Networks of full size on fake tensors, which have a shape and a dtype but no memory: stand-ins for files, and a count of bytes."""

import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvideo.models.families import FAMILIES


class FakeCache:
    """An embedding cache of any number of prompts, on whatever device tensors are made on."""

    path, unconditional = Path("cache"), 9

    def __init__(self, shapes: dict, height: int, width: int):
        self.shapes, self.fingerprint = shapes, {"height": height, "width": width}

    def get(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.ones(len(indices), *shape, dtype=torch.bfloat16) for name, shape in self.shapes.items()}


def make_schedule(module: ModuleType, args: Any, steps: int) -> Any:
    """What the script calls its time schedule, of `steps` steps."""
    if hasattr(args, "shift"):
        return module.time_schedule(steps, args.shift)
    with tempfile.TemporaryDirectory() as folder:
        scheduler, settings = FAMILIES[module.__name__.removeprefix("train_grpo_")].scheduler
        getattr(diffusers, scheduler).from_config(settings).save_pretrained(Path(folder, "scheduler"))
        return module.time_schedule(steps, Path(folder))


def size(tensors: Any) -> int:
    """Bytes of their storages, each once."""
    return sum({leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in tree_leaves(tensors)}.values())


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, each storage once: `alive`, and `most` since it was last set.

    apart: tensors that are not counted, though operations return views of them.
    """

    def __init__(self, apart: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive, self.most, self.known = 0, 0, {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return output

    def freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.alive -= size
