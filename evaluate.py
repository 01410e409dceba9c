"""Score a base model, and a trained checkpoint of it, through diffusers' own pipeline with deterministic (ODE) sampling.

    python evaluate.py --model shapes/models/flux --checkpoint RUN/export --prompts shapes/prompts/heldout.txt --rewards shapes \\
        --output_dir EVALUATION

Both models get the same prompts and the same noise. Writes results.json, samples.png and, with a checkpoint, rewards.png (the run's curves
with the base's noise band). Runs under torchrun too: the processes share the pictures.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import DiffusionPipeline
from tqdm import tqdm

from fastvideo import distributed
from fastvideo.distributed import Ranks, UserError, keyed_generator
from fastvideo.files import whole_file
from fastvideo.media import save_grid, to_pil
from fastvideo.pretrained import load_pipeline, load_pretrained
from fastvideo.prompts import read_prompts
from fastvideo.rewards import Reward, load_rewards, parse_rewards, score
from fastvideo.tracking import plot_rewards

SAMPLING = ("sampling_steps", "shift", "embedded_guidance", "height", "width", "max_sequence_length")


@dataclass
class Args:
    model: Path
    """Base model folder in diffusers layout."""
    prompts: Path
    """Prompt file, .txt or .jsonl."""
    rewards: tuple[str, ...]
    """Each NAME[=PATH][@THRESHOLD]."""
    output_dir: Path
    """Where results.json and the pictures go."""
    checkpoint: Path | None = None
    """A run's export/ folder: its weights are evaluated beside the base's, with the sampling settings of the run's manifest."""
    num_seeds: int = 3
    """Noise seeds; the spread of the means over them is reported."""
    images_per_prompt: int = 1
    """Pictures of each prompt for each noise seed."""
    batch_size: int = 16
    """Pictures sampled at once by each process."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in (auto: bfloat16 on GPUs, float32 on CPUs)."""
    sampling_steps: int | None = None
    """Steps from noise to picture (default: the run's, else 25)."""
    shift: float | None = None
    """Time shift of the schedule (default: the run's, else 3)."""
    embedded_guidance: float | None = None
    """Guidance given to guidance-distilled models (default: the run's, else 3.5)."""
    height: int | None = None
    """Picture height in pixels (default: the run's, else what the model's VAE was trained on)."""
    width: int | None = None
    """Picture width in pixels (default: likewise)."""
    max_sequence_length: int | None = None
    """Tokens of the text encoder (default: the run's, else what the model's tokenizer allows, at most 512)."""

    def __post_init__(self) -> None:
        parse_rewards(self.rewards)
        for flag in ("num_seeds", "images_per_prompt", "batch_size", *SAMPLING):
            if (value := getattr(self, flag)) is not None and not value > 0:
                raise UserError(f"--{flag} is {value}, but must be above 0")


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    ranks = distributed.init()
    rows, _ = read_prompts(args.prompts)
    rewards = load_rewards(parse_rewards(args.rewards), ranks.device)
    pipeline = load_pipeline(args.model, args.dtype, ranks.device)
    sampling = sampling_settings(args, pipeline)
    # A shift of our own in place of the folder's, which for FLUX.1-dev depends on the resolution.
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, shift=sampling["shift"], use_dynamic_shifting=False
    )

    results: dict[str, Any] = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
        "sampling": sampling,
    }
    results |= {"prompts": len(rows), "images": len(rows) * args.images_per_prompt * args.num_seeds}
    pictures, labels = [], []
    for name in ("base", "trained") if args.checkpoint else ("base",):
        if name == "trained":
            model_class, dtype = type(pipeline.transformer), pipeline.transformer.dtype
            pipeline.transformer = None  # two of them may not fit on one GPU
            pipeline.transformer = load_pretrained(model_class, args.checkpoint, "transformer", "--checkpoint", torch_dtype=dtype)
            pipeline.to(ranks.device)
        scores, shown = evaluate(name, pipeline, sampling, rows, rewards, args, ranks)
        results[name] = {reward: summary(values) for reward, values in scores.items()}
        pictures.append(shown)
        captions = [rows[i % len(rows)]["prompt"] for i in range(len(shown))]
        first = [" ".join(f"{scores[reward][0][i * args.images_per_prompt]:.2f}" for reward in rewards) for i in range(len(shown))]
        labels.append([f"{name} {numbers} {caption}" for caption, numbers in zip(captions, first)])

    if ranks.is_main:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(args.output_dir / "results.json") as path:
            path.write_text(json.dumps(results, indent=2))
        save_grid(args.output_dir / "samples.png", pictures, labels)
        print_table(results)
        run = args.checkpoint.parent if args.checkpoint else None
        if run and (run / "metrics.jsonl").exists():
            plot_rewards(run, args.output_dir / "rewards.png", results)
        print(f"written to {args.output_dir}")


def sampling_settings(args: Args, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Flags first, then the run's manifest, then defaults of the model."""
    resolution = pipeline.vae.config.sample_size
    tokens = min(512, pipeline.tokenizer_2.model_max_length)
    settings = dict(zip(SAMPLING, (25, 3.0, 3.5, resolution, resolution, tokens), strict=True))
    if args.checkpoint:
        manifest = args.checkpoint.parent / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"--checkpoint {args.checkpoint} must be the export folder inside a run folder: there is no {manifest}")
        settings |= json.loads(manifest.read_text())["sampling"]
    return settings | {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


@torch.no_grad()
def evaluate(
    name: str, pipeline: DiffusionPipeline, sampling: dict, rows: list[dict], rewards: dict[str, Reward], args: Args, ranks: Ranks
) -> tuple[dict[str, list[list[float]]], list]:
    """Collective. Scores of each reward, a list for each noise seed in order of prompt and picture; and pictures of the first prompts."""
    jobs = [(seed, prompt, k) for seed in range(args.num_seeds) for prompt in range(len(rows)) for k in range(args.images_per_prompt)]
    mine, done, shown = jobs[ranks.rank :: ranks.world_size], {}, {}
    for start in tqdm(range(0, len(mine), args.batch_size), f"evaluating {name}", disable=not ranks.is_main):
        batch = mine[start : start + args.batch_size]
        images = pipeline(
            prompt=[rows[prompt]["prompt"] for _, prompt, _ in batch],
            height=sampling["height"],
            width=sampling["width"],
            num_inference_steps=sampling["sampling_steps"],
            guidance_scale=sampling["embedded_guidance"],
            max_sequence_length=sampling["max_sequence_length"],
            generator=[keyed_generator(seed, "evaluation", prompt, k) for seed, prompt, k in batch],
            output_type="pt",
        ).images.float() * 2 - 1  # fmt: skip
        scores = score(rewards, images, [rows[prompt] for _, prompt, _ in batch])
        for i, job in enumerate(batch):
            done[job] = {reward: values[i].item() for reward, values in scores.items()}
            if job[0] == 0 and job[1] < 8 and job[2] == 0:
                shown[job] = to_pil(images[i : i + 1])[0]
    done = {job: values for part in distributed.all_gather_object(done) for job, values in part.items()}
    shown = {job: image for part in distributed.all_gather_object(shown) for job, image in part.items()}
    per_seed = len(jobs) // args.num_seeds
    scores = {reward: [[done[job][reward] for job in jobs[i : i + per_seed]] for i in range(0, len(jobs), per_seed)] for reward in rewards}
    return scores, [shown[job] for job in sorted(shown)]


def summary(values: list[list[float]]) -> dict[str, Any]:
    """Mean of all; mean of each noise seed, and their standard deviation (0 for one seed)."""
    seed_means = [statistics.fmean(part) for part in values]
    spread = statistics.stdev(seed_means) if len(seed_means) > 1 else 0.0
    return {"mean": statistics.fmean(seed_means), "seed_std": spread, "seed_means": seed_means}


def print_table(results: dict[str, Any]) -> None:
    models = [name for name in ("base", "trained") if name in results]
    print(f"\n{results['images']} pictures of {results['prompts']} prompts; mean +- standard deviation over noise seeds")
    print(f"{'reward':<16}" + "".join(f"{name:>20}" for name in models) + (f"{'difference':>14}" if len(models) == 2 else ""))
    for reward in results["base"]:
        cells = [f"{results[name][reward]['mean']:.4f} +- {results[name][reward]['seed_std']:.4f}" for name in models]
        difference = f"{results['trained'][reward]['mean'] - results['base'][reward]['mean']:>+14.4f}" if len(models) == 2 else ""
        print(f"{reward:<16}" + "".join(f"{cell:>20}" for cell in cells) + difference)


if __name__ == "__main__":
    distributed.run(main)
