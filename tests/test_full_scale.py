"""The published models at the paper's resolution and length: one rollout step and one update through the scripts' own functions.

Everything is a fake tensor, with a shape and a dtype but no memory, so 13 B parameters fit. Right there: shapes, dtypes, packing.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DDIMScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch._subclasses import FakeTensorMode

IMAGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
LLAMA_AND_CLIP = {"prompt_embeds": (256, 4096), "prompt_attention_mask": (256,), "pooled_prompt_embeds": (768,)}

FLUX_VAE = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


@dataclass(frozen=True)
class FullSize:
    """network, vae: class and the settings of its published config.json that are not the class's defaults. parameters: published number.

    cached: shapes of a prompt's embeddings. latents: expected, of one sample. flags: of the script, where they are not its defaults.
    """

    script: str
    network: tuple
    parameters: int
    vae: tuple
    cached: dict
    latents: tuple[int, ...]
    media: tuple[int, ...]
    flags: dict = field(default_factory=dict)


HUNYUAN_VAE = (AutoencoderKLHunyuanVideo, {})
MODELS = {
    "sd_v1.4": FullSize(
        "train_grpo_sd",
        (UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
        859_520_964,
        (AutoencoderKL, IMAGE_VAE | {"latent_channels": 4, "scaling_factor": 0.18215}),
        {"prompt_embeds": (77, 768)},
        (4, 64, 64),
        (3, 512, 512),
    ),
    "flux.1-dev": FullSize(
        "train_grpo_flux",
        (FluxTransformer2DModel, {"guidance_embeds": True}),
        11_901_408_320,
        (
            AutoencoderKL,
            IMAGE_VAE
            | {
                "latent_channels": 16,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
            },
        ),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        (45 * 45, 64),
        (3, 720, 720),
    ),
    "hunyuan_video": FullSize(
        "train_grpo_hunyuan",
        (HunyuanVideoTransformer3DModel, {"guidance_embeds": True}),
        12_821_012_544,
        HUNYUAN_VAE,
        LLAMA_AND_CLIP,
        (16, 14, 60, 60),
        (3, 53, 480, 480),
    ),
    "hunyuan_image": FullSize(
        "train_grpo_hunyuan",
        (HunyuanVideoTransformer3DModel, {"guidance_embeds": True}),
        12_821_012_544,
        HUNYUAN_VAE,
        LLAMA_AND_CLIP,
        (16, 1, 90, 90),
        (3, 720, 720),
        {"num_frames": 1, "height": 720, "width": 720},
    ),
    "skyreels_i2v": FullSize(
        "train_grpo_skyreels",
        (HunyuanVideoTransformer3DModel, {"in_channels": 32, "guidance_embeds": True}),
        12_821_209_152,
        HUNYUAN_VAE,
        LLAMA_AND_CLIP | {"image_latents": (16, 1, 50, 80)},
        (16, 14, 50, 80),
        (3, 53, 400, 640),
    ),
    "wan_2.1_t2v_1.3b": FullSize(
        "train_grpo_wan",
        (WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        1_418_996_800,
        (AutoencoderKLWan, {}),
        {"prompt_embeds": (512, 4096)},
        (16, 21, 60, 104),
        (3, 81, 480, 832),
    ),
}


class FakeCache:
    """An embedding cache of any number of prompts, on whatever device tensors are made on."""

    path, unconditional = Path("cache"), 9

    def __init__(self, shapes: dict, height: int, width: int):
        self.shapes, self.fingerprint = shapes, {"height": height, "width": width}

    def get(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.ones(len(indices), *shape, dtype=torch.bfloat16) for name, shape in self.shapes.items()}


def in_bfloat16(kind: type, config: dict) -> torch.nn.Module:
    torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast afterwards
    try:
        return kind(**config)
    finally:
        torch.set_default_dtype(torch.float32)


QUICK = ("flux.1-dev", "hunyuan_video")


@pytest.mark.parametrize(
    "model", [pytest.param(model, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, model in MODELS.items()]
)
def test_a_rollout_and_an_update_at_full_size(model, tmp_path):
    module = importlib.import_module(model.script)
    args = module.Args(model=tmp_path, embeddings=tmp_path, output_dir=tmp_path, rewards=("aesthetic",), sampling_steps=2, **model.flags)
    if model.script == "train_grpo_sd":
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).save_pretrained(
            tmp_path / "scheduler"
        )
        schedule = module.time_schedule(2, tmp_path)
    else:
        schedule = module.time_schedule(2, args.shift)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer, vae = (in_bfloat16(*parts) for parts in (model.network, model.vae))
        assert sum(parameter.numel() for parameter in transformer.parameters()) == model.parameters
        transformer.train()
        vae.requires_grad_(False)
        assert module.latent_shape(transformer, vae, args) == model.latents
        cond = module.load_cond(FakeCache(model.cached, args.height, args.width), [0, 1], transformer, vae, args)

        z_1 = torch.randn(2, *model.latents)
        trained_steps = torch.zeros(2, 1, dtype=torch.long)
        generators = [torch.Generator(), torch.Generator()]
        levels = [args.noise_level, 0.0]
        trajectory, x0_hat = module.rollout(transformer, cond, z_1, schedule, levels, generators, trained_steps)
        assert trajectory["z_s"].shape == (2, 1, *model.latents) and trajectory["z_s"].dtype == torch.float32
        assert x0_hat.shape == (2, *model.latents) and x0_hat.dtype == torch.float32
        with torch.no_grad():
            media = module.decode(vae, x0_hat, args)
        assert media.shape == (2, *model.media) and media.dtype == torch.float32

        transitions, pair_cond = module.pick(trajectory, cond, torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        log_prob, _ = module.score_transitions(transformer, transitions, pair_cond, schedule, args.noise_level)
        loss, _ = module.grpo_loss(log_prob, transitions["old_log_prob"], torch.ones(2), args.clip_range)
        loss.backward()
        missing = [name for name, parameter in transformer.named_parameters() if parameter.grad is None]
        assert missing == []
        assert all(parameter.grad.dtype == torch.bfloat16 for parameter in transformer.parameters())
