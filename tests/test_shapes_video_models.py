"""The embedded video models: do diffusers' pipelines load them, make clips and pictures, and read captions as they were trained to?"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from shapes import video, world
from shapes.checker import check
from shapes.tiny_video_models import llama_tokenizer
from shapes.video import FRAMES, VIDEO_SPECS
from shapes.video_checker import check_clips, fidelity, motion_quality, visual_quality
from shapes.video_evaluation import THINGS, sample, through
from shapes.video_training import CAPTIONS, TEXT_TOKENS, prompt_states

MODELS = Path(__file__).parent.parent / "shapes" / "models"
PROMPTS = [video.caption(spec) for spec in VIDEO_SPECS[:3]]


@pytest.fixture(scope="module")
def hunyuan() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline.from_pretrained(MODELS / "hunyuan", dtype=torch.float32)


@pytest.fixture(scope="module")
def skyreels() -> HunyuanSkyreelsImageToVideoPipeline:
    return HunyuanSkyreelsImageToVideoPipeline.from_pretrained(MODELS / "skyreels", dtype=torch.float32)


def ids_of(tokenizer, prompts: list[str], **arguments) -> list[list[int]]:
    return tokenizer([DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts], **arguments)["input_ids"]


@pytest.mark.parametrize("name", ["hunyuan", "skyreels"])
def test_as_many_tokens_come_before_the_prompt_as_the_pipeline_crops(name, request):
    tokenizer = request.getfixturevalue(name).tokenizer
    rows = ids_of(tokenizer, [*CAPTIONS, "", "Zebra's 7 Äpfel"])
    crop = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    assert crop == 95 and len({tuple(row[:crop]) for row in rows}) == 1
    for row, prompt in zip(rows, [*CAPTIONS, "", "Zebra's 7 Äpfel"]):
        assert row[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row[crop:-1]) == prompt
    assert all(len(row) == crop + len(caption.split()) + 1 for row, caption in zip(rows, CAPTIONS))  # every word is a token
    assert tokenizer.model_max_length == 16 and tokenizer.padding_side == "right"


@pytest.mark.parametrize("name", ["hunyuan", "skyreels"])
def test_llama_has_the_tokenizer_that_pretraining_makes(name):
    saved = json.loads((MODELS / name / "tokenizer" / "tokenizer.json").read_text())
    made = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    assert all(made[part] == saved[part] for part in made.keys() - {"padding", "truncation"})  # those are of the last call before saving
    assert saved["pre_tokenizer"]["pretokenizers"][1]["type"] == "ByteLevel"  # as in Llama 3
    ids = [token["id"] for token in saved["added_tokens"]]
    assert min(ids) == len(saved["model"]["vocab"]) == 500  # special tokens come after all others


@torch.no_grad()
def test_encode_prompt_gives_what_the_transformer_was_trained_on(hunyuan):
    states, pooled, mask = hunyuan.encode_prompt(CAPTIONS, max_sequence_length=16)
    ids = ids_of(hunyuan.tokenizer, CAPTIONS, padding="max_length", max_length=95 + TEXT_TOKENS, return_tensors="pt")
    trained_on = prompt_states(hunyuan.text_encoder, ids)
    real = mask[:, :TEXT_TOKENS].bool()
    assert real.sum() == mask.sum()  # none is longer
    torch.testing.assert_close(trained_on[real], states[:, :TEXT_TOKENS][real], atol=1e-4, rtol=1e-4)
    distances = torch.cdist(pooled, pooled) + torch.eye(len(CAPTIONS))
    assert hunyuan.tokenizer_2.model_max_length == 77 and distances.min() > 1e-3  # CLIP tells all captions apart


@torch.no_grad()
def test_padded_text_does_not_matter(hunyuan):
    states, pooled, mask = hunyuan.encode_prompt(PROMPTS, max_sequence_length=16)
    latents, times = torch.randn(3, 16, 3, 8, 8), torch.tensor([999.0, 500.0, 10.0])

    def predict(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return hunyuan.transformer(latents, times, states, mask, pooled, return_dict=False)[0]

    noisy = torch.where(mask.bool()[:, :, None], states, torch.randn_like(states))
    torch.testing.assert_close(predict(noisy, mask), predict(states, mask), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predict(states[:, :6], mask[:, :6]), predict(states, mask), atol=1e-5, rtol=1e-5)
    assert (predict(states.roll(1, 0), mask) - predict(states, mask)).abs().max() > 1e-3


@torch.no_grad()
def test_the_vae_keeps_clips_and_pictures(hunyuan, skyreels):
    rng = np.random.default_rng(0)
    specs = list(VIDEO_SPECS[::5])
    clips = video.render_clips(specs, video.tracks(specs, FRAMES, rng), rng)
    latents, decoded = through(hunyuan.vae, clips)
    assert latents.shape == (15, 16, 3, 8, 8)
    assert check_clips(decoded, specs)["strict"].mean() > 0.5
    assert motion_quality(decoded, specs).mean() > 0.9
    assert visual_quality(decoded).mean() > 0.6
    assert fidelity(decoded, clips[:, :, 0]).mean() > 0.4
    scaled = latents * hunyuan.vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1 and 0.85 < scaled.std() < 1.15
    assert check(through(hunyuan.vae, world.render(THINGS, rng)[:, :, None])[1][:, :, 0], THINGS)["strict"].mean() > 0.9
    assert [through(hunyuan.vae, clips[:1, :, :frames])[1].shape[2] for frames in (1, 5)] == [1, 5]
    weights, same = hunyuan.vae.state_dict(), skyreels.vae.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_clips_and_pictures_by_the_pipelines(hunyuan, skyreels):
    clips = sample(hunyuan, [video.caption(spec) for spec in VIDEO_SPECS[::3]], 0, num_frames=FRAMES, num_inference_steps=8)
    assert clips.shape == (24, 3, FRAMES, 32, 32)
    assert visual_quality(clips).mean() > 0.3
    pictures = sample(hunyuan, [world.caption(spec) for spec in THINGS], 0, num_frames=1, num_inference_steps=8)
    assert pictures.shape == (12, 3, 1, 32, 32)
    assert check(pictures[:, :, 0], THINGS)["soft"].mean() > 0.5
    rng = np.random.default_rng(0)
    specs = list(VIDEO_SPECS[::6])
    references = video.render_clips(specs, video.tracks(specs, FRAMES, rng)[:, :1], rng)[:, :, 0]
    prompts = [video.caption(spec) for spec in specs]
    clips = sample(skyreels, prompts, 0, references, num_frames=FRAMES, num_inference_steps=8, true_cfg_scale=1.0)
    assert fidelity(clips, references).mean() > 2 * fidelity(clips, np.roll(references, 1, 0)).mean()
