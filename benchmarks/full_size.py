"""What an iteration costs at full size: a published configuration with random weights, trained by its own script.

    python benchmarks/full_size.py --model flux.1-dev --folder /dev/shm/full --lora_rank 32 --gradient_checkpointing
    torchrun --standalone --nproc_per_node 8 benchmarks/full_size.py --model hunyuan_video --folder /scratch/full --sp_size 4 ...

Writes a model folder and a cache of random embeddings into --folder, once; all other flags go to the training script as they are. The
reward is the brightness of the samples, which costs nothing, and nothing is saved. Prints the script's own seconds and memory of each
iteration, and a JSON line.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import torch
import tyro

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.common import print_table  # noqa: E402 (run as a script, Python knows only this file's folder)
from fastvideo import rewards  # noqa: E402
from fastvideo.embeddings.cache import write_cache  # noqa: E402
from fastvideo.models.families import FAMILIES  # noqa: E402
from fastvideo.models.families.family import Family  # noqa: E402
from fastvideo.parallel import distributed  # noqa: E402
from fastvideo.parallel.distributed import Ranks  # noqa: E402
from fastvideo.runs import checkpoint, tracking  # noqa: E402


@dataclass(frozen=True)
class FullSize:
    """The published facts of fastvideo/models/families with classes for names, and one size: what the benchmarks and tests ask for."""

    script: str
    network: tuple
    parameters: int
    vae: tuple
    cached: dict
    latents: tuple[int, ...]
    media: tuple[int, ...]
    flags: dict

    @property
    def family(self) -> Family:
        return FAMILIES[self.script.removeprefix("train_grpo_")]


MODELS = {
    title: FullSize(
        f"train_grpo_{name}",
        (getattr(diffusers, family.network.class_name), family.network.published),
        family.parameters,
        (getattr(diffusers, family.vae.class_name), family.vae.published),
        family.cached,
        size.latents,
        size.media,
        size.flags,
    )
    for name, family in FAMILIES.items()
    for title, size in family.full_size.items()
}
PROMPTS = 8


def make_model(model: FullSize, folder: Path) -> None:
    """A model folder with random weights in bfloat16 (8 to 26 GB), made where that is fast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name, (kind, config) in ((model.family.network_folder, model.network), ("vae", model.vae)):
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            network = kind(**config)
        torch.set_default_dtype(torch.float32)
        network.save_pretrained(folder / name, max_shard_size="4GB")
        del network
    (folder / "model_index.json").write_text(json.dumps({"_class_name": model.family.pipeline}))
    scheduler, settings = model.family.scheduler
    getattr(diffusers, scheduler).from_config(settings).save_pretrained(folder / "scheduler")


def make_cache(model: FullSize, folder: Path) -> None:
    def encode(rows: list[dict]) -> dict[str, torch.Tensor]:
        masks = {name: torch.ones(len(rows), *shape, dtype=torch.bool) for name, shape in model.cached.items() if name.endswith("mask")}
        return {name: torch.randn(len(rows), *shape, dtype=torch.bfloat16) for name, shape in model.cached.items()} | masks

    family = model.script.removeprefix("train_grpo_")
    fingerprint = {"family": family, "max_sequence_length": 512, "height": model.media[-2], "width": model.media[-1]}
    rows = [{"prompt": f"prompt {i}"} for i in range(PROMPTS)] + [{"prompt": ""}]
    write_cache(folder, rows, encode, fingerprint, Ranks(0, 1, torch.device("cpu")), shard_size=16, batch_size=16)


def brightness(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
    """Of pictures (B, 3, H, W) or clips (B, 3, F, H, W): their mean, (B,) in [-1, 1]."""
    return media.flatten(1).mean(1)


@dataclass
class Args:
    model: Literal[tuple(MODELS)]
    """Which published configuration."""
    folder: Path
    """Where the model, the embeddings and the runs go; a local disk or memory of 26 GB."""
    make_only: bool = False
    """Write the model folder and the embeddings, and do not train."""


def main() -> None:
    args, flags = tyro.cli(Args, use_underscores=True, return_unknown_args=True, description=__doc__.splitlines()[0])
    model, folder = MODELS[args.model], args.folder / args.model
    if args.make_only:
        distributed.init()
        make_model(model, folder / "model")
        make_cache(model, folder / "embeddings")
        return
    if distributed.launch_rank() == 0 and not (folder / "embeddings" / "index.json").is_file():
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        made = [sys.executable, __file__, "--model", args.model, "--folder", str(args.folder), "--make_only"]
        subprocess.run(made, env=alone, check=True)

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    rewards.REWARDS["brightness"] = lambda path, device: brightness
    checkpoint.save = checkpoint.export = lambda *_: None
    given = {"model": folder / "model", "embeddings": folder / "embeddings", "output_dir": run, "rewards": "brightness"} | model.flags
    given |= {"iterations": 2, "sample_every": 0}
    sys.argv = [f"{model.script}.py", *(word for name, value in given.items() for word in (f"--{name}", str(value))), "--trackers", *flags]
    runpy.run_path(str(REPOSITORY / f"{model.script}.py"), run_name="__main__")
    if distributed.launch_rank() == 0:
        rows = tracking.read_metrics(run)
        columns = {"seconds": "time/iteration_s", "rollout": "time/rollout_s", "decode": "time/decode_s", "update": "time/update_s"}
        columns |= {"samples/s": "throughput/samples_per_s", "peak GiB": "memory/peak_gib", "max |ratio - 1|": "policy/ratio_max_dev"}
        print_table([{"iteration": str(row["iteration"])} | {name: f"{row[key]:.3g}" for name, key in columns.items()} for row in rows])
        print(json.dumps({"model": args.model, "flags": flags, "iterations": rows}))


if __name__ == "__main__":
    distributed.run(main)
