"""GRPO training of Wan 2.1 (rectified flow, text-to-video with guidance): DanceGRPO, https://arxiv.org/abs/2505.07818.

    python train_grpo_wan.py --model shapes/models/wan --embeddings CACHE --output_dir RUN --rewards motion \\
        --height 32 --width 32 --num_frames 9 --guidance_scale 2     # after python shapes/pretrain.py --stages wan_vae wan
    torchrun --standalone --nproc_per_node 8 train_grpo_wan.py --model Wan2.1 --embeddings CACHE --output_dir RUN --rewards ...

Equation numbers are the paper's. Letters for shapes: B samples in a batch, P prompts, G samples of one prompt (--num_generations),
T sampling steps, K trained steps of a sample, C channels, F frames, L text tokens.
"""

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tqdm import tqdm

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.embeddings.fingerprint import check_encoder
from fastvideo.embeddings.prompts import draw_prompts
from fastvideo.errors import UserError, warn
from fastvideo.flags import check_numbers, check_size
from fastvideo.models.model_folder import check_model
from fastvideo.models.pretrained import add_lora, load_network, load_pretrained
from fastvideo.parallel import distributed, zero
from fastvideo.parallel.attention import set_attention
from fastvideo.parallel.distributed import Ranks, keyed_generator
from fastvideo.parallel.ema import EMA
from fastvideo.parallel.networks.wan import parallelize
from fastvideo.parallel.reference import InitialWeights
from fastvideo.rewards import check_rewards, load_rewards, parse_rewards, score
from fastvideo.rewards.preflight import preflight
from fastvideo.rewards.statistics import group_statistics
from fastvideo.runs import checkpoint, guards, run_folder, tracking
from fastvideo.runs.stop import StopSignals

FAMILY = "wan"  # of the embedding caches that fit
# What evaluate.py takes over from a run.
SAMPLING = ("sampling_steps", "shift", "guidance_scale", "height", "width", "num_frames", "max_sequence_length")

# 1. Arguments =========================================================================================================


@dataclass
class Args:
    model: Path
    """Wan 2.1 text-to-video folder in diffusers layout; `transformer` and `vae` are loaded from it."""
    embeddings: Path
    """Embedding cache of the training prompts, made by preprocess/embed_wan.py with the same model folder."""
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
    num_generations: int = 12
    """Samples of each prompt (G), the group within which advantages are computed."""
    updates_per_iteration: int = 1
    """Optimiser steps an iteration, each on its own share of every prompt's samples."""
    best_of_n: int = 0
    """Train on this many samples a prompt only: the better half from the top, the other from the bottom by advantage (0: on all)."""
    sampling_steps: int = 25
    """Steps from noise to clip (T)."""
    shift: float = 5.0
    """Time shift of the schedule: above 1 it spends more steps at high noise."""
    noise_level: float = 0.3
    """Noise of the sampling SDE, epsilon_t in Eq. 8."""
    sde_window: tuple[int, int] | None = None
    """START COUNT: only these transitions are stochastic and trained, Euler steps elsewhere (default: all but the last)."""
    timestep_fraction: float = 0.6
    """Share of the stochastic transitions that is trained, for each sample (tau)."""
    timestep_selection: Literal["random", "first", "last"] = "random"
    """Which of the stochastic transitions are trained."""
    shared_noise: bool = True
    """All samples of one prompt start from the same noise."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, within the policy: what is sampled and scored is the guided prediction (1: none, at half the cost)."""
    height: int = 480
    """Height in pixels."""
    width: int = 832
    """Width in pixels."""
    num_frames: int = 81
    """Frames of a clip, one more than a multiple of 4. 1: text-to-image, with rewards for pictures."""

    clip_range: float = 1e-4
    """The ratio is clipped to 1 +- this."""
    advantage_clip: float = 5.0
    """Summed advantages are clipped to +- this."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the initial policy (0: none, as in the paper). Without LoRA it needs a whole copy on each GPU."""
    old_log_prob: Literal["rollout", "recompute"] = "rollout"
    """Where the ratio's denominator comes from: the rollout, or one more pass in the update's own batches."""
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
    lora_rank: int = 0
    """Train a LoRA adapter of this rank on the attention layers (0: train all weights)."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimiser over the processes, 2 also gradients, 3 also weights."""
    sp_size: int = 1
    """Neighbouring processes that compute each sample together, sharing its tokens (sequence parallelism)."""
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
    vae_tiling: bool = False
    """Decode sample by sample in overlapping tiles, to save memory."""
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
        self.reward_weights = check_rewards(self.rewards, self.reward_weights, self.held_out_rewards)
        rules = {
            "at least 2": "num_generations sampling_steps",
            "above 0": "iterations prompts_per_iteration updates_per_iteration height width shift noise_level clip_range advantage_clip "
            "num_frames learning_rate rollout_batch_size micro_batch_size sp_size timeout_minutes checkpoint_every keep_checkpoints",
            "1 or more": "guidance_scale",
            "0 or more": "best_of_n kl_weight weight_decay max_grad_norm lr_warmup_steps lora_rank sample_every",
            "above 0 and at most 1": "timestep_fraction",
            "at least 0 and below 1": "ema_decay",
        }
        check_numbers(vars(self), rules)
        if self.best_of_n % 2 or self.best_of_n > self.num_generations:
            raise UserError(f"--best_of_n is {self.best_of_n}, but must be even and at most --num_generations {self.num_generations}")
        if self.kept_generations % self.updates_per_iteration:
            kept = f"--best_of_n {self.best_of_n}" if self.best_of_n else f"--num_generations {self.num_generations}"
            raise UserError(f"--updates_per_iteration {self.updates_per_iteration} does not divide {kept}")
        (start, count), most = self.sde_window or (0, self.sampling_steps - 1), self.sampling_steps - 1  # the last is never stochastic
        if start < 0 or count < 1 or start + count > most:
            raise UserError(f"--sde_window {start} {count} must lie within the first {most} of --sampling_steps {self.sampling_steps}")
        schedule = time_schedule(self.sampling_steps, self.shift).tolist()
        worst = max(self.noise_level**2 * (schedule[i] - schedule[i + 1]) / (2 * schedule[i] ** 2) for i in self.stochastic_steps)
        if worst > 0.5:  # the SDE's drift overshoots in one step: Euler-Maruyama is unstable
            warn(
                f"noise_level^2 * delta / (2 t^2) reaches {worst:.2f}, and sampling breaks down towards 1: lower --noise_level "
                f"{self.noise_level}, raise --sampling_steps {self.sampling_steps}, or choose an earlier --sde_window"
            )

    @property
    def kept_generations(self) -> int:
        return self.best_of_n or self.num_generations

    @property
    def stochastic_steps(self) -> range:
        """Transitions with noise, which alone can be trained. Never the last: what it adds would not reach the decoded x0_hat."""
        start, count = self.sde_window or (0, self.sampling_steps - 1)
        return range(start, start + count)


# 2. Sampler ===========================================================================================================


# Copied from train_grpo_flux.py
def time_schedule(num_steps: int, shift: float) -> torch.Tensor:
    """Noise levels of a trajectory, (num_steps + 1,) float32: 1 (noise) down to 0 (clean), crowded towards 1 for shift > 1."""
    t = torch.linspace(1, 0, num_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


# Copied from train_grpo_flux.py
def sde_step(
    z_t: torch.Tensor,
    u_hat: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    noise_level: float,
    z_s: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One transition of the rectified-flow SDE from time t to s < t: draws z_s from `noise`, or scores a given `z_s`.

    z_t, u_hat, z_s, noise: (B, ...) float32. t, s: scalars or (B,), 1 >= t > s >= 0.
    Returns z_s; its log-probability (B,), the mean over elements (None at noise_level 0, where the step is Euler's); and x0_hat.
    """
    t, s = (torch.as_tensor(v, dtype=z_t.dtype, device=z_t.device).reshape(-1, *[1] * (z_t.ndim - 1)) for v in (t, s))
    x0_hat = z_t - t * u_hat  # Eq. 3, with u = eps - x
    if noise_level == 0:
        return z_t + u_hat * (s - t), None, x0_hat  # Eq. 4
    score = -(z_t - (1 - t) * x0_hat) / t**2  # of N((1 - t) x, t^2 I), below Eq. 8
    mean = z_t + (u_hat - 0.5 * noise_level**2 * score) * (s - t)  # Eq. 8, drift
    std = noise_level * (t - s).sqrt()  # Eq. 8, diffusion
    if z_s is None:
        z_s = mean + std * noise
    log_prob = -((z_s - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return z_s, log_prob.flatten(1).mean(1), x0_hat


# 3. Model =============================================================================================================


def load_models(args: Args, dtype: torch.dtype, ranks: Ranks) -> tuple[WanTransformer3DModel, AutoencoderKLWan]:
    """The policy, on the CPU and ready for the engine, and the frozen decoder on its device."""
    transformer = load_network(WanTransformer3DModel, args.model, "transformer", dtype, ranks)
    vae = load_pretrained(AutoencoderKLWan, args.model, "vae", torch_dtype=dtype).to(ranks.device).eval().requires_grad_(False)
    scale = vae.config.scale_factor_spatial * transformer.config.patch_size[1]  # pixels to a token: 16 for Wan 2.1
    check_size(vars(args), pixels=scale, frames=vae.config.scale_factor_temporal)
    vae.use_tiling = vae.use_slicing = args.vae_tiling
    parallelize(transformer, ranks)
    set_attention(transformer, args.attention, ranks.device)
    add_lora(transformer, args.lora_rank, args.seed)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train(), vae


def latent_shape(transformer: WanTransformer3DModel, vae: AutoencoderKLWan, args: Args) -> tuple[int, ...]:
    """Of one sample: (C, latent frames, latent height, latent width)."""
    frames = (args.num_frames - 1) // vae.config.scale_factor_temporal + 1
    scale = vae.config.scale_factor_spatial
    return transformer.config.out_channels, frames, args.height // scale, args.width // scale


def load_cond(cache: EmbeddingCache, prompts: list[int], transformer: WanTransformer3DModel, vae: AutoencoderKLWan, args: Args) -> dict:
    """What the network is given of each prompt, as tensors with the prompts in front: embeddings, zeros where text is padded (Wan has no
    mask for it); for classifier-free guidance also those of the empty prompt, as negative_*."""
    device, dtype = vae.device, transformer.dtype
    cond = {name: tensor.to(device, dtype) for name, tensor in cache.get(prompts).items()}
    if args.guidance_scale != 1:
        empty = cache.get([cache.unconditional])
        cond |= {f"negative_{name}": tensor.to(device, dtype).expand_as(cond[name]) for name, tensor in empty.items()}
        cond["guidance_scale"] = torch.full((len(prompts), 1, 1, 1, 1), args.guidance_scale, device=device)
    return cond


def predict(transformer: torch.nn.Module, z_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    """u_hat, of z_t's shape (B, C, F, H, W), float32, at t (B,). The only call of the network, for rollout and update alike.

    With guidance (the paper's appendix C) both branches are one batch of 2 B, and gradients flow through both.
    """
    inputs = {
        "hidden_states": z_t.to(cond["prompt_embeds"].dtype),
        "timestep": 1000 * t,
        "encoder_hidden_states": cond["prompt_embeds"],
    }
    if "guidance_scale" not in cond:
        return transformer(**inputs, return_dict=False)[0].float()
    negative = inputs | {"encoder_hidden_states": cond["negative_prompt_embeds"]}
    both = transformer(**{name: torch.cat([negative[name], inputs[name]]) for name in inputs}, return_dict=False)[0].float()
    u_negative, u_positive = both.chunk(2)
    return u_negative + cond["guidance_scale"] * (u_positive - u_negative)


def decode(vae: AutoencoderKLWan, x0_hat: torch.Tensor, args: Args) -> torch.Tensor:
    """Latents to clips (B, 3, num_frames, height, width), or with one frame to pictures (B, 3, height, width), float32 in [-1, 1]."""
    mean, std = (x0_hat.new_tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))  # of each channel
    clips = vae.decode((x0_hat * std + mean).to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)
    return clips.squeeze(2) if args.num_frames == 1 else clips


# 4. Rollout ===========================================================================================================


# Copied from train_grpo_flux.py
@torch.no_grad()
def rollout(
    transformer: torch.nn.Module,
    cond: dict[str, torch.Tensor],
    z_1: torch.Tensor,
    schedule: torch.Tensor,
    noise_levels: list[float],
    generators: list[torch.Generator],
    trained_steps: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sample one trajectory for each row of z_1, keeping only the transitions that will be trained.

    cond: tensors (B, ...). z_1: (B, *latent) float32. schedule: (T + 1,). noise_levels: T numbers, 0 for an Euler step.
    generators: B, for the noise of each sample's steps. trained_steps: (B, K) step indices.
    Returns the trajectories, {"step", "old_log_prob": (B, K), "z_t", "z_s": (B, K, *latent)}, and the clean latents (B, *latent).
    """
    kept = {"step": trained_steps, "old_log_prob": z_1.new_zeros(trained_steps.shape)}
    kept |= {name: z_1.new_zeros(*trained_steps.shape, *z_1.shape[1:]) for name in ("z_t", "z_s")}
    z_t = z_1
    for step, noise_level in enumerate(noise_levels):
        t, s = schedule[step], schedule[step + 1]
        u_hat = predict(transformer, z_t, t.expand(len(z_t)), cond)
        noise = torch.stack([torch.randn(z_t.shape[1:], generator=g) for g in generators]).to(z_t) if noise_level else None
        z_s, log_prob, _ = sde_step(z_t, u_hat, t, s, noise_level, noise=noise)
        if noise_level:
            here = trained_steps == step  # (B, K)
            here_too = here.view(*here.shape, *[1] * (z_t.ndim - 1))
            kept["z_t"] = torch.where(here_too, z_t[:, None], kept["z_t"])
            kept["z_s"] = torch.where(here_too, z_s[:, None], kept["z_s"])
            kept["old_log_prob"] = torch.where(here, log_prob[:, None], kept["old_log_prob"])
        z_t = z_s
    return kept, z_t


# 5. Advantages ========================================================================================================


# Copied from train_grpo_flux.py
def group_advantages(rewards: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Eq. 10 within each prompt's group, for each reward that has a weight, then the weighted sum (Algorithm 1, line 8).

    rewards: name -> (P, G). Returns (P, G) float32. A group whose rewards are all equal gets exactly zero.
    """
    total = 0
    for name, weight in weights.items():
        values = rewards[name].double()
        deviations = (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-8)
        equal = values.amax(1, keepdim=True) == values.amin(1, keepdim=True)  # not std == 0: the mean of equal numbers is rounded
        total = total + weight * deviations.masked_fill(equal, 0)
    return total.float()


# Copied from train_grpo_flux.py
def best_of_n(advantages: torch.Tensor, keep: int) -> torch.Tensor:
    """Of each prompt's samples, the keep / 2 with the highest and the keep / 2 with the lowest advantage.

    advantages: (P, G). Returns (P, keep) indices in ascending order; all of them for keep = G.
    """
    order = advantages.argsort(dim=1, descending=True, stable=True)
    top = (keep + 1) // 2
    return torch.cat([order[:, :top], order[:, order.shape[1] - (keep - top) :]], dim=1).sort(dim=1).values


# Copied from train_grpo_flux.py
def select_timesteps(
    generators: list[torch.Generator], num_steps: int, fraction: float, selection: Literal["random", "first", "last"] = "random"
) -> torch.Tensor:
    """For each sample, which of `num_steps` steps are trained: (len(generators), ceil(fraction * num_steps)), ascending and distinct."""
    count = math.ceil(round(fraction * num_steps, 6))  # 0.6 * 5 is 3, not 3.0000000000000004
    if selection == "random":
        return torch.stack([torch.randperm(num_steps, generator=g)[:count].sort().values for g in generators])
    first = 0 if selection == "first" else num_steps - count
    return torch.arange(first, first + count).expand(len(generators), -1)


# 6. Loss ==============================================================================================================


# Copied from train_grpo_flux.py
def grpo_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 9, negated, as the mean over the given transitions. All inputs (B,). Returns the loss and statistics of the ratio."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        stats = {
            "ratio_mean": ratio.mean(),
            "ratio_max_dev": (ratio - 1).abs().max(),
            "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
            "clip_frac": ((ratio - 1).abs() > clip_range).float().mean(),
        }
    return loss, stats


# Copied from train_grpo_flux.py
def pick(trajectory: dict, cond: dict, sample: torch.Tensor, slot: torch.Tensor, num_generations: int) -> tuple[dict, dict]:
    """Transitions of a process's trajectories {name: (samples, K, ...)} at sample (B,), slot (B,), and what their prompts condition on."""
    transitions = {name: tensor[sample, slot] for name, tensor in trajectory.items()}
    return transitions, {name: tensor[sample // num_generations] for name, tensor in cond.items()}


# Copied from train_grpo_flux.py
def score_transitions(
    transformer: torch.nn.Module, transitions: dict, cond: dict, schedule: torch.Tensor, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log_prob (B,) under the transformer's weights of transitions as `rollout` keeps them, each tensor (B, ...); and its u_hat."""
    z_t, t, s = transitions["z_t"], schedule[transitions["step"]], schedule[transitions["step"] + 1]
    u_hat = predict(transformer, z_t, t, cond)
    return sde_step(z_t, u_hat, t, s, noise_level, z_s=transitions["z_s"])[1], u_hat


# Copied from train_grpo_flux.py
def reference_kl(transitions: dict, schedule: torch.Tensor, u_hat: torch.Tensor, noise_level: float) -> torch.Tensor:
    """KL to the initial policy, whose prediction is transitions["u_ref"], |mean - mean_ref|^2 / (2 std^2), mean over elements and batch."""
    z_t, t, s = transitions["z_t"], schedule[transitions["step"]], schedule[transitions["step"] + 1]
    mean, mean_ref = (sde_step(z_t, u, t, s, noise_level, noise=torch.zeros_like(z_t))[0] for u in (u_hat, transitions["u_ref"]))
    return ((mean - mean_ref).square().flatten(1).mean(1) / (2 * noise_level**2 * (t - s))).mean()


# Copied from train_grpo_flux.py
def check_ratio(max_deviation: float, clip_range: float) -> None:
    """Before the first update the ratio is 1. Warns above a tenth of clip_range; raises UserError above clip_range."""
    message = (
        f"before the first update, max |ratio - 1| is {max_deviation:.1e} with --clip_range {clip_range}: rollout and update computed "
        "different log-probs, because of bfloat16 kernels that depend on the batch shape, the attention backend, or dropout. "
        "--old_log_prob recompute cures it; so may equal --rollout_batch_size and --micro_batch_size, or --dtype float32"
    )
    if not max_deviation <= clip_range:
        raise UserError(message)
    if max_deviation > clip_range / 10:
        warn(message)


# 7. Main ==============================================================================================================


# Copied from train_grpo_flux.py
def main() -> None:
    args = tyro.cli(Args, use_underscores=True, console_outputs=distributed.launch_rank() == 0, description=__doc__.splitlines()[0])
    ranks = distributed.init(args.sp_size, args.timeout_minutes)
    P, G, N = args.prompts_per_iteration, args.num_generations, args.updates_per_iteration
    if P % ranks.dp_size:
        raise UserError(f"--prompts_per_iteration {P} does not divide among {ranks.layout}")
    device, dtype = ranks.device, distributed.compute_dtype(args.dtype, ranks.device)
    zero.check_stage(args.zero_stage, args.offload, dtype)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(args).items()}
    cache = EmbeddingCache(args.embeddings, {"family": FAMILY}, ranks)
    resume_from = run_folder.enter(args.output_dir, args.resume, arguments, cache.digest, args.allow_changed_args)

    # Rewards, models, engine.
    distributed.on_main(lambda: check_model(args.model, FAMILY, "training"))
    check_encoder(cache, args.model)
    rewards = load_rewards(parse_rewards(args.rewards + args.held_out_rewards), device, cache.rows[: cache.num_prompts])
    weights = dict(zip(rewards, args.reward_weights))  # of those that are trained on
    transformer, vae = load_models(args, dtype, ranks)
    distributed.together(lambda: load_cond(cache, [0], transformer, vae, args))  # a cache that does not fit is refused now
    reference = InitialWeights(transformer) if args.kl_weight else None
    local_prompts = P // ranks.dp_size
    steps_trained = select_timesteps([torch.Generator()], len(args.stochastic_steps), args.timestep_fraction).shape[1]
    pairs_per_update = local_prompts * (args.kept_generations // N) * steps_trained
    engine = zero.initialize(
        transformer,
        stage=args.zero_stage,
        offload=args.offload,
        dtype=dtype,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_multiplier=lambda update: min(1.0, (update + 1) / max(1, args.lr_warmup_steps)),
        max_grad_norm=args.max_grad_norm,
        micro_batch_size=args.micro_batch_size,
        accumulation_steps=math.ceil(pairs_per_update / args.micro_batch_size),
        reduce_dtype=args.reduce_dtype,
    )
    if reference:
        reference.fill(engine, args.offload)
    ema = EMA(engine, args.ema_decay) if args.ema_decay else None
    schedule = time_schedule(args.sampling_steps, args.shift).to(device)
    noise_levels = [args.noise_level if step in args.stochastic_steps else 0.0 for step in range(args.sampling_steps)]
    shape = latent_shape(transformer, vae, args)
    distributed.together(lambda: preflight(rewards, decode(vae, torch.zeros(1, *shape, device=device), args), cache.rows[0]))

    done = checkpoint.load(engine, ema, resume_from) if resume_from else 0
    sampling = {name: (arguments | cache.fingerprint)[name] for name in SAMPLING}
    if ranks.is_main:
        print(f"{cache.num_prompts} prompts, {G} samples of each of {P} an iteration on {ranks.layout}, {device.type}, {dtype}")
    run_folder.write_manifest(args.output_dir, __file__, arguments, cache.digest, sampling, done, ranks)
    tracker = tracking.Tracker(args.output_dir, args.trackers, arguments, done)

    stop = StopSignals()
    progress = tqdm(range(done + 1, args.iterations + 1), initial=done, total=args.iterations, disable=not ranks.is_main, desc="GRPO")
    for iteration in progress:
        timer = tracking.Timer()
        with timer("iteration"):
            # Line 2: draw a batch of prompts. This process (with its group of --sp_size) has the slots `first` to `first + local_prompts`.
            first = ranks.dp_rank * local_prompts
            own_prompts = draw_prompts(cache.num_prompts, P, iteration, args.seed)[first : first + local_prompts]
            cond = distributed.together(lambda p=own_prompts: load_cond(cache, p, transformer, vae, args))
            samples = [(first + i // G, i % G) for i in range(local_prompts * G)]  # (prompt slot, index in its group)

            # Line 10, ahead of its turn so that only what is trained needs to be kept: the trained steps of each sample.
            generators = [keyed_generator(args.seed, "timesteps", iteration, *sample) for sample in samples]
            selected = select_timesteps(generators, len(args.stochastic_steps), args.timestep_fraction, args.timestep_selection)
            trained_steps = (selected + args.stochastic_steps.start).to(device)

            # Lines 3 to 5: G samples of each prompt from the old policy, which is the current one.
            progress.set_description("sampling")
            trajectories, latents, failure = [], [], None
            scores = {name: torch.zeros(P * G) for name in rewards}
            try:
                with timer("rollout"), zero.gathered(engine, args.gather_for_rollout):
                    for batch in torch.arange(len(samples)).split(args.rollout_batch_size):
                        if stopped := stop.requested():
                            raise stopped
                        slots = [samples[i] for i in batch]
                        keys = [(slot,) if args.shared_noise else (slot, g) for slot, g in slots]
                        initial = [keyed_generator(args.seed, "initial_noise", iteration, *key) for key in keys]
                        z_1 = torch.stack([torch.randn(shape, generator=generator) for generator in initial])
                        generators = [keyed_generator(args.seed, "step_noise", iteration, *sample) for sample in slots]
                        batch_cond = {name: tensor[batch.to(device) // G] for name, tensor in cond.items()}
                        kept, x0_hat = rollout(engine, batch_cond, z_1.to(device), schedule, noise_levels, generators, trained_steps[batch])
                        trajectories.append(kept)
                        latents.append(x0_hat)
                trajectory = {name: torch.cat([part.pop(name) for part in trajectories]) for name in list(trajectories[0])}
                x0_hat = torch.cat(latents)

                # Line 6: their rewards. The processes of a sequence-parallel group have the same samples, and share decoding and scoring.
                own_samples = list(range(ranks.sp_rank, len(samples), ranks.sp_size))
                for start in range(0, len(own_samples), args.rollout_batch_size):
                    batch = own_samples[start : start + args.rollout_batch_size]
                    with timer("decode"), torch.no_grad():
                        media = decode(vae, x0_hat[batch], args)
                    with timer("reward"):
                        values = score(rewards, media, [cache.rows[own_prompts[i // G]] for i in batch])
                    for name in rewards:
                        scores[name][[first * G + i for i in batch]] = values[name]
            except UserError as error:
                failure = error
            if failure := distributed.first_error(failure):
                if iteration > 1:  # these are still the weights of the one before
                    checkpoint.save(engine, ema, args.output_dir, iteration - 1, args.keep_checkpoints, ranks)
                raise failure

            # Lines 7 to 9: advantages within each prompt's group, of all prompts on all processes alike.
            group_rewards = {name: distributed.all_reduce_sum(values.to(device)).cpu().view(P, G) for name, values in scores.items()}
            advantages = group_advantages(group_rewards, weights).clamp(-args.advantage_clip, args.advantage_clip)
            own_advantages = advantages[first : first + local_prompts]
            chosen = (best_of_n(own_advantages, args.kept_generations) + G * torch.arange(local_prompts)[:, None]).flatten()
            own_advantages = own_advantages.flatten()[chosen].to(device)
            trajectory = {name: trajectory.pop(name)[chosen.to(device)] for name in list(trajectory)}  # the others are not needed any more

            # Lines 11 to 13: gradient ascent. Update u takes samples u, u + N, u + 2 N, ... of every prompt, with all their trained steps.
            updates = []
            for u in range(N):
                sample = torch.arange(len(chosen), device=device).view(local_prompts, -1)[:, u::N].flatten()
                pairs = sample.repeat_interleave(steps_trained), torch.arange(steps_trained, device=device).repeat(len(sample))
                updates.append(list(zip(*(indices.split(args.micro_batch_size) for indices in pairs), strict=True)))

            progress.set_description("updating")
            stats, norms = [], []
            with timer("update"):
                passes = [("old_log_prob", nullcontext(engine))] if args.old_log_prob == "recompute" else []
                if reference:  # all of them now, so that it is on the GPU once an iteration
                    trajectory["u_ref"] = torch.zeros_like(trajectory["z_t"])
                    passes.append(("u_ref", reference.applied()))
                for name, network in passes:
                    with torch.no_grad(), network as scorer:
                        for pair in (pair for update in updates for pair in update):
                            transitions, pair_cond = pick(trajectory, cond, *pair, args.kept_generations)
                            log_prob, u_hat = score_transitions(scorer, transitions, pair_cond, schedule, args.noise_level)
                            trajectory[name][pair] = log_prob if name == "old_log_prob" else u_hat
                for u, update in enumerate(updates):
                    for sample, slot in update:
                        transitions, pair_cond = pick(trajectory, cond, sample, slot, args.kept_generations)
                        log_prob, u_hat = score_transitions(engine, transitions, pair_cond, schedule, args.noise_level)
                        loss, row = grpo_loss(log_prob, transitions["old_log_prob"], own_advantages[sample], args.clip_range)
                        row |= {"loss": loss.detach(), "update": u, "share": len(sample) / pairs_per_update}
                        if reference:
                            kl = reference_kl(transitions, schedule, u_hat, args.noise_level)
                            row["kl"], loss = kl.detach(), loss + args.kl_weight * kl
                        norm = zero.backward_and_step(engine, loss * row["share"])
                        stats.append(row)
                    norms.append(norm)
                    if u == 0 and iteration == done + 1:
                        check_ratio(max(distributed.all_gather_object(max(row["ratio_max_dev"].item() for row in stats))), args.clip_range)
                    if ema is not None:
                        ema.update()

        # What happened, on all processes together.
        stats = [row for rows in distributed.all_gather_object([{k: float(v) for k, v in row.items()} for row in stats]) for row in rows]
        metrics = group_statistics(group_rewards, weights)
        metrics["advantage/abs_mean"] = advantages.abs().mean().item()
        for name in ("loss", "ratio_mean", "approx_kl", "clip_frac", *(["kl"] if args.kl_weight else [])):
            metrics[f"policy/{name}"] = sum(row[name] * row["share"] for row in stats) / (N * ranks.world_size)
        metrics["policy/ratio_max_dev"] = max(row["ratio_max_dev"] for row in stats if row["update"] == 0)  # before any update: 0
        metrics |= {"policy/grad_norm": sum(norms) / len(norms), "policy/lr": engine.get_lr()[0]}
        metrics |= tracking.costs(timer, P * G) | {"samples": iteration * P * G}
        tracker.log(iteration, metrics)
        collapse = guards.check(args.output_dir, iteration, args.clip_range)
        shown = {name: f"{metrics[f'reward/{name}_mean']:.3f}" for name in weights}
        progress.set_postfix(shown | {"|ratio-1|": f"{metrics['policy/ratio_max_dev']:.0e}"})
        last = iteration == args.iterations
        if args.sample_every and (iteration % args.sample_every == 0 or last):
            with ema.applied() if ema else nullcontext():
                media = sample_media(engine, transformer, vae, cache, schedule, args, ranks)
            tracker.log_samples(iteration, media, [cache.rows[i % cache.num_prompts]["prompt"] for i in range(8)])
        failure = stop.requested() or (collapse if args.stop_on_collapse else None)
        if iteration % args.checkpoint_every == 0 or last or failure:
            checkpoint.save(engine, ema, args.output_dir, iteration, args.keep_checkpoints, ranks)
        if failure and not last:
            raise failure

    with ema.applied() if ema else nullcontext():
        checkpoint.export(engine, args.output_dir / "export", "transformer")
    tracker.close()
    if ranks.is_main:
        curve = tracking.plot_rewards(args.output_dir, args.output_dir / "rewards.png")
        print(f"trained weights: {args.output_dir / 'export'}; metrics: {args.output_dir / 'metrics.jsonl'}; reward curve: {curve}")


# Copied from train_grpo_flux.py
@torch.no_grad()
def sample_media(engine, transformer, vae, cache, schedule, args, ranks) -> torch.Tensor | None:
    """ODE samples of the cache's first 8 prompts, always from the same noise, (8, 3, ...) in [-1, 1] on rank 0 (None on others)."""
    share = math.ceil(8 / ranks.dp_size)
    places = [min(ranks.dp_rank * share + i, 7) for i in range(share)]
    cond = load_cond(cache, [place % cache.num_prompts for place in places], transformer, vae, args)
    shape = latent_shape(transformer, vae, args)
    z_1 = torch.stack([torch.randn(shape, generator=keyed_generator(args.seed, "pictures", place)) for place in places])
    nothing_trained = torch.empty(share, 0, dtype=torch.long, device=ranks.device)
    with zero.gathered(engine, args.gather_for_rollout):
        _, x0_hat = rollout(engine, cond, z_1.to(ranks.device), schedule, [0.0] * args.sampling_steps, [], nothing_trained)
    owners = [place // share * ranks.sp_size + place % share % ranks.sp_size for place in range(8)]
    own = {place: decode(vae, x0_hat[[place % share]], args) for place in range(8) if owners[place] == ranks.rank}
    return distributed.collect_on_main(own, owners)


if __name__ == "__main__":
    distributed.run(main)
