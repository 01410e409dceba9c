"""One training run: what is about processes, files and reporting in it, so that a script can be about its algorithm."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import ModelMixin
from tqdm import tqdm

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.embeddings.fingerprint import check_encoder
from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.models.model_folder import check_model
from fastvideo.parallel import distributed, zero
from fastvideo.parallel.ema import EMA
from fastvideo.parallel.reference import InitialWeights
from fastvideo.rewards import load_rewards, parse_rewards
from fastvideo.rewards.preflight import preflight
from fastvideo.rewards.statistics import group_statistics
from fastvideo.runs import checkpoint, guards, run_folder, tracking
from fastvideo.runs.flags import RunFlags, parse
from fastvideo.runs.statistics import update_statistics
from fastvideo.runs.stop import StopSignals

__all__ = ["Run", "RunFlags", "parse"]
PICTURES = 8  # samples in a grid
PHASES = {"rollout": "sampling", "update": "updating"}  # as the progress bar calls them


class Run:
    """A run, from its folder and its processes to its last checkpoint: `for iteration in run`.

    In order: `Run(...)`, `train(network)`, `start(...)`; then in each iteration, on all processes alike, `with run.saved_on_failure()` what
    may fail while the weights are still those of the iteration before, `backward` for each micro-batch, `report`. After the iteration it
    saves what is due, and stops where a signal or a guard asks for it. `finish` exports.

    ranks, device, dtype: where and in what this process computes. cache: the embeddings. rewards: name -> reward, held-out ones too.
    weights: name -> weight, of the rewards that are trained on. iteration: the current one, from 1. ema, reference: None without.
    """

    def __init__(self, args: RunFlags, family: str, script: str, sp_size: int = 1):
        """Collective. Refuses, with UserError, what would not run, before anything large is loaded.

        args: the script's, which also name the folder of the `model`. family: of the embedding caches that fit. script: its file.
        """
        self.args, self.family, self.script = args, family, script
        self.ranks = distributed.init(sp_size, args.timeout_minutes)
        if args.prompts_per_iteration % self.ranks.dp_size:
            raise UserError(f"--prompts_per_iteration {args.prompts_per_iteration} does not divide among {self.ranks.layout}")
        self.device, self.dtype = self.ranks.device, distributed.compute_dtype(args.dtype, self.ranks.device)
        zero.check_stage(args.zero_stage, args.offload, self.dtype)
        self.arguments = {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(args).items()}
        self.cache = EmbeddingCache(args.embeddings, {"family": family}, self.ranks)
        self.resume_from = run_folder.enter(args.output_dir, args.resume, self.arguments, self.cache.digest, args.allow_changed_args)
        distributed.on_main(lambda: check_model(args.model, family, "training"))
        check_encoder(self.cache, args.model)
        specs, rows = parse_rewards(args.rewards + args.held_out_rewards), self.cache.rows[: self.cache.num_prompts]
        self.rewards = distributed.together(lambda: load_rewards(specs, self.device, rows))
        self.weights = dict(zip(self.rewards, args.reward_weights))

    def train(self, network: ModelMixin, pairs_per_update: int, clip_range: float, keep_initial: bool) -> None:
        """Collective. Make `policy`, the engine that trains `network`, with an optimizer step after every `pairs_per_update` (sample, step)
        pairs of each process; and, if `keep_initial`, `reference`. clip_range: within which the ratio should stay.
        """
        args, self.clip_range = self.args, clip_range
        self.reference = InitialWeights(network) if keep_initial else None
        self.policy = zero.initialize(
            network,
            stage=args.zero_stage,
            offload=args.offload,
            dtype=self.dtype,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            lr_multiplier=lambda update: min(1.0, (update + 1) / max(1, args.lr_warmup_steps)),
            max_grad_norm=args.max_grad_norm,
            micro_batch_size=args.micro_batch_size,
            accumulation_steps=math.ceil(pairs_per_update / args.micro_batch_size),
            reduce_dtype=args.reduce_dtype,
        )
        if self.reference:
            self.reference.fill(self.policy, args.offload)
        self.ema = EMA(self.policy, args.ema_decay) if args.ema_decay else None

    def start(self, media: torch.Tensor) -> None:
        """Collective. Try the rewards on `media`, as decoded; go on from the checkpoint, if any; say what is run, with what."""
        args = self.args
        distributed.together(lambda: preflight(self.rewards, media, self.cache.rows[0]))
        self.done = checkpoint.load(self.policy, self.ema, self.resume_from) if self.resume_from else 0
        settings = {name: (self.arguments | self.cache.fingerprint)[name] for name in FAMILIES[self.family].sampling}
        if self.ranks.is_main:
            prompts = f"{self.cache.num_prompts} prompts, {args.prompts_per_iteration} an iteration"
            print(f"{prompts}, on {self.ranks.layout}, {self.device.type}, {self.dtype}")
        run_folder.write_manifest(args.output_dir, self.script, self.arguments, self.cache.digest, settings, self.done, self.ranks)
        self.tracker = tracking.Tracker(args.output_dir, args.trackers, self.arguments, self.done)

    def __iter__(self) -> Iterator[int]:
        """Collective. The iterations that are left. Raises UserError after one, saved, in which a signal or a guard has asked to stop."""
        args, self.signals = self.args, StopSignals()
        left = range(self.done + 1, args.iterations + 1)
        self.progress = tqdm(left, initial=self.done, total=args.iterations, disable=not self.ranks.is_main)
        for iteration in self.progress:
            self.iteration = iteration
            self.timer, self.stats, self.norms, self.collapse = tracking.Timer(), [], [], None
            yield iteration
            last = iteration == args.iterations
            failure = self.signals.requested() or (self.collapse if args.stop_on_collapse else None)
            if iteration % args.checkpoint_every == 0 or last or failure:
                self._save(iteration)
            if failure and not last:
                raise failure

    # ---------------------------------------------------------------------------------------------------- within an iteration

    def generators(self, purpose: str, keys: Iterable[tuple[int, ...]]) -> list[torch.Generator]:
        """A random generator for each key, the same in this iteration of every run with this --seed, on any number of processes."""
        return [distributed.keyed_generator(self.args.seed, purpose, self.iteration, *key) for key in keys]

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Collective. Inside, the policy has all its weights at hand for forward passes, and seconds become time/rollout_s."""
        with self.timed("rollout"), zero.gathered(self.policy, self.args.gather_for_rollout):
            yield

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds inside become time/NAME_s."""
        if name in PHASES:
            self.progress.set_description(PHASES[name])
        with self.timer(name):
            yield

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        """Collective. Indices of `count` samples, --rollout_batch_size at once; before each, all stop if a signal has come to any."""
        for batch in torch.arange(count).split(self.args.rollout_batch_size):
            if stopped := self.signals.requested():
                raise stopped
            yield batch

    def shared(self, count: int) -> tuple[torch.Tensor, ...]:
        """Of `count` samples, which a sequence-parallel group has in common, this process's share of the work, in batches of indices."""
        return torch.arange(count)[self.ranks.sp_rank :: self.ranks.sp_size].split(self.args.rollout_batch_size)

    def of_all_prompts(self, scores: list[dict[str, torch.Tensor]], places: list[int], num_generations: int) -> dict[str, torch.Tensor]:
        """Collective. Scores of the batches that `shared` gave this process, whose prompts are at `places`, as (P, G) of all prompts."""
        gathered, samples = {}, torch.arange(self.args.prompts_per_iteration * num_generations).view(-1, num_generations)
        own = samples[places].flatten()[self.ranks.sp_rank :: self.ranks.sp_size].to(self.device)
        for name in self.rewards:
            everywhere = torch.zeros(samples.numel(), device=self.device)
            everywhere[own] = torch.cat([everywhere[:0], *(batch[name].to(everywhere) for batch in scores)])
            gathered[name] = distributed.all_reduce_sum(everywhere).cpu().view_as(samples)
        return gathered

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Collective. If it raises UserError inside on any process, all save the iteration before, whose weights these are, and raise."""
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        if failure := distributed.first_error(failure):
            if self.iteration > 1:
                self._save(self.iteration - 1)
            raise failure

    def backward(self, loss: torch.Tensor, stats: dict[str, torch.Tensor], share: float) -> None:
        """Collective. A micro-batch's backward pass; with the last of an update the optimizer's step, and the moving average's.

        loss, stats: means over the micro-batch, which is `share` of its update. Raises UserError for a gradient that is not finite, and if
        before the first update of all the ratio, where `stats` have one, is not 1 (`guards.check_ratio`).
        """
        norm = zero.backward_and_step(self.policy, loss * share)
        self.stats.append(stats | {"update": len(self.norms), "share": share})
        if norm is None:
            return
        self.norms.append(norm)
        if len(self.norms) == 1 and self.iteration == self.done + 1 and "ratio_max_dev" in stats:
            largest = max(row["ratio_max_dev"].item() for row in self.stats)
            guards.check_ratio(max(distributed.all_gather_object(largest)), self.clip_range)
        if self.ema:
            self.ema.update()

    def report(self, rewards: dict[str, torch.Tensor], advantages: torch.Tensor | None = None) -> None:
        """Collective. Log what happened on all processes together, and look for what goes wrong.

        rewards: name -> (P, G). advantages: (P, G), as they were trained on, by a method that has some.
        """
        self.timer.end()
        metrics = group_statistics(rewards, self.weights)
        metrics |= {} if advantages is None else {"advantage/abs_mean": advantages.abs().mean().item()}
        metrics |= update_statistics(self.stats, len(self.norms))
        metrics |= {"policy/grad_norm": sum(self.norms) / len(self.norms), "policy/lr": self.policy.get_lr()[0]}
        samples = next(iter(rewards.values())).numel()
        metrics |= tracking.costs(self.timer, samples) | {"samples": self.iteration * samples}
        self.tracker.log(self.iteration, metrics)
        self.collapse = guards.check(self.args.output_dir, self.iteration, self.clip_range)
        shown = {name: f"{metrics[f'reward/{name}_mean']:.3f}" for name in self.weights}
        if "policy/ratio_max_dev" in metrics:
            shown["|ratio-1|"] = f"{metrics['policy/ratio_max_dev']:.0e}"
        self.progress.set_postfix(shown)

    # ------------------------------------------------------------------------------------------------------------ pictures

    def pictures_due(self) -> bool:
        every = self.args.sample_every
        return bool(every) and (self.iteration % every == 0 or self.iteration == self.args.iterations)

    def picture_share(self) -> tuple[list[int], dict[int, int]]:
        """Which of the grid's places 0 to 7 this process's sequence-parallel group samples, as many in each group, the last perhaps twice;
        and, of those that this process has to decode, place -> index among them.
        """
        count = math.ceil(PICTURES / self.ranks.dp_size)
        places = [min(self.ranks.dp_rank * count + i, PICTURES - 1) for i in range(count)]
        return places, {place: place % count for place in range(PICTURES) if self._owner(place) == self.ranks.rank}

    def _owner(self, place: int) -> int:
        """The rank that decodes the picture at `place`."""
        group, index = divmod(place, math.ceil(PICTURES / self.ranks.dp_size))
        return group * self.ranks.sp_size + index % self.ranks.sp_size

    def show(self, own: dict[int, torch.Tensor]) -> None:
        """Collective. Write the grid of pictures. own: place -> (1, 3, ...) in [-1, 1], of those that this process decodes."""
        media = distributed.collect_on_main(own, [self._owner(place) for place in range(PICTURES)])
        captions = [self.cache.rows[place % self.cache.num_prompts]["prompt"] for place in range(PICTURES)]
        self.tracker.log_samples(self.iteration, media, captions)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective. Inside, the policy has the moving average's weights, if there is one, all at hand for forward passes."""
        with self.ema.applied() if self.ema else nullcontext(), zero.gathered(self.policy, self.args.gather_for_rollout):
            yield

    # ------------------------------------------------------------------------------------------------------------- the end

    def _save(self, iteration: int) -> None:
        checkpoint.save(self.policy, self.ema, self.args.output_dir, iteration, self.args.keep_checkpoints, self.ranks)

    def finish(self, subfolder: str) -> None:
        """Collective. Export the trained weights as `export/SUBFOLDER`, and draw the reward curve."""
        folder = self.args.output_dir
        with self.ema.applied() if self.ema else nullcontext():
            checkpoint.export(self.policy, folder / "export", subfolder)
        self.tracker.close()
        if self.ranks.is_main:
            curve = tracking.plot_rewards(folder, folder / "rewards.png")
            print(f"trained weights: {folder / 'export'}; metrics: {folder / 'metrics.jsonl'}; reward curve: {curve}")
