"""Make the reference images of image-to-video training from a prompt file, with any text-to-image pipeline that diffusers loads.

python preprocess/make_reference_images.py --model DIR --prompts FILE --output_dir DIR --height H --width W, alone or under torchrun, on
GPUs or CPUs. The folder gets images/ and, when all are there, prompts.jsonl: each row with its picture as "image", a path that counts
from that file. A killed run continues when started again with the same flags.
"""

import hashlib
import io
import json
import math
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
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from fastvideo.embeddings.cache import refuse_difference
from fastvideo.embeddings.fingerprint import encoder_fingerprint
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError, first_line, launch_rank
from fastvideo.files import whole_file
from fastvideo.models.pretrained import load_pipeline
from fastvideo.models.tokenizers import token_digest
from fastvideo.parallel.distributed import all_gather_object, init, keyed_generator, on_main, run, together

Job = tuple[int, int]  # index of the row, index of the picture among the row's


@dataclass
class Args:
    """Make reference images from prompts with any text-to-image pipeline of diffusers."""

    model: Path
    """Folder of the text-to-image model in diffusers format, such as FLUX.1-dev."""
    prompts: str
    """Prompt file, .txt or .jsonl. A row's "image_prompt", if it has one, is drawn in place of its "prompt"."""
    output_dir: Path
    """Folder for images/, prompts.jsonl and settings.json. That of a killed run with the same settings is continued."""
    height: int
    """Height in pixels: that of the videos."""
    width: int
    """Width in pixels: that of the videos."""
    num_inference_steps: int = 50
    """Steps from noise to picture."""
    guidance_scale: float = 3.5
    """Guidance; what suits depends on the model (FLUX.1-dev: 3.5, Stable Diffusion: 7.5)."""
    images_per_prompt: int = 1
    """Pictures of each prompt, each a row of its own in prompts.jsonl."""
    batch_size: int = 4
    """Pictures made at once by each process."""
    seed: int = 0
    """Of the noise."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in; auto: bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        for flag in ("height", "width", "num_inference_steps", "images_per_prompt", "batch_size"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} must be at least 1, not {getattr(self, flag)}")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"--guidance_scale must be 0 or more, not {self.guidance_scale}")


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=launch_rank() == 0)
    ranks = init()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    rows = on_main(lambda: read_rows(args.prompts))
    pipeline = load_pipeline(args.model, args.dtype, ranks.device, of_any_kind=True)
    on_main(lambda: prepare_folder(args, rows, pipeline))
    jobs = [(row, k) for row in range(len(rows)) for k in range(args.images_per_prompt)]

    mine = tqdm(jobs[ranks.rank :: ranks.world_size], "checking finished images", delay=2, leave=False, disable=not ranks.is_main)
    unfinished = [job for job in mine if not is_finished(image_path(args, job), args)]
    unfinished = sorted(job for part in all_gather_object(unfinished) for job in part)
    with tqdm(total=len(jobs), initial=len(jobs) - len(unfinished), unit="image", disable=not ranks.is_main) as progress:
        # All processes meet after every batch: a failure stops everyone at once, and nobody waits long enough for a timeout.
        for start in range(0, len(unfinished), args.batch_size * ranks.world_size):
            turn = unfinished[start : start + args.batch_size * ranks.world_size]
            batch = turn[ranks.rank :: ranks.world_size]
            together(lambda batch=batch: batch and make_images(pipeline, batch, rows, args))
            progress.update(len(turn))
    on_main(lambda: write_prompts(jobs, rows, args))


def read_rows(prompts: str) -> list[dict]:
    """The prompt file's rows. Raises UserError for one that has a picture already, or an "image_prompt" without text."""
    rows, report = read_prompts(prompts)
    for row, line in zip(rows, report["lines"], strict=True):
        if "image" in row:
            raise UserError(f'line {line} of {prompts} has an "image" already')
        if not isinstance(row.get("image_prompt", "-"), str) or not row.get("image_prompt", "-").strip():
            raise UserError(f'line {line} of {prompts} has no text as "image_prompt", but {row["image_prompt"]!r}')
    for kind in ("empty", "duplicates"):
        if report[kind]:
            print(f"{len(report[kind])} {kind} left out: line {', '.join(map(str, report[kind][:10]))}{', ...' * (len(report[kind]) > 10)}")
    return rows


def prepare_folder(args: Args, rows: list[dict], pipeline: DiffusionPipeline) -> None:
    """Note what the pictures depend on in settings.json. Raises UserError if those in the folder were made with something else."""
    parts = [name for name, module in pipeline.components.items() if module is not None and (args.model / name).is_dir()]
    settings = encoder_fingerprint(
        args.model,
        tuple(parts),
        pipeline=type(pipeline).__name__,
        prompts="sha256:" + hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        dtype=str(pipeline.dtype).removeprefix("torch."),
        token_ids=token_digest(pipeline.components),
        **{name: getattr(args, name) for name in ("height", "width", "num_inference_steps", "guidance_scale", "images_per_prompt", "seed")},
    )
    path = args.output_dir / "settings.json"
    try:
        (args.output_dir / "images").mkdir(parents=True, exist_ok=True)
        for leftover in (args.output_dir / "images").glob(".*.tmp"):  # a killed run was writing it
            leftover.unlink()
        if any((args.output_dir / "images").iterdir()):
            if not path.exists():
                raise UserError(f"{args.output_dir / 'images'} is not empty, but there is no {path}: choose another --output_dir")
            refuse_difference(args.output_dir, dict(json.loads(path.read_bytes())), settings, "this run")
    except OSError as error:
        raise UserError(f"cannot write to {args.output_dir}: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another --output_dir") from error
    write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())


def image_path(args: Args, job: Job) -> Path:
    row, k = job
    return args.output_dir / "images" / f"{row:06d}_{k}.png"


def is_finished(path: Path, args: Args) -> bool:
    """Whether an earlier run made this picture and it is undamaged, by PNG's own checksums."""
    if not path.exists():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return image.size == (args.width, args.height)
    except Exception as error:  # what PIL's readers raise for a broken file is not documented
        print(f"warning: {path} is damaged ({first_line(error)}); making it again", file=sys.stderr)
        return False


@torch.no_grad()
def make_images(pipeline: DiffusionPipeline, batch: list[Job], rows: list[dict], args: Args) -> None:
    """Make and write the pictures of `batch`. Raises UserError for what the pipeline refuses, and for files that cannot be written."""
    try:
        output = pipeline(
            prompt=[rows[row].get("image_prompt", rows[row]["prompt"]) for row, _ in batch],
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[keyed_generator(args.seed, "reference_image", row, k) for row, k in batch],
            output_type="pil",
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size {args.batch_size} at {args.width} x {args.height} pixels takes more memory than the GPU has"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{type(pipeline).__name__} in {args.model} cannot make the images: {first_line(error)}") from error
    refused = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
    for job, image, is_refused in zip(batch, output.images, refused, strict=True):
        path = image_path(args, job)
        if image.size != (args.width, args.height):
            made = f"{image.width} x {image.height}"
            raise UserError(f"--width {args.width} --height {args.height}: {type(pipeline).__name__} makes {made} pixels instead")
        if is_refused:
            print(f"warning: {path} is black: the model's safety checker refused {rows[job[0]]['prompt'][:60]!r}", file=sys.stderr)
        png = io.BytesIO()
        image.convert("RGB").save(png, format="PNG")
        write_whole(path, png.getvalue())


def write_prompts(jobs: list[Job], rows: list[dict], args: Args) -> None:
    path = args.output_dir / "prompts.jsonl"
    lines = [rows[job[0]] | {"image": image_path(args, job).relative_to(args.output_dir).as_posix()} for job in jobs]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    print(f"{len(jobs)} images of {len(rows)} prompts: {path}")


def write_whole(path: Path, data: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


if __name__ == "__main__":
    run(main)
