"""Which attention kernels a network uses."""

import importlib.util

import torch
from diffusers import ModelMixin

from fastvideo.errors import UserError


def set_attention(model: ModelMixin, backend: str, device: torch.device) -> None:
    """Make `model` use a diffusers attention backend: native (PyTorch's own, without cuDNN's), flash, _flash_3, ...

    "auto" takes flash-attn where it is installed and usable (bfloat16 on a GPU), else native. Raises UserError for a backend that is
    unknown, missing, or of no effect.
    """
    if device.type == "cuda":
        # PyTorch prefers cuDNN's kernel on Hopper, whose backward pass gave infinite gradients and crashes with short texts (docs/gpu.md).
        torch.backends.cuda.enable_cudnn_sdp(False)
    takes_backends = any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in model.modules())
    if backend == "auto":
        usable = takes_backends and device.type == "cuda" and model.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn")
        backend = "flash" if usable else "native"
    if backend == "native":
        return
    if not takes_backends:
        raise UserError(
            f"--attention {backend}: diffusers' {type(model).__name__} knows only PyTorch's own attention: use --attention native"
        )
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--attention {backend} cannot be used here: {error}. For flash: pip install -r requirements-gpu.txt") from error
