"""What tests/test_zero.py has measured, on as many processes as it is started with.

python zero_worker.py OUTPUT.json CASE...: rank 0 writes {case: measurements}. The cases are in the table at the end. Pairs of processes
share each sample, but in the layouts that say otherwise.
"""

import contextlib
import copy
import gc
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel

from fastvideo.models.pretrained import add_lora
from fastvideo.parallel import distributed, zero
from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.ema import EMA
from fastvideo.parallel.networks import flux, hunyuan
from fastvideo.parallel.shards import fragments, master_shards

SHARES = [0.5, 0.2, 0.3]  # of the update's loss: one for each micro-batch
LEARNING_RATE, MAX_GRAD_NORM = 80.0, 0.05
STAGE_3 = {
    "shard_all": {  # stage 3 would keep all of a network as small as this
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    # As in large networks: biases are not sharded; after a forward pass, parameters are on their way or kept for the backward pass.
    "prefetch": {
        "stage3_param_persistence_threshold": 100,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 3000,
    },
    "reuse": {"stage3_param_persistence_threshold": 100},
}
gathers = 0  # all-gathers that DeepSpeed has started


def build(family: str, dtype: torch.dtype = torch.float32, lora: bool = False) -> torch.nn.Module:
    """A tiny network in training mode with random biases and scales; with `lora`, its adapter is random too."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 20}
    if family == "flux":
        model = FluxTransformer2DModel(in_channels=8, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), guidance_embeds=True, **sizes)
    else:
        sizes |= {"in_channels": 4, "out_channels": 4, "patch_size": 2, "patch_size_t": 1, "num_refiner_layers": 1, "text_embed_dim": 24}
        model = HunyuanVideoTransformer3DModel(rope_axes_dim=(4, 6, 6), **sizes)
    if lora:
        add_lora(model, rank=2, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "lora_B" in name:  # an adapter's B is zero at first, and A would have no gradient
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


def inputs(family: str, dtype: torch.dtype, *key: int) -> dict[str, torch.Tensor]:
    """Two samples: 9 image tokens and 3 heads, which two processes share unequally, and 5 text tokens, some of them padding."""
    generator = distributed.keyed_generator(0, "inputs", *key)
    cond = {
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "pooled_projections": torch.randn(2, 20, generator=generator),
    }
    time = torch.rand(2, generator=generator)
    if family == "flux":
        img_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0))
        x = {"hidden_states": torch.randn(2, 9, 8, generator=generator), "img_ids": img_ids, "txt_ids": torch.zeros(5, 3)}
        x |= cond | {"timestep": time, "guidance": torch.full((2,), 3.5)}
    else:
        x = {
            "hidden_states": torch.randn(2, 4, 1, 6, 6, generator=generator),
            "timestep": 1000 * time,
            "guidance": torch.full((2,), 6000.0),
        }
        x |= cond | {"encoder_attention_mask": torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])}
    return {name: tensor.to(dtype) for name, tensor in x.items()}


def loss_of(network: Callable, family: str, dtype: torch.dtype, *key: int) -> torch.Tensor:
    x = inputs(family, dtype, *key)
    output = network(**x, return_dict=False)[0]
    target = torch.randn(output.shape, generator=distributed.keyed_generator(0, "target", *key))
    return (output.to(torch.promote_types(dtype, torch.float32)) - target).square().mean()


def start(
    model: torch.nn.Module,
    family: str,
    ranks: Ranks,
    stage: int,
    dtype=torch.float32,
    offload=False,
    stage3="shard_all",
    reduce_dtype="auto",
):
    """The engine, but with SGD, for Adam would hide a wrong scale of the gradients."""
    {"flux": flux, "hunyuan": hunyuan}[family].parallelize(model, ranks)
    initialize = zero.deepspeed.initialize

    def with_settings(config: dict, **others):
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        config["zero_optimization"] |= STAGE_3[stage3] if stage == 3 else {}
        return initialize(config=config, **others)

    with (
        mock.patch.object(zero.deepspeed, "initialize", with_settings),
        mock.patch.object(torch.optim, "AdamW", torch.optim.SGD),
        mock.patch.object(zero, "DeepSpeedCPUAdam", torch.optim.SGD),
    ):
        return zero.initialize(
            model,
            stage=stage,
            offload=offload,
            dtype=dtype,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            lr_multiplier=lambda update: 1.0,
            max_grad_norm=MAX_GRAD_NORM,
            micro_batch_size=2,
            accumulation_steps=len(SHARES),
            reduce_dtype=reduce_dtype,
        )


def train(engine, family: str, ranks: Ranks, dtype: torch.dtype = torch.float32, update: int = 0) -> float:
    """One update; the processes of one dp_rank have the same samples. Returns the gradients' norm before clipping."""
    for index, share in enumerate(SHARES):
        norm = zero.backward_and_step(engine, share * loss_of(engine, family, dtype, update, index, ranks.dp_rank))
    return norm


def weights(engine) -> dict[str, torch.Tensor]:
    with zero.gathered(engine):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values())).hexdigest()


def same_everywhere(tensors: dict[str, torch.Tensor]) -> bool:
    return len(set(distributed.all_gather_object(digest(tensors)))) == 1


# ------------------------------------------------------------------------------------------------ one step, on one process and on all


def reference_step(model: torch.nn.Module, family: str, dp_size: int) -> tuple[dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """The step in plain PyTorch, on all samples, with no process but this one; returns the weights after it, the gradients' norm, and
    the step itself, of each trainable weight, which bfloat16 has not rounded."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wide = torch.promote_types(model.dtype, torch.float32)
    gradients = {name: torch.zeros_like(parameter, dtype=wide) for name, parameter in trainable.items()}
    for dp_rank in range(dp_size):
        for index, share in enumerate(SHARES):
            loss = share * loss_of(model, family, model.dtype, 0, index, dp_rank)
            for name, gradient in zip(trainable, torch.autograd.grad(loss, list(trainable.values()))):
                gradients[name] += gradient.to(wide) / dp_size
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    steps = {name: -LEARNING_RATE * MAX_GRAD_NORM / norm * gradient for name, gradient in gradients.items()}
    for name, step in steps.items():
        after[name] = (after[name].to(wide) + step).to(model.dtype)
    return after, norm, steps


def step_error(engine, before: dict[str, torch.Tensor], steps: dict[str, torch.Tensor]) -> float:
    """Of the float32 weights that this process updates: the largest error of their step, over the largest step."""
    errors = []
    for shard, parts in zip(master_shards(engine), fragments(engine), strict=True):
        for part in parts:
            here = slice(part.start, part.start + part.count)
            step = shard.view(-1)[part.offset : part.offset + part.count] - before[part.name].flatten()[here].float()
            errors.append((step - steps[part.name].flatten()[here]).abs().max().item())
    return max(errors) / max(step.abs().max().item() for step in steps.values())


def one_step(
    ranks: Ranks, family: str, stage: int, lora=False, gradient_checkpointing=False, bf16=False, offload=False, reduce_dtype="auto"
) -> dict:
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = build(family, dtype, lora)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # bfloat16 is compared with bfloat16, and float32 with the truth.
    expected, expected_norm, steps = reference_step(copy.deepcopy(model) if bf16 else copy.deepcopy(model).double(), family, ranks.dp_size)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    engine = start(model, family, ranks, stage, dtype, offload, reduce_dtype=reduce_dtype)
    gathers_before = gathers
    norm = train(engine, family, ranks, dtype)
    gathers_of_step = gathers - gathers_before
    after = weights(engine)
    difference = {name: after[name].double() - expected[name].double() for name in expected}
    change = {name: expected[name].double() - before[name].double() for name in expected}
    total_norm = lambda tensors: torch.nn.utils.get_total_norm(tensors.values()).item()  # noqa: E731
    return {
        "parameters": len(after),
        "gathers": gathers_of_step,
        "norm": norm,
        "max_grad_norm": MAX_GRAD_NORM,
        "expected_norm": expected_norm,
        "weights_error": max(difference[name].abs().max() / expected[name].abs().max() for name in expected).item(),
        "change_error": total_norm(difference) / total_norm(change),
        "change": total_norm(change) / total_norm(before),
        "step_error": max(distributed.all_gather_object(step_error(engine, before, steps))),
        "same_everywhere": same_everywhere(after),
        "timeouts": timeouts(),
    }


def timeouts() -> dict[str, float]:
    """Seconds after which a collective fails, by the name of the group: of all that this process is in, DeepSpeed's among them."""
    groups = dist.distributed_c10d._world.pg_names
    return {name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group, name in groups.items()}


# -------------------------------------------------------------------------------------------------------------- waiting for the GPU


def waits(ranks: Ranks, stage: int) -> dict:
    """How often DeepSpeed has waited for all that the device has to do, in the forward passes of a rollout, once it is in its stride."""
    engine = start(build("flux"), "flux", ranks, stage)
    for update in range(3):
        train(engine, "flux", ranks, update=update)
    accelerator = deepspeed.accelerator.get_accelerator()
    with mock.patch.object(accelerator, "synchronize", wraps=accelerator.synchronize) as synchronize, zero.gathered(engine):
        entering = synchronize.call_count
        rollout(engine, 5)
        return {"in_rollout": synchronize.call_count - entering, "reaches_deepspeed": accelerator.synchronize is synchronize}


# -------------------------------------------------------------------------------------------------------------------- gathered


@torch.no_grad()
def rollout(engine, num_steps: int = 3) -> list[torch.Tensor]:
    return [engine(**inputs("flux", torch.float32, 9, step), return_dict=False)[0] for step in range(num_steps)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def all_gathers(function: Callable[[], object]) -> int:
    before = gathers
    function()
    return gathers - before


def gathered(ranks: Ranks, stage3: str) -> dict:
    """Rollouts inside, with training in between; an engine that makes no rollouts trains alike."""
    trained, engine = (start(build("flux"), "flux", ranks, 3, stage3=stage3) for _ in range(2))
    parameters = list(engine.module.parameters())
    results = {"parameters": len(parameters), "training_alone": [], "training_after": [], "trained": []}
    for update in range(2):
        before = gathers
        with zero.gathered(engine):
            results["entering"] = gathers - before
            results["inside"] = all_gathers(lambda: rollout(engine, 5))
            results["whole"] = sum(parameter.shape == parameter.ds_shape for parameter in parameters)
        results["partitioned"] = sum(parameter.ds_status.name == "NOT_AVAILABLE" for parameter in parameters)
        results["training_alone"].append(all_gathers(lambda: train(trained, "flux", ranks, update=update)))  # noqa: B023
        results["training_after"].append(all_gathers(lambda: train(engine, "flux", ranks, update=update)))  # noqa: B023
        results["trained"].append(digest(weights(trained)) == digest(weights(engine)))
    with zero.gathered(engine, enabled=False):
        results["not_enabled"] = all_gathers(lambda: rollout(engine, 1))
    with zero.gathered(engine):
        results["same"] = same(rollout(engine), rollout(trained))
    return results


class Stop(Exception):
    pass


def interrupted(ranks: Ranks, stage3: str) -> dict:
    """Exceptions inside, between and amid forward passes; one inside another; writes to the parameters; then training as if nothing was."""
    trained, engine = (start(build("flux"), "flux", ranks, 3, stage3=stage3) for _ in range(2))
    for one in (trained, engine):
        train(one, "flux", ranks)
    expected = rollout(engine)
    results = {}

    with contextlib.suppress(Stop), zero.gathered(engine):
        rollout(engine)
        raise Stop
    results["after_an_exception"] = same(rollout(engine), expected)

    def stop(*_) -> None:
        raise Stop

    with contextlib.suppress(Stop), zero.gathered(engine):
        hook = engine.module.single_transformer_blocks[0].attn.to_q.register_forward_pre_hook(stop)
        rollout(engine)
    hook.remove()
    results["after_a_broken_forward"] = same(rollout(engine), expected)

    with zero.gathered(engine):
        with zero.gathered(engine):
            results["nested"] = same(rollout(engine), expected)
        results["after_nested"] = same(rollout(engine), expected)

    with zero.gathered(engine), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(1)
    results["after_writing"] = same(rollout(engine), expected)

    for one in (trained, engine):
        train(one, "flux", ranks, update=1)
    results["trained"] = digest(weights(trained)) == digest(weights(engine))

    with zero.gathered(engine):
        try:
            loss_of(engine, "flux", torch.float32, 0).backward()
        except AssertionError as error:
            results["backward_refused"] = "no backward pass inside" in str(error)
    return results


def averaged(ranks: Ranks, stage3: str) -> dict:
    """The EMA's weights inside, the network's own outside."""
    engine = start(build("flux"), "flux", ranks, 3, stage3=stage3)
    ema = EMA(engine, 0.5)
    initial = weights(engine)
    train(engine, "flux", ranks)
    last, own = weights(engine), rollout(engine)
    ema.update()
    with ema.applied(), zero.gathered(engine):
        average, inside = weights(engine), rollout(engine)
    results = {"own_after_gathered": same(rollout(engine), own)}
    with ema.applied():
        results["same"] = same(rollout(engine), inside)
    results["own_after_not_gathered"] = same(rollout(engine), own)
    errors = [(average[name] - (initial[name] + last[name]) / 2).abs().max() / average[name].abs().max() for name in average]
    return results | {"error": max(errors).item(), "moved": not same(inside, own)}


# ------------------------------------------------------------------------------------------------------------------------------


def cases(ranks: Ranks) -> dict[str, Callable[[], dict]]:
    table = {}
    for stage in range(4):
        for layout in (Ranks(ranks.rank, ranks.world_size, ranks.device), ranks):
            table[f"flux {layout.dp_size}x{layout.sp_size} stage {stage}"] = partial(one_step, layout, "flux", stage)
        table[f"hunyuan stage {stage}"] = partial(one_step, ranks, "hunyuan", stage)
        for option in ("lora", "gradient_checkpointing", "bf16", "offload"):
            table[f"{option} stage {stage}"] = partial(one_step, ranks, "flux", stage, **{option: True})
        apart = Ranks(ranks.rank, ranks.world_size, ranks.device)  # parts of a gradient, which sp_size makes, are rounded each for itself
        table[f"bf16 reduced in float32 stage {stage}"] = partial(one_step, apart, "flux", stage, bf16=True, reduce_dtype="float32")
        table[f"waits stage {stage}"] = partial(waits, ranks, stage)
    for stage3 in STAGE_3:
        for function in (gathered, interrupted, averaged):
            table[f"{function.__name__} {stage3}"] = partial(function, ranks, stage3)
    return table


def main() -> None:
    ranks = distributed.init(2, timeout_minutes=1.5)
    gc.freeze()  # the imports' objects: each engine of stage 3 collects garbage
    gather = dist.all_gather_into_tensor

    def counted(*args, **kwargs):
        global gathers
        gathers += 1
        return gather(*args, **kwargs)

    dist.all_gather_into_tensor = counted  # before DeepSpeed takes it
    table = cases(ranks)
    results = {name: table[name]() for name in sys.argv[2:]}
    if ranks.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run(main)
