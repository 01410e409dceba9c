"""Stable Diffusion v1.4."""

from fastvideo.models.families.family import Family, Part, Size
from fastvideo.models.families.text_encoders import CLIP_L

IMAGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
TINY_IMAGE_VAE = {  # 3 x 32 x 32 pictures to 4 x 8 x 8 latents
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FAMILY = Family(
    title="Stable Diffusion v1.4",
    pipeline="StableDiffusionPipeline",
    network=Part(
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "block_out_channels": (32, 56),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
    ),
    vae=Part("AutoencoderKL", IMAGE_VAE | {"latent_channels": 4, "scaling_factor": 0.18215}, TINY_IMAGE_VAE),
    text_encoders=(CLIP_L,),
    scheduler=(
        "PNDMScheduler",
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "clip_sample": False,  # nothing to PNDM; DDIMScheduler.from_config would clip latents without it
        },
    ),
    sampling={
        "sampling_steps": ("num_inference_steps", 50),
        "guidance_scale": ("guidance_scale", 5.0),
        "height": ("height", None),
        "width": ("width", None),
    },
    cached={"prompt_embeds": (77, 768)},
    parameters=859_520_964,
    full_size={"sd_v1.4": Size((4, 64, 64), (3, 512, 512))},
)
