"""Encode a prompt file with FLUX's text encoders (CLIP and T5) into an embedding cache, which train_grpo_flux.py reads.

python preprocess/embed_flux.py --model DIR --prompts FILE --output_dir CACHE, alone or under torchrun, on GPUs or CPUs. A killed run
continues when started again with the same flags.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # models come from folders, never from a hub
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import diffusers
import torch
import transformers
import tyro
from diffusers import FluxPipeline
from safetensors import SafetensorError
from transformers import CLIPTextModel, T5EncoderModel

from fastvideo.distributed import UserError, init, launch_rank, on_main, run
from fastvideo.embedding_cache import write_cache
from fastvideo.fingerprint import encoder_fingerprint
from fastvideo.pretrained import first_line, load_pretrained
from fastvideo.prompts import read_prompts

ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass
class Args:
    """Encode a prompt file with FLUX's text encoders into an embedding cache."""

    model: str
    """FLUX folder in diffusers format; its transformer and VAE are not needed."""
    prompts: str
    """Prompt file: .txt, one prompt a line, or .jsonl, one object with a "prompt" a line."""
    output_dir: str
    """Folder of the cache. That of a killed run with the same flags is continued."""
    max_sequence_length: int | None = None
    """Tokens of the T5 embedding; longer prompts are cut. Default: what tokenizer_2 allows, at most 512."""
    batch_size: int = 16
    """Prompts encoded at once."""
    shard_size: int = 64
    """Prompts a file, at 4 MiB each for FLUX.1-dev in bfloat16."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the encoders and the cache; auto: bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self):
        for flag in ("batch_size", "shard_size"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} must be at least 1, not {getattr(self, flag)}")
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= 512:
            raise UserError(f"--max_sequence_length must be from 1 to FLUX's 512, not {self.max_sequence_length}")


def load_encoders(model: str, dtype: torch.dtype) -> FluxPipeline:
    """FLUX's pipeline with tokenizers and text encoders only, on the CPU. Raises UserError for a missing or broken folder or file."""
    text_encoder = load_pretrained(CLIPTextModel, model, "text_encoder", dtype=dtype)
    text_encoder_2 = load_pretrained(T5EncoderModel, model, "text_encoder_2", dtype=dtype)
    try:
        pipeline = FluxPipeline.from_pretrained(
            model, text_encoder=text_encoder, text_encoder_2=text_encoder_2, transformer=None, vae=None, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"--model: {model} cannot be loaded as FluxPipeline: {first_line(error)}") from error
    for name in ("tokenizer", "tokenizer_2"):
        # Without these files transformers makes a tokenizer that knows no words, and says nothing.
        files = {kind: Path(model) / name / file for kind, file in getattr(pipeline, name).vocab_files_names.items()}
        in_one_file = files.pop("tokenizer_file")
        if not in_one_file.is_file() and not all(path.is_file() for path in files.values()):
            raise UserError(
                f"--model: {Path(model) / name} has no {in_one_file.name} and no {' and '.join(path.name for path in files.values())}"
            )
    return pipeline


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=launch_rank() == 0)
    if not Path(args.model).is_dir():
        raise UserError(f"--model: there is no folder {args.model}")
    ranks = init()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    rows, report = on_main(lambda: read_prompts(args.prompts))
    pipeline = load_encoders(args.model, getattr(torch, dtype)).to(ranks.device)
    length = args.max_sequence_length or min(512, pipeline.tokenizer_2.model_max_length)
    fingerprint = on_main(lambda: encoder_fingerprint(args.model, ENCODER_FOLDERS, family="flux", max_sequence_length=length, dtype=dtype))

    diffusers.logging.set_verbosity_error()  # both libraries would warn of each long prompt; the report below names them all at once
    transformers.logging.set_verbosity_error()
    token_ids = pipeline.tokenizer_2([row["prompt"] for row in rows]).input_ids
    over_long = [line for line, ids in zip(report["lines"], token_ids) if len(ids) > length]
    if ranks.is_main:
        for what, lines in (
            ("empty lines skipped", report["empty"]),
            ("duplicates dropped", report["duplicates"]),
            (f"prompts cut at {length} tokens", over_long),
        ):
            listed = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
            print(f"{len(lines)} {what}" + (f": line {listed}" if lines else ""), flush=True)

    @torch.inference_mode()
    def encode(batch: list[dict]) -> dict[str, torch.Tensor]:
        prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt([row["prompt"] for row in batch], max_sequence_length=length)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    write_cache(args.output_dir, rows, encode, fingerprint, ranks, args.shard_size, args.batch_size)
    if ranks.is_main:
        print(f"{len(rows)} prompts of {args.prompts} in {-(-len(rows) // args.shard_size)} shards: {args.output_dir}")


if __name__ == "__main__":
    run(main)
