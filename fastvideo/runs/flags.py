"""The flags of a run, which are the same for all models, and how a script's flags are read."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from fastvideo.errors import launch_rank
from fastvideo.flags import check_numbers
from fastvideo.rewards import check_rewards

Flags = TypeVar("Flags", bound="RunFlags")


@dataclass(kw_only=True)
class RunFlags:
    """What a run learns from, its optimizer, and how the work is laid out, kept and shown."""

    embeddings: Path
    """Embedding cache of the training prompts, made by the model's preprocess/embed_*.py with the same model folder."""
    output_dir: Path
    """Run folder: metrics, checkpoints, pictures, and after the last iteration export/."""
    rewards: tuple[str, ...]
    """Each NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]; a threshold makes the reward binary."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward's advantages, in the order of --rewards (default: 1 each)."""
    held_out_rewards: tuple[str, ...] = ()
    """Rewards that are logged but never trained on: if they fall while the others rise, the training over-optimises."""
    iterations: int = 300
    """Training iterations: each draws prompts, samples, and makes --updates_per_iteration updates."""
    seed: int = 0
    """Seed of every random draw: prompts, noise, trained steps, LoRA initialisation."""

    prompts_per_iteration: int = 32
    """Prompts of one iteration, over all processes (P)."""

    lora_rank: int = 0
    """Train a LoRA adapter of this rank on the attention layers (0: train all weights)."""
    learning_rate: float = 1e-5
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm (0: not at all)."""
    lr_warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to its value."""
    ema_decay: float = 0.995
    """Decay of the weights' moving average, taken after each update; the average is what is exported (0: none)."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimiser over the processes, 2 also gradients, 3 also weights."""
    gather_for_rollout: bool = True
    """At --zero_stage 3, gather the weights once for all of an iteration's sampling, not layer by layer in every step, if they fit."""
    reduce_dtype: Literal["auto", "float32"] = "auto"
    """What gradients are averaged over the processes in (auto: --dtype)."""
    offload: bool = False
    """Keep the optimiser (and the reference of --kl_weight) in CPU memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in (auto: bfloat16 on GPUs, float32 on CPUs). Latents and log-probs are always float32."""
    attention: str = "auto"
    """A diffusers attention backend: native, flash, ... (auto: flash where flash-attn is installed, else native)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    rollout_batch_size: int = 8
    """Samples drawn at once by each process."""
    micro_batch_size: int = 4
    """(sample, step) pairs in one forward and backward pass of each process."""

    timeout_minutes: float = 30
    """A process that the others have waited for this long is taken for lost, which ends the run."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in --output_dir, if any; never: refuse a folder that has a run in it."""
    allow_changed_args: bool = False
    """Resume even if arguments have changed that change what is computed; else that is refused."""
    stop_on_collapse: bool = False
    """Save and stop, not only warn, when the reward, the ratio or the gradients leave what is healthy (docs/clusters.md has the rules)."""
    checkpoint_every: int = 50
    """Iterations between checkpoints; one is always saved after the last."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    sample_every: int = 50
    """Iterations between grids of ODE samples of 8 prompts (0: none)."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        """Raises UserError for what does not fit, as the scripts' own flags do."""
        self.reward_weights = check_rewards(self.rewards, self.reward_weights, self.held_out_rewards)
        rules = {
            "above 0": "iterations prompts_per_iteration learning_rate rollout_batch_size micro_batch_size timeout_minutes "
            "checkpoint_every keep_checkpoints",
            "0 or more": "lora_rank weight_decay max_grad_norm lr_warmup_steps sample_every",
            "at least 0 and below 1": "ema_decay",
        }
        check_numbers(vars(self), rules)


def parse(flags: type[Flags], description: str) -> Flags:
    """The command line as `flags`, a dataclass whose fields are those of its bases, each of which is a group in --help."""
    names = {base.__name__.removesuffix("Flags").lower(): base for base in flags.__bases__}
    groups = dataclasses.make_dataclass("Groups", [(name, tyro.conf.OmitArgPrefixes[base]) for name, base in names.items()])
    settings = {"use_underscores": True, "console_outputs": launch_rank() == 0, "description": description.splitlines()[0]}
    given = tyro.cli(groups, prog=Path(sys.argv[0]).name, **settings)
    return flags(**{name: value for group in vars(given).values() for name, value in vars(group).items()})
