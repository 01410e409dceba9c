"""The weights that a network has before it is trained, for the KL divergence to the initial policy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine
from diffusers import ModelMixin
from torch import nn

from fastvideo.parallel.zero import gathered


class InitialWeights:
    """With a LoRA adapter `model` itself, with the adapter off. Else a frozen copy of it, whole on each process.

    The copy is filled from the engine's weights, on the device or (`offload`) in pinned CPU memory, so that there is never a second one.
    """

    def __init__(self, model: ModelMixin):
        """To be made before the engine, whose hooks are not for the copy."""
        self.lora = bool(getattr(model, "peft_config", None))
        without_contents = {id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in model.parameters()}
        self.model = model if self.lora else copy.deepcopy(model, without_contents)

    def fill(self, engine: DeepSpeedEngine, offload: bool) -> None:
        """Collective. To be called before the weights are trained or resumed. offload: keep the copy on the CPU between uses."""
        self.device = engine.device

        def kept(weight: torch.Tensor) -> torch.Tensor:
            if not offload:
                return weight.detach().clone()
            return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda, requires_grad=False).copy_(weight.detach())

        if not self.lora:
            with gathered(engine):
                for own, trained in zip(self.model.modules(), engine.module.modules(), strict=True):
                    for name, weight in trained._parameters.items():
                        own._parameters[name] = None if weight is None else nn.Parameter(kept(weight), requires_grad=False)
                    for name, buffer in trained._buffers.items():
                        own._buffers[name] = None if buffer is None else buffer.clone()

    @contextmanager
    def applied(self) -> Iterator[ModelMixin]:
        """Inside, the network with its initial weights, on the device."""
        if self.lora:
            self.model.disable_adapters()
            yield self.model
            self.model.enable_adapters()
            return
        kept = [(weight, weight.data) for weight in self.model.parameters()]
        for weight, data in kept:
            weight.data = data.to(self.device, non_blocking=True)  # the same one if it is there
        yield self.model
        for weight, data in kept:
            weight.data = data
