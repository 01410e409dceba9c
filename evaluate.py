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
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tqdm import tqdm

from fastvideo.embeddings.encoders import check_images, read_image
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError
from fastvideo.files import whole_file
from fastvideo.flags import check_numbers
from fastvideo.media import film_strip, save_grid, save_video, to_pil
from fastvideo.models.families import FAMILIES
from fastvideo.models.families.family import Family
from fastvideo.models.model_folder import check_model
from fastvideo.models.pretrained import load_pipeline, load_pretrained
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks, keyed_generator
from fastvideo.rewards import Reward, load_rewards, parse_rewards, score
from fastvideo.runs.tracking import plot_rewards, read_metrics

# Training's times are evenly spaced before the shift, whatever else a folder's scheduler would do with them.
PLAIN = dict.fromkeys(
    ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"),
    False,
) | {"shift_terminal": None}
SAMPLING = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.sampling))
NUMBERS = {"above 0": " ".join(SAMPLING), "1 or more": "guidance_scale"}


@dataclass
class Args:
    model: Path
    """Base model folder in diffusers layout."""
    prompts: Path
    """Prompt file, .txt or .jsonl."""
    rewards: tuple[str, ...]
    """Each NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]."""
    output_dir: Path
    """Where results.json and the pictures go."""
    checkpoint: Path | None = None
    """A run's export/ folder: its weights are evaluated beside the base's, with the sampling settings of the run's manifest."""
    num_seeds: int = 3
    """Noise seeds; the spread of the means over them is reported."""
    images_per_prompt: int = 1
    """Pictures of each prompt for each noise seed."""
    batch_size: int | None = None
    """Pictures or clips sampled at once by each process (default: 16 pictures or 1 clip)."""
    vae_tiling: bool = False
    """Decode in tiles, one sample at a time: less memory for long or large clips, and what a run with this flag decoded."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in (auto: bfloat16 on GPUs, float32 on CPUs)."""
    sampling_steps: int | None = None
    """Steps from noise to picture (default of this and what follows: the run's, else what its training script has)."""
    shift: float | None = None
    """Time shift of a rectified flow's schedule."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 for none (Stable Diffusion, SkyReels, Wan)."""
    embedded_guidance: float | None = None
    """Guidance given to guidance-distilled models as an input (FLUX, HunyuanVideo, SkyReels)."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    resize: bool = False
    """Stretch first frames of another size to --height and --width, without keeping the ratio of their sides (SkyReels)."""
    num_frames: int | None = None
    """Frames of a clip; 1 for pictures of a video model."""
    max_sequence_length: int | None = None
    """Tokens of the text encoder."""

    def __post_init__(self) -> None:
        parse_rewards(self.rewards)
        check_numbers(vars(self), NUMBERS | {"above 0": f"num_seeds images_per_prompt batch_size {NUMBERS['above 0']}"})


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    ranks = distributed.init()
    parts = distributed.on_main(lambda: check_model(args.model))
    rewards = load_rewards(parse_rewards(args.rewards), ranks.device, read_prompts(args.prompts)[0])
    without = {"safety_checker": None} if "unet" in parts else {}  # it would blacken pictures, which training does not do
    pipeline = load_pipeline(args.model, args.dtype, ranks.device, **without)
    sampling = sampling_settings(args, pipeline)
    family = family_of(pipeline)
    rows, report = read_prompts(args.prompts, ("prompt", "image") if family.from_images else ("prompt",))
    if family.from_images and "image" not in rows[0]:
        raise UserError(f'--prompts {args.prompts} must be a .jsonl file of objects with a "prompt" and an "image" for {args.model}')
    if family.from_images:
        size = None if args.resize else (sampling["width"], sampling["height"])
        rows = distributed.on_main(lambda: check_images(rows, report["lines"], str(args.prompts), size))
    args.batch_size = args.batch_size or batch_size(pictures=sampling.get("num_frames", 1) == 1)
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
    use_trained_sampler(pipeline, sampling)
    network = family.network_folder

    results: dict[str, Any] = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
        "sampling": sampling,
    }
    results |= {"prompts": len(rows), "images": len(rows) * args.images_per_prompt * args.num_seeds}
    media, labels = [], []
    for name in ("base", "trained") if args.checkpoint else ("base",):
        if name == "trained":
            model_class, dtype = type(getattr(pipeline, network)), getattr(pipeline, network).dtype
            setattr(pipeline, network, None)  # two of them may not fit on one GPU
            setattr(pipeline, network, load_pretrained(model_class, args.checkpoint, network, "--checkpoint", torch_dtype=dtype))
            pipeline.to(ranks.device)
        scores, shown = evaluate(name, pipeline, sampling, rows, rewards, args, ranks)
        results[name] = {reward: summary(values) for reward, values in scores.items()}
        media.append(shown)
        captions = [rows[i % len(rows)]["prompt"] for i in range(len(shown))]
        first = [" ".join(f"{scores[reward][0][i * args.images_per_prompt]:.2f}" for reward in rewards) for i in range(len(shown))]
        labels.append([f"{name} {numbers} {caption}" for caption, numbers in zip(captions, first)])

    if ranks.is_main:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(args.output_dir / "results.json") as path:
            path.write_text(json.dumps(results, indent=2))
        save_comparison(args.output_dir / "samples.png", media, labels)
        print_table(results)
        run = args.checkpoint.parent if args.checkpoint else None
        if run and (run / "metrics.jsonl").exists() and read_metrics(run):
            plot_rewards(run, args.output_dir / "rewards.png", results)
        print(f"written to {args.output_dir}")


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The facts of a model that `check_model` let pass."""
    return next(family for family in FAMILIES.values() if family.pipeline == type(pipeline).__name__)


def batch_size(pictures: bool) -> int:
    """What fits a GPU of 80 GB for all models, with their text encoders."""
    return 16 if pictures else 1


def save_comparison(path: Path, media: list[torch.Tensor], labels: list[list[str]]) -> None:
    """A grid of the models' media, a row each; of clips, which are wide, a column each, and an mp4 of each beside it."""
    if media[0].ndim == 4:
        return save_grid(path, [to_pil(samples) for samples in media], labels)
    save_grid(path, list(zip(*map(film_strip, media), strict=True)), list(zip(*labels, strict=True)))
    for clips, name in zip(media, ("base", "trained")):
        for i, clip in enumerate(clips):
            save_video(path.parent / "samples" / f"{name}_{i}.mp4", clip, fps=8)


def sampling_settings(args: Args, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Flags first, then the run's manifest, then defaults of the pipeline. Raises UserError for a flag that the pipeline does not have."""
    family = family_of(pipeline)
    known = family.sampling
    settings = {name: default for name, (_, default) in known.items()}
    for size in ("height", "width"):
        settings[size] = settings[size] or pipeline.vae.config.sample_size
    if "max_sequence_length" in settings:
        limit = getattr(pipeline, family.length_limit).model_max_length
        settings["max_sequence_length"] = min(settings["max_sequence_length"], limit)
    if args.checkpoint:
        manifest = args.checkpoint.parent / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"--checkpoint {args.checkpoint} must be the export folder inside a run folder: there is no {manifest}")
        try:
            of_run = dict(json.loads(manifest.read_bytes())["sampling"])
            check_numbers({name: of_run.get(name) for name in SAMPLING}, NUMBERS)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError) as error:
            raise UserError(f"{manifest} is damaged: {type(error).__name__}: {error}") from error
        if of_run.keys() != known.keys():
            raise UserError(
                f"--checkpoint {args.checkpoint} is not of a {type(pipeline).__name__} as --model {args.model} is: see {manifest}"
            )
        settings |= of_run
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    for name in given.keys() - known.keys():
        raise UserError(f"--{name} is not a setting of {type(pipeline).__name__}, which has {', '.join(known)}")
    return settings | given


def use_trained_sampler(pipeline: DiffusionPipeline, sampling: dict[str, Any]) -> None:
    """Replace the folder's scheduler by training's at noise level 0: Euler with the run's shift, or DDIM.

    FLUX.1-dev's own, for one, has a shift that depends on the resolution.
    """
    config = pipeline.scheduler.config
    if "shift" in sampling:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=sampling["shift"], **PLAIN)
        # Before the shift, the times go evenly from 1 to this; WanPipeline leaves them to the scheduler, the others say so themselves.
        pipeline.scheduler.sigma_min = 1 / sampling["sampling_steps"]
    else:
        pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def pipeline_arguments(pipeline: DiffusionPipeline, sampling: dict[str, Any], rows: list[dict]) -> dict[str, Any]:
    """What the pipeline is called with for `rows`, generators apart."""
    family = family_of(pipeline)
    known = family.sampling
    arguments = {known[name][0]: value for name, value in sampling.items() if known[name][0]}
    if "guidance_scale" in sampling:
        arguments["negative_prompt"] = [""] * len(rows)
    if family.from_images:
        arguments["image"] = [read_image(row["image"]) for row in rows]
    return arguments | {"prompt": [row["prompt"] for row in rows], "output_type": "pt"}


def media_of(output: Any, sampling: dict[str, Any]) -> torch.Tensor:
    """A pipeline's output as (B, 3, H, W), or as clips (B, 3, F, H, W), float32 in [-1, 1]."""
    media = (output.images if hasattr(output, "images") else output.frames.transpose(1, 2)).float() * 2 - 1
    return media.squeeze(2) if sampling.get("num_frames") == 1 else media


@torch.no_grad()
def evaluate(
    name: str, pipeline: DiffusionPipeline, sampling: dict, rows: list[dict], rewards: dict[str, Reward], args: Args, ranks: Ranks
) -> tuple[dict[str, list[list[float]]], torch.Tensor]:
    """Collective. Scores of each reward, a list for each noise seed in order of prompt and picture; and media of the first 8 prompts."""
    jobs = [(seed, prompt, k) for seed in range(args.num_seeds) for prompt in range(len(rows)) for k in range(args.images_per_prompt)]
    mine, done, shown = jobs[ranks.rank :: ranks.world_size], {}, {}
    for start in tqdm(range(0, len(mine), args.batch_size), f"evaluating {name}", disable=not ranks.is_main):
        batch = mine[start : start + args.batch_size]
        generators = [keyed_generator(seed, "evaluation", prompt, k) for seed, prompt, k in batch]
        batch_rows = [rows[prompt] for _, prompt, _ in batch]
        media = media_of(pipeline(**pipeline_arguments(pipeline, sampling, batch_rows), generator=generators), sampling)
        scores = score(rewards, media, batch_rows)
        for i, job in enumerate(batch):
            done[job] = {reward: values[i].item() for reward, values in scores.items()}
            if job[0] == 0 and job[1] < 8 and job[2] == 0:
                shown[job] = media[i].cpu()
    done = {job: values for part in distributed.all_gather_object(done) for job, values in part.items()}
    shown = {job: one for part in distributed.all_gather_object(shown) for job, one in part.items()}
    per_seed = len(jobs) // args.num_seeds
    scores = {reward: [[done[job][reward] for job in jobs[i : i + per_seed]] for i in range(0, len(jobs), per_seed)] for reward in rewards}
    return scores, torch.stack([shown[job] for job in sorted(shown)])


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
