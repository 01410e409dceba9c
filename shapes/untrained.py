"""Make a model folder of a family's own classes, tiny and with random weights: all that embedding, training and evaluation read.

    python shapes/untrained.py flux runs/untrained

The sizes are those of fastvideo/models/families, the tokenizers those of shapes/models. The same seed makes the same bytes.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import diffusers
import torch
import transformers
import tyro

from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.models.families.family import Part
from fastvideo.models.tokenizers import load_tokenizer
from fastvideo.parallel.distributed import run

MODELS = Path(__file__).resolve().parent / "models"


def make(family: str, folder: Path, seed: int = 0) -> None:
    """Write the folder. Raises UserError if there is anything at its place."""
    if folder.exists():
        raise UserError(f"FOLDER {folder} exists already")
    facts = FAMILIES[family]
    index: dict[str, object] = {"_class_name": facts.pipeline, "_diffusers_version": diffusers.__version__}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, part in ((facts.network_folder, facts.network), ("vae", facts.vae)):
            getattr(diffusers, part.class_name)(**part.tiny).save_pretrained(folder / name)
            index[name] = ["diffusers", part.class_name]
        for name, part in facts.encoders.items():
            text_encoder(part).save_pretrained(folder / name)
            index[name] = ["transformers", part.class_name]
            tokenizer, source = name.replace("text_encoder", "tokenizer"), MODELS / part.tokenizer
            shutil.copytree(source, folder / tokenizer)
            index[tokenizer] = json.loads((source.parent / "model_index.json").read_bytes())[source.name]
    scheduler, settings = facts.scheduler
    getattr(diffusers, scheduler).from_config(settings).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", scheduler]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def text_encoder(part: Part) -> transformers.PreTrainedModel:
    """For the vocabulary and the special tokens of its tokenizer."""
    tokenizer = load_tokenizer(MODELS / part.tokenizer, None, "NAME")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model_class = getattr(transformers, part.class_name)
    known = {name: number for name, number in special.items() if number is not None}
    return model_class(model_class.config_class(vocab_size=len(tokenizer), **known, **part.tiny))


@dataclass
class Args:
    """Make a tiny model folder with random weights."""

    name: tyro.conf.Positional[Literal[tuple(FAMILIES)]]
    """Of train_grpo_NAME.py."""
    folder: tyro.conf.Positional[Path]
    """The new folder."""
    seed: int = 0
    """Of the weights."""


def main() -> None:
    args = tyro.cli(Args, use_underscores=True)
    transformers.logging.set_verbosity_error()  # it counts the tokens of what load_tokenizer compares
    transformers.logging.disable_progress_bar()
    make(args.name, args.folder, args.seed)
    print(f"written to {args.folder}")


if __name__ == "__main__":
    run(main)
