"""GPU memory of training a published model as scripts/train_NAME.sh does, computed: no GPU, no weights.

    python benchmarks/memory.py
    python benchmarks/memory.py --model hunyuan_video --gpus 8 16 32 --zero_stage 2 3 --micro_batch_size 2

All other flags go to the training script after the launch script's own. What the networks compute is run by the training script's functions
on fake tensors, which have a shape and a dtype but no memory, and the bytes alive at once are counted; what ZeRO holds follows from the
formulas of benchmarks/README.md. Prints a table, and as the last line a JSON object with the same numbers in bytes.
"""

import dataclasses
import importlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import torch
import torch.distributed as dist
import tyro
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common import parallelize, print_table
from benchmarks.fake import FakeCache, PeakMemory, make_schedule, size
from benchmarks.full_size import MODELS, REPOSITORY, FullSize
from fastvideo.errors import UserError
from fastvideo.models.pretrained import add_lora
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks
from fastvideo.rewards import parse_rewards

GIB = 2**30
BUCKET = 2 * 200_000_000  # bytes, as fastvideo/parallel/zero.py sets it, of bfloat16
LIVE = 2 * 1_000_000_000  # bytes: how much of the network DeepSpeed gathers at stage 3 before it drops what it has used
# Networks of rewards, bytes a parameter times parameters: ViT-H-14 in float32, Qwen2-VL-2B in bfloat16 (docs/rewards.md).
REWARDS = {"hpsv2": 4 * 986_109_441, "clip": 4 * 986_714_881, "videoalign": 2 * 2_208_563_200}
NOTES = """\
GiB a GPU. optimizer: with the moving average. others: the VAE, and the networks of hpsv2, clip (a ViT-H-14) and videoalign; those of other
rewards are not counted. kept: the trajectories of an iteration. saved: by one forward pass for its backward pass. sampling_alive and so on:
the most that a phase has alive beside all these, sampling and so on: with them. start: DeepSpeed copies the network into one piece.
Left out: the CUDA context and NCCL's buffers, fragmentation, what kernels need while they run, and rewards' activations."""


@dataclass
class Args:
    model: tuple[Literal[tuple(MODELS)], ...] = tuple(name for name, model in MODELS.items() if not model.flags)
    """Which published configurations. Default: those of the launch scripts."""
    gpus: tuple[int, ...] = ()
    """Numbers of GPUs. Default: as many as the launch script is for."""
    zero_stage: tuple[Literal[1, 2, 3], ...] = ()
    """ZeRO stages. Default: the launch script's."""


def launch_settings(model: FullSize, flags: list[str]) -> tuple[ModuleType, Any, int]:
    """The training script, the arguments that its launch script gives it with `flags` at the end, and the number of GPUs it is for."""
    launch = REPOSITORY / "scripts" / f"train_{model.script.removeprefix('train_grpo_')}.sh"
    text = launch.read_text()
    rewards = re.search(r"^rewards=\((.*)\)$", text, re.MULTILINE)
    command = text[text.index("exec python ") :].replace("\\\n", "").replace('"${rewards[@]}"', rewards[1] if rewards else "")
    command = shlex.split(command.replace("${VIDEOALIGN:-}", "x").replace("${HPS:-}", "x").replace("${CLIP:-}", "x"))
    given = command[next(i for i, word in enumerate(command) if f"{model.script}.py" in word) + 1 : -1]  # the last is "$@"
    given += ["--output_dir", "run", *(word for name, value in model.flags.items() for word in (f"--{name}", str(value)))]
    module = importlib.import_module(model.script)
    args = tyro.cli(module.Args, use_underscores=True, args=[*given, *flags])
    return module, args, int(re.search(r" on (\d+) GPUs", text)[1])


def measure(module: ModuleType, model: FullSize, args: Any, sp_size: int) -> dict[str, int]:
    """Bytes of the whole networks, and of what a GPU has alive beside them: in each phase; of one prompt, `cond`; of one sample, `kept`."""
    if sp_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sp_size)
    schedule = make_schedule(module, args, 2)
    with torch.device("meta"):
        network, vae = (kind(**config) for kind, config in (model.network, model.vae))
        add_lora(network, args.lora_rank, args.seed)
        network, vae = network.bfloat16().train(), vae.bfloat16().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, vae = (part.to_empty(device="cpu") for part in (network, vae))
        vae.use_tiling = vae.use_slicing = getattr(args, "vae_tiling", False)
        if sp_size > 1:
            parallelize(
                model.script.removeprefix("train_grpo_"), network, Ranks(0, sp_size, torch.device("cpu"), sp_size, dist.group.WORLD)
            )
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        weights, trained = list(network.parameters()), [weight for weight in network.parameters() if weight.requires_grad]
        for weight in trained:  # DeepSpeed moves each gradient into its buckets at once
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        found = {"network": size(weights), "trained": size(trained), "vae": size(list(vae.parameters()))}

        shape = module.latent_shape(network, vae, args)
        steps = module.trained_count(len(args.stochastic_steps), args.timestep_fraction)
        batch, pairs = torch.zeros(args.rollout_batch_size, dtype=torch.long), torch.zeros(args.micro_batch_size, dtype=torch.long)
        with PeakMemory([*weights, *network.buffers(), *vae.parameters(), *vae.buffers()]) as memory:

            def peak(phase: str, function: Callable, *arguments: Any) -> Any:
                before = memory.most = memory.alive
                result = function(*arguments)
                found[phase] = memory.most - before
                return result

            def update() -> None:
                transitions, pair_cond = module.pick(trajectory, cond, pairs, pairs, args.kept_generations)
                before = memory.alive
                log_prob, _ = module.score_transitions(network, transitions, pair_cond, schedule)
                found["saved"] = memory.alive - before
                module.grpo_loss(log_prob, transitions["old_log_prob"], pairs.float(), args.clip_range)[0].backward()

            cond = module.load_cond(FakeCache(model.cached, args.height, args.width), [0], network, vae, args)
            noise = torch.randn(len(batch), *shape), schedule, [args.noise_level, 0.0], [torch.Generator() for _ in batch]
            batch_cond = {name: tensor[batch] for name, tensor in cond.items()}
            trajectory, x0_hat = peak("sampling", module.rollout, network, batch_cond, *noise, torch.zeros(len(batch), steps).long())
            peak("decoding", torch.no_grad()(module.decode), vae, x0_hat, args)
            peak("update", update)
            found |= {"cond": size(cond), "kept": (size(trajectory) + size(x0_hat)) // len(batch)}
    if sp_size > 1:
        dist.destroy_process_group()
    return found


def row(found: dict[str, int], args: Any, W: int, stage: int, sp_size: int) -> dict[str, Any]:
    """Of the results: bytes on each of W GPUs."""
    if W < 1 or W % sp_size or args.prompts_per_iteration * sp_size % W:
        raise UserError(f"--prompts_per_iteration {args.prompts_per_iteration} does not divide among {W} GPUs in groups of {sp_size}")
    prompts = args.prompts_per_iteration * sp_size // W
    N = found["trained"] // 2  # parameters in bfloat16; sums of gradients, the optimizer's copies and all averages are in float32
    rewards = {spec.name.partition(".")[0] for spec in parse_rewards(args.rewards)}
    state = {
        "weights": found["network"] / (W if stage == 3 else 1),
        "gradients": {1: 6 * N, 2: 6 * N / W, 3: 4 * N / W}[stage],  # below stage 3 also those of the last micro-batch
        "optimizer": (16 if args.ema_decay else 12) * N / W,
        "others": found["vae"] + sum(REWARDS.get(reward, 0) for reward in rewards),
        "cond": prompts * found["cond"],
        "kept": prompts * args.num_generations * found["kept"],
    }
    buckets = {1: 0, 2: 2 * BUCKET, 3: BUCKET}[stage]
    phases = {phase: sum(state.values()) + found[phase] for phase in ("sampling", "decoding", "update")}
    phases["update"] += buckets - state["kept"] * (1 - args.kept_generations / args.num_generations)
    if stage == 3:  # the buckets stay; the network is gathered, for sampling as a whole
        phases["sampling"] += buckets + (found["network"] if args.gather_for_rollout else LIVE)
        phases["decoding"] += buckets
        phases["update"] += LIVE
    phases["start"] = found["network"] + (found["trained"] if stage < 3 else 0) + state["others"]
    alive = {"saved": found["saved"]} | {f"{phase}_alive": found[phase] for phase in ("sampling", "decoding", "update")}
    return {"gpus": W, "zero_stage": stage, **state, "buckets": buckets, **alive, **phases, "peak": max(phases.values())}


def main() -> None:
    args, flags = tyro.cli(Args, use_underscores=True, return_unknown_args=True, description=__doc__.splitlines()[0])
    results = []
    for name in args.model:
        module, settings, launched = launch_settings(MODELS[name], flags)
        if settings.offload or settings.kl_weight or settings.dtype == "float32":
            raise UserError("--offload, --kl_weight and --dtype float32 are not computed here")
        sp_size = getattr(settings, "sp_size", 1)
        found = measure(module, MODELS[name], settings, sp_size)
        for W, stage in itertools.product(args.gpus or (launched,), args.zero_stage or (settings.zero_stage,)):
            results.append({"model": name} | row(found, settings, W, stage, sp_size))
    exact = ("model", "gpus", "zero_stage")
    print_table([{key: str(value) if key in exact else f"{value / GIB:.1f}" for key, value in row.items()} for row in results])
    print(NOTES)
    print(json.dumps({"arguments": dataclasses.asdict(args), "flags": flags, "results": results}))


if __name__ == "__main__":
    distributed.run(main)
