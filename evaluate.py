"""Score a base model and trained checkpoints of it through diffusers' own pipeline with deterministic (ODE) sampling.

    python evaluate.py --model shapes/models/flux --checkpoints RUN/export --prompts shapes/prompts/heldout.txt --rewards shapes \\
        --output_dir EVALUATION

All models get the same prompts and the same noise. Writes results.json, .csv and .md, scores.csv, samples.png and, with one checkpoint,
rewards.png (the run's curves with the base's noise band): docs/evaluation.md. Run again, it goes on where it was stopped. Runs under
torchrun too: the processes share the pictures.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tqdm import tqdm

from fastvideo.embeddings.encoders import read_image
from fastvideo.errors import UserError
from fastvideo.evaluation import diversity, human_pairs
from fastvideo.evaluation.checkpoints import BASE, Checkpoint, check_exports, parse_checkpoints, settings_of_runs
from fastvideo.evaluation.identity import model_identity
from fastvideo.evaluation.pictures import save_all, save_grids
from fastvideo.evaluation.results import Scored, scored, summarise
from fastvideo.evaluation.store import Job, Store
from fastvideo.evaluation.tables import print_table, write_tables
from fastvideo.evaluation.tasks import Task, check_first_frames, find_benchmarks, kept_jobs, key_of, load_tasks, plan
from fastvideo.flags import check_numbers
from fastvideo.models.families import FAMILIES
from fastvideo.models.families.family import Family
from fastvideo.models.model_folder import check_model
from fastvideo.models.pretrained import load_pipeline, load_pretrained
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks, compute_dtype, keyed_generator
from fastvideo.rewards import parse_rewards, score
from fastvideo.rewards.preflight import preflight
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
    output_dir: Path
    """Where results and pictures go."""
    prompts: Path | None = None
    """Prompt file, .txt or .jsonl, for --rewards: the benchmark that is called "prompts"."""
    rewards: tuple[str, ...] = ()
    """Each NAME[=PATH][,OPTION=VALUE...][@THRESHOLD], for --prompts."""
    benchmarks: tuple[str, ...] = ()
    """Each NAME=PATH[,OPTION=VALUE...]: published prompts with their rewards, such as geneval=FILE,detector=FOLDER."""
    checkpoints: tuple[str, ...] = ()
    """Each [NAME=]RUN/export: weights that are evaluated beside the base's, with the sampling settings of their runs' manifests."""
    num_seeds: int = 3
    """Noise seeds; the spread of the means over them is reported."""
    images_per_prompt: int = 1
    """Pictures of each of the --prompts for each noise seed."""
    batch_size: int | None = None
    """Pictures or clips sampled at once by each process (default: 16 pictures or 1 clip)."""
    diversity_clip: Path | None = None
    """CLIP folder by whose features diversity is measured too (default: that of the reward clip, if there is one)."""
    save_pictures: bool = False
    """Keep all pictures, as PNG files, or clips, as mp4."""
    human_pairs: int = 0
    """Pairs of two models' pictures that are written for people to judge, the key apart."""
    human_models: tuple[str, str] | None = None
    """Whose pictures these are (default: base and the first checkpoint)."""
    scores_dir: Path | None = None
    """Where scores are kept as they are made (default: OUTPUT_DIR/scores); evaluations with the same one sample what they share once."""
    vae_tiling: bool = False
    """Decode in tiles, one sample at a time: less memory for long or large clips, and what a run with this flag decoded."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in (auto: bfloat16 on GPUs, float32 on CPUs)."""
    sampling_steps: int | None = None
    """Steps from noise to picture (default of this and what follows: the runs', else what the training script has)."""
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
        if not self.prompts and not self.benchmarks:
            raise UserError("give --prompts and --rewards, or --benchmarks")
        if self.prompts or self.rewards:
            specs = parse_rewards(self.rewards)
            if not self.prompts:
                raise UserError("--rewards are for --prompts, which are not given: those of --benchmarks bring their own")
            if reserved := [spec.name for spec in specs if spec.name.startswith(diversity.PREFIX)]:
                raise UserError(f"--rewards: {reserved[0]} has the name of a measure of diversity: call the function otherwise")
        names = [BASE, *(checkpoint.name for checkpoint in parse_checkpoints(self.checkpoints))]
        rules = {"above 0": f"num_seeds images_per_prompt batch_size {NUMBERS['above 0']}", "0 or more": "human_pairs"}
        check_numbers(vars(self), NUMBERS | rules)
        if self.human_pairs and len(names) == 1:
            raise UserError("--human_pairs needs --checkpoints: pairs are of two models' pictures")
        self.human_models = self.human_models or (names[0], names[-1 if len(names) == 1 else 1])
        for name in self.human_models:
            if name not in names:
                raise UserError(f"--human_models has {name!r}, but the models are {', '.join(names)}")


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    ranks = distributed.init()
    parts = distributed.on_main(lambda: check_model(args.model))
    distributed.on_main(lambda: check_checkpoints(args))
    benchmarks = distributed.on_main(lambda: find_benchmarks(args.prompts, args.rewards, args.images_per_prompt, args.benchmarks))
    tasks = load_tasks(benchmarks, args.num_seeds, args.diversity_clip, ranks.device)
    without = {"safety_checker": None} if "unet" in parts else {}  # it would blacken pictures, which training does not do
    pipeline = load_pipeline(args.model, args.dtype, ranks.device, **without)
    sampling = sampling_settings(args, pipeline)
    family = family_of(type(pipeline).__name__)
    if family.from_images:
        size = None if args.resize else (sampling["width"], sampling["height"])
        rows = distributed.on_main(lambda: [check_first_frames(task.benchmark, args.prompts, size) for task in tasks])
        tasks = [replace(task, benchmark=replace(task.benchmark, rows=checked)) for task, checked in zip(tasks, rows, strict=True)]
    clips = sampling.get("num_frames", 1) > 1
    args.batch_size = args.batch_size or batch_size(pictures=not clips)
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
    use_trained_sampler(pipeline, sampling)

    settings = sampling | {"dtype": str(compute_dtype(args.dtype, ranks.device)), "device": ranks.device.type}
    settings |= {"vae_tiling": args.vae_tiling, "resize": args.resize}
    keys = distributed.on_main(lambda: [key_of(task, settings) for task in tasks])
    pairs = human_pairs.choose({task.name: task.jobs for task in tasks}, args.human_pairs)
    found: dict[str, dict[str, Scored]] = {}
    stores: dict[str, dict[str, Store]] = {}
    checkpoints = parse_checkpoints(args.checkpoints)
    models = {BASE: None} | {checkpoint.name: checkpoint.export for checkpoint in checkpoints}
    kept = {model: kept_jobs(tasks, args.save_pictures, pairs if model in args.human_models else []) for model in models}
    weights = distributed.on_main(lambda: {model: model_identity(args.model, family, export) for model, export in models.items()})
    titles = {model: str(export or args.model) for model, export in models.items()}
    root = args.scores_dir or args.output_dir / "scores"
    plans = distributed.on_main(
        lambda: {model: plan(root, titles[model], weights[model], tasks, keys, kept[model], clips) for model in models}
    )
    frames = (sampling["num_frames"],) if clips else ()
    blank = torch.zeros(1, 3, *frames, sampling["height"], sampling["width"], device=ranks.device)
    of_tasks = zip(tasks, *plans.values(), strict=True)
    needed = [task for task, *of_models in of_tasks if any(todo for _, todo in of_models)]
    distributed.together(lambda: [preflight(task.rewards, blank, task.benchmark.rows[0]) for task in needed])
    for model, export in models.items():
        if export and any(todo for _, todo in plans[model]):
            use_network(pipeline, export, ranks.device)
        found[model], stores[model] = {}, {}
        for task, (folder, todo) in zip(tasks, plans[model], strict=True):
            stores[model][task.name] = store = Store(folder)
            sample(model, pipeline, sampling, task, todo, kept[model][task.name], store, args.batch_size, ranks)
            made = {job: record for part in distributed.all_gather_object(store.new) for job, record in part.items()}
            if ranks.is_main:
                found[model][task.name] = scored(store.read() | made, task.jobs)

    if ranks.is_main:
        results: dict[str, Any] = {
            "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()},
            "sampling": sampling,
            "models": titles,
            "benchmarks": {task.name: task.facts | {"kind": "clip" if clips else "picture"} for task in tasks},
        }
        results |= summarise(found, [task.benchmark for task in tasks])
        write_tables(args.output_dir, results, found, [task.benchmark for task in tasks])
        save_grids(args.output_dir, tasks, found, stores, clips)
        if args.save_pictures:
            save_all(args.output_dir / "pictures", tasks, stores, clips)
        if pairs:
            files = [tuple(stores[model][name].media(job, clips) for model in args.human_models) for name, job in pairs]
            rows = {task.name: task.benchmark.rows for task in tasks}
            prompts = [rows[name][job.prompt]["prompt"] for name, job in pairs]
            print(human_pairs.write_pairs(args.output_dir / "human_pairs", args.human_models, pairs, files, prompts))
        print_table(results)
        if len(checkpoints) == 1:
            plot_curves(checkpoints[0], args.output_dir / "rewards.png", results)
        print(f"written to {args.output_dir}")


def plot_curves(checkpoint: Checkpoint, path: Path, results: dict[str, Any]) -> None:
    """The curves of a run that has some, with the rewards of the first benchmark."""
    if not (checkpoint.run / "metrics.jsonl").exists() or not read_metrics(checkpoint.run):
        return
    benchmark = next(iter(results["benchmarks"]))
    before, after = (results["scores"][model][benchmark] for model in (BASE, checkpoint.name))
    rewards = [name for name in before if "seed_std" in before[name]]
    plot_rewards(
        checkpoint.run, path, {key: {name: part[name] for name in rewards} for key, part in (("base", before), ("trained", after))}
    )


def use_network(pipeline: DiffusionPipeline, export: Path, device: torch.device) -> None:
    """Put the network of a run's export in the place of the pipeline's."""
    network = family_of(type(pipeline).__name__).network_folder
    model_class, dtype = type(getattr(pipeline, network)), getattr(pipeline, network).dtype
    setattr(pipeline, network, None)  # two of them may not fit on one GPU
    setattr(pipeline, network, load_pretrained(model_class, export, network, "--checkpoints", torch_dtype=dtype))
    pipeline.to(device)


def family_of(pipeline: str) -> Family:
    """The facts of a model that `check_model` let pass, by the class of its pipeline."""
    return next(family for family in FAMILIES.values() if family.pipeline == pipeline)


def check_checkpoints(args: Args) -> None:
    """Before anything is loaded. Raises UserError as `given_settings` and `check_exports` do."""
    family = family_of(json.loads((args.model / "model_index.json").read_bytes())["_class_name"])
    given_settings(args, family)
    check_exports(parse_checkpoints(args.checkpoints), family)


def batch_size(pictures: bool) -> int:
    """What fits a GPU of 80 GB for all models, with their text encoders."""
    return 16 if pictures else 1


def given_settings(args: Args, family: Family) -> dict[str, Any]:
    """Flags first, then the runs' manifests. Raises UserError for a flag that a pipeline has not, and as `settings_of_runs` does."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    of_runs = settings_of_runs(parse_checkpoints(args.checkpoints), family.pipeline, family.sampling, given, NUMBERS)
    for name in given.keys() - family.sampling.keys():
        raise UserError(f"--{name} is not a setting of {family.pipeline}, which has {', '.join(family.sampling)}")
    return of_runs | given


def sampling_settings(args: Args, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """`given_settings`, and for the others defaults of the training script and the pipeline."""
    family = family_of(type(pipeline).__name__)
    settings = {name: default for name, (_, default) in family.sampling.items()}
    for size in ("height", "width"):
        settings[size] = settings[size] or pipeline.vae.config.sample_size
    if "max_sequence_length" in settings:
        limit = getattr(pipeline, family.length_limit).model_max_length
        settings["max_sequence_length"] = min(settings["max_sequence_length"], limit)
    return settings | given_settings(args, family)


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
    family = family_of(type(pipeline).__name__)
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
def sample(
    model: str,
    pipeline: DiffusionPipeline,
    sampling: dict[str, Any],
    task: Task,
    todo: list[Job],
    kept: Collection[Job],
    store: Store,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """This process's share of the jobs to do: sample, score, and add to the store; of those in `kept` the pictures as well."""
    mine, rows = todo[ranks.rank :: ranks.world_size], task.benchmark.rows
    for start in tqdm(range(0, len(mine), batch_size), f"{model} on {task.name}", disable=not ranks.is_main or not mine):
        batch = mine[start : start + batch_size]
        generators = [keyed_generator(job.seed, "evaluation", job.prompt, job.k) for job in batch]
        batch_rows = [rows[job.prompt] for job in batch]
        media = media_of(pipeline(**pipeline_arguments(pipeline, sampling, batch_rows), generator=generators), sampling)
        for job, one in zip(batch, media):
            if job in kept:
                store.add_media(job, one)
        store.add(batch, score(task.rewards, media, batch_rows), {name: measure(media) for name, measure in task.features.items()})


if __name__ == "__main__":
    distributed.run(main)
