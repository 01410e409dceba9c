"""What the benchmarks share: starting the processes, a transformer with random weights, a table."""

import importlib
import os
import sys

import diffusers
import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel

from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.parallel.distributed import Ranks, compute_dtype

NETWORKS = ("flux", "hunyuan", "wan")  # of fastvideo/parallel/networks, those that make_transformer makes
MODELS = tuple(name for name, family in FAMILIES.items() if family.parallelize in NETWORKS)
TEXT_WIDTH = 64  # of the text embeddings that the transformers are given; the first thing they do is to project them


def become_torchrun(processes: int) -> None:
    """Run this very command by torchrun on `processes` processes of this machine, unless it is run so already. Then it does not return.

    Raises UserError for more processes than GPUs, where there are any.
    """
    if "RANK" in os.environ:
        return
    if 0 < torch.cuda.device_count() < processes:
        raise UserError(f"{processes} processes need a GPU each, but there are {torch.cuda.device_count()}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def check_sizes(heads: int, head_dim: int, **sizes: int) -> None:
    """Raise UserError for sizes, named as the flags are, of which no transformer can be made."""
    for name, value in {"heads": heads, "head_dim": head_dim, **sizes}.items():
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if head_dim % 8:
        raise UserError(f"--head_dim must be a multiple of 8, for the three axes of rotary embeddings, not {head_dim}")


def make_transformer(
    name: str, layers: int, heads: int, head_dim: int, tokens: int, text_tokens: int, batch_size: int, dtype: str, ranks: Ranks
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """One of MODELS with random weights, and inputs for it: on the device, in the dtype, and the same on every process.

    layers: transformer blocks; half of FLUX's and HunyuanVideo's, rounded down, are double-stream ones.
    """
    diffusers.utils.logging.set_verbosity_error()  # of casting to bfloat16 what from_pretrained leaves in float32; DeepSpeed casts it, too
    torch.manual_seed(0)
    inputs = {"encoder_hidden_states": torch.randn(batch_size, text_tokens, TEXT_WIDTH), "timestep": torch.rand(batch_size)}
    sizes = {"num_attention_heads": heads, "attention_head_dim": head_dim}
    streams = {"num_layers": layers // 2, "num_single_layers": layers - layers // 2}
    axis = head_dim // 8 * 2
    rope_axes = (head_dim - 2 * axis, axis, axis)
    network = FAMILIES[name].parallelize
    if network == "wan":
        ffn = {"ffn_dim": 4 * heads * head_dim, "rope_max_seq_len": max(1024, tokens)}
        model = WanTransformer3DModel(**sizes, **ffn, num_layers=layers, text_dim=TEXT_WIDTH)
        inputs["hidden_states"] = torch.randn(batch_size, 16, 1, 2, 2 * tokens)  # patches of 2 x 2
    else:
        inputs["pooled_projections"] = torch.randn(batch_size, TEXT_WIDTH)
        if network == "flux":
            widths = {"in_channels": 64, "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH}
            model = FluxTransformer2DModel(**sizes, **streams, **widths, axes_dims_rope=rope_axes)
            inputs["hidden_states"] = torch.randn(batch_size, tokens, 64)
            inputs |= {"img_ids": torch.arange(tokens)[:, None].repeat(1, 3).float(), "txt_ids": torch.zeros(text_tokens, 3)}
        else:
            channels = 16 * FAMILIES[name].channels
            widths = {"in_channels": channels, "out_channels": 16, "text_embed_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH}
            others = {"rope_axes_dim": rope_axes, "num_refiner_layers": 1, "guidance_embeds": False}
            model = HunyuanVideoTransformer3DModel(**sizes, **streams, **widths, **others)
            inputs["hidden_states"] = torch.randn(batch_size, channels, 1, 2, 2 * tokens)
            inputs["encoder_attention_mask"] = torch.ones(batch_size, text_tokens)  # of text without padding, which would be cut off
    dtype = compute_dtype(dtype, ranks.device)
    inputs = {key: value.to(ranks.device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}
    return model.to(ranks.device, dtype), inputs


def parallelize(family: str, network: torch.nn.Module, ranks: Ranks) -> None:
    """Share the tokens of each sample among the processes, as the family's training script does."""
    importlib.import_module(f"fastvideo.parallel.networks.{FAMILIES[family].parallelize}").parallelize(network, ranks)


def print_table(rows: list[dict[str, str]]) -> None:
    """Rows with the same keys, which are the header; all but the first column on the right."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        first, *others = widths
        print(f"{row[first]:<{widths[first]}}", *(f"{row[name]:>{widths[name]}}" for name in others), sep="  ")
