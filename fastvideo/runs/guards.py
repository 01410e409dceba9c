"""Signs in metrics.jsonl that a run goes wrong, and which of its checkpoints is the best. docs/clusters.md has what was measured.

A rule looks at rows of metrics.jsonl, one an iteration, and says what is wrong after the last of them, or None.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import NamedTuple

from fastvideo.errors import UserError, warn
from fastvideo.parallel.distributed import on_main
from fastvideo.rewards.names import metric_name
from fastvideo.runs.tracking import read_metrics, unchanged_since

Rows = list[dict[str, float]]

WINDOW = 10  # iterations whose mean is one evaluation: enough prompts for their mix to matter little
EVALUATIONS = 4  # in a row, in which a held-out reward must fall each time for a warning
COLLAPSE_STD = 1.0  # standard deviations of the samples: now the average one is as bad as the bad ones were at the best time
PROMPTS_STD = 2.0  # standard deviations of the iterations' means
ZERO_STD_FRAC = 0.95  # groups that teach nothing: the few others are too few for a direction
FAR = 100  # clip ranges: clipping has held nothing back
KL = 0.1  # an element: the steps' means are off by almost half of the noise that they are drawn with
SPIKE = 10.0  # times the median of the iterations before, HISTORY of them, at least WINDOW
HISTORY = 20
SPIKES = 3  # in one window: more than a bad batch


class Trouble(NamedTuple):
    """What is wrong, since which iteration, and what may cure it; only what has a cure is worth stopping for."""

    message: str
    since: int
    cure: str | None = None


def check(output_dir: Path, iteration: int, clip_range: float) -> UserError | None:
    """Collective. Warn of what begins to go wrong in the run, as its metrics.jsonl shows after `iteration`.

    Returns, on all processes, what to stop with as long as something is wrong that is worth stopping for; else None.
    """

    def checked() -> UserError | None:
        try:
            return _check(output_dir, iteration, clip_range)
        except KeyError as error:  # someone has edited it
            raise UserError(f"a line of {output_dir / 'metrics.jsonl'} lacks {error}: mend or delete it") from error

    return on_main(checked)


def _check(output_dir: Path, iteration: int, clip_range: float) -> UserError | None:
    rules = [(lambda rows: policy_explosion(rows, clip_range), 1), (gradient_spike, 1), (gradient_spikes, 1)]
    if iteration % WINDOW == 0:
        rows = read_metrics(output_dir)
        rules += [(reward_collapse, WINDOW), (no_signal, WINDOW), (over_optimization, WINDOW)]
    else:  # a long run is parsed only once in a while
        lines = (output_dir / "metrics.jsonl").read_text().splitlines()[-(WINDOW + HISTORY + 1) :]
        rows = [json.loads(line) for line in lines]
    manifest = json.loads((output_dir / "manifest.json").read_text())
    begin = unchanged_since(manifest)
    weights = zip(manifest["arguments"]["rewards"], manifest["arguments"]["reward_weights"])
    penalties = {f"reward/{metric_name(text)}_mean" for text, weight in weights if weight < 0}  # which should fall
    rows = [{key: value for key, value in row.items() if key not in penalties} for row in rows if row["iteration"] > begin]
    failure = None
    for rule, step in rules:
        if trouble := rule(rows):
            if not rule(rows[:-step]):
                warn(trouble.message)
            end = len(rows) - step
            while end > 0 and (earlier := rule(rows[:end])):  # checkpoints of bad times are no way back
                trouble, end = trouble._replace(since=earlier.since), end - step
            if trouble.cure and failure is None:
                keep = manifest["arguments"]["keep_checkpoints"]
                failure = UserError(f"{trouble.message}. {way_back(output_dir, iteration, trouble, keep)}")
    return failure


def check_ratio(max_deviation: float, clip_range: float) -> None:
    """Before the first update the ratio is 1. Warns above a tenth of clip_range; raises UserError above clip_range, and for NaN."""
    message = (
        f"before the first update, max |ratio - 1| is {max_deviation:.1e} with --clip_range {clip_range}: rollout and update computed "
        "different log-probs, because of bfloat16 kernels that depend on the batch shape, the attention backend, or dropout. "
        "--old_log_prob recompute cures it; so may equal --rollout_batch_size and --micro_batch_size, or --dtype float32"
    )
    if not max_deviation <= clip_range:
        raise UserError(message)
    if max_deviation > clip_range / 10:
        warn(message)


# ------------------------------------------------------------------------------------------------------- rules for each iteration


def policy_explosion(rows: Rows, clip_range: float) -> Trouble | None:
    """One iteration's updates have moved the policy further than clipping can explain, or to numbers that are none."""
    row, cure = rows[-1] if rows else {}, "a lower --learning_rate or --max_grad_norm, or fewer --updates_per_iteration"
    # To the old policy, from log-probs that are off by d: d^2 / 2. To the initial one it grows in health too, but not at once.
    before = [row["policy/kl"] for row in rows[-HISTORY - 1 : -1] if "policy/kl" in row]
    most_kl = max(KL, SPIKE * median(before)) if len(before) >= WINDOW else math.inf
    for name, most in (("approx_kl", min(FAR * clip_range, 1) ** 2 / 2), ("kl", most_kl), ("grad_norm", math.inf)):
        value = row.get(f"policy/{name}", 0.0)
        if not (math.isfinite(value) and value <= most):
            above = f", above {most:.3g}" if math.isfinite(value) else ""
            return Trouble(f"policy explosion: policy/{name} is {value:.3g} in iteration {row['iteration']}{above}", row["iteration"], cure)
    return None


def spikes(rows: Rows) -> dict[int, float]:
    """Of the last WINDOW rows those whose gradient norm is a spike: iteration -> times the median before. Norms of 0 teach no scale."""
    found = {}
    for end in range(max(0, len(rows) - WINDOW), len(rows)):
        before = [row["policy/grad_norm"] for row in rows[max(0, end - HISTORY) : end] if 0 < row["policy/grad_norm"] < math.inf]
        norm = rows[end]["policy/grad_norm"]
        if len(before) >= WINDOW and norm > SPIKE * median(before):
            found[rows[end]["iteration"]] = norm / median(before)
    return found


def gradient_spike(rows: Rows) -> Trouble | None:
    """The last iteration's gradient norm is one. Clipping has held it back, so it is only worth a warning."""
    found = spikes(rows)
    if not rows or (iteration := rows[-1]["iteration"]) not in found:
        return None
    return Trouble(f"policy/grad_norm spikes to {found[iteration]:.3g} times its usual value in iteration {iteration}", iteration)


def gradient_spikes(rows: Rows) -> Trouble | None:
    """The last iteration's gradient norm is a spike, and not the only one."""
    found = spikes(rows)
    if len(found) < SPIKES or rows[-1]["iteration"] not in found:
        return None
    message = (
        f"gradients out of bounds: policy/grad_norm was above {SPIKE:g} times its usual value in iterations {', '.join(map(str, found))}"
    )
    return Trouble(message, min(found), "a lower --max_grad_norm or --learning_rate, or more --prompts_per_iteration")


# ------------------------------------------------------------------------------------------------ rules for the end of each window


def windows(rows: Rows) -> list[Rows]:
    """The rows in windows, back from the end, the last first; what is left over at the beginning is dropped."""
    return [rows[end - WINDOW : end] for end in range(len(rows), WINDOW - 1, -WINDOW)]


def names(rows: Rows, prefix: str) -> list[str]:
    """The rewards whose means all rows have, as PREFIX/NAME."""
    keys = [key for key in (rows[0] if rows else ()) if key.startswith(f"{prefix}/") and key.endswith("_mean")]
    return [key.removesuffix("_mean") for key in keys if all(key in row for row in rows)]


def mean(rows: Rows, name: str, key: str = "mean") -> float:
    return fmean(row[f"{name}_{key}"] for row in rows)


def reward_collapse(rows: Rows) -> Trouble | None:
    """A trained reward's mean over the last window fell far below its best one, or below the first iteration's."""
    now, *earlier = windows(rows) or [[]]
    earlier.append(rows[:1])  # the model as it came, which may not last for a whole window
    for name in names(now, "reward"):
        best = max((window for window in earlier if name in names(window, "reward")), key=lambda window: mean(window, name), default=now)
        before, after, until = mean(best, name), mean(now, name), best[-1]["iteration"]
        # Of the samples, then or now: where all was perfect, then has none. Of the iterations' means: an iteration may draw easy prompts.
        std, mix = max(mean(best, name, "std"), mean(now, name, "std")), pstdev(row[f"{name}_mean"] for row in now)
        if before - after > COLLAPSE_STD * std + PROMPTS_STD * mix:
            message = (
                f"reward collapse: {name}_mean fell from {before:.4g} by iteration {until} to {after:.4g} by {now[-1]['iteration']}, "
                f"with a standard deviation of {std:.3g} over samples and of {mix:.3g} over iterations"
            )
            return Trouble(message, until + 1, "a lower --learning_rate or --max_grad_norm, or a --kl_weight")
    return None


def no_signal(rows: Rows) -> Trouble | None:
    """In no iteration of the last window could the rewards tell a group's samples apart."""
    now = (windows(rows) or [[]])[0]
    if not now or min(row["reward/zero_std_frac"] for row in now) < ZERO_STD_FRAC:
        return None
    message = (
        f"no signal: in each of the last {WINDOW} iterations reward/zero_std_frac was {ZERO_STD_FRAC} or more, so there is nothing to learn"
    )
    return Trouble(message, now[0]["iteration"], "a softer reward, more --num_generations or a higher --noise_level")


def over_optimization(rows: Rows) -> Trouble | None:
    """Over the last EVALUATIONS windows all trained rewards rose while a held-out one fell each time."""
    seen = windows(rows)[:EVALUATIONS][::-1]
    if len(seen) < EVALUATIONS:
        return None
    rows = [row for window in seen for row in window]
    trained = {name: [mean(window, name) for window in (seen[0], seen[-1])] for name in names(rows, "reward")}
    for name in names(rows, "held_out"):
        values = [mean(window, name) for window in seen]
        if all(later < earlier for earlier, later in pairwise(values)) and all(last > first for first, last in trained.values()):
            rose = ", ".join(f"{other}_mean rose from {a:.4g} to {b:.4g}" for other, (a, b) in trained.items())
            message = (
                f"over-optimisation: since iteration {rows[0]['iteration']} {name}_mean fell from {values[0]:.4g} to {values[-1]:.4g} "
                f"while {rose}. An earlier checkpoint may be better; a --kl_weight or another trained reward holds it back"
            )
            return Trouble(message, rows[0]["iteration"])
    return None


# ------------------------------------------------------------------------------------------------------------- the way back


def best_checkpoint(output_dir: Path, checkpoints: list[Path]) -> Path | None:
    """Of folders iteration_NNNNNN the one with the best held-out rewards; the last of equals; None without held-out rewards.

    What counts is the gain since the run's first WINDOW iterations, in standard deviations that the samples had then, of the means over
    the last WINDOW iterations before the checkpoint, averaged over the held-out rewards.
    """
    rows = read_metrics(output_dir) if (output_dir / "metrics.jsonl").exists() else []
    scores = {}
    for checkpoint in sorted(checkpoints):
        until = [row for row in rows if row["iteration"] <= iteration_of(checkpoint)]
        gains = []
        for name in names(until[-1:], "held_out"):
            first = [row for row in rows if f"{name}_mean" in row][:WINDOW]
            last = [row for row in until if f"{name}_mean" in row][-WINDOW:]
            gains.append((mean(last, name) - mean(first, name)) / (mean(first, name, "std") or 1))
        if gains:
            scores[checkpoint] = fmean(gains)
    return max(reversed(scores), key=lambda checkpoint: scores[checkpoint]) if scores else None


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iteration_"))


def way_back(output_dir: Path, iteration: int, trouble: Trouble, keep: int) -> str:
    """What to do, and from which checkpoint: the best, or the newest from before, of those that will be there once `iteration` is saved."""
    folder = output_dir / "checkpoints"
    there = sorted(path for path in folder.glob("iteration_*") if iteration_of(path) < iteration)
    best = best_checkpoint(output_dir, [*there, folder / f"iteration_{iteration:06d}"])
    good = [path for path in there[max(0, len(there) - (keep - 1)) :] if iteration_of(path) < trouble.since]
    if best in there:
        good.append(best)
    if not good:
        return f"No checkpoint from before is kept: start again in another --output_dir, with {trouble.cure}"
    again = f"write {good[-1].name} into {folder / 'latest'}, and give the same command with --allow_changed_args"
    return f"To go back, {again} and {trouble.cure}"
