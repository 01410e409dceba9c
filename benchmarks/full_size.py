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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DDIMScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.common import print_table  # noqa: E402 (run as a script, Python knows only this file's folder)
from fastvideo import rewards  # noqa: E402
from fastvideo.embeddings.cache import write_cache  # noqa: E402
from fastvideo.models.model_folder import FAMILIES  # noqa: E402
from fastvideo.parallel import distributed  # noqa: E402
from fastvideo.parallel.distributed import Ranks  # noqa: E402
from fastvideo.runs import checkpoint, tracking  # noqa: E402

IMAGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
FLUX_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
HUNYUAN_VAE = (AutoencoderKLHunyuanVideo, {})
LLAMA_AND_CLIP = {"prompt_embeds": (256, 4096), "prompt_attention_mask": (256,), "pooled_prompt_embeds": (768,)}


@dataclass(frozen=True)
class FullSize:
    """network, vae: class and the settings of its published config.json that are not the class's defaults. parameters: published number.

    cached: shapes of a prompt's embeddings. latents: expected, of one sample. flags: of the script, where they are not its defaults.
    """

    script: str
    network: tuple
    parameters: int
    vae: tuple
    cached: dict
    latents: tuple[int, ...]
    media: tuple[int, ...]
    flags: dict = field(default_factory=dict)


MODELS = {
    "sd_v1.4": FullSize(
        "train_grpo_sd",
        (UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
        859_520_964,
        (AutoencoderKL, IMAGE_VAE | {"latent_channels": 4, "scaling_factor": 0.18215}),
        {"prompt_embeds": (77, 768)},
        (4, 64, 64),
        (3, 512, 512),
    ),
    "flux.1-dev": FullSize(
        "train_grpo_flux",
        (FluxTransformer2DModel, {"guidance_embeds": True}),
        11_901_408_320,
        (AutoencoderKL, IMAGE_VAE | FLUX_VAE),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        (45 * 45, 64),
        (3, 720, 720),
    ),
    "hunyuan_video": FullSize(
        "train_grpo_hunyuan",
        (HunyuanVideoTransformer3DModel, {"guidance_embeds": True}),
        12_821_012_544,
        HUNYUAN_VAE,
        LLAMA_AND_CLIP,
        (16, 14, 60, 60),
        (3, 53, 480, 480),
    ),
    "hunyuan_image": FullSize(
        "train_grpo_hunyuan",
        (HunyuanVideoTransformer3DModel, {"guidance_embeds": True}),
        12_821_012_544,
        HUNYUAN_VAE,
        LLAMA_AND_CLIP,
        (16, 1, 90, 90),
        (3, 720, 720),
        {"num_frames": 1, "height": 720, "width": 720},
    ),
    "skyreels_i2v": FullSize(
        "train_grpo_skyreels",
        (HunyuanVideoTransformer3DModel, {"in_channels": 32, "guidance_embeds": True}),
        12_821_209_152,
        HUNYUAN_VAE,
        LLAMA_AND_CLIP | {"image_latents": (16, 1, 50, 80)},
        (16, 14, 50, 80),
        (3, 53, 400, 640),
    ),
    "wan_2.1_t2v_1.3b": FullSize(
        "train_grpo_wan",
        (WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        1_418_996_800,
        (AutoencoderKLWan, {}),
        {"prompt_embeds": (512, 4096)},
        (16, 21, 60, 104),
        (3, 81, 480, 832),
    ),
}
PROMPTS = 8


def make_model(model: FullSize, folder: Path) -> None:
    """A model folder with random weights in bfloat16 (8 to 26 GB), made where that is fast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name, (kind, config) in (("unet" if model.script == "train_grpo_sd" else "transformer", model.network), ("vae", model.vae)):
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            network = kind(**config)
        torch.set_default_dtype(torch.float32)
        network.save_pretrained(folder / name, max_shard_size="4GB")
        del network
    pipeline = FAMILIES[model.script.removeprefix("train_grpo_")].pipeline
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if model.script == "train_grpo_sd":
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).save_pretrained(
            folder / "scheduler"
        )


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
