"""Encode a prompt file, and the empty prompt, with Stable Diffusion's CLIP into an embedding cache, which train_grpo_sd.py reads.

python preprocess/embed_sd.py --model DIR --prompts FILE --output_dir CACHE, alone or under torchrun, on GPUs or CPUs. A killed run
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
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from fastvideo.embeddings.cache import write_cache
from fastvideo.embeddings.encoders import UNCONDITIONAL, load_encoders, report_prompts, start
from fastvideo.embeddings.fingerprint import encoder_fingerprint
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import launch_rank
from fastvideo.models.model_folder import check_model
from fastvideo.models.pretrained import load_pretrained
from fastvideo.models.tokenizers import token_digest
from fastvideo.parallel.distributed import on_main, run

FOLDERS = ("text_encoder", "tokenizer")
NOT_NEEDED = {"unet": None, "vae": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@dataclass
class Args:
    """Encode a prompt file, and the empty prompt, with Stable Diffusion's text encoder into an embedding cache."""

    model: str
    """Stable Diffusion folder in diffusers format; its UNet, VAE and safety checker are not needed."""
    prompts: str
    """Prompt file: .txt, one prompt a line, or .jsonl, one object with a "prompt" a line."""
    output_dir: str
    """Folder of the cache. That of a killed run with the same flags is continued."""
    batch_size: int = 16
    """Prompts encoded at once, cut at the tokens that the tokenizer allows."""
    shard_size: int = 256
    """Prompts a file, at 0.12 MB each for Stable Diffusion v1.4 in bfloat16."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the encoder and the cache; auto: bfloat16 on a GPU, float32 on a CPU."""


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=launch_rank() == 0)
    ranks, dtype = start(args.model, args.dtype, batch_size=args.batch_size, shard_size=args.shard_size)
    on_main(lambda: check_model(args.model, "sd", "embedding"))
    rows, report = on_main(lambda: read_prompts(args.prompts))
    text_encoder = load_pretrained(CLIPTextModel, args.model, "text_encoder", dtype=dtype)
    pipeline = load_encoders(StableDiffusionPipeline, args.model, text_encoder=text_encoder, **NOT_NEEDED).to(ranks.device)
    settings = {"family": "sd", "dtype": str(dtype).removeprefix("torch.")}
    fingerprint = on_main(lambda: encoder_fingerprint(args.model, FOLDERS, token_ids=token_digest(pipeline.components), **settings))
    report_prompts(rows, report, lambda prompts: pipeline.tokenizer(prompts).input_ids, pipeline.tokenizer.model_max_length, ranks)

    @torch.inference_mode()
    def encode(batch: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [row["prompt"] for row in batch]
        prompt_embeds, _ = pipeline.encode_prompt(prompts, ranks.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}

    write_cache(args.output_dir, [*rows, UNCONDITIONAL], encode, fingerprint, ranks, args.shard_size, args.batch_size)
    if ranks.is_main:
        print(f"{len(rows)} prompts of {args.prompts} and the empty prompt: {args.output_dir}")


if __name__ == "__main__":
    run(main)
