"""What is logged of rewards."""

from collections.abc import Collection

import torch


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
