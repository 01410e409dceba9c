"""What is logged of the updates."""

import torch

from fastvideo.parallel import distributed


def update_statistics(own: list[dict[str, torch.Tensor | float]], updates: int) -> dict[str, float]:
    """Collective. Metrics "policy/NAME" of an iteration's `updates`: the means over the micro-batches of all processes.

    own: of each micro-batch of this process what `Run.backward` was given, its "update", and the "share" of that which it is.
    Of "ratio_max_dev", where there is one, the largest in the first update: before it the ratio is 1.
    """
    gathered = distributed.all_gather_object([{name: float(value) for name, value in row.items()} for row in own])
    rows = [row for rows in gathered for row in rows]
    means = [name for name in rows[0] if name not in ("ratio_max_dev", "update", "share")]
    metrics = {f"policy/{name}": sum(row[name] * row["share"] for row in rows) / (updates * len(gathered)) for name in means}
    if "ratio_max_dev" in rows[0]:
        metrics["policy/ratio_max_dev"] = max(row["ratio_max_dev"] for row in rows if row["update"] == 0)
    return metrics
