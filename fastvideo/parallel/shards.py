"""What DeepSpeed ZeRO trains, as each process holds it: float32 shards of the weights and of Adam's averages, and what is where in them.

A shard is a flat tensor of pieces of parameters, one after the other, with padding; at stage 0 it is a whole parameter.
"""

from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam


class Fragment(NamedTuple):
    """Consecutive elements of one parameter: `count` of them, from `start` in the flattened parameter, at `offset` in the shard."""

    name: str
    start: int
    offset: int
    count: int


def master_shards(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Live float32 views of the trainable weights that this process updates: its shard at stages 1 to 3, all of them at stage 0."""
    return [shard.data for shard in _optimized(engine)]


def adam_shards(engine: DeepSpeedEngine, average: str) -> list[torch.Tensor]:
    """Adam's "exp_avg" or "exp_avg_sq", live, aligned with `master_shards`. Exists after the first update or `set_updates`."""
    return [engine.basic_optimizer.state[shard][average] for shard in _optimized(engine)]


def fragments(engine: DeepSpeedEngine) -> list[list[Fragment]]:
    """What each of `master_shards` holds, padding left out. The fragments of all processes together are each trainable parameter once
    at stages 1 to 3; at stage 0 every process has it all.
    """
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        return [[Fragment(names[parameter], 0, 0, parameter.numel())] for parameter in _optimized(engine)]
    if engine.zero_optimization_stage() == 3:
        return [_equal_parts(group, names, engine.global_rank) for group in optimizer.fp16_groups]
    shards = []
    for group in optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups:
        links = [(names[parameter], parameter._hp_mapping) for parameter in group if parameter._hp_mapping is not None]
        places = [(name, link.lp_fragment_address.start, link.hp_fragment_address) for name, link in links]
        shards.append([Fragment(name, start, place.start, place.numel) for name, start, place in places])
    return shards


def _equal_parts(group: list[torch.nn.Parameter], names: dict[torch.nn.Parameter, str], rank: int) -> list[Fragment]:
    """Stage 3: each parameter is cut into as many equal parts as there are processes, the last ones padded; a shard has this process's."""
    parts, offset = [], 0
    for parameter in group:
        size = parameter.ds_tensor.ds_numel
        count = min(size, parameter.ds_numel - rank * size)
        if count > 0:
            parts.append(Fragment(names[parameter], rank * size, offset, count))
        offset += size
    return parts


def parameter_shapes(engine: DeepSpeedEngine) -> dict[str, list[int]]:
    """Shapes of the whole trainable parameters by name."""
    trainable = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trainable.items()}


def set_updates(engine: DeepSpeedEngine, updates: int) -> None:
    """Set Adam's step and the learning rate of a fresh engine to where they are after `updates` updates; Adam's averages start as zeros."""
    optimizer, scheduler = engine.basic_optimizer, engine.lr_scheduler
    on_cpu = isinstance(optimizer, DeepSpeedCPUAdam)
    fused = optimizer.defaults.get("fused")  # CUDA's kernel wants the count of steps where the weights are, the others on the CPU
    for shard in _optimized(engine):
        averages = {average: torch.zeros_like(shard.data) for average in ("exp_avg", "exp_avg_sq")}
        step = updates if on_cpu else torch.tensor(float(updates), device=shard.device if fused else "cpu")
        optimizer.state[shard] = {"step": step, **averages}
    engine.global_steps = scheduler.last_epoch = updates
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(updates)
    if on_cpu:  # it multiplies up beta ** step as it goes, but takes pow after a jump, whose last bit differs: go there step by step
        nothing, betas, eps = torch.zeros(4, 1), optimizer.defaults["betas"], optimizer.defaults["eps"]
        for step in range(1, updates + 1):
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *betas, eps, 0.0, True, *nothing)


def refresh_weights(engine: DeepSpeedEngine) -> None:
    """Collective. Make the network run with what stands in `master_shards`."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.parameter_offload.partition_all_parameters()  # what earlier forward passes left gathered is out of date
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := optimizer.persistent_parameters:  # those too small to be worth sharding
            persistent[0].all_gather(persistent)
    elif engine.zero_optimization_stage() > 0:
        optimizer.update_lp_params()


def _optimized(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The tensors that the optimizer steps on."""
    for attribute in (
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 in bfloat16
        "fp32_partitioned_groups_flat",  # stage 3
    ):
        if hasattr(engine.optimizer, attribute):
            return getattr(engine.optimizer, attribute)
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
