"""GRPO training of Stable Diffusion (diffusion, DDIM, classifier-free guidance), in one file: DanceGRPO, https://arxiv.org/abs/2505.07818.

    python train_grpo_sd.py --model shapes/models/sd --embeddings CACHE --output_dir RUN --rewards aesthetic --height 32 --width 32
    torchrun --standalone --nproc_per_node 8 train_grpo_sd.py --model stable-diffusion-v1-4 --embeddings CACHE --output_dir RUN --rewards R

Equation numbers are the paper's. Letters for shapes: B samples in a batch, P prompts, G samples of one prompt (--num_generations),
T sampling steps, K trained steps of a sample, C latent channels.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.embeddings.prompts import by_text_length, shuffled_prompts
from fastvideo.errors import UserError, first_line
from fastvideo.flags import check_numbers, check_size
from fastvideo.models.pretrained import load_network, load_pretrained, prepare
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks, keyed_generator
from fastvideo.rewards import score
from fastvideo.runs.run import Run, RunFlags, parse

# 1. Arguments =========================================================================================================


@dataclass(kw_only=True)
class ModelFlags:
    """What differs between models, in the flag or in its default."""

    model: Path
    """Stable Diffusion folder in diffusers layout; `unet`, `vae` and `scheduler` are loaded from it."""
    sampling_steps: int = 50
    """Steps from noise to picture (T)."""
    noise_level: float = 1.0
    """Noise of the sampling SDE, epsilon_t in Eq. 7: the paper's Table 6 has 0.3, its released code 1, which is DDPM and the most."""
    noise_schedule: Literal["constant", "decay"] = "constant"
    """Epsilon_t is noise_level, as DDIM's eta; or noise_level in the first step, and falls as the square root of the time left."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, within the policy: what is sampled and scored is the guided prediction (1: none, at half the cost)."""
    height: int = 512
    """Picture height in pixels."""
    width: int = 512
    """Picture width in pixels."""


@dataclass(kw_only=True)
class AlgorithmFlags:
    """Algorithm 1."""

    num_generations: int = 12
    """Samples of each prompt (G), the group within which advantages are computed."""
    updates_per_iteration: int = 1
    """Optimiser steps an iteration, each on its own share of every prompt's samples."""
    best_of_n: int = 0
    """Train on this many samples a prompt only: the better half from the top, the other from the bottom by advantage (0: on all)."""
    sde_window: tuple[int, int] | None = None
    """START COUNT: only these transitions are stochastic and trained, DDIM steps elsewhere (default: all but the last)."""
    timestep_fraction: float = 0.6
    """Share of the stochastic transitions that is trained, for each sample (tau)."""
    timestep_selection: Literal["random", "first", "last"] = "random"
    """Which of the stochastic transitions are trained."""
    shared_noise: bool = True
    """All samples of one prompt start from the same noise."""
    clip_range: float = 1e-4
    """The ratio is clipped to 1 +- this."""
    advantage_clip: float = 5.0
    """Summed advantages are clipped to +- this."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the initial policy (0: none, as in the paper). Without LoRA it needs a whole copy on each GPU."""
    old_log_prob: Literal["rollout", "recompute"] = "rollout"
    """Where the ratio's denominator comes from: the rollout, or one more pass in the update's own batches."""


@dataclass(kw_only=True)
class Args(ModelFlags, AlgorithmFlags, RunFlags):
    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "at least 2": "num_generations sampling_steps",
            "above 0": "updates_per_iteration height width clip_range advantage_clip",
            "1 or more": "guidance_scale",
            "0 or more": "best_of_n kl_weight",
            "above 0 and at most 1": "timestep_fraction noise_level",
        }
        check_numbers(vars(self), rules)
        if self.best_of_n % 2 or self.best_of_n > self.num_generations:
            raise UserError(f"--best_of_n is {self.best_of_n}, but must be even and at most --num_generations {self.num_generations}")
        if self.kept_generations % self.updates_per_iteration:
            kept = "best_of_n" if self.best_of_n else "num_generations"
            raise UserError(f"--updates_per_iteration {self.updates_per_iteration} does not divide --{kept} {self.kept_generations}")
        (start, count), most = self.sde_window or (0, self.sampling_steps - 1), self.sampling_steps - 1  # the last is never stochastic
        if start < 0 or count < 1 or start + count > most:
            raise UserError(f"--sde_window {start} {count} must lie within the first {most} of --sampling_steps {self.sampling_steps}")

    @property
    def kept_generations(self) -> int:
        return self.best_of_n or self.num_generations

    @property
    def stochastic_steps(self) -> range:
        """Transitions with noise, which alone can be trained. Never the last: DDIM has hardly any noise there to tell samples apart."""
        start, count = self.sde_window or (0, self.sampling_steps - 1)
        return range(start, start + count)


# 2. Sampler ===========================================================================================================


class Schedule(NamedTuple):
    """The noise of a trajectory's T transitions: training step before, alpha^2 of Eq. 1 before and after, each (T,)."""

    timesteps: Tensor
    alpha_bar_t: Tensor
    alpha_bar_s: Tensor
    predicts_v: bool

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(*(part.to(device) if isinstance(part, Tensor) else part for part in self))


def time_schedule(num_steps: int, model: Path) -> Schedule:
    """DDIM's schedule with the betas, spacing and prediction type of the folder's scheduler. Raises UserError if DDIM has none."""
    folder = model / "scheduler"
    try:
        scheduler = DDIMScheduler.from_pretrained(folder, local_files_only=True)
        scheduler.set_timesteps(num_steps)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--model: {folder} gives no DDIM schedule of --sampling_steps {num_steps}: {first_line(error)}") from error
    t, prediction, most = scheduler.timesteps, scheduler.config.prediction_type, scheduler.config.num_train_timesteps
    if t.max() >= most or most // 2 < num_steps < most:  # beyond what it was trained on, or starting far from pure noise
        raise UserError(f"--sampling_steps {num_steps} does not fit the {most} steps of {folder}: use at most {most // 2}")
    s = t - most // num_steps  # as DDIM steps; with trailing spacing it need not be the next t
    alpha_bar_t = scheduler.alphas_cumprod[t]
    alpha_bar_s = torch.where(s < 0, scheduler.final_alpha_cumprod, scheduler.alphas_cumprod[s.clamp(min=0)])
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"--model: {folder} has prediction_type {prediction!r}, but epsilon and v_prediction are supported")
    if alpha_bar_t.min() < 1e-6:
        raise UserError(f"--model: {folder} leaves no signal at the first step (zero terminal SNR), which a policy of noise cannot sample")
    return Schedule(t, alpha_bar_t, alpha_bar_s, prediction == "v_prediction")


def noise_levels(schedule: Schedule, args: Args) -> list[float]:
    """Epsilon_t of each transition, T numbers, 0 for a DDIM step."""
    levels = args.noise_level * (schedule.timesteps / schedule.timesteps[0]).double() ** {"constant": 0, "decay": 0.5}[args.noise_schedule]
    return [level if step in args.stochastic_steps else 0.0 for step, level in enumerate(levels.tolist())]


def sde_step(
    z_t: Tensor,
    eps_hat: Tensor,
    alpha_bar_t: Tensor,
    alpha_bar_s: Tensor,
    noise_level: float | Tensor,
    z_s: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One transition of the diffusion SDE in DDIM's discrete form: draws z_s from `noise`, or scores a given `z_s`.

    z_t, eps_hat, z_s, noise: (B, ...) float32. alpha_bar_t < alpha_bar_s in (0, 1], noise_level, 0 (DDIM) to 1 (DDPM): scalars or (B,).
    Returns z_s, its log-probability (B,) as the mean over elements, and x0_hat; without `noise` and `z_s` the mean, None, and x0_hat.
    """
    coefficients = (torch.as_tensor(v, dtype=z_t.dtype, device=z_t.device) for v in (alpha_bar_t, alpha_bar_s, noise_level))
    alpha_bar_t, alpha_bar_s, noise_level = (v.reshape(-1, *[1] * (z_t.ndim - 1)) for v in coefficients)
    x0_hat = (z_t - (1 - alpha_bar_t).sqrt() * eps_hat) / alpha_bar_t.sqrt()  # Eq. 1
    # Eq. 7 in discrete form: https://arxiv.org/abs/2010.02502, Eq. 16 and 12
    std = noise_level * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)).sqrt()
    mean = alpha_bar_s.sqrt() * x0_hat + (1 - alpha_bar_s - std**2).sqrt() * eps_hat
    if noise is None and z_s is None:
        return mean, None, x0_hat  # Eq. 2 at noise_level 0
    z_s = mean + std * noise if z_s is None else z_s
    log_prob = -((z_s - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return z_s, log_prob.flatten(1).mean(1), x0_hat


# 3. Model =============================================================================================================


def load_models(args: Args, dtype: torch.dtype, ranks: Ranks) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """The policy, on the CPU and ready for the engine, and the frozen decoder on its device."""
    unet = load_network(UNet2DConditionModel, args.model, "unet", dtype, ranks)
    vae = load_pretrained(AutoencoderKL, args.model, "vae", torch_dtype=dtype).to(ranks.device).eval().requires_grad_(False)
    scale = 2 ** (len(vae.config.block_out_channels) + len(unet.config.block_out_channels) - 2)  # to the UNet's coarsest grid: 64 for v1.4
    check_size(vars(args), pixels=scale)
    return prepare(unet, args.attention, args.lora_rank, args.seed, args.gradient_checkpointing, ranks.device), vae


def latent_shape(unet: UNet2DConditionModel, vae: AutoencoderKL, args: Args) -> tuple[int, ...]:
    """Of one sample: (C, latent height, latent width)."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return unet.config.in_channels, args.height // scale, args.width // scale


def load_cond(cache: EmbeddingCache, prompts: list[int], unet: UNet2DConditionModel, vae: AutoencoderKL, args: Args) -> dict:
    """What the network is given of each prompt, as tensors with the prompts in front: its embeddings, and guidance by the empty prompt."""
    cond = {"prompt_embeds": cache.get(prompts)["prompt_embeds"].to(vae.device, unet.dtype)}
    if args.guidance_scale != 1:
        empty = cache.get([cache.unconditional])
        cond["negative_prompt_embeds"] = empty["prompt_embeds"].to(vae.device, unet.dtype).expand_as(cond["prompt_embeds"])
        cond["guidance_scale"] = torch.full((len(prompts), 1, 1, 1), args.guidance_scale, device=vae.device)
    return cond


def predict(unet: nn.Module, z_t: Tensor, step: Tensor, schedule: Schedule, cond: dict[str, Tensor]) -> Tensor:
    """eps_hat, of z_t's shape (B, C, H, W), float32, before transition `step` (B,). The only call of the network, for rollout and update.

    With guidance (the paper's appendix C) both branches are one batch of 2 B, and gradients flow through both.
    """
    z, t, text = z_t.to(cond["prompt_embeds"].dtype), schedule.timesteps[step], cond["prompt_embeds"]
    if "guidance_scale" in cond:
        z, t, text = torch.cat([z, z]), torch.cat([t, t]), torch.cat([cond["negative_prompt_embeds"], text])
    output = unet(z, t, encoder_hidden_states=text, return_dict=False)[0].float()
    if "guidance_scale" in cond:
        negative, positive = output.chunk(2)
        output = negative + cond["guidance_scale"] * (positive - negative)
    if not schedule.predicts_v:
        return output
    alpha_bar = schedule.alpha_bar_t[step].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z_t  # from v = alpha eps - sigma x, https://arxiv.org/abs/2202.00512


def decode(vae: AutoencoderKL, x0_hat: Tensor, args: Args) -> Tensor:
    """Latents (B, C, H, W) to pictures (B, 3, height, width), float32 in [-1, 1]."""
    return vae.decode((x0_hat / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)


# 4. Rollout ===========================================================================================================


@torch.no_grad()
def rollout(
    unet: nn.Module, cond: dict, z_t: Tensor, schedule: Schedule, levels: list, generators: list, trained_steps: Tensor, first: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Sample one trajectory for each row of z_t, the latents before step `first`, keeping only the transitions that will be trained.

    cond: tensors (B, ...). z_t: (B, *latent) float32. schedule: of T steps. levels: of noise in all steps to the last, 0 for a DDIM step.
    generators: B torch.Generator, for the noise of each sample's steps. trained_steps: (B, K) step indices.
    Returns trajectories, {"step", "noise_level", "old_log_prob": (B, K), "z_t", "z_s": (B, K, *latent)}, and last latents (B, *latent).
    """
    trained_levels = z_t.new_tensor(levels, dtype=torch.float64)[trained_steps]
    kept = {"step": trained_steps, "noise_level": trained_levels, "old_log_prob": z_t.new_zeros(trained_steps.shape)}
    kept |= {name: z_t.new_zeros(*trained_steps.shape, *z_t.shape[1:]) for name in ("z_t", "z_s")}
    for step, noise_level in enumerate(levels[first:], first):
        eps_hat = predict(unet, z_t, torch.full((len(z_t),), step, device=z_t.device), schedule, cond)
        noise = torch.stack([torch.randn(z_t.shape[1:], generator=g) for g in generators]).to(z_t) if noise_level else None
        z_s, log_prob, _ = sde_step(z_t, eps_hat, schedule.alpha_bar_t[step], schedule.alpha_bar_s[step], noise_level, noise=noise)
        if noise_level:
            for name, value in {"z_t": z_t, "z_s": z_s, "old_log_prob": log_prob}.items():
                chosen = (trained_steps == step).view(*trained_steps.shape, *[1] * (value.ndim - 1))
                kept[name] = torch.where(chosen, value[:, None], kept[name])
        z_t = z_s
    return kept, z_t


# 5. Advantages ========================================================================================================
# Copied from train_grpo_flux.py


def group_advantages(rewards: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
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


def best_of_n(advantages: Tensor, keep: int) -> Tensor:
    """Of each prompt's samples, the keep / 2 with the highest and the keep / 2 with the lowest advantage.

    advantages: (P, G). Returns (P, keep) indices in ascending order; all of them for keep = G.
    """
    order = advantages.argsort(dim=1, descending=True, stable=True)
    top = (keep + 1) // 2
    return torch.cat([order[:, :top], order[:, order.shape[1] - (keep - top) :]], dim=1).sort(dim=1).values


def select_timesteps(
    generators: list[torch.Generator], num_steps: int, fraction: float, selection: Literal["random", "first", "last"] = "random"
) -> Tensor:
    """For each sample, which of `num_steps` steps are trained: (len(generators), ceil(fraction * num_steps)), ascending and distinct."""
    count = trained_count(num_steps, fraction)
    if selection == "random":
        return torch.stack([torch.randperm(num_steps, generator=g)[:count].sort().values for g in generators])
    first = 0 if selection == "first" else num_steps - count
    return torch.arange(first, first + count).expand(len(generators), -1)


def trained_count(num_steps: int, fraction: float) -> int:
    """How many of `num_steps` steps are trained (K)."""
    return math.ceil(round(fraction * num_steps, 6))  # 0.6 * 5 is 3, not 3.0000000000000004


# 6. Loss ==============================================================================================================


# Copied from train_grpo_flux.py
def grpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 9, negated, as the mean over the given transitions. All inputs (B,). Returns the loss and statistics of the ratio."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        stats = {
            "loss": loss.detach(),
            "ratio_mean": ratio.mean(),
            "ratio_max_dev": (ratio - 1).abs().max(),
            "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
            "clip_frac": ((ratio - 1).abs() > clip_range).float().mean(),
        }
    return loss, stats


# Copied from train_grpo_flux.py
def pick(trajectory: dict, cond: dict, sample: Tensor, k: Tensor, num_generations: int) -> tuple[dict, dict]:
    """Transitions of a process's trajectories {name: (samples, K, ...)} at sample (B,), k (B,), and what their prompts condition on."""
    transitions = {name: tensor[sample, k] for name, tensor in trajectory.items()}
    return transitions, {name: tensor[sample // num_generations] for name, tensor in cond.items()}


def score_transitions(unet: nn.Module, transitions: dict, cond: dict, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """log_prob (B,) under the UNet's weights of transitions as `rollout` keeps them, each tensor (B, ...); and its eps_hat."""
    z_t, step = transitions["z_t"], transitions["step"]
    eps_hat = predict(unet, z_t, step, schedule, cond)
    coefficients = schedule.alpha_bar_t[step], schedule.alpha_bar_s[step], transitions["noise_level"]
    return sde_step(z_t, eps_hat, *coefficients, z_s=transitions["z_s"])[1], eps_hat


def reference_kl(transitions: dict, schedule: Schedule, eps_hat: Tensor) -> Tensor:
    """KL to the initial policy, whose prediction is transitions["u_ref"], |mean - mean_ref|^2 / (2 std^2), mean over elements and batch."""
    step, zeros = transitions["step"], torch.zeros_like(transitions["z_t"])
    coefficients = schedule.alpha_bar_t[step], schedule.alpha_bar_s[step], transitions["noise_level"]
    mean, mean_ref = (sde_step(transitions["z_t"], eps, *coefficients)[0] for eps in (eps_hat, transitions["u_ref"]))
    std = sde_step(zeros, zeros, *coefficients, noise=torch.ones_like(zeros))[0]
    return ((mean - mean_ref).square() / (2 * std**2)).mean()


# 7. Algorithm 1 =======================================================================================================
# Copied from train_grpo_flux.py with transformer->unet, schedule: Tensor->schedule: Schedule, shift->model, args.sp_size->1, flux->sd


def main() -> None:
    args = parse(Args, __doc__)
    run = Run(args, "sd", __file__, 1)
    unet, vae = load_models(args, run.dtype, run.ranks)
    distributed.together(lambda: load_cond(run.cache, [0], unet, vae, args))  # a cache that does not fit is refused now
    updates = split_into_updates(args, run.ranks)
    run.train(unet, len(updates[0]), args.clip_range, keep_initial=args.kl_weight > 0)
    schedule = time_schedule(args.sampling_steps, args.model).to(run.device)
    shape = latent_shape(unet, vae, args)
    run.start(decode(vae, torch.zeros(1, *shape, device=run.device), args))

    for _ in run:
        # Line 2: a batch of prompts, of which each process has its share. A sample is (place of its prompt, its own in the group).
        prompts = draw_prompts(run)
        samples = [(place, g) for place in prompts for g in range(args.num_generations)]
        cond = distributed.together(lambda drawn=prompts: load_cond(run.cache, list(drawn.values()), unet, vae, args))

        # Line 10, ahead of its turn so that only what is trained needs to be kept: the trained steps of each sample.
        trained_steps = draw_steps(samples, run).to(run.device)

        with run.saved_on_failure():
            # Lines 3 to 5: G samples of each prompt from the old policy, which is the current one.
            trajectory = sample_groups(samples, cond, trained_steps, schedule, shape, run)

            # Line 6: their rewards.
            scores = score_samples(trajectory.pop("x0_hat"), prompts, vae, run)
        rewards = run.of_all_prompts(scores, list(prompts), args.num_generations)

        # Lines 7 to 9: advantages within each prompt's group, and which samples are worth training on.
        advantages = group_advantages(rewards, run.weights).clamp(-args.advantage_clip, args.advantage_clip)
        trajectory, own_advantages = keep_best(trajectory, advantages[list(prompts)], args)

        # Lines 11 to 13: gradient ascent.
        with run.timed("update"):
            score_before_updates(updates, trajectory, cond, schedule, run)
            for pairs in updates:
                update_policy(pairs, trajectory, cond, own_advantages, schedule, run)

        run.report(rewards, advantages)
        if run.pictures_due():
            with run.averaged():
                run.show(sample_pictures(unet, vae, schedule, shape, run))

    run.finish("unet")


def draw_prompts(run: Run) -> dict[int, int]:
    """Of the iteration's P prompts those of this process and its group of --sp_size, shortest text first: place among the P -> index."""
    drawn = shuffled_prompts(run.cache.num_prompts, run.args.prompts_per_iteration, run.iteration, run.args.seed)
    share = len(drawn) // run.ranks.dp_size
    return by_text_length({place: drawn[place] for place in range(run.ranks.dp_rank * share, (run.ranks.dp_rank + 1) * share)}, run.cache)


def draw_steps(samples: list[tuple], run: Run) -> Tensor:
    """Which transitions of each sample are trained, (len(samples), K)."""
    stochastic, generators = run.args.stochastic_steps, run.generators("timesteps", samples)
    return stochastic.start + select_timesteps(generators, len(stochastic), run.args.timestep_fraction, run.args.timestep_selection)


def sample_groups(samples: list, cond: dict, trained_steps: Tensor, schedule: Schedule, shape: tuple, run: Run) -> dict:
    """`rollout` of all samples, in batches: their trajectories {name: (samples, K, ...)}, and clean latents "x0_hat" (samples, *shape)."""
    args, parts, levels, G = run.args, [], noise_levels(schedule, run.args), run.args.num_generations
    starts, first = ([key[:1] for key in samples[::G]], args.stochastic_steps.start) if args.shared_noise else (samples, 0)
    z_t = torch.stack([torch.randn(shape, generator=generator) for generator in run.generators("initial_noise", starts)]).to(run.device)
    with run.sampling():
        for batch in run.batches(len(starts)) if first else ():  # samples with the same noise part at the first stochastic step
            batch_cond = {name: tensor[batch] for name, tensor in cond.items()}
            _, z_t[batch] = rollout(run.policy, batch_cond, z_t[batch], schedule, levels[:first], [], trained_steps[batch, :0])
        for batch in run.batches(len(samples)):
            batch_cond = {name: tensor[batch // G] for name, tensor in cond.items()}
            start, noise = z_t[batch * len(starts) // len(samples)], run.generators("step_noise", [samples[i] for i in batch])
            kept, x0_hat = rollout(run.policy, batch_cond, start, schedule, levels, noise, trained_steps[batch], first)
            parts.append(kept | {"x0_hat": x0_hat})
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


@torch.no_grad()
def score_samples(x0_hat: Tensor, prompts: dict[int, int], vae: nn.Module, run: Run) -> list[dict[str, Tensor]]:
    """Rewards name -> (B,) of each batch of this process's samples, or of its share where a sequence-parallel group has them in common."""
    rows, scores = [run.cache.rows[prompt] for prompt in prompts.values() for _ in range(run.args.num_generations)], []
    for batch in run.shared(len(x0_hat)):
        with run.timed("decode"):
            media = decode(vae, x0_hat[batch], run.args)
        with run.timed("reward"):
            scores.append(score(run.rewards, media, [rows[i] for i in batch]))
    return scores


def keep_best(trajectory: dict[str, Tensor], advantages: Tensor, args: Args) -> tuple[dict[str, Tensor], Tensor]:
    """The samples that are trained on: their trajectories, and their advantages flattened from (prompts, G). The others are freed."""
    best = best_of_n(advantages, args.kept_generations) + args.num_generations * torch.arange(len(advantages))[:, None]
    best, device = best.flatten(), trajectory["z_t"].device
    return {name: trajectory.pop(name)[best.to(device)] for name in list(trajectory)}, advantages.flatten()[best].to(device)


def split_into_updates(args: Args, ranks: Ranks) -> list[Tensor]:
    """The (sample, k) pairs of each of the N updates, (pairs, 2): indices among the samples that are kept, and among their K trained steps.

    Update u takes samples u, u + N, u + 2 N, ... of every prompt, with all their trained steps.
    """
    keep, N = args.kept_generations, args.updates_per_iteration
    samples = torch.arange(args.prompts_per_iteration // ranks.dp_size * keep, device=ranks.device).view(-1, keep)
    k = torch.arange(trained_count(len(args.stochastic_steps), args.timestep_fraction), device=ranks.device)
    return [torch.cartesian_prod(samples[:, u::N].flatten(), k) for u in range(N)]


@torch.no_grad()
def score_before_updates(updates: list[Tensor], trajectory: dict, cond: dict, schedule: Schedule, run: Run) -> None:
    """Add what updates compare with, by passes in their own batches: log-probs of the old policy, and u_ref of the initial one for a KL."""
    args = run.args
    passes = {"old_log_prob": nullcontext(run.policy)} if args.old_log_prob == "recompute" else {}
    if run.reference:
        passes["u_ref"], trajectory["u_ref"] = run.reference.applied(), torch.zeros_like(trajectory["z_t"])
    for name, network in passes.items():
        with network as scorer:
            for pairs in [batch for update in updates for batch in update.split(args.micro_batch_size)]:
                transitions, pair_cond = pick(trajectory, cond, *pairs.T, args.kept_generations)
                log_prob, u_hat = score_transitions(scorer, transitions, pair_cond, schedule)
                trajectory[name][tuple(pairs.T)] = log_prob if name == "old_log_prob" else u_hat


def update_policy(pairs: Tensor, trajectory: dict, cond: dict, advantages: Tensor, schedule: Schedule, run: Run) -> None:
    """One step of gradient ascent on the mean objective of all processes' `pairs` (n, 2), in micro-batches."""
    args = run.args
    for batch in pairs.split(args.micro_batch_size):
        transitions, pair_cond = pick(trajectory, cond, *batch.T, args.kept_generations)
        log_prob, u_hat = score_transitions(run.policy, transitions, pair_cond, schedule)
        loss, stats = grpo_loss(log_prob, transitions["old_log_prob"], advantages[batch[:, 0]], args.clip_range)
        if args.kl_weight:
            kl = reference_kl(transitions, schedule, u_hat)
            stats["kl"], loss = kl.detach(), loss + args.kl_weight * kl
        run.backward(loss, stats, len(batch) / len(pairs))


@torch.no_grad()
def sample_pictures(unet: nn.Module, vae: nn.Module, schedule: Schedule, shape: tuple[int, ...], run: Run) -> dict[int, Tensor]:
    """ODE samples of the cache's first 8 prompts, always from the same noise: those that this process decodes, place -> (1, 3, ...)."""
    args, (places, own) = run.args, run.picture_share()
    cond = load_cond(run.cache, [place % run.cache.num_prompts for place in places], unet, vae, args)
    z_1 = torch.stack([torch.randn(shape, generator=keyed_generator(args.seed, "pictures", place)) for place in places])
    nothing_trained = torch.empty(len(places), 0, dtype=torch.long, device=run.device)
    _, x0_hat = rollout(run.policy, cond, z_1.to(run.device), schedule, [0.0] * args.sampling_steps, [], nothing_trained)
    return {place: decode(vae, x0_hat[[index]], args) for place, index in own.items()}


if __name__ == "__main__":
    distributed.run(main)
