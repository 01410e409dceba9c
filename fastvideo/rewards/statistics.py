"""What is logged of rewards, and the sign that a trained reward is exploited."""

import json
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import torch

from fastvideo.distributed import launch_rank, warn

WINDOW = 10  # iterations whose mean is one evaluation: enough prompts for their mix to matter little
EVALUATIONS = 4  # in a row, in which a held-out reward must fall each time for a warning


def group_statistics(group_rewards: dict[str, torch.Tensor], trained: Collection[str]) -> dict[str, float]:
    """Metrics of rewards name -> (P, G), a row of samples for each prompt: of each reward its mean, std, min and max over all samples, its
    mean std within rows, and the share of rows in which it tells no samples apart.

    Names of `trained` rewards begin with "reward/", of others with "held_out/". `reward/zero_std_frac` is the share of rows in which no
    trained reward tells the samples apart: they teach nothing.
    """
    metrics = {}
    flat = {name: values.amax(1) == values.amin(1) for name, values in group_rewards.items()}
    for name, values in group_rewards.items():
        values = values.double()
        statistics = {"mean": values.mean(), "std": values.std(), "group_std": values.std(1).mean()}
        statistics |= {"min": values.min(), "max": values.max(), "zero_std_frac": flat[name].double().mean()}
        prefix = f"{'reward' if name in trained else 'held_out'}/{name}"
        metrics |= {f"{prefix}_{key}": value.item() for key, value in statistics.items()}
    metrics["reward/zero_std_frac"] = torch.stack([flat[name] for name in trained]).all(0).double().mean().item()
    return metrics


def warn_of_over_optimization(output_dir: Path, iteration: int) -> None:
    """Warn if, over the last EVALUATIONS means of WINDOW iterations in metrics.jsonl, all trained rewards rose while a held-out one fell.

    Looks only at the end of a window, and only on rank 0.
    """
    if launch_rank() != 0 or iteration % WINDOW or iteration < WINDOW * EVALUATIONS:
        return
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()][-WINDOW * EVALUATIONS :]
    means = {
        name: [sum(row[name] for row in rows[start : start + WINDOW]) / WINDOW for start in range(0, len(rows), WINDOW)]
        for name in rows[0]
        if name.startswith(("reward/", "held_out/")) and name.endswith("_mean") and all(name in row for row in rows)
    }
    trained = {name: values for name, values in means.items() if name.startswith("reward/")}
    for name, values in means.items():
        falls = all(later < earlier for earlier, later in pairwise(values))
        if name.startswith("held_out/") and falls and all(values[-1] > values[0] for values in trained.values()):
            warn(
                f"over-optimisation: since iteration {rows[0]['iteration']} {name} fell from {values[0]:.4g} to {values[-1]:.4g} while "
                + ", ".join(f"{other} rose from {values[0]:.4g} to {values[-1]:.4g}" for other, values in trained.items())
                + ". An earlier checkpoint may be better; a --kl_weight or another trained reward holds it back"
            )
