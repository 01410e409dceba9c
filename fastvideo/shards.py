"""The trainable weights as each process holds them under DeepSpeed ZeRO: float32 shards."""

import torch
from deepspeed import DeepSpeedEngine


def master_shards(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Live float32 views of the trainable weights that this process updates: its shard at stages 1 to 3, all of them at stage 0."""
    for attribute in (
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 in bfloat16
        "fp32_partitioned_groups_flat",  # stage 3
    ):
        if hasattr(engine.optimizer, attribute):
            return [shard.data for shard in getattr(engine.optimizer, attribute)]
    return [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]


def refresh_weights(engine: DeepSpeedEngine) -> None:
    """Collective. Make the network run with what stands in `master_shards`."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := optimizer.persistent_parameters:  # always gathered, so that all_gather alone would pass them over
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif engine.zero_optimization_stage() > 0:
        optimizer.update_lp_params()
