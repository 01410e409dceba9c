"""What each model has to do: benchmarks with their rewards loaded, their pictures as jobs, and which of these are still to be sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastvideo.embeddings.encoders import check_images
from fastvideo.embeddings.fingerprint import content_digest
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError
from fastvideo.evaluation import diversity
from fastvideo.evaluation.benchmarks import Benchmark, parse_benchmark, read_rows
from fastvideo.evaluation.identity import rewards_identity, rows_identity
from fastvideo.evaluation.store import Job, Store, open_store
from fastvideo.rewards import Reward, load_rewards, parse_rewards

PROMPTS = "prompts"  # the benchmark of --prompts and --rewards
SHOWN = 8  # prompts in the grid of all models


@dataclass(frozen=True)
class Task:
    """A benchmark with what is loaded for it.

    rewards, features: by name. clip: the folder of the CLIP that measures diversity. jobs: all pictures, seed after seed.
    """

    benchmark: Benchmark
    rewards: dict[str, Reward]
    features: dict[str, diversity.Features]
    clip: Path | None
    jobs: list[Job]

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def facts(self) -> dict[str, Any]:
        """For a report."""
        facts = {name: getattr(self.benchmark, name) for name in ("rewards", "images_per_prompt", "group", "total")}
        return {"prompts": len(self.benchmark.rows), "samples": len(self.jobs)} | facts


def find_benchmarks(prompts: Path | None, rewards: tuple[str, ...], images_per_prompt: int, named: Sequence[str]) -> list[Benchmark]:
    """That of the prompt file first. Raises UserError as `read_prompts` and `parse_benchmark` do, and for a name that is given twice."""
    own = [Benchmark(PROMPTS, read_rows(str(prompts)), rewards, images_per_prompt)] if prompts else []
    benchmarks = own + [parse_benchmark(text) for text in named]
    names = [benchmark.name for benchmark in benchmarks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--benchmarks: {twice[0]!r} is given twice")
    return benchmarks


def load_tasks(benchmarks: Sequence[Benchmark], num_seeds: int, clip: Path | None, device: torch.device) -> list[Task]:
    """Rewards that several have are loaded once. clip: for diversity; None: that of the reward `clip`, where it is one of theirs.

    Raises UserError as `load_rewards` does, which names the benchmark, or --rewards.
    """
    rewards: dict[str, dict[str, Reward]] = {}  # by what the command line has for them
    for text in dict.fromkeys(text for benchmark in benchmarks for text in benchmark.rewards):
        rows = [row for benchmark in benchmarks if text in benchmark.rewards for row in benchmark.rows]
        owner = next(benchmark.name for benchmark in benchmarks if text in benchmark.rewards)
        try:
            rewards[text] = load_rewards(parse_rewards([text]), device, rows)
        except UserError as error:
            if owner == PROMPTS:
                raise
            raise UserError(f"--benchmarks: {owner}: {str(error).removeprefix('--rewards: ')}") from error
    features: dict[Path | None, dict[str, diversity.Features]] = {}
    tasks = []
    for benchmark in benchmarks:
        of_reward = (Path(spec.path) for spec in parse_rewards(benchmark.rewards) if spec.name == "clip" and not spec.file)
        folder = clip or next(of_reward, None)
        if folder not in features:
            features[folder] = diversity.load_features(folder, device)
        own = {name: reward for text in benchmark.rewards for name, reward in rewards[text].items()}
        places = product(range(num_seeds), range(len(benchmark.rows)), range(benchmark.images_per_prompt))
        tasks.append(Task(benchmark, own, features[folder], folder, [Job(*place) for place in places]))
    return tasks


def check_first_frames(benchmark: Benchmark, prompts: Path | None, size: tuple[int, int] | None) -> list[dict]:
    """The rows, with checksums of their first frames. Raises UserError for prompts without, and as `check_images` does.

    prompts: the prompt file. size: width and height in pixels that they must have, if any.
    """
    source, lines = f"benchmark {benchmark.name}", list(range(1, len(benchmark.rows) + 1))
    if benchmark.name == PROMPTS:
        source, lines = str(prompts), read_prompts(prompts, ("prompt", "image"))[1]["lines"]
    if "image" not in benchmark.rows[0]:
        raise UserError(f'--prompts {source} must be a .jsonl file of objects with a "prompt" and an "image" for this model')
    return check_images(benchmark.rows, lines, source, size)


def key_of(task: Task, sampling: dict[str, Any]) -> dict[str, Any]:
    """What the scores of any model depend on. sampling: all that changes what is sampled, as numbers and words."""
    return {
        "sampling": sampling,
        "prompts": rows_identity(task.benchmark.rows),
        "rewards": rewards_identity(task.benchmark.rewards),
        "diversity": content_digest(task.clip) if task.clip else None,
        "versions": {package: version(package) for package in ("torch", "diffusers", "transformers")},
    }


def kept_jobs(tasks: Sequence[Task], everything: bool, pairs: Sequence[tuple[str, Job]]) -> dict[str, set[Job]]:
    """Of each task by name, the jobs of which one model's pictures are kept: `everything`, or those in its grid and in `pairs`."""
    kept = {task.name: set(task.jobs if everything else filter(is_shown, task.jobs)) for task in tasks}
    for name, job in pairs:
        kept[name].add(job)
    return kept


def is_shown(job: Job) -> bool:
    """Whether it stands in the grid of all models."""
    return job.seed == job.k == 0 and job.prompt < SHOWN


def plan(
    root: Path,
    title: str,
    weights: dict[str, Any],
    tasks: Sequence[Task],
    keys: Sequence[dict[str, Any]],
    kept: dict[str, set[Job]],
    clips: bool,
) -> list[tuple[Path, list[Job]]]:
    """Of each task the folder of one model's store under `root`, and what it still has to sample; says what is there already.

    title: what the user calls the model. weights: its identity. kept: jobs of which the pictures, or `clips`, must be there too.
    """
    plans = []
    for task, key in zip(tasks, keys, strict=True):
        folder, changed = open_store(root, f"{title} on {task.name}", {"model": weights} | key)
        store = Store(folder)
        done = store.read().keys()
        todo = [job for job in task.jobs if job not in done or (job in kept[task.name] and not store.media(job, clips).is_file())]
        if changed:
            print(f"{title} on {task.name} begins anew: {changed}")
        elif len(todo) < len(task.jobs):
            print(f"{title} on {task.name}: {len(task.jobs) - len(todo)} of {len(task.jobs)} are in {folder}")
        plans.append((folder, todo))
    return plans
