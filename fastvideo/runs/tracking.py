"""What a run leaves to read: metrics.jsonl, TensorBoard or wandb, the reward curve; and its timers."""

import json
import math
import os
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from fastvideo.errors import UserError, warn
from fastvideo.files import whole_file, writing
from fastvideo.media import save_samples
from fastvideo.parallel import devices
from fastvideo.parallel.devices import peak_memory_gib
from fastvideo.parallel.distributed import all_gather_object, on_main
from fastvideo.runs.integrity import naming_the_last


def check(output_dir: Path, trackers: list[str]) -> None:
    """Raise UserError, before models are loaded, for what could not be written in a run's folder, and for wandb without a key."""
    for folder in (output_dir / name for name in ("checkpoints", "samples", *trackers) if (output_dir / name).exists()):
        with writing(folder), tempfile.TemporaryFile(dir=folder):
            pass
    if (output_dir / "metrics.jsonl").exists():
        read_metrics(output_dir)
    if "wandb" in trackers:
        with _wandb() as wandb:
            wandb.login()


@contextmanager
def _wandb() -> Iterator[ModuleType]:
    """The package, to be started inside."""
    try:
        import wandb

        yield wandb
    except ImportError as error:
        raise UserError("--trackers wandb needs the package wandb: pip install wandb") from error
    except Exception as error:  # wandb.errors has many, and does not say which
        raise UserError(f"--trackers wandb cannot start: {type(error).__name__}: {' '.join(str(error).split())}") from error


class Tracker:
    """Writes metrics of each iteration to `output_dir/metrics.jsonl` and to the chosen trackers, from rank 0.

    trackers: any of "tensorboard" (under `output_dir/tensorboard`) and "wandb" (its environment variables apply).
    resumed_iteration: lines and events after it are dropped: those iterations are about to be done again.

    All methods are collective. They raise UserError for what cannot be written, and at the start for a damaged line of metrics.jsonl.
    """

    def __init__(self, output_dir: Path, trackers: list[str], config: dict[str, Any], resumed_iteration: int):
        self.path, self.events = output_dir / "metrics.jsonl", output_dir / "tensorboard"
        self.tensorboard = self.wandb = None

        def start() -> None:
            kept = self._rewind(resumed_iteration) if self.path.exists() else 0
            if kept < resumed_iteration:
                warn(f"{self.path} has {kept} of the {resumed_iteration} iterations that were done")
            if "tensorboard" in trackers:
                from torch.utils.tensorboard import SummaryWriter

                with writing(self.events):
                    self.tensorboard = SummaryWriter(self.events, purge_step=resumed_iteration + 1)
                # Its thread keeps an error for the next call, which raises it, but would also print it where it happens.
                others = threading.excepthook
                threading.excepthook = lambda hook: None if type(hook.thread).__name__ == "_AsyncWriterThread" else others(hook)
            if "wandb" in trackers:
                # The same after a resume, and another for a folder of the same name elsewhere.
                name = re.sub(r"[/\\#?%:]", "_", output_dir.name[:100])  # wandb takes none of these
                run_id = f"{name}-{zlib.crc32(str(output_dir.resolve()).encode()):08x}"
                with _wandb() as wandb:
                    self.wandb = wandb.init(project="fastvideo", dir=output_dir, config=config, id=run_id, resume="allow")

        on_main(start)

    def _write(self, function: Callable[[], None]) -> None:
        with naming_the_last(self.path.parent):
            on_main(function)

    def _rewind(self, iteration: int) -> int:
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.path.parent) if row["iteration"] <= iteration]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept))
        return len(kept)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append one iteration's numbers; on disk when this returns."""

        def write() -> None:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self.tensorboard is not None:
                with writing(self.events):
                    for name, value in metrics.items():
                        self.tensorboard.add_scalar(name, value, iteration)
                    self.tensorboard.flush()
            if self.wandb is not None:
                self.wandb.log(metrics, step=iteration)

        self._write(write)

    def log_samples(self, iteration: int, media: torch.Tensor | None, captions: list[str]) -> None:
        """Write `output_dir/samples/iteration_NNNNNN.png`, and mp4 files of clips beside it, and show the PNG in the trackers too.

        media: pictures (B, 3, H, W) or clips (B, 3, F, H, W) in [-1, 1]; needed on rank 0 only. captions: B.
        """

        def write() -> None:
            path = save_samples(self.path.parent / "samples" / f"iteration_{iteration:06d}.png", media, captions)
            if self.tensorboard is not None:
                with Image.open(path) as image, writing(self.events):
                    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
                    pixels = pixels.view(image.height, image.width, 3)
                    self.tensorboard.add_image("samples", pixels, iteration, dataformats="HWC")
                    self.tensorboard.flush()
            if self.wandb is not None:
                import wandb

                self.wandb.log({"samples": wandb.Image(str(path))}, step=iteration)

        self._write(write)

    def close(self) -> None:
        def write() -> None:
            if self.tensorboard is not None:
                with writing(self.events):
                    self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()

        self._write(write)


class Timer:
    """Seconds spent under each name: `with timer("rollout"): ...`, then `timer.seconds`; from its making to `end` as "iteration"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = _now()

    def end(self) -> None:
        self.seconds["iteration"] = _now() - self.start

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = _now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + _now() - start


def _now() -> float:
    if devices.on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def costs(timer: Timer, num_samples: int) -> dict[str, float]:
    """Collective. Metrics of an iteration that made `num_samples`: seconds, samples a second, peak memory of the fullest process."""
    metrics = {f"time/{name}_s": seconds for name, seconds in timer.seconds.items()}
    metrics["throughput/samples_per_s"] = num_samples / timer.seconds["iteration"]
    return metrics | {"memory/peak_gib": max(all_gather_object(peak_memory_gib()))}


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The objects of `output_dir/metrics.jsonl`, in order, without a last one that a kill has cut off. UserError for a damaged line."""
    path, rows = output_dir / "metrics.jsonl", []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["iteration"], int):
                raise ValueError
            for name, value in row.items():
                finite = isinstance(value, int) or name.startswith(("reward/", "held_out/"))
                if not isinstance(value, int | float) or (finite and not abs(value) < 2**63):
                    raise ValueError
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number < len(lines):  # nothing stands behind the last line break but what was being written
                raise UserError(f"line {number} of {path} is damaged: mend or delete it") from error
    return rows


def unchanged_since(manifest: dict[str, Any]) -> int:
    """The last iteration that was made with other arguments: before it, rewards may have been others, or what was wrong be cured."""
    begin = manifest["from_iteration"]
    for before in reversed(manifest["history"]):  # each has what was not the same at the next start
        if "arguments" in before:
            break
        begin = min(begin, before.get("from_iteration", begin))
    return begin


def plot_rewards(output_dir: Path, path: Path, evaluation: dict[str, Any] | None = None, window: int = 10) -> Path:
    """Draw a run's reward curves as a PNG at `path`: means over the training samples, thin, and their moving average, thick.

    evaluation: evaluate.py's results. Its rewards get a panel each too, with the base model's mean and noise band (two standard deviations
    over noise seeds, both ways) and the trained model's mean at the end.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(output_dir)
    keys = dict.fromkeys(key for row in metrics for key in row if key.startswith("reward/") and key.endswith("_mean"))
    curves = {key.removeprefix("reward/").removesuffix("_mean"): [row.get(key, math.nan) for row in metrics] for key in keys}
    names = list(dict.fromkeys([*curves, *(evaluation["base"] if evaluation else [])]))
    iterations = [row["iteration"] for row in metrics]
    figure, axes = pyplot.subplots(max(1, len(names)), 1, figsize=(7.5, 2.6 * max(1, len(names))), squeeze=False, sharex=True)
    for axis, name in zip(axes[:, 0], names):
        if name in curves:
            values = torch.tensor(curves[name])
            averages = [values[max(0, i - window + 1) : i + 1].mean() for i in range(len(values))]
            axis.plot(iterations, values, color="tab:blue", alpha=0.25)
            axis.plot(iterations, averages, color="tab:blue", label="training samples")
        if evaluation and name in evaluation["base"]:
            base, trained = evaluation["base"][name], evaluation["trained"][name]
            axis.axhline(base["mean"], color="gray", label="base, evaluation prompts (band: 2 sd over noise seeds)")
            axis.axhspan(base["mean"] - 2 * base["seed_std"], base["mean"] + 2 * base["seed_std"], color="gray", alpha=0.3)
            axis.errorbar(
                iterations[-1], trained["mean"], 2 * trained["seed_std"], fmt="o", color="tab:red", label="trained, evaluation prompts"
            )
        axis.legend(fontsize=7)
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("iteration")
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    return path
