"""Where evaluation's pictures and clips go: grids of all models, and single files."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fastvideo.evaluation.results import Scored
from fastvideo.evaluation.store import Store
from fastvideo.evaluation.tasks import Task, is_shown
from fastvideo.files import writing
from fastvideo.media import film_strip, read_video, save_grid


def save_grids(
    folder: Path, tasks: Sequence[Task], found: dict[str, dict[str, Scored]], stores: dict[str, dict[str, Store]], clips: bool
) -> None:
    """samples.png, or of several benchmarks samples_NAME.png: the first picture of the first prompts by each model, with its scores."""
    for task in tasks:
        jobs = [job for job in task.jobs if is_shown(job)]
        media = {model: [parts[task.name].media(job, clips) for job in jobs] for model, parts in stores.items()}
        labels = []
        for model, parts in found.items():
            scores = [" ".join(f"{values[job.prompt, 0, 0]:.2f}" for values in parts[task.name].scores.values()) for job in jobs]
            labels.append([f"{model} {numbers} {task.benchmark.rows[job.prompt]['prompt']}" for job, numbers in zip(jobs, scores)])
        save_comparison(folder / ("samples.png" if len(tasks) == 1 else f"samples_{task.name}.png"), media, labels)


def save_all(folder: Path, tasks: Sequence[Task], stores: dict[str, dict[str, Store]], clips: bool) -> None:
    """All pictures, as MODEL/BENCHMARK/promptP_seedS_K.png, or .mp4."""
    for model, parts in stores.items():
        for task in tasks:
            for source in (parts[task.name].media(job, clips) for job in task.jobs):
                copy_media(source, folder / model / task.name / source.name)


def as_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """Pictures, and clips as film strips."""
    clips = paths[0].suffix == ".mp4"
    return [film_strip(read_video(path)[None])[0] if clips else Image.open(path).convert("RGB") for path in paths]


def save_comparison(path: Path, media: dict[str, list[Path]], labels: list[list[str]]) -> None:
    """A grid of the models' pictures, a row each; of clips, which are wide, a column each, and each clip in a folder beside it.

    media: model -> files, of the same prompts and noise. labels: as `media`, a list a model.
    """
    shown = [as_pictures(paths) for paths in media.values()]
    if next(iter(media.values()))[0].suffix == ".png":
        return save_grid(path, shown, labels)
    save_grid(path, list(zip(*shown, strict=True)), list(zip(*labels, strict=True)))
    for model, paths in media.items():
        for i, clip in enumerate(paths):
            copy_media(clip, path.with_suffix("") / f"{model}_{i}.mp4")


def copy_media(source: Path, target: Path, link: bool = True) -> None:
    """As a second name of the same file if the file system can and `link` says so, else as a copy."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target) if link else shutil.copyfile(source, target)
        except OSError:
            shutil.copyfile(source, target)
