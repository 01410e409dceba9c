"""Online DPO for Stable Diffusion: of each prompt's samples the best against the worst, by Diffusion-DPO, https://arxiv.org/abs/2311.12908.

    python baselines/dpo_sd.py --model shapes/models/sd --embeddings CACHE --output_dir RUN --rewards aesthetic --height 32 --width 32
    torchrun --standalone --nproc_per_node 8 baselines/dpo_sd.py --model SD_V1.4 --embeddings CACHE --output_dir RUN --rewards R

The pairs come from the current policy, with guidance, judged by the rewards. What is trained is the prediction of noise that is added to
the two clean samples, the same for both, at random steps of the model's own training schedule, and from the prompt alone, without guidance,
as the method trains. The initial policy is the reference. A prompt whose samples all have the same rewards teaches nothing.

Equation and line numbers are DanceGRPO's. Letters for shapes: B samples in a batch, P prompts, G samples of one prompt (--num_generations),
T sampling steps, K trained steps of a pair, C latent channels.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import torch
import torch.nn.functional as F
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

# Copied from train_grpo_sd.py
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


# Own
@dataclass(kw_only=True)
class AlgorithmFlags:
    """Online DPO."""

    num_generations: int = 12
    """Samples of each prompt (G), of which the best and the worst are a pair."""
    updates_per_iteration: int = 1
    """Optimiser steps an iteration, each on its own share of every pair's steps."""
    steps_per_pair: int = 16
    """Steps of the training schedule, each with noise of its own, at which every pair is trained (K)."""
    shared_noise: bool = False
    """All samples of one prompt start from the same noise."""
    beta: float = 5000.0
    """Weight of the KL divergence to the initial policy that the loss stands for: the higher, the less is changed."""


# Own
@dataclass(kw_only=True)
class Args(ModelFlags, AlgorithmFlags, RunFlags):
    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "at least 2": "num_generations sampling_steps",
            "above 0": "updates_per_iteration height width steps_per_pair beta",
            "1 or more": "guidance_scale",
            "above 0 and at most 1": "noise_level",
        }
        check_numbers(vars(self), rules)
        if self.steps_per_pair % self.updates_per_iteration:
            raise UserError(f"--updates_per_iteration {self.updates_per_iteration} does not divide --steps_per_pair {self.steps_per_pair}")

    @property
    def stochastic_steps(self) -> range:
        """Transitions with noise: all but the last."""
        return range(self.sampling_steps - 1)


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


# Own
def training_schedule(model: Path) -> Schedule:
    """The steps that the folder's network was trained on, for `predict` at any of them. `time_schedule` has accepted the folder."""
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler", local_files_only=True)
    alpha_bar = scheduler.alphas_cumprod
    predicts_v = scheduler.config.prediction_type == "v_prediction"
    return Schedule(torch.arange(len(alpha_bar)), alpha_bar, torch.ones_like(alpha_bar), predicts_v)


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


# Own
def best_and_worst(advantages: Tensor) -> Tensor:
    """Which of each prompt's samples has the highest and which the lowest advantage: (P, G) to (P, 2)."""
    return torch.stack([advantages.argmax(1), advantages.argmin(1)], dim=1)


# 6. Loss ==============================================================================================================


def pick(trajectory: dict, cond: dict, sample: Tensor, k: Tensor, num_generations: int) -> tuple[dict, dict]:
    """Transitions of a process's trajectories {name: (samples, K, ...)} at sample (B,), k (B,), and what their prompts condition on."""
    transitions = {name: tensor[sample, k] for name, tensor in trajectory.items()}
    return transitions, {name: tensor[sample // num_generations] for name, tensor in cond.items()}


# Own
def noise_errors(unet: nn.Module, pairs: dict[str, Tensor], cond: dict[str, Tensor], schedule: Schedule) -> Tensor:
    """|eps - eps_hat|^2 of the better and the worse of each pair, (B, 2), means over elements.

    pairs: "step" (B,) of the training `schedule`, "noise" (B, *latent), "z_t" (B, 2, *latent), the samples with that noise.
    """
    step, noise = (pairs[name].repeat_interleave(2, dim=0) for name in ("step", "noise"))
    text = {"prompt_embeds": cond["prompt_embeds"].repeat_interleave(2, dim=0)}  # no guidance
    eps_hat = predict(unet, pairs["z_t"].flatten(0, 1), step, schedule, text)
    return (noise - eps_hat).square().flatten(1).mean(1).view(-1, 2)


# Own
def dpo_loss(errors: Tensor, reference: Tensor, told_apart: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-DPO's loss, mean over the pairs, with its T omega = 1 / 2 over means of elements, as its authors' code has it.

    errors, reference: (B, 2), by the policy and the initial one. told_apart: (B,), 0 for a pair without a better one, and no gradient.
    Returns the loss and what is logged.
    """
    better, worse = (errors - reference).unbind(1)
    loss = -F.logsigmoid(-beta / 2 * told_apart * (better - worse)).mean()
    return loss, {"loss": loss.detach(), "accuracy": (better < worse).float().mean()}


# 7. Algorithm 1 =======================================================================================================


# Own
def main() -> None:
    args = parse(Args, __doc__)
    run = Run(args, "sd", __file__, 1)
    unet, vae = load_models(args, run.dtype, run.ranks)
    distributed.together(lambda: load_cond(run.cache, [0], unet, vae, args))  # a cache that does not fit is refused now
    updates = split_into_updates(args, run.ranks)
    run.train(unet, len(updates[0]), math.inf, keep_initial=True)
    schedule = time_schedule(args.sampling_steps, args.model).to(run.device)
    training = training_schedule(args.model).to(run.device)
    shape = latent_shape(unet, vae, args)
    run.start(decode(vae, torch.zeros(1, *shape, device=run.device), args))

    for _ in run:
        # Line 2: a batch of prompts, of which each process has its share. A sample is (place of its prompt, its own in the group).
        prompts = draw_prompts(run)
        samples = [(place, g) for place in prompts for g in range(args.num_generations)]
        cond = distributed.together(lambda drawn=prompts: load_cond(run.cache, list(drawn.values()), unet, vae, args))

        with run.saved_on_failure():
            # Lines 3 to 5: G samples of each prompt from the current policy, of which only the end is kept.
            nothing_kept = torch.empty(len(samples), 0, dtype=torch.long, device=run.device)
            x0 = sample_groups(samples, cond, nothing_kept, schedule, shape, run)["x0_hat"]

            # Line 6: their rewards.
            scores = score_samples(x0, prompts, vae, run)
        rewards = run.of_all_prompts(scores, list(prompts), args.num_generations)

        # The best and the worst of each prompt, with noise.
        advantages = group_advantages(rewards, run.weights)
        pairs = noised_pairs(x0, advantages[list(prompts)], list(prompts), training, run)

        # Gradient descent.
        with run.timed("update"):
            score_by_reference(updates, pairs, cond, training, run)
            for places in updates:
                update_policy(places, pairs, cond, training, run)

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


# Own
def noised_pairs(x0: Tensor, advantages: Tensor, places: list[int], schedule: Schedule, run: Run) -> dict[str, Tensor]:
    """The pairs of this process's p prompts at K random steps, by the rewards' `advantages` (p, G).

    x0: clean latents of its samples (p G, *latent). places: of its prompts. schedule: the model's training steps.
    Returns {"step", "told_apart": (p, K), "noise": (p, K, *latent), "z_t": (p, K, 2, *latent)}.
    """
    K, generators = run.args.steps_per_pair, run.generators("pairs", [(place,) for place in places])
    step = torch.stack([torch.randint(len(schedule.timesteps), (K,), generator=generator) for generator in generators]).to(x0.device)
    noise = torch.stack([torch.randn(K, *x0.shape[1:], generator=generator) for generator in generators]).to(x0)
    chosen = best_and_worst(advantages) + advantages.shape[1] * torch.arange(len(places))[:, None]
    alpha_bar = schedule.alpha_bar_t[step].view(len(places), K, *[1] * x0.ndim)
    z_t = alpha_bar.sqrt() * x0[chosen.to(x0.device)][:, None] + (1 - alpha_bar).sqrt() * noise[:, :, None]  # Eq. 1
    told_apart = (advantages.amax(1) > advantages.amin(1)).to(x0).view(-1, 1).expand(-1, K)
    return {"step": step, "told_apart": told_apart, "noise": noise, "z_t": z_t}


# Own
def split_into_updates(args: Args, ranks: Ranks) -> list[Tensor]:
    """The (pair, k) of each of the N updates, (n, 2): update u takes steps u, u + N, u + 2 N, ... of every pair."""
    pairs = torch.arange(args.prompts_per_iteration // ranks.dp_size, device=ranks.device)
    k = torch.arange(args.steps_per_pair, device=ranks.device)
    return [torch.cartesian_prod(pairs, k[u :: args.updates_per_iteration]) for u in range(args.updates_per_iteration)]


# Own
@torch.no_grad()
def score_by_reference(updates: list[Tensor], pairs: dict, cond: dict, schedule: Schedule, run: Run) -> None:
    """Add the initial policy's errors to `pairs`, "reference" (p, K, 2), in the updates' own batches."""
    pairs["reference"] = torch.zeros(*pairs["step"].shape, 2, device=run.device)
    with run.reference.applied() as scorer:
        for places in [batch for update in updates for batch in update.split(run.args.micro_batch_size)]:
            chosen, pair_cond = pick(pairs, cond, *places.T, 1)
            pairs["reference"][tuple(places.T)] = noise_errors(scorer, chosen, pair_cond, schedule)


# Own
def update_policy(places: Tensor, pairs: dict, cond: dict, schedule: Schedule, run: Run) -> None:
    """One step of gradient descent on the mean loss of all processes' `places` (n, 2), in micro-batches."""
    for batch in places.split(run.args.micro_batch_size):
        chosen, pair_cond = pick(pairs, cond, *batch.T, 1)
        errors = noise_errors(run.policy, chosen, pair_cond, schedule)
        loss, stats = dpo_loss(errors, chosen["reference"], chosen["told_apart"], run.args.beta)
        run.backward(loss, stats, len(batch) / len(places))


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
