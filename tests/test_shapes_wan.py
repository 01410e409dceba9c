"""The embedded Wan: does diffusers' pipeline load it and make clips and pictures, and does its VAE keep what is shown?"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from shapes import video, world
from shapes.checker import check
from shapes.tiny_wan import SHIFT, begin_with_pictures, encode, wan_vae
from shapes.video import FRAMES, VIDEO_SPECS
from shapes.video_checker import motion_quality, visual_quality
from shapes.video_evaluation import THINGS, sample
from shapes.video_training import CAPTIONS

FOLDER = Path(__file__).parent.parent / "shapes" / "models" / "wan"


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return WanPipeline.from_pretrained(FOLDER, dtype=torch.float32)


def test_every_word_of_a_caption_is_a_token(pipeline):
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)  # as the real folder has
    for caption, ids in zip(CAPTIONS, pipeline.tokenizer(CAPTIONS).input_ids, strict=True):
        assert len(ids) == len(caption.split()) + 1 and pipeline.tokenizer.unk_token_id not in ids
    assert pipeline.tokenizer.model_max_length == 16


@torch.no_grad()
def test_the_vae_keeps_clips_and_pictures(pipeline):
    rng = np.random.default_rng(0)
    specs = list(VIDEO_SPECS[::5])
    clips = video.render_clips(specs, video.tracks(specs, FRAMES, rng), rng)
    latents = encode(pipeline.vae, torch.from_numpy(clips) * 2 - 1)
    decoded = pipeline.vae.decode(latents).sample.numpy() / 2 + 0.5
    assert latents.shape == (15, 16, 3, 8, 8)
    assert motion_quality(decoded, specs).mean() > 0.8
    assert visual_quality(decoded).mean() > 0.5
    mean, std = (torch.tensor(pipeline.vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    scaled = (latents - mean) / std
    assert abs(scaled.mean()) < 0.1 and 0.85 < scaled.std() < 1.15
    pictures = torch.from_numpy(world.render(THINGS, rng))[:, :, None] * 2 - 1
    decoded = pipeline.vae.decode(encode(pipeline.vae, pictures)).sample
    assert check(decoded[:, :, 0].numpy() / 2 + 0.5, THINGS)["strict"].mean() > 0.9
    assert [pipeline.vae.decode(encode(pipeline.vae, pictures.expand(-1, -1, n, -1, -1)[:1])).sample.shape[2] for n in (1, 5)] == [1, 5]


@torch.no_grad()
def test_a_vae_that_begins_with_pictures_takes_a_still_clip_for_one():
    torch.manual_seed(0)
    vae = wan_vae()
    begin_with_pictures(vae)
    picture = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    still = picture.expand(-1, -1, FRAMES, -1, -1)
    decoded, decoded_still = (vae.decode(encode(vae, shown)).sample for shown in (picture, still))
    torch.testing.assert_close(decoded_still, decoded.expand_as(decoded_still), atol=1e-5, rtol=0)


def test_clips_and_pictures_by_the_pipeline(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=SHIFT)
    pipeline.scheduler.sigma_min = 1 / 8
    settings = {"num_inference_steps": 8, "guidance_scale": 1.0}
    clips = sample(pipeline, [video.caption(spec) for spec in VIDEO_SPECS[::3]], 0, num_frames=FRAMES, **settings)
    assert clips.shape == (24, 3, FRAMES, 32, 32)
    assert visual_quality(clips).mean() > 0.25
    pictures = sample(pipeline, [world.caption(spec) for spec in THINGS], 0, num_frames=1, **settings)
    assert pictures.shape == (12, 3, 1, 32, 32)
    assert check(pictures[:, :, 0], THINGS)["soft"].mean() > 0.5
