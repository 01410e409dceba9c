"""SkyReels-V1-I2V: HunyuanVideo's parts, with a network that is given the first frame's latents beside the clip's."""

from fastvideo.models.families import hunyuan
from fastvideo.models.families.family import Family, Part, Size

FAMILY = Family(
    title="SkyReels-V1-I2V",
    pipeline="HunyuanSkyreelsImageToVideoPipeline",
    network=Part(
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 32, "guidance_embeds": True},
        hunyuan.TINY_TRANSFORMER | {"in_channels": 32},
    ),
    vae=hunyuan.VAE,
    text_encoders=hunyuan.FAMILY.text_encoders,
    scheduler=hunyuan.FAMILY.scheduler,
    sampling={
        "sampling_steps": ("num_inference_steps", 25),
        "shift": (None, 7.0),
        "guidance_scale": ("true_cfg_scale", 5.0),
        "embedded_guidance": ("guidance_scale", 1.0),
        "height": ("height", 400),
        "width": ("width", 640),
        "num_frames": ("num_frames", 53),
        "max_sequence_length": ("max_sequence_length", 256),
    },
    cached=hunyuan.CACHED | {"image_latents": (16, 1, 50, 80)},
    parameters=12_821_209_152,
    full_size={"skyreels_i2v": Size((16, 14, 50, 80), (3, 53, 400, 640))},
    parallelize="hunyuan",
    channels=2,  # of the clip and of the image
    from_images=True,
)
