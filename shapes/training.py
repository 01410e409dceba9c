"""The loop and the data that all stages of `shapes/pretrain.py` share."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from diffusers import ModelMixin
from tqdm import tqdm

from shapes.world import Spec, render


def optimise(
    loss_function: Callable[[], torch.Tensor],
    parameters: list[torch.nn.Parameter],
    steps: int,
    learning_rate: float,
    name: str,
    weight_decay: float = 0.0,
    every: tuple[int, Callable[[int], None]] | None = None,
) -> None:
    """Minimise `loss_function` by AdamW, 100 steps of warm-up and a cosine decay; leaves the moving average of the weights in `parameters`.

    every: (n, callback): each n steps `callback(step)` is called with the averaged weights in place.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    averages = [parameter.detach().clone() for parameter in parameters]
    progress = tqdm(range(1, steps + 1), desc=name, mininterval=5.0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, step / 100) * (0.02 + 0.98 * (0.5 + 0.5 * np.cos(np.pi * step / steps)))
        loss = loss_function()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))  # a short memory at first, or the random start would stay in the average
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if every is not None and step % every[0] == 0 and step < steps:
            swap(parameters, averages)
            every[1](step)
            swap(parameters, averages)
    swap(parameters, averages)


@torch.no_grad()
def swap(parameters: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Exchange the values of two lists of equal-shaped tensors, in place."""
    for parameter, other in zip(parameters, others):
        kept = parameter.clone()
        parameter.copy_(other)
        other.copy_(kept)


def pictures_of(specs: list[Spec], rng: np.random.Generator) -> torch.Tensor:
    """Rendered pictures of `specs`: (N, 3, 32, 32) float32 in [-1, 1]."""
    return torch.from_numpy(render(specs, rng)) * 2 - 1


def half_copy(model: ModelMixin) -> ModelMixin:
    """A copy to save in float16: half the size, the same scores."""
    model = copy.deepcopy(model).half()
    model.register_to_config(_name_or_path="")  # else this folder's path on this machine is saved
    return model
