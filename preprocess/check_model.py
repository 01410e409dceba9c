"""Say in seconds whether a model folder is complete: from its JSON files and the heads of its safetensors files, without its weights.

python preprocess/check_model.py MODEL [--family flux] [--use training]. Exit code 0: complete; 2: it is not, and why.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # models come from folders, never from a hub
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import tyro

from fastvideo.models.families import FAMILIES
from fastvideo.models.families.family import Use
from fastvideo.models.model_folder import check_model
from fastvideo.parallel.distributed import run


@dataclass
class Args:
    """Say whether a model folder is complete, without loading it."""

    model: tyro.conf.Positional[Path]
    """Model folder in diffusers format (docs/models.md)."""
    family: Literal[tuple(FAMILIES)] | None = None
    """Whose scripts it is for: train_grpo_FAMILY.py. Default: what its model_index.json says."""
    use: Use = "evaluation"
    """What it is for: evaluation needs all of it, training no text encoders, embedding no network."""


def main() -> None:
    args = tyro.cli(Args, use_underscores=True)
    sizes = check_model(args.model, args.family, args.use, "MODEL")
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
    print(f"{args.model} is complete for {args.use}: {parts}")


if __name__ == "__main__":
    run(main)
