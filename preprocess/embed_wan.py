"""Encode a prompt file, and the empty prompt, with Wan's UMT5 into an embedding cache, which train_grpo_wan.py reads.

python preprocess/embed_wan.py --model DIR --prompts FILE --output_dir CACHE, alone or under torchrun, on GPUs or CPUs. A killed run
continues when started again with the same flags.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # models come from folders, never from a hub
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import torch
import tyro
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import UMT5EncoderModel

from fastvideo.embeddings.cache import write_cache
from fastvideo.embeddings.encoders import UNCONDITIONAL, load_encoders, report_prompts, start
from fastvideo.embeddings.fingerprint import encoder_fingerprint
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError, launch_rank
from fastvideo.models.model_folder import check_model
from fastvideo.models.pretrained import load_pretrained
from fastvideo.models.tokenizers import token_digest
from fastvideo.parallel.distributed import on_main, run

FOLDERS = ("text_encoder", "tokenizer")


@dataclass
class Args:
    """Encode a prompt file, and the empty prompt, with Wan's text encoder into an embedding cache."""

    model: str
    """Wan 2.1 folder in diffusers format; its transformer and VAE are not needed."""
    prompts: str
    """Prompt file: .txt, one prompt a line, or .jsonl, one object with a "prompt" a line."""
    output_dir: str
    """Folder of the cache. That of a killed run with the same flags is continued."""
    max_sequence_length: int | None = None
    """Tokens of the UMT5 embedding; longer prompts are cut. Default: what the tokenizer allows, at most 512."""
    batch_size: int = 16
    """Prompts encoded at once."""
    shard_size: int = 64
    """Prompts a file, at 4 MiB each for Wan 2.1 in bfloat16."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the encoder and the cache; auto: bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self):
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= 512:
            raise UserError(f"--max_sequence_length must be from 1 to Wan's 512, not {self.max_sequence_length}")


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=launch_rank() == 0)
    ranks, dtype = start(args.model, args.dtype, batch_size=args.batch_size, shard_size=args.shard_size)
    on_main(lambda: check_model(args.model, "wan", "embedding"))
    rows, report = on_main(lambda: read_prompts(args.prompts))
    text_encoder = load_pretrained(UMT5EncoderModel, args.model, "text_encoder", dtype=dtype)
    pipeline = load_encoders(WanPipeline, args.model, text_encoder=text_encoder, transformer=None, vae=None).to(ranks.device)
    length = args.max_sequence_length or min(512, pipeline.tokenizer.model_max_length)
    settings = {"family": "wan", "max_sequence_length": length, "dtype": str(dtype).removeprefix("torch.")}
    fingerprint = on_main(lambda: encoder_fingerprint(args.model, FOLDERS, token_ids=token_digest(pipeline.components), **settings))
    report_prompts(rows, report, lambda prompts: pipeline.tokenizer([prompt_clean(p) for p in prompts]).input_ids, length, ranks)

    @torch.inference_mode()
    def encode(batch: list[dict]) -> dict[str, torch.Tensor]:
        # The empty prompt, which ends the rows, is our choice of a negative one, and WanPipeline's. Wan's own code has a list of flaws.
        prompts = [row["prompt"] for row in batch]
        prompt_embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
        return {"prompt_embeds": prompt_embeds}

    write_cache(args.output_dir, [*rows, UNCONDITIONAL], encode, fingerprint, ranks, args.shard_size, args.batch_size)
    if ranks.is_main:
        print(f"{len(rows)} prompts of {args.prompts} and the empty prompt: {args.output_dir}")


if __name__ == "__main__":
    run(main)
