"""HunyuanVideo."""

from fastvideo.models.families.family import Family, Part, Size
from fastvideo.models.families.text_encoders import CLIP_L_77, LLAMA_3_8B

TINY_TRANSFORMER = {  # 2 x 2 latents of one frame are a token: 48 for 9 frames, 16 for a picture
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": False,
    "text_embed_dim": 64,
    "pooled_projection_dim": 64,
    "rope_axes_dim": (8, 12, 12),
}
VAE = Part(
    "AutoencoderKLHunyuanVideo",
    {},
    {  # clips of 3 x (4 k + 1) x 32 x 32 to latents of 16 x (k + 1) x 8 x 8
        "latent_channels": 16,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
        "block_out_channels": (8, 16, 32),
        "layers_per_block": 1,
        # At least 4 channels a group: normalising each channel by itself would take the colour out of a picture.
        "norm_num_groups": 2,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
        "mid_block_add_attention": False,
    },
)
CACHED = {"prompt_embeds": (256, 4096), "prompt_attention_mask": (256,), "pooled_prompt_embeds": (768,)}
FAMILY = Family(
    title="HunyuanVideo",
    pipeline="HunyuanVideoPipeline",
    network=Part("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}, TINY_TRANSFORMER),
    vae=VAE,
    text_encoders=(LLAMA_3_8B, CLIP_L_77),
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
    sampling={
        "sampling_steps": ("num_inference_steps", 25),
        "shift": (None, 5.0),
        "embedded_guidance": ("guidance_scale", 6.018),
        "height": ("height", 480),
        "width": ("width", 480),
        "num_frames": ("num_frames", 53),
        "max_sequence_length": ("max_sequence_length", 256),
    },
    cached=CACHED,
    parameters=12_821_012_544,
    full_size={
        "hunyuan_video": Size((16, 14, 60, 60), (3, 53, 480, 480)),
        "hunyuan_image": Size((16, 1, 90, 90), (3, 720, 720), {"num_frames": 1, "height": 720, "width": 720}),
    },
    parallelize="hunyuan",
)
