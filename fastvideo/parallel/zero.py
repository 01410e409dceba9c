"""DeepSpeed ZeRO: configuration from a few numbers, the engine, and access to the weights that it shards."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils import cpp_extension

from fastvideo.parallel import devices

os.environ.setdefault("DS_ACCELERATOR", "cuda" if devices.on_gpu() else "cpu")

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import logger as deepspeed_logger

from fastvideo.errors import UserError, first_line
from fastvideo.parallel.distributed import new_group

deepspeed_logger.setLevel("ERROR")
# Only a faster all-reduce inside one CPU host, for which DeepSpeed would run the compiler for a minute at the first start.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STALE = 900.0  # seconds after which a build of DeepSpeed's CPU optimizer, which takes one minute, is taken for killed


def check_stage(stage: int, offload: bool, dtype: torch.dtype) -> None:
    """Raise UserError for what ZeRO cannot do at `stage`, and where the optimizer that `offload` needs cannot be built."""
    if offload and stage == 0:
        raise UserError("--offload moves what ZeRO shards, but --zero_stage is 0: use --zero_stage 1")
    if dtype == torch.bfloat16 and stage == 0:
        raise UserError("--zero_stage 0 keeps no float32 master weights, which --dtype bfloat16 needs: use --zero_stage 1")
    if offload:
        _build_cpu_optimizer()


def _build_cpu_optimizer() -> None:
    """DeepSpeed's CPU Adam, compiled at its first use; later starts find it. UserError if that fails."""
    tools = str(Path(sys.executable).parent)  # ninja's, also where the environment is not activated
    if tools not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + tools
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
        lock = Path(cpp_extension._get_build_directory("cpu_adam", verbose=False), "lock")  # for which torch would wait for ever
        with suppress(FileNotFoundError):
            if (age := time.time() - lock.stat().st_mtime) > STALE:
                raise FileExistsError(f"{lock} was left {age / 60:.0f} min ago by a build that was killed: delete it")
        deepspeed.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # of the compiler, of torch's builder, of DeepSpeed's
        raise UserError(
            f"--offload needs DeepSpeed's CPU optimizer, which cannot be built in {folder}: {first_line(error)}. It takes a C++ compiler "
            "(g++) and a folder that can be written, which TORCH_EXTENSIONS_DIR names"
        ) from error


def initialize(
    model: nn.Module,
    *,
    stage: int,
    offload: bool,
    dtype: torch.dtype,
    learning_rate: float,
    weight_decay: float,
    lr_multiplier: Callable[[int], float],
    max_grad_norm: float,
    micro_batch_size: int,
    accumulation_steps: int,
    reduce_dtype: str = "auto",
) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` and an AdamW over its trainable parameters in a DeepSpeed engine.

    stage: ZeRO stage 0 (nothing sharded), 1 (optimizer state), 2 (+ gradients) or 3 (+ parameters).
    offload: keep the optimizer's state, and take its step, on the CPU (stages 1 to 3).
    dtype: what the network computes in; with bfloat16 the master weights and accumulated gradients are float32.
    lr_multiplier: update index (from 0) -> factor of `learning_rate`.
    max_grad_norm: gradients are clipped to this global norm; 0 means not at all.
    accumulation_steps: micro-batches an update.
    reduce_dtype: what gradients are sent and averaged in: "float32", or "auto", which is `dtype`.

    Collective: processes whose `model` is on the meta device get rank 0's weights. Gradients are averaged over all processes.
    """
    _materialize(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = devices.on_gpu()
    # PyTorch's default on GPUs, foreach, needs room for one more copy of the shard.
    optimizer_class = DeepSpeedCPUAdam if offload else partial(torch.optim.AdamW, fused=on_gpu)
    optimizer = optimizer_class(parameters, lr=learning_rate, weight_decay=weight_decay)
    # While the backward pass goes on, gradients are sent in buckets, of which two exist at a time.
    zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 200_000_000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,  # always set: DeepSpeed clips to 1.0 where the key is missing
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every forward pass
    }
    if reduce_dtype == "float32":
        config["communication_data_type"] = "fp32"
    if deepspeed.utils.groups._WORLD_GROUP is None:  # DeepSpeed's collectives are in a group of its own, which would have its own timeout
        deepspeed.utils.groups._WORLD_GROUP = new_group(range(torch.distributed.get_world_size()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def _materialize(model: nn.Module) -> None:
    """Collective. Give what is on the meta device memory: parameters on this process's device, for DeepSpeed, which sends rank 0's to all;
    buffers, which it does not send, with rank 0's contents.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if devices.on_gpu() else torch.device("cpu")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer = torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer
                torch.distributed.broadcast(buffer, 0)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def backward_and_step(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> float | None:
    """Collective. Backward of one micro-batch; on the last of an update also the optimiser step.

    loss: this micro-batch's part of the update's loss, already weighted: the parts are summed, not averaged.
    Returns the global gradient norm before clipping after a step, None between steps. Raises UserError if that is not finite.
    """
    engine.backward(loss, scale_wrt_gas=False)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = None
    if engine.zero_optimization_stage() == 0:  # DeepSpeed reports no norm there; the gradients are averaged by now
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    norm = float(engine.get_global_grad_norm() if norm is None else norm)
    if not math.isfinite(norm):
        raise UserError(f"the gradient norm is {norm} in update {engine.global_steps}: diverged; the last checkpoint is whole")
    return norm


class _AllGathered:
    """Stands in for ZeRO's coordinator while all parameters are gathered: stage 3's hooks ask it for everything, and it does nothing."""

    def reset_step(self) -> None:
        pass

    def trace_prologue(self, module: nn.Module) -> None:
        pass

    def is_record_trace(self) -> bool:
        return False

    def fetch_sub_module(self, module: nn.Module, forward: bool) -> None:
        assert forward, "no backward pass inside `gathered`"

    def release_sub_module(self, module: nn.Module, forward: bool) -> None:
        pass


@contextmanager
def gathered(engine: deepspeed.DeepSpeedEngine, enabled: bool = True) -> Iterator[None]:
    """Collective. Inside, a network that stage 3 shards has all its parameters in full: any number of forward passes for one gathering.

    For forward passes only, through `engine` as ever. Costs the memory of the whole network in its compute dtype. What is written to the
    parameters inside is lost on leaving. Below stage 3, or if not `enabled`, or inside another one, it does nothing.
    """
    offload = engine.optimizer.parameter_offload if enabled and engine.zero_optimization_stage() == 3 else None
    if offload is None or isinstance(offload.param_coordinator, _AllGathered):
        yield
        return
    # The hooks stay, and what the coordinator has recorded of the training passes: to register hooks anew would make it start over.
    coordinator = offload.param_coordinator
    offload.partition_all_parameters()  # waits for those on their way, and drops what earlier passes kept: it may be out of date
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        offload.param_coordinator = _AllGathered()
        try:
            yield
        finally:
            offload.param_coordinator = coordinator
    if persistent := offload.persistent_parameters:  # those too small to be worth sharding
        persistent[0].all_gather(persistent)


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Collective. The network's whole state dict on the CPU of rank 0, {} elsewhere; gathers one tensor at a time at stage 3."""
    is_main = engine.global_rank == 0
    state = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            if is_main:
                state[name] = tensor.detach().cpu().clone()
    return state
