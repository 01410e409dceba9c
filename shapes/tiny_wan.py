"""A Wan 2.1 text-to-video model in a size that suits clips of 32 px: fresh, trained, and measured by diffusers' pipeline.

It learns from the same shaky clips and loose captions as HunyuanVideo does in `shapes/video_training.py`.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from fastvideo.models.families import FAMILIES
from fastvideo.models.families.text_encoders import UMT5_XXL
from shapes import video, world
from shapes.checker import aesthetic, check
from shapes.tiny_models import TEXT_LENGTH, t5_tokenizer
from shapes.training import half_copy, optimise
from shapes.video import FRAMES, VIDEO_SPECS
from shapes.video_evaluation import THINGS, describe, sample
from shapes.video_training import CAPTIONS, EMPTY_SHARE, SHIFT, fit_video_vae, flow_loss, redraw, shaky_clips, single_frames

BATCH = 72


def wan_vae() -> AutoencoderKLWan:
    """0.49 M parameters: clips of 3 x (4 k + 1) x 32 x 32 to latents of 16 x (k + 1) x 8 x 8."""
    return AutoencoderKLWan(**FAMILIES["wan"].vae.tiny)


def umt5(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """0.09 M parameters, 64 wide."""
    return UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **UMT5_XXL.tiny))


def wan_transformer() -> WanTransformer3DModel:
    """1.0 M parameters; 2 x 2 latents of one frame are a token: 48 for 9 frames, 16 for a picture."""
    return WanTransformer3DModel(**FAMILIES["wan"].network.tiny)


def wan_scheduler(shift: float) -> UniPCMultistepScheduler:
    """What the folders of Wan 2.1 have."""
    return UniPCMultistepScheduler(**FAMILIES["wan"].scheduler[1] | {"flow_shift": shift})


def fresh_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """All of Wan but the VAE untrained."""
    tokenizer = t5_tokenizer([world.caption(spec) for spec in world.all_specs()] + [video.caption(spec) for spec in VIDEO_SPECS])
    return WanPipeline(tokenizer, umt5(tokenizer), vae, wan_scheduler(SHIFT), wan_transformer())


def train_wan_vae(folder: Path, steps: int, rng: np.random.Generator) -> None:
    """Wan's VAE, saved in `folder` with its latents' moments."""
    vae = wan_vae()
    begin_with_pictures(vae)
    for parameter in vae.parameters():  # half as fast otherwise
        if parameter.ndim > 3:
            layout = torch.channels_last_3d if parameter.ndim == 5 else torch.channels_last
            parameter.data = parameter.data.contiguous(memory_format=layout)

    def save(clips: torch.Tensor) -> None:
        latents = encode(vae, clips)
        moments = {"latents_mean": latents.mean((0, 2, 3, 4)).tolist(), "latents_std": latents.std((0, 2, 3, 4)).tolist()}
        trained = wan_vae()
        trained.load_state_dict(vae.state_dict())
        trained.register_to_config(**moments)
        trained.half().save_pretrained(folder)
        evaluate_wan_vae(AutoencoderKLWan.from_pretrained(folder, dtype=torch.float32), np.random.default_rng(0), 144)

    fit_video_vae(vae, "wan vae", steps, rng, save)


@torch.no_grad()
def begin_with_pictures(vae: AutoencoderKLWan) -> None:
    """Weights that look at no earlier frame, and pass a frame through what changes the number of frames: Wan's began with pictures too."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1] = 0
            if module.kernel_size == (3, 1, 1):
                channels = torch.arange(module.out_channels)
                module.weight[:, :, -1] = 0
                module.weight[channels, channels % module.in_channels, -1] = 1
                module.bias.zero_()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latents, as the VAE gives them, of clips in [-1, 1]: (N, 3, F, 32, 32) -> (N, 16, k + 1, 8, 8)."""
    return torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in clips.split(BATCH)])


@torch.no_grad()
def evaluate_wan_vae(vae: AutoencoderKLWan, rng: np.random.Generator, number: int = 720) -> None:
    """Prints what the checkers say of clips, pictures and their reconstructions, and the squared error in [0, 1]."""

    def through(shown: np.ndarray) -> np.ndarray:
        latents = encode(vae, torch.from_numpy(shown) * 2 - 1)
        return torch.cat([vae.decode(chunk).sample for chunk in latents.split(BATCH)]).numpy() / 2 + 0.5

    specs = [VIDEO_SPECS[i % len(VIDEO_SPECS)] for i in range(number)]
    clips = video.render_clips(specs, video.tracks(specs, FRAMES, rng), rng)
    decoded = through(clips)
    print(f"wan vae: smooth clips: mse {np.square(decoded - clips).mean():.2e}")
    print(f"  truth: {describe(clips, specs, clips[:, :, 0])}")
    print(f"  reconstructed: {describe(decoded, specs, clips[:, :, 0])}")
    things = [THINGS[i % len(THINGS)] for i in range(number)]
    pictures = world.render(things, rng)[:, :, None]
    decoded = through(pictures)
    strict = check(decoded[:, :, 0], things)["strict"].mean()
    print(f"wan vae: pictures: mse {np.square(decoded - pictures).mean():.2e}, reconstructed strict {strict:.3f}", flush=True)


def train_wan(folder: Path, steps: int, learning_rate: float, compiled: bool, rng: np.random.Generator) -> None:
    """Wan's transformer and its UMT5, three quarters on clips and a quarter on pictures, with the VAE that is in `folder`.

    A tenth of the captions is empty, as in guidance's other branch.
    """
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
    pipeline = fresh_pipeline(vae)
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    tokens = pipeline.tokenizer([*CAPTIONS, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    kinds = []
    for draw, number, in_a_batch in ((shaky_clips, 4800, 48), (single_frames, 1200, 16)):
        shown, labels = draw(number, rng)
        kinds.append(((encode(vae, shown) - mean) / std, labels, in_a_batch))
    network = torch.compile(transformer, dynamic=False) if compiled else transformer

    def predict(encoder_attention_mask: None, pooled_projections: None, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return network(**inputs)

    def loss_function() -> torch.Tensor:
        states = text_encoder(**tokens).last_hidden_state * tokens.attention_mask[..., None]  # zeros for padding, as the pipeline has it
        losses = []
        for latents, labels, number in kinds:
            batch = torch.randint(len(latents), (number,))
            named = torch.where(torch.rand(number) < EMPTY_SHARE, len(CAPTIONS), redraw(labels[batch]))
            losses.append(flow_loss(predict, latents[batch], (states[named], None, None)))
        return 0.75 * losses[0] + 0.25 * losses[1]

    def save(step: int) -> None:
        halves = {name: half_copy(getattr(pipeline, name)) for name in ("vae", "transformer")}
        WanPipeline(**pipeline.components | halves).save_pretrained(folder)
        evaluate_wan(folder, 2, 0, f"step {step}")

    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    optimise(loss_function, parameters, steps, learning_rate, "wan", weight_decay=0.01, every=(500, save))
    save(steps)


def evaluate_wan(folder: Path, clips_per_prompt: int, seed: int, name: str, steps: int = 8, guidance: float = 1.0) -> np.ndarray:
    """Prints the checkers' scores of clips and of single frames that diffusers' pipeline makes; returns the clips as `sample` does."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=SHIFT)
    pipeline.scheduler.sigma_min = 1 / steps  # where the last step begins: WanPipeline can't be given the times
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    specs = list(VIDEO_SPECS) * clips_per_prompt
    clips = sample(pipeline, [video.caption(spec) for spec in specs], seed, num_frames=FRAMES, **settings)
    print(f"wan: {name}, {len(clips)} clips, guidance {guidance}: {describe(clips, specs)}")
    things = THINGS * clips_per_prompt * 6
    pictures = sample(pipeline, [world.caption(spec) for spec in things], seed, num_frames=1, **settings)[:, :, 0]
    scores = check(pictures, things) | {"aesthetic": aesthetic(pictures)}
    text = ", ".join(f"{key} {scores[key].mean():.3f}" for key in ("strict", "soft", "well_formed", "aesthetic"))
    print(f"wan: {name}, {len(pictures)} pictures, guidance {guidance}: {text}", flush=True)
    return clips
