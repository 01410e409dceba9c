"""Wan 2.1 T2V 1.3B."""

from fastvideo.models.families.family import Family, Part, Size
from fastvideo.models.families.text_encoders import UMT5_XXL

FAMILY = Family(
    title="Wan 2.1 T2V 1.3B",
    pipeline="WanPipeline",
    network=Part(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256, "num_layers": 4},
    ),
    vae=Part(
        "AutoencoderKLWan",
        {},
        {  # clips of 3 x (4 k + 1) x 32 x 32 to latents of 16 x (k + 1) x 8 x 8
            "base_dim": 8,
            "z_dim": 16,
            "dim_mult": [1, 2, 4],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "latents_mean": [0.0] * 16,
            "latents_std": [1.0] * 16,
            "scale_factor_spatial": 4,
        },
    ),
    text_encoders=(UMT5_XXL,),
    scheduler=(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    sampling={
        "sampling_steps": ("num_inference_steps", 25),
        "shift": (None, 5.0),
        "guidance_scale": ("guidance_scale", 5.0),
        "height": ("height", 480),
        "width": ("width", 832),
        "num_frames": ("num_frames", 81),
        "max_sequence_length": ("max_sequence_length", 512),
    },
    cached={"prompt_embeds": (512, 4096)},
    parameters=1_418_996_800,
    full_size={"wan_2.1_t2v_1.3b": Size((16, 21, 60, 104), (3, 81, 480, 832))},
    parallelize="wan",
)
