"""Measures the saved video models by diffusers' pipelines: `python shapes/pretrain.py --stages evaluate` prints all of it."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline

from shapes import video, world
from shapes.checker import aesthetic, check
from shapes.tiny_models import TEXT_LENGTH
from shapes.video import FRAMES, VIDEO_SPECS, VideoSpec
from shapes.video_checker import check_clips, fidelity, motion_quality, visual_quality
from shapes.world import RL_COLOURS, SHAPES, SIZE, Spec

THINGS = [Spec(((colour, shape),)) for colour in RL_COLOURS for shape in SHAPES]  # of the captions for pictures
BATCH = 72


def describe(clips: np.ndarray, specs: list[VideoSpec], references: np.ndarray | None = None) -> str:
    """The checkers' mean scores of clips in [0, 1], (N, 3, frames, 32, 32), in words; fidelity only where there are references."""
    scores = check_clips(clips, specs)
    scores = {name: scores[name] for name in ("strict", "soft")}
    scores |= {"motion": motion_quality(clips, specs), "visual": visual_quality(clips)}
    if references is not None:
        scores["fidelity"] = fidelity(clips, references)
    return ", ".join(f"{name} {score.mean():.3f}" for name, score in scores.items())


@torch.no_grad()
def evaluate_video_vae(vae: AutoencoderKLHunyuanVideo, rng: np.random.Generator, number: int = 720) -> None:
    """What the checkers say of clips and of their reconstructions, the squared error of pictures in [0, 1], and the latents' moments."""
    vae = vae.float()
    specs = [VIDEO_SPECS[i % len(VIDEO_SPECS)] for i in range(number)]
    for name, jitter in (("smooth", 0.0), ("shaky", rng.uniform(0, 1.5, number))):
        clips = video.render_clips(specs, video.tracks(specs, FRAMES, rng, jitter), rng)
        latents, decoded = through(vae, clips)
        print(f"video vae: {name} clips: mse {np.square(decoded - clips).mean():.2e}")
        print(f"  truth: {describe(clips, specs, clips[:, :, 0])}")
        print(f"  reconstructed: {describe(decoded, specs, clips[:, :, 0])}")
    things = [THINGS[i % len(THINGS)] for i in range(number)]
    pictures = world.render(things, rng)
    decoded = through(vae, pictures[:, :, None])[1][:, :, 0]
    strict = check(decoded, things)["strict"].mean()
    print(f"video vae: single pictures: mse {np.square(decoded - pictures).mean():.2e}, reconstructed strict {strict:.3f}")
    scaled = latents * vae.config.scaling_factor
    by_channel = f"mean {scaled.mean((0, 2, 3, 4)).numpy().round(2)}, std {scaled.std((0, 2, 3, 4)).numpy().round(2)}"
    print(f"video vae: scaled latents have mean {scaled.mean():.3f}, std {scaled.std():.3f}, by channel {by_channel}", flush=True)


def through(vae: AutoencoderKLHunyuanVideo, clips: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Latents of clips in [0, 1], and what becomes of the clips."""
    latents = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in torch.from_numpy(clips).split(BATCH)])
    decoded = torch.cat([vae.decode(chunk).sample for chunk in latents.split(BATCH)])
    return latents, (decoded / 2 + 0.5).clamp(0, 1).numpy()


def evaluate_hunyuan(folder: Path, clips_per_prompt: int, seed: int, name: str, steps: int = 8) -> np.ndarray:
    """Prints the checkers' scores of clips and of single frames that diffusers' pipeline makes; returns the clips as `sample` does."""
    pipeline = HunyuanVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    specs = list(VIDEO_SPECS) * clips_per_prompt
    clips = sample(pipeline, [video.caption(spec) for spec in specs], seed, num_frames=FRAMES, num_inference_steps=steps)
    print(f"hunyuan: {name}, {len(clips)} clips: {describe(clips, specs)}")
    things = THINGS * clips_per_prompt * 6
    pictures = sample(pipeline, [world.caption(spec) for spec in things], seed, num_frames=1, num_inference_steps=steps)[:, :, 0]
    scores = check(pictures, things) | {"aesthetic": aesthetic(pictures)}
    text = ", ".join(f"{key} {scores[key].mean():.3f}" for key in ("strict", "soft", "well_formed", "aesthetic"))
    print(f"hunyuan: {name}, {len(pictures)} pictures: {text}", flush=True)
    return clips


def evaluate_skyreels(folder: Path, clips_per_prompt: int, seed: int, name: str, guidance_scale: float = 1.0, steps: int = 8) -> np.ndarray:
    """Prints the checkers' scores of clips that go on from the first frames of smooth ones; returns them as `sample` does.

    guidance_scale: of classifier-free guidance against the empty caption.
    """
    pipeline = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    specs = list(VIDEO_SPECS) * clips_per_prompt
    references = video.render_clips(specs, video.tracks(specs, FRAMES, rng)[:, :1], rng)[:, :, 0]
    settings = {"num_frames": FRAMES, "num_inference_steps": steps, "true_cfg_scale": guidance_scale}
    clips = sample(pipeline, [video.caption(spec) for spec in specs], seed, references, **settings)
    print(f"skyreels: {name}, {len(clips)} clips, guidance {guidance_scale}: {describe(clips, specs, references)}", flush=True)
    return clips


def sample(
    pipeline: HunyuanVideoPipeline | HunyuanSkyreelsImageToVideoPipeline,
    prompts: list[str],
    seed: int,
    references: np.ndarray | None = None,
    **settings: float,
) -> np.ndarray:
    """Clips that go on from `references`, (N, 3, 32, 32) in [0, 1], where given: (N, 3, frames, 32, 32) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        images = {}
        if references is not None:
            images = {"image": torch.from_numpy(references[start : start + BATCH]), "negative_prompt": [""] * len(batch)}
        output = pipeline(
            prompt=batch,
            height=SIZE,
            width=SIZE,
            generator=generator,
            max_sequence_length=TEXT_LENGTH,
            output_type="np",
            **images,
            **settings,
        )
        clips.append(output.frames.transpose(0, 4, 1, 2, 3))
    return np.concatenate(clips)
