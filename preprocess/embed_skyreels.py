"""Encode prompts, their reference images and the empty prompt into an embedding cache, which train_grpo_skyreels.py reads.

python preprocess/embed_skyreels.py --model DIR --prompts FILE.jsonl --output_dir CACHE, alone or under torchrun, on GPUs or CPUs. A killed
run continues when started again with the same flags.
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
from diffusers import AutoencoderKLHunyuanVideo, HunyuanSkyreelsImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE
from transformers import CLIPTextModel, LlamaModel

from fastvideo.embeddings.cache import write_cache
from fastvideo.embeddings.encoders import UNCONDITIONAL, check_images, in_template, load_encoders, read_image, report_prompts, start
from fastvideo.embeddings.fingerprint import encoder_fingerprint
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError, launch_rank
from fastvideo.models.model_folder import check_model
from fastvideo.models.pretrained import load_pretrained
from fastvideo.models.tokenizers import token_digest
from fastvideo.parallel.distributed import on_main, run

FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@dataclass
class Args:
    """Encode prompts, their reference images and the empty prompt into an embedding cache."""

    model: str
    """SkyReels-I2V folder in diffusers format; its transformer is not needed."""
    prompts: str
    """Prompt file: .jsonl, one object with a "prompt" and an "image" a line, the path of an image, relative to the file."""
    output_dir: str
    """Folder of the cache. That of a killed run with the same flags is continued."""
    height: int = 400
    """Of the images, and of the videos in training; a multiple of 16."""
    width: int = 640
    """Of the images, and of the videos in training; a multiple of 16."""
    resize: bool = False
    """Stretch images of another size to --height and --width, as the pipeline would: without keeping the ratio of their sides."""
    max_sequence_length: int | None = None
    """Tokens of the LLaMA embedding, after the pipeline's prompt template; longer prompts are cut. Default: what the tokenizer allows, at
    most 256."""
    batch_size: int = 16
    """Prompts encoded at once."""
    shard_size: int = 64
    """Prompts a file, at 2 MiB each and 0.25 MiB of image latents for 400 x 640 pixels, for SkyReels-V1 in bfloat16."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the text encoders and the cached text; auto: bfloat16 on a GPU, float32 on a CPU. The VAE and the image latents are float32."""

    def __post_init__(self):
        if not self.prompts.endswith(".jsonl"):
            raise UserError(f'--prompts {self.prompts} must be a .jsonl file of objects with a "prompt" and an "image"')
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= 256:
            raise UserError(f"--max_sequence_length must be from 1 to SkyReels' 256, not {self.max_sequence_length}")
        if min(self.height, self.width) < 16 or self.height % 16 or self.width % 16:
            raise UserError(f"--height {self.height} and --width {self.width} must be multiples of 16")


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=launch_rank() == 0)
    ranks, dtype = start(args.model, args.dtype, batch_size=args.batch_size, shard_size=args.shard_size)
    on_main(lambda: check_model(args.model, "skyreels", "embedding"))
    rows, report = on_main(lambda: read_prompts(args.prompts, identity=("prompt", "image")))
    rows = on_main(lambda: check_images(rows, report["lines"], args.prompts, None if args.resize else (args.width, args.height)))
    text_encoder = load_pretrained(LlamaModel, args.model, "text_encoder", dtype=dtype)
    text_encoder_2 = load_pretrained(CLIPTextModel, args.model, "text_encoder_2", dtype=dtype)
    vae = load_pretrained(AutoencoderKLHunyuanVideo, args.model, "vae", dtype=torch.float32).to(ranks.device)
    components = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "vae": vae, "transformer": None}
    pipeline = load_encoders(HunyuanSkyreelsImageToVideoPipeline, args.model, **components).to(ranks.device)
    length = args.max_sequence_length or min(256, pipeline.tokenizer.model_max_length)
    settings = {"family": "skyreels", "max_sequence_length": length, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {"height": args.height, "width": args.width}
    fingerprint = on_main(lambda: encoder_fingerprint(args.model, FOLDERS, token_ids=token_digest(pipeline.components), **settings))
    report_prompts(rows, report, in_template(pipeline.tokenizer, TEMPLATE), length, ranks)

    def encode_image(row: dict) -> torch.Tensor:
        """(C, 1, h, w): the mean of the VAE's posterior for the reference image, scaled. The empty prompt has none: zeros, never read."""
        if row == UNCONDITIONAL:
            ratio = vae.spatial_compression_ratio
            return torch.zeros(vae.config.latent_channels, 1, args.height // ratio, args.width // ratio, device=ranks.device)
        image = pipeline.video_processor.preprocess(read_image(row["image"]), args.height, args.width).to(ranks.device)
        return vae.encode(image[:, :, None]).latent_dist.mode()[0] * vae.config.scaling_factor

    @torch.inference_mode()
    def encode(batch: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [row["prompt"] for row in batch]
        prompt_embeds, pooled_prompt_embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
        text = {"prompt_embeds": prompt_embeds, "prompt_attention_mask": mask, "pooled_prompt_embeds": pooled_prompt_embeds}
        return text | {"image_latents": torch.stack([encode_image(row) for row in batch])}

    write_cache(args.output_dir, [*rows, UNCONDITIONAL], encode, fingerprint, ranks, args.shard_size, args.batch_size)
    if ranks.is_main:
        print(f"{len(rows)} prompts of {args.prompts} with their images, and the empty prompt: {args.output_dir}")


if __name__ == "__main__":
    run(main)
