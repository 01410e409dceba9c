"""GPU memory of training a published model as scripts/train_NAME.sh does, computed: no GPU, no weights.

    python benchmarks/memory.py
    python benchmarks/memory.py --model hunyuan_video --gpus 8 --zero_stage 3

All other flags go to the training script after the launch script's own. What the networks compute is run on fake tensors, which have a shape
and a dtype but no memory, by the script's own functions, and what is alive at once is counted; what ZeRO holds follows from the formulas of
benchmarks/README.md. Prints a table, and as the last line a JSON object with the same numbers in bytes.
"""

import dataclasses
import importlib
import json
import os
import re
import shlex
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # from any working directory

import torch
import torch.distributed as dist
import tyro
from diffusers import DDIMScheduler
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import print_table
from benchmarks.full_size import MODELS, FullSize
from fastvideo import distributed
from fastvideo.distributed import Ranks, UserError
from fastvideo.models import flux, hunyuan, wan
from fastvideo.pretrained import add_lora
from fastvideo.rewards import parse_rewards

GIB = 2**30
BUCKET = 2 * 200_000_000  # bytes, as fastvideo/zero.py sets it, of bfloat16
LIVE = 2 * 1_000_000_000  # bytes: how much of the network DeepSpeed gathers at stage 3 before it drops what it has used
# Networks of rewards, bytes a parameter times parameters: ViT-H-14 in float32, Qwen2-VL-2B in bfloat16 (docs/rewards.md).
REWARDS = {"hpsv2": 4 * 986_109_441, "clip": 4 * 986_714_881, "videoalign": 2 * 2_208_563_200}
PARALLELIZE = {"flux": flux.parallelize, "hunyuan": hunyuan.parallelize, "skyreels": hunyuan.parallelize, "wan": wan.parallelize}
NOTES = """\
GiB. state: weights, gradients, optimizer, moving average. others: the VAE, and the networks of rewards, of whichever CLIP is given a ViT-H-14.
kept: the trajectories of an iteration. sampling, decoding, update: what is alive beside all that, most of it activations.
start: DeepSpeed copies the network into one piece. peak: the largest of start, sampling, decoding and update, each with what is held then.
Left out: the CUDA context and NCCL's buffers (1 to 3 GiB), the allocator's fragmentation, what kernels need inside, and rewards' activations."""


@dataclass
class Args:
    model: tuple[Literal[tuple(MODELS)], ...] = tuple(name for name, model in MODELS.items() if not model.flags)
    """Which published configurations. Default: those of the launch scripts."""
    gpus: int = 0
    """Number of GPUs. 0: as many as the launch script is for."""


class FakeCache:
    """An embedding cache of any number of prompts, on whatever device tensors are made on."""

    path, unconditional = Path("cache"), 9

    def __init__(self, shapes: dict, height: int, width: int):
        self.shapes, self.fingerprint = shapes, {"height": height, "width": width}

    def get(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.ones(len(indices), *shape, dtype=torch.bfloat16) for name, shape in self.shapes.items()}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, each storage once: `alive`, and `most` since it was last set.

    apart: tensors that are not counted, though operations return views of them.
    """

    def __init__(self, apart: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive, self.most, self.known = 0, 0, {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return output

    def freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.alive -= size


def make_schedule(module: ModuleType, args: Any, steps: int) -> Any:
    """What the script calls its time schedule, of `steps` steps."""
    if module.FAMILY != "sd":
        return module.time_schedule(steps, args.shift)
    with tempfile.TemporaryDirectory() as folder:
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).save_pretrained(
            Path(folder, "scheduler")
        )
        return module.time_schedule(steps, Path(folder))


def launch_settings(model: FullSize, flags: list[str]) -> tuple[ModuleType, Any, int]:
    """The training script, the arguments that its launch script gives it with `flags` at the end, and the number of GPUs it is for."""
    launch = REPOSITORY / "scripts" / f"train_{model.script.removeprefix('train_grpo_')}.sh"
    text = launch.read_text()
    command = shlex.split(text[text.index("torchrun ") :].replace("\\\n", ""))
    given = command[command.index(f"$repository/{model.script}.py") + 1 : -1]  # the last is "$@"
    given += ["--output_dir", "run", *(word for name, value in model.flags.items() for word in (f"--{name}", str(value)))]
    module = importlib.import_module(model.script)
    args = tyro.cli(module.Args, use_underscores=True, args=[*given, *flags])
    return module, args, int(re.search(r" on (\d+) GPUs", text)[1])


def size(tensors: Any) -> int:
    """Bytes of their storages, each once."""
    return sum({leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in tree_leaves(tensors)}.values())


def measure(module: ModuleType, model: FullSize, args: Any, prompts: int, sp_size: int) -> dict[str, int]:
    """Bytes of the whole networks, and of what a GPU with `prompts` prompts an iteration has alive beside them in each phase."""
    if sp_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sp_size)
    schedule = make_schedule(module, args, 2)
    with torch.device("meta"):
        network, vae = (kind(**config) for kind, config in (model.network, model.vae))
        add_lora(network, args.lora_rank, args.seed)
        network, vae = network.bfloat16(), vae.bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, vae = (part.to_empty(device="cpu") for part in (network, vae))
        vae.requires_grad_(False)
        vae.use_tiling = vae.use_slicing = getattr(args, "vae_tiling", False)
        if sp_size > 1:
            PARALLELIZE[module.FAMILY](network, Ranks(0, sp_size, torch.device("cpu"), sp_size, dist.group.WORLD))
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        weights, trained = list(network.parameters()), [weight for weight in network.parameters() if weight.requires_grad]
        for weight in trained:  # DeepSpeed moves each gradient into its buckets at once
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        found = {"network": size(weights), "trained": size(trained), "vae": size(list(vae.parameters()))}

        shape = module.latent_shape(network, vae, args)
        steps = module.select_timesteps([torch.Generator()], len(args.stochastic_steps), args.timestep_fraction).shape[1]
        batch, pairs = torch.zeros(args.rollout_batch_size, dtype=torch.long), torch.zeros(args.micro_batch_size, dtype=torch.long)
        with PeakMemory([*weights, *network.buffers(), *vae.parameters(), *vae.buffers()]) as memory:

            def peak(phase: str, function: Callable, *arguments: Any) -> Any:
                before = memory.most = memory.alive
                result = function(*arguments)
                found[phase] = memory.most - before
                return result

            def update() -> None:
                transitions, pair_cond = module.pick(trajectory, cond, pairs, pairs, args.kept_generations)
                log_prob, _ = module.score_transitions(network, transitions, pair_cond, schedule, args.noise_level)
                module.grpo_loss(log_prob, transitions["old_log_prob"], pairs.float(), args.clip_range)[0].backward()

            cond = module.load_cond(FakeCache(model.cached, args.height, args.width), list(range(prompts)), network, vae, args)
            found["cond"] = size(cond)
            noise = torch.randn(len(batch), *shape), schedule, [args.noise_level, 0.0], [torch.Generator() for _ in batch]
            batch_cond = {name: tensor[batch] for name, tensor in cond.items()}
            trajectory, x0_hat = peak("sampling", module.rollout, network, batch_cond, *noise, batch[:, None].expand(-1, steps))
            peak("decoding", torch.no_grad()(module.decode), vae, x0_hat, args)
            peak("update", update)
            found["kept"] = prompts * args.num_generations * (size(trajectory) + size(x0_hat)) // len(batch)
    if sp_size > 1:
        dist.destroy_process_group()
    return found


def memory_of(name: str, gpus: int, flags: list[str]) -> dict[str, Any]:
    """A row of the results: bytes on each of `gpus` GPUs (0: as many as the launch script is for)."""
    module, args, launched = launch_settings(MODELS[name], flags)
    W, stage, sp_size = gpus or launched, args.zero_stage, getattr(args, "sp_size", 1)
    if args.offload or args.kl_weight or args.dtype == "float32" or stage == 0:
        raise UserError("--offload, --kl_weight, --dtype float32 and --zero_stage 0 are not computed here")
    prompts, rest = divmod(args.prompts_per_iteration * sp_size, W)
    if rest or W % sp_size:
        raise UserError(f"--prompts_per_iteration {args.prompts_per_iteration} does not divide among {W} GPUs in groups of {sp_size}")
    found = measure(module, MODELS[name], args, prompts, sp_size)
    N = found["trained"] // 2  # parameters in bfloat16; their sums of gradients, copies and averages are in float32
    rewards = {spec.name.partition(".")[0] for spec in parse_rewards(args.rewards)}
    state = {
        "weights": found["network"] / (W if stage == 3 else 1),
        "gradients": {1: 6 * N, 2: 6 * N / W, 3: 4 * N / W}[stage],  # below stage 3 also those of the last micro-batch
        "optimizer": (16 if args.ema_decay else 12) * N / W,
        "others": found["vae"] + sum(REWARDS.get(reward, 0) for reward in rewards),
    }
    buckets = {1: 0, 2: 2 * BUCKET, 3: BUCKET}[stage]
    gathered = {"sampling": found["network"] if args.gather_for_rollout else LIVE, "update": LIVE} if stage == 3 else {}
    phases = {}
    for phase in ("sampling", "decoding", "update"):
        kept = found["kept"] * (args.kept_generations / args.num_generations if phase == "update" else 1)
        buckets_now = buckets if phase == "update" or stage == 3 else 0
        phases[phase] = sum(state.values()) + found["cond"] + kept + found[phase] + buckets_now + gathered.get(phase, 0)
    phases["start"] = found["network"] + (found["trained"] if stage < 3 else 0) + state["others"]
    alive = {f"{phase}_alive": found[phase] for phase in ("sampling", "decoding", "update")}
    row = {"model": name, "gpus": W, "zero_stage": stage, **state, "buckets": buckets, "kept": found["kept"], **alive, **phases}
    return row | {"peak": max(phases.values())}


def main() -> None:
    args, flags = tyro.cli(Args, use_underscores=True, return_unknown_args=True, description=__doc__.splitlines()[0])
    results = [memory_of(name, args.gpus, flags) for name in args.model]
    exact = ("model", "gpus", "zero_stage")
    print_table([{key: str(value) if key in exact else f"{value / GIB:.1f}" for key, value in row.items()} for row in results])
    print(NOTES)
    print(json.dumps({"arguments": dataclasses.asdict(args), "flags": flags, "results": results}))


if __name__ == "__main__":
    distributed.run(main)
