"""FLUX.1-dev."""

from fastvideo.models.families.family import Family, Part, Size
from fastvideo.models.families.sd import IMAGE_VAE, TINY_IMAGE_VAE
from fastvideo.models.families.text_encoders import CLIP_L, T5_XXL

FAMILY = Family(
    title="FLUX.1-dev",
    pipeline="FluxPipeline",
    network=Part(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "guidance_embeds": False,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
    vae=Part(
        "AutoencoderKL",
        IMAGE_VAE
        | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        TINY_IMAGE_VAE | {"shift_factor": 0.1},
    ),
    text_encoders=(CLIP_L, T5_XXL),
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    sampling={
        "sampling_steps": ("num_inference_steps", 25),
        "shift": (None, 3.0),
        "embedded_guidance": ("guidance_scale", 3.5),
        "height": ("height", None),
        "width": ("width", None),
        "max_sequence_length": ("max_sequence_length", 512),
    },
    cached={"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    parameters=11_901_408_320,
    full_size={"flux.1-dev": Size((45 * 45, 64), (3, 720, 720))},
    parallelize="flux",
    length_limit="tokenizer_2",
    channels=4,
    packed=True,
)
