"""Do the tests notice mistakes? Plants each of a list of mistakes in a copy of the repository and runs the tests that should see it.

    python scripts/mutants.py             all, about half an hour on two cores
    python scripts/mutants.py ema kl      those with one of these words in their names
    python scripts/mutants.py --list

A mutant is killed if a test fails, or hangs. One that survives wants a test, or is no mistake: then it does not belong here. A change that
touches a mutant's text has to carry it along; tests/test_mutants.py fails until then.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 300.0  # seconds, after which tests hang


class Mutant(NamedTuple):
    """old: text that stands once in the file. tests: as pytest's command line has them."""

    name: str
    file: str
    old: str
    new: str
    tests: str


# Files
FLUX = "train_grpo_flux.py"  # whose copies in the other scripts stay as they are
SD = "train_grpo_sd.py"
SKYREELS = "train_grpo_skyreels.py"
WAN = "train_grpo_wan.py"
RUN = "fastvideo/runs/run.py"
UPDATE_STATISTICS = "fastvideo/runs/statistics.py"
CHECKPOINT = "fastvideo/runs/checkpoint.py"
GUARDS = "fastvideo/runs/guards.py"
ZERO = "fastvideo/parallel/zero.py"
SHARDS = "fastvideo/parallel/shards.py"
DISTRIBUTED = "fastvideo/parallel/distributed.py"
ULYSSES = "fastvideo/parallel/sequence_parallel.py"
REWARDS = "fastvideo/rewards/__init__.py"
PROMPTS = "fastvideo/embeddings/prompts.py"
# Tests
WIRING = "tests/test_wiring.py"
PIECES = "tests/test_grpo.py"
SAMPLER = "tests/test_sampler.py -k 'not marginals'"
TRAIN = "tests/test_train_flux.py"
SPLIT = "tests/test_sequence_parallel.py -k outputs"
GUIDED = "tests/test_families.py -k branches"

MUTANTS = [
    # The sampler
    Mutant(
        "schedule: shift upside down", FLUX, "return shift * t / (1 + (shift - 1) * t)", "return t / (shift - (shift - 1) * t)", SAMPLER
    ),
    Mutant("sde: sign of x0_hat", FLUX, "x0_hat = z_t - t * u_hat", "x0_hat = z_t + t * u_hat", SAMPLER),
    Mutant("sde: sign of the score", FLUX, "score = -(z_t - (1 - t) * x0_hat) / t**2", "score = (z_t - (1 - t) * x0_hat) / t**2", SAMPLER),
    Mutant(
        "sde: variance instead of standard deviation",
        FLUX,
        "std = noise_level.to(z_t) * (t - s).sqrt()",
        "std = noise_level.to(z_t) * (t - s)",
        SAMPLER,
    ),
    Mutant("sde: noise level not squared", FLUX, "(0.5 * noise_level**2).to(z_t)", "(0.5 * noise_level).to(z_t)", SAMPLER),
    Mutant("noise levels: without a schedule", FLUX, "factors[args.noise_schedule]", 'factors["constant"]', SAMPLER),
    Mutant("noise levels: infinite at t = 1", FLUX, "torch.where(t < 1, t, s)", "t", SAMPLER),
    Mutant("sd: noise levels without a schedule", SD, '"decay": 0.5}', '"decay": 0}', "tests/test_sampler_sd.py"),
    Mutant("sde: log-prob without the standard deviation", FLUX, " - std.log() - 0.5", " - 0.5", SAMPLER),
    Mutant(
        "sde: log-prob summed over elements",
        FLUX,
        "return z_s, log_prob.flatten(1).mean(1), x0_hat",
        "return z_s, log_prob.flatten(1).sum(1), x0_hat",
        SAMPLER,
    ),
    Mutant(
        "sd: standard deviation of another transition",
        SD,
        "(1 - alpha_bar_s) / (1 - alpha_bar_t) * (1",
        "(1 - alpha_bar_t) / (1 - alpha_bar_s) * (1",
        "tests/test_sampler_sd.py",
    ),
    Mutant(
        "sd: direction without the noise that is added",
        SD,
        "(1 - alpha_bar_s - std**2).sqrt() * eps_hat",
        "(1 - alpha_bar_s).sqrt() * eps_hat",
        "tests/test_sampler_sd.py",
    ),
    Mutant(
        "sd: v-prediction's sign",
        SD,
        "alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z_t",
        "alpha_bar.sqrt() * output - (1 - alpha_bar).sqrt() * z_t",
        "tests/test_sampler_sd.py",
    ),
    Mutant(
        "sd: branches of guidance swapped",
        SD,
        "negative, positive = output.chunk(2)",
        "positive, negative = output.chunk(2)",
        "tests/test_sampler_sd.py",
    ),
    Mutant("sd: no gradient through the negative branch", SD, "output = negative + cond", "output = negative.detach() + cond", GUIDED),
    Mutant(
        "skyreels: no gradient through the negative branch",
        SKYREELS,
        "return u_negative + cond",
        "return u_negative.detach() + cond",
        GUIDED,
    ),
    Mutant("wan: no gradient through the prompt's branch", WAN, "(u_positive - u_negative)", "(u_positive.detach() - u_negative)", GUIDED),
    Mutant(
        "skyreels: image in every frame",
        SKYREELS,
        'F.pad(cond["image_latents"], (0, 0, 0, 0, 0, z_t.shape[2] - 1))',
        'cond["image_latents"].expand_as(z_t)',
        "tests/test_families.py -k noise_0_is_diffusers",
    ),
    # The rollout
    Mutant(
        "rollout: noise from the global generator",
        FLUX,
        "torch.randn(z_t.shape[1:], generator=g) for g in generators",
        "torch.randn(z_t.shape[1:]) for g in generators",
        WIRING,
    ),
    Mutant(
        "rollout: the network is asked at s",
        FLUX,
        "u_hat = predict(transformer, z_t, t.expand(len(z_t)), cond)",
        "u_hat = predict(transformer, z_t, s.expand(len(z_t)), cond)",
        WIRING,
    ),
    Mutant(
        "rollout: z_s kept as z_t",
        FLUX,
        '{"z_t": z_t, "z_s": z_s, "old_log_prob": log_prob}.items()',
        '{"z_t": z_s, "z_s": z_s, "old_log_prob": log_prob}.items()',
        WIRING,
    ),
    Mutant(
        "rollout: the last latents before the last step",
        FLUX,
        "        z_t = z_s\n    return kept, z_t\n",
        "        z_1, z_t = z_t, z_s\n    return kept, z_1\n",
        WIRING,
    ),
    Mutant("window: its start is ignored by sampling", FLUX, "return range(start, start + count)", "return range(count)", WIRING),
    Mutant(
        "window: its start is ignored by training", FLUX, "return stochastic.start + select_timesteps(", "return select_timesteps(", WIRING
    ),
    Mutant(
        "window: the last step is stochastic",
        FLUX,
        "(0, self.sampling_steps - 1)\n        return range",
        "(0, self.sampling_steps)\n        return range",
        PIECES,
    ),
    Mutant(
        "noise in every step",
        FLUX,
        "level if step in args.stochastic_steps else 0.0",
        "level if step < args.sampling_steps - 1 else 0.0",
        WIRING,
    ),
    Mutant(
        "initial noise equal in every iteration",
        FLUX,
        'for generator in run.generators("initial_noise", starts)]',
        'for generator in [keyed_generator(args.seed, "initial_noise", *start) for start in starts]]',
        WIRING,
    ),
    Mutant("initial noise equal for all prompts", FLUX, "[key[:1] for key in samples[::G]]", "[key[:0] for key in samples[::G]]", WIRING),
    Mutant("initial noise never shared", FLUX, "if args.shared_noise else (samples, 0)", "if False else (samples, 0)", WIRING),
    Mutant(
        "steps before the window: those of another prompt",
        FLUX,
        "z_t[batch * len(starts) // len(samples)]",
        "z_t[batch % len(z_t)]",
        WIRING,
    ),
    Mutant(
        "steps before the window: one too few",
        FLUX,
        "schedule, levels[:first], [], trained",
        "schedule, levels[: first - 1], [], trained",
        WIRING,
    ),
    Mutant(
        "step noise equal in every iteration",
        FLUX,
        'run.generators("step_noise", [samples[i] for i in batch])',
        '[keyed_generator(args.seed, "step_noise", *samples[i]) for i in batch]',
        WIRING,
    ),
    Mutant(
        "step noise equal within a group",
        FLUX,
        'run.generators("step_noise", [samples[i] for i in batch])',
        'run.generators("step_noise", [samples[i][:1] for i in batch])',
        WIRING,
    ),
    Mutant(
        "trained steps equal for all samples",
        FLUX,
        'run.generators("timesteps", samples)',
        'run.generators("timesteps", samples[:1] * len(samples))',
        WIRING,
    ),
    Mutant(
        "every batch has the first one's trained steps",
        FLUX,
        "levels, noise, trained_steps[batch], first)",
        "levels, noise, trained_steps[: len(batch)], first)",
        WIRING,
    ),
    Mutant(
        "rollout: all samples of the first prompt",
        FLUX,
        "tensor[batch // G]",
        "tensor[batch * 0]",
        WIRING,
    ),
    Mutant(
        "prompts: those of the first iteration for ever",
        FLUX,
        "run.args.prompts_per_iteration, run.iteration, run.args.seed)",
        "run.args.prompts_per_iteration, 1, run.args.seed)",
        WIRING,
    ),
    Mutant(
        "prompts: all processes have the same",
        FLUX,
        "{place: drawn[place] for place in range(",
        "{place: drawn[place % share] for place in range(",
        WIRING,
    ),
    # Rewards and advantages
    Mutant(
        "scores: with another sample's prompt",
        FLUX,
        "[rows[i] for i in batch]",
        "[rows[i - run.args.num_generations] for i in batch]",
        WIRING,
    ),
    Mutant(
        "scores: of other pictures",
        FLUX,
        "media = decode(vae, x0_hat[batch], run.args)",
        "media = decode(vae, x0_hat[batch.flip(0)], run.args)",
        WIRING,
    ),
    Mutant(
        "decode: without the VAE's shift",
        FLUX,
        "latents / vae.config.scaling_factor + vae.config.shift_factor",
        "latents / vae.config.scaling_factor",
        WIRING,
    ),
    Mutant(
        "advantages negated",
        FLUX,
        "advantages = group_advantages(rewards, run.weights).clamp(",
        "advantages = (-group_advantages(rewards, run.weights)).clamp(",
        WIRING,
    ),
    Mutant("advantages not clipped", FLUX, ".clamp(-args.advantage_clip, args.advantage_clip)\n", "\n", WIRING),
    Mutant("advantages of other processes' prompts", FLUX, "advantages[list(prompts)]", "advantages[: len(prompts)]", WIRING),
    Mutant("advantages: mean over all prompts", FLUX, "values - values.mean(1, keepdim=True)", "values - values.mean()", PIECES),
    Mutant("advantages: not divided by the standard deviation", FLUX, " / (values.std(1, keepdim=True) + 1e-8)", "", PIECES),
    Mutant("advantages: weights ignored", FLUX, "total = total + weight * deviations", "total = total + deviations", PIECES),
    Mutant("advantages: equal rewards are not zero", FLUX, "deviations.masked_fill(equal, 0)", "deviations", PIECES),
    Mutant(
        "best of n: the best alone",
        FLUX,
        "torch.cat([order[:, :top], order[:, order.shape[1] - (keep - top) :]], dim=1)",
        "order[:, :keep]",
        PIECES,
    ),
    Mutant("best of n: not in the samples' order", FLUX, "(keep - top) :]], dim=1).sort(dim=1).values", "(keep - top) :]], dim=1)", PIECES),
    Mutant(
        "best of n: of other prompts",
        FLUX,
        "+ args.num_generations * torch.arange(len(advantages))[:, None]",
        "+ args.kept_generations * torch.arange(len(advantages))[:, None]",
        WIRING,
    ),
    Mutant(
        "best of n: others' advantages",
        FLUX,
        "advantages.flatten()[best].to(device)",
        "advantages.flatten()[: len(best)].to(device)",
        WIRING,
    ),
    Mutant("steps: not in order", FLUX, "[:count].sort().values for g", "[:count] for g", WIRING),
    Mutant(
        "steps: rounded down", FLUX, "return math.ceil(round(fraction * num_steps, 6))", "return max(1, int(fraction * num_steps))", PIECES
    ),
    Mutant("steps: last is first", FLUX, 'first = 0 if selection == "first" else num_steps - count', "first = 0", PIECES),
    Mutant(
        "steps: selection ignored",
        FLUX,
        "run.args.timestep_fraction, run.args.timestep_selection)",
        "run.args.timestep_fraction)",
        f"{TRAIN} -k 'test_option and old_log_prob'",
    ),
    # The updates
    Mutant("loss: its sign", FLUX, "loss = -torch.minimum(", "loss = torch.minimum(", PIECES),
    Mutant("loss: the larger of both", FLUX, "-torch.minimum(ratio", "-torch.maximum(ratio", PIECES),
    Mutant(
        "loss: clipped from below alone", FLUX, "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(min=1 - clip_range)", PIECES
    ),
    Mutant("loss: the ratio upside down", FLUX, "log_ratio = log_prob - old_log_prob", "log_ratio = old_log_prob - log_prob", PIECES),
    Mutant("updates: all train the same samples", FLUX, "samples[:, u::N].flatten()", "samples[:, ::N].flatten()", WIRING),
    Mutant(
        "updates: one prompt's share twice",
        FLUX,
        "samples[:, u::N].flatten()",
        "samples[:1, u::N].repeat(len(samples), 1).flatten()",
        WIRING,
    ),
    Mutant("updates: another sample's advantage", FLUX, "advantages[batch[:, 0]]", "advantages[batch[:, 1]]", WIRING),
    Mutant(
        "updates: another prompt's embeddings", FLUX, "tensor[sample // num_generations]", "tensor[sample // num_generations - 1]", WIRING
    ),
    Mutant(
        "updates: scored at another time",
        FLUX,
        'z_t, t, s = transitions["z_t"], schedule[transitions["step"]], schedule[transitions["step"] + 1]\n    u_hat',
        'z_t, t, s = transitions["z_t"], schedule[transitions["step"] - 1], schedule[transitions["step"] + 1]\n    u_hat',
        WIRING,
    ),
    Mutant(
        "updates: scored at one noise level",
        FLUX,
        't, s, transitions["noise_level"], z_s=',
        't, s, transitions["noise_level"].mean(), z_s=',
        WIRING,
    ),
    Mutant(
        "updates: scored at another step's noise level", FLUX, "torch.float64)[trained_steps]", "torch.float64)[trained_steps - 1]", WIRING
    ),
    Mutant("updates: micro-batches weigh the same", FLUX, "len(batch) / len(pairs))", "args.micro_batch_size / len(pairs))", WIRING),
    Mutant("kl subtracted", FLUX, "loss + args.kl_weight * kl", "loss - args.kl_weight * kl", WIRING),
    Mutant("kl unweighted", FLUX, "loss + args.kl_weight * kl", "loss + kl", WIRING),
    Mutant("kl detached", FLUX, "loss + args.kl_weight * kl", "loss + args.kl_weight * kl.detach()", WIRING),
    Mutant("kl: not half", FLUX, '((2 * transitions["noise_level"] ** 2)', '((transitions["noise_level"] ** 2)', PIECES),
    Mutant(
        "kl: one noise level for all", FLUX, 'sde_step(z_t, u, t, s, transitions["noise_level"])', "sde_step(z_t, u, t, s, 0.3)", PIECES
    ),
    Mutant("kl to the current policy", FLUX, "run.reference.applied(), torch", "nullcontext(run.policy), torch", WIRING),
    Mutant(
        "kl: reference moves along", "fastvideo/parallel/reference.py", "return weight.detach().clone()", "return weight.detach()", WIRING
    ),
    Mutant(
        "old log-probs are never recomputed",
        FLUX,
        'if args.old_log_prob == "recompute" else {}',
        'if args.old_log_prob == "computed again" else {}',
        PIECES,
    ),
    Mutant("pictures: one noise for all", FLUX, '"pictures", place)) for', '"pictures", 0)) for', WIRING),
    Mutant("pictures: of the first prompt", FLUX, "[place % run.cache.num_prompts for place in places]", "[0 for place in places]", WIRING),
    # The run
    Mutant("run: weight decay not passed on", RUN, "weight_decay=args.weight_decay", "weight_decay=0.0", WIRING),
    Mutant("run: clipping not passed on", RUN, "max_grad_norm=args.max_grad_norm", "max_grad_norm=1.0", WIRING),
    Mutant("run: warm-up one update late", RUN, "(update + 1) / max(", "update / max(", WIRING),
    Mutant(
        "run: last micro-batch in the next update",
        RUN,
        "math.ceil(pairs_per_update / args.micro_batch_size)",
        "pairs_per_update // args.micro_batch_size",
        WIRING,
    ),
    Mutant(
        "run: weights of rewards reversed",
        RUN,
        "zip(self.rewards, args.reward_weights)",
        "zip(self.rewards, reversed(args.reward_weights))",
        WIRING,
    ),
    Mutant(
        "run: keys without the iteration",
        RUN,
        "keyed_generator(self.args.seed, purpose, self.iteration, *key)",
        "keyed_generator(self.args.seed, purpose, *key)",
        WIRING,
    ),
    Mutant(
        "run: keys without the seed",
        RUN,
        "keyed_generator(self.args.seed, purpose, self.iteration, *key)",
        "keyed_generator(0, purpose, self.iteration, *key)",
        WIRING,
    ),
    Mutant("run: shares ignored", RUN, "backward_and_step(self.policy, loss * share)", "backward_and_step(self.policy, loss)", WIRING),
    Mutant(
        "run: ema once an iteration",
        RUN,
        "        if self.ema:\n            self.ema.update()",
        "        if self.ema and len(self.norms) == 1:\n            self.ema.update()",
        WIRING,
    ),
    Mutant(
        "run: ema not drawn",
        RUN,
        "with self.ema.applied() if self.ema else nullcontext(), zero.gathered",
        "with nullcontext(), zero.gathered",
        WIRING,
    ),
    Mutant("run: ema not exported", RUN, "with self.ema.applied() if self.ema else nullcontext():", "with nullcontext():", WIRING),
    Mutant(
        "run: ratio not checked",
        RUN,
        'if len(self.norms) == 1 and self.iteration == self.done + 1 and "ratio_max_dev" in stats:',
        "if False:",
        f"{TRAIN} -k stops_all",
    ),
    Mutant(
        "run: scores of other processes' places",
        RUN,
        "own = samples[places]",
        "own = samples[[-1 - place for place in places]]",
        WIRING,
    ),
    Mutant(
        "run: scores of a pair in blocks",
        RUN,
        "torch.arange(count)[self.ranks.sp_rank :: self.ranks.sp_size]",
        "torch.arange(count).chunk(self.ranks.sp_size)[self.ranks.sp_rank]",
        f"{TRAIN} -k 'layouts and 2_processes-2-2-2'",
    ),
    Mutant(
        "run: metrics of one process",
        UPDATE_STATISTICS,
        "rows = [row for rows in gathered for row in rows]",
        "rows = gathered[0] * len(gathered)",
        WIRING,
    ),
    Mutant(
        "run: metrics without shares",
        UPDATE_STATISTICS,
        'sum(row[name] * row["share"] for row in rows)',
        "sum(row[name] for row in rows)",
        WIRING,
    ),
    Mutant(
        "run: captions of other pictures",
        RUN,
        '[self.cache.rows[place % self.cache.num_prompts]["prompt"]',
        '[self.cache.rows[-1 - place]["prompt"]',
        WIRING,
    ),
    Mutant(
        "run: nothing saved after the last iteration",
        RUN,
        "args.checkpoint_every == 0 or last or failure",
        "args.checkpoint_every == 0 or failure",
        WIRING,
    ),
    Mutant(
        "run: last iteration done twice",
        RUN,
        "left = range(self.done + 1, args.iterations + 1)",
        "left = range(max(1, self.done), args.iterations + 1)",
        "tests/test_resume.py -k longer_run",
    ),
    Mutant(
        "run: a failing reward loses the iterations before",
        RUN,
        "                self._save(self.iteration - 1)\n",
        "                pass\n",
        "tests/test_bad_input.py -k 'failing_reward and shape'",
    ),
    # Processes, shards, averages
    Mutant(
        "ema: decay and the rest swapped",
        "fastvideo/parallel/ema.py",
        "master_shards(self.engine), 1 - self.decay)",
        "master_shards(self.engine), self.decay)",
        WIRING,
    ),
    Mutant(
        "ema: the average is trained on",
        "fastvideo/parallel/ema.py",
        "        finally:\n            self._swap()",
        "        finally:\n            pass",
        "tests/test_zero.py -k averaged",
    ),
    Mutant("zero: weight decay dropped", ZERO, "lr=learning_rate, weight_decay=weight_decay)", "lr=learning_rate)", WIRING),
    Mutant("zero: always clips to 1", ZERO, '"gradient_clipping": max_grad_norm,', '"gradient_clipping": 1.0,', WIRING),
    Mutant("zero: divides by the number of micro-batches", ZERO, "scale_wrt_gas=False", "scale_wrt_gas=True", WIRING),
    Mutant(
        "zero: no learning-rate schedule", ZERO, "LambdaLR(optimizer, lr_multiplier)", "LambdaLR(optimizer, lambda update: 1.0)", WIRING
    ),
    Mutant("keys without the purpose", DISTRIBUTED, "repr((seed, purpose, *key))", "repr((seed, *key))", PIECES),
    Mutant("keys run together", DISTRIBUTED, "repr((seed, purpose, *key))", "(str(seed) + purpose + ''.join(map(str, key)))", PIECES),
    Mutant("scores of this process alone", DISTRIBUTED, "    dist.all_reduce(values)\n", "", WIRING),
    Mutant(
        "errors of one process alone",
        DISTRIBUTED,
        "    if error := first_error(error):\n        raise error\n    return value",
        "    if error:\n        raise error\n    return value",
        "tests/test_embedding_cache.py -k stop_together",
    ),
    Mutant(
        "ulysses: the gradient is a mean",
        ULYSSES,
        "return gradient[:, ctx.own] * ctx.size, None, None",
        "return gradient[:, ctx.own], None, None",
        SPLIT,
    ),
    Mutant("ulysses: text always before the image", ULYSSES, "if text is not None and text_first else", "if text is not None else", SPLIT),
    Mutant(
        "ulysses: the first has all that does not divide",
        ULYSSES,
        "(rank < count % self.size)",
        "(rank == 0) * (count % self.size)",
        "tests/test_sequence_parallel.py -k shares",
    ),
    Mutant(
        "ulysses: heads come back in another order",
        ULYSSES,
        "return torch.cat(pieces, dim=1).permute(2, 0, 1, 3)",
        "return torch.cat(pieces[::-1], dim=1).permute(2, 0, 1, 3)",
        SPLIT,
    ),
    Mutant(
        "resume: Adam's steps are forgotten",
        SHARDS,
        "torch.tensor(float(updates), device",
        "torch.tensor(0.0, device",
        "tests/test_resume.py -k longer_run",
    ),
    Mutant(
        "resume: the learning rate is forgotten",
        SHARDS,
        "base * factor(updates)",
        "base * factor(0)",
        "tests/test_elastic.py -k tiny_module",
    ),
    Mutant(
        "checkpoint: without the average",
        CHECKPOINT,
        '({"ema": ema.shards} if ema is not None else {})',
        "{}",
        "tests/test_resume.py -k longer_run",
    ),
    Mutant(
        "checkpoint: one too few is kept",
        CHECKPOINT,
        "len(earlier) - (keep - 1)",
        "len(earlier) - (keep - 2)",
        "tests/test_guards.py -k best_checkpoint_is_kept",
    ),
    Mutant(
        "checkpoint: pieces at another place",
        CHECKPOINT,
        "piece[begin - first : end - first]",
        "piece[: end - begin]",
        "tests/test_elastic.py -k tiny_module",
    ),
    # Rewards and what is logged of them
    Mutant(
        "threshold: at it is above it",
        REWARDS,
        "(values > threshold)",
        "(values >= threshold)",
        "tests/test_reward_checks.py -k threshold_has",
    ),
    Mutant("threshold: upside down", REWARDS, "(values > threshold)", "(values < threshold)", WIRING),
    Mutant(
        "rewards share one tensor",
        REWARDS,
        "given = media.clone()\n    return scores",
        "pass\n    return scores",
        "tests/test_reward_isolation.py",
    ),
    Mutant("rewards share the rows", REWARDS, "[copy.deepcopy(row) for row in rows]", "rows", "tests/test_reward_isolation.py"),
    Mutant(
        "rewards may turn gradients off",
        "fastvideo/rewards/isolation.py",
        "    (torch.is_grad_enabled, torch.set_grad_enabled),\n",
        "",
        "tests/test_reward_isolation.py",
    ),
    Mutant(
        "scores that are not finite pass",
        REWARDS,
        "if not math.isfinite(value):",
        "if value is None:",
        "tests/test_reward_checks.py -k broken_reward",
    ),
    Mutant(
        "logged: groups flat in any reward",
        "fastvideo/rewards/statistics.py",
        "for name in trained]).all(0)",
        "for name in trained]).any(0)",
        "tests/test_reward_checks.py -k seen_alone",
    ),
    Mutant(
        "logged: spread over all instead of groups",
        "fastvideo/rewards/statistics.py",
        '"group_std": values.std(1).mean()',
        '"group_std": values.std()',
        "tests/test_reward_checks.py -k seen_alone",
    ),
    Mutant(
        "logged: held-out rewards as trained ones",
        "fastvideo/rewards/statistics.py",
        "'reward' if name in trained else 'held_out'",
        "'reward'",
        "tests/test_reward_checks.py -k seen_alone",
    ),
    Mutant(
        "shapes: pictures half as bright",
        "shapes/rewards.py",
        "(media.float().cpu() / 2 + 0.5).clamp(0, 1)",
        "(media.float().cpu() / 2).clamp(0, 1)",
        WIRING,
    ),
    # Prompts, evaluation
    Mutant(
        "prompts: the same order in every epoch",
        PROMPTS,
        'keyed_generator(seed, "prompt_order", epoch)',
        'keyed_generator(seed, "prompt_order")',
        PIECES,
    ),
    Mutant(
        "prompts: an iteration ahead",
        PROMPTS,
        "range((iteration - 1) * prompts_per_iteration, iteration * prompts_per_iteration)",
        "range(iteration * prompts_per_iteration, (iteration + 1) * prompts_per_iteration)",
        WIRING,
    ),
    Mutant(
        "prompts: duplicates are kept",
        PROMPTS,
        '"duplicates" if key in seen else "lines"',
        '"lines"',
        "tests/test_embedding_cache.py -k 'text_file or jsonl_file'",
    ),
    Mutant(
        "prompts: other fields are dropped",
        PROMPTS,
        "                row = json.loads(line)\n",
        '                row = {"prompt": json.loads(line)["prompt"]}\n',
        "tests/test_embedding_cache.py -k 'text_file or jsonl_file'",
    ),
    Mutant(
        "evaluation: equal noise for all pictures of a prompt",
        "evaluate.py",
        '"evaluation", job.prompt, job.k)',
        '"evaluation", job.prompt)',
        "tests/test_evaluate.py -k each_picture",
    ),
    Mutant(
        "evaluation: equal noise for all seeds",
        "evaluate.py",
        'keyed_generator(job.seed, "evaluation"',
        'keyed_generator(0, "evaluation"',
        "tests/test_evaluate.py -k each_picture",
    ),
    Mutant(
        "evaluation: scores of other seeds",
        "fastvideo/evaluation/results.py",
        ".reshape(shape).swapaxes(0, 1) for name in",
        ".reshape(shape) for name in",
        "tests/test_evaluate.py -k each_picture",
    ),
    Mutant(
        "evaluation: spread of a population",
        "fastvideo/evaluation/results.py",
        "statistics.stdev(seed_means)",
        "statistics.pstdev(seed_means)",
        "tests/test_evaluate.py -k results_and_pictures",
    ),
    Mutant(
        "evaluation: intervals of a percentile bootstrap's width",
        "fastvideo/evaluation/statistics.py",
        "np.maximum(np.sqrt(np.maximum(drawn_variance, 0)), np.where(same, 1.0, FLOOR * error)[:, None])",
        "np.where(same, 1.0, error)[:, None]",
        "tests/test_statistics.py -k hold_the_truth",
    ),
    Mutant(
        "evaluation: groups are drawn together",
        "fastvideo/evaluation/statistics.py",
        "    parts = _parts(values, groups)\n    if min",
        "    parts = _parts(values, None)\n    if min",
        "tests/test_statistics.py -k 'another_bootstrap or groups'",
    ),
    Mutant(
        "evaluation: the whole is the mean of all samples always",
        "fastvideo/evaluation/results.py",
        'entries(values, groups if total == "groups" else None)',
        "entries(values, None)",
        "tests/test_statistics.py -k the_whole",
    ),
    Mutant(
        "evaluation: ties are lost",
        "fastvideo/evaluation/statistics.py",
        "(scores > against) + 0.5 * (scores == against)",
        "(scores > against) + 0.0 * (scores == against)",
        "tests/test_statistics.py -k ties",
    ),
    Mutant(
        "evaluation: a changed checkpoint is taken for the one before",
        "fastvideo/evaluation/tasks.py",
        'open_store(root, f"{title} on {task.name}", {"model": weights} | key)',
        'open_store(root, f"{title} on {task.name}", key)',
        "tests/test_evaluate.py -k another_checkpoint",
    ),
    Mutant(
        "evaluation: answers of people are for the other model",
        "fastvideo/evaluation/human_pairs.py",
        'if pair["left"] == models[1]',
        'if pair["left"] == models[0]',
        "tests/test_evaluate.py -k pairs_for_people",
    ),
    # Guards
    Mutant("guards: a ratio that is NaN passes", GUARDS, "if not max_deviation <= clip_range:", "if max_deviation > clip_range:", PIECES),
    Mutant("guards: no warning of the ratio", GUARDS, "if max_deviation > clip_range / 10:", "if max_deviation > clip_range:", PIECES),
    Mutant(
        "guards: a rise is a collapse",
        GUARDS,
        "if before - after > COLLAPSE_STD",
        "if after - before > COLLAPSE_STD",
        "tests/test_guards.py -k collapse",
    ),
    Mutant(
        "guards: one good iteration is no signal",
        GUARDS,
        'min(row["reward/zero_std_frac"] for row in now)',
        'max(row["reward/zero_std_frac"] for row in now)',
        "tests/test_guards.py -k no_signal",
    ),
    Mutant(
        "guards: any held-out fall alarms",
        GUARDS,
        "if all(later < earlier for earlier, later in pairwise(values)) and all(",
        "if any(later < earlier for earlier, later in pairwise(values)) and all(",
        "tests/test_guards.py -k no_false_alarm",
    ),
    Mutant(
        "guards: the worst checkpoint is the best",
        GUARDS,
        "return max(reversed(scores), key=lambda checkpoint: scores[checkpoint])",
        "return min(reversed(scores), key=lambda checkpoint: scores[checkpoint])",
        "tests/test_guards.py -k test_best_checkpoint",
    ),
    Mutant(
        "guards: penalties should rise",
        GUARDS,
        "for text, weight in weights if weight < 0}",
        "for text, weight in weights if weight > 0}",
        "tests/test_guards.py -k penalty",
    ),
]


def copy_repository(folder: Path) -> Path:
    """What git knows of the working tree, and new files."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in names.stdout.split("\0"):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


@contextmanager
def planted(mutant: Mutant | None, folder: Path) -> Iterator[None]:
    """Inside, the copy has the mistake; afterwards it is whole again."""
    if mutant is None:
        yield
        return
    path = folder / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its text stands {source.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        path.write_text(source)


def passes(folder: Path, tests: str) -> bool:
    """Run tests in a copy, one after the other, until one fails. Raises RuntimeError if none of them ran."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "-x", *shlex.split(tests)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that the tests have started and left
    if process.returncode not in (0, 1):
        raise RuntimeError(f"pytest {tests} did not run:\n{output[-3000:]}")
    return process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their names")
    parser.add_argument("--workers", type=int, default=2, help="mutants at once, each in a copy of its own")
    parser.add_argument("--list", action="store_true", help="print their names, files and tests")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.words or any(word in mutant.name for word in args.words)]
    if args.list:
        print("\n".join(f"{mutant.name:<55} {mutant.file:<40} {mutant.tests}" for mutant in chosen))
    if args.list or not chosen:
        return 0

    start, copies, survivors = time.monotonic(), SimpleQueue(), []

    def try_out(mutant: Mutant | None, tests: str) -> tuple[bool, float]:
        """Whether the tests pass with this mistake, or with none; and the seconds it took."""
        folder, begin = copies.get(), time.monotonic()
        try:
            with planted(mutant, folder):
                return passes(folder, tests), time.monotonic() - begin
        finally:
            copies.put(folder)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.workers) as pool:
        for worker in range(args.workers):
            copies.put(copy_repository(Path(temporary, str(worker))))
        used = sorted({mutant.tests for mutant in chosen})
        for tests, (passed, _) in zip(used, pool.map(lambda tests: try_out(None, tests), used)):
            if not passed:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"this fails without any mistake: pytest {tests}")
        print(f"{len(used)} groups of tests pass without any mistake; now {len(chosen)} with one", flush=True)
        for mutant, (passed, seconds) in zip(chosen, pool.map(lambda mutant: try_out(mutant, mutant.tests), chosen)):
            print(f"{'SURVIVED' if passed else 'killed':<9}{seconds:6.1f} s  {mutant.name} ({mutant.file})", flush=True)
            survivors += [mutant.name] * passed
    killed = len(chosen) - len(survivors)
    print(
        f"{killed} of {len(chosen)} killed, {100 * killed / len(chosen):.1f} %, in {(time.monotonic() - start) / 60:.0f} min",
        *survivors,
        sep="\n",
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
