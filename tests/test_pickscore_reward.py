"""PickScore: the formula of its model card, by transformers' own parts, on a tiny random model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from fastvideo.errors import UserError
from fastvideo.rewards import load_rewards, parse_rewards
from fastvideo.rewards.clip import load_clip
from fastvideo.rewards.pickscore import load_pickscore

CLIP_FOLDER = Path(__file__).resolve().parent.parent / "shapes" / "models" / "clip"
CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square, " * 20]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """As published: a model without tokenizer, and the folder of another model with the tokenizer and the image processor."""
    model_folder, processor = tmp_path_factory.mktemp("pickscore"), tmp_path_factory.mktemp("processor")
    model = CLIPModel.from_pretrained(CLIP_FOLDER)
    model.logit_scale.data.fill_(np.log(100))
    model.save_pretrained(model_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(CLIP_FOLDER / name, processor / name)
    return model_folder, processor


def pictures(height: int, width: int) -> np.ndarray:
    """Three smooth pictures, (3, height, width, 3) uint8."""
    draw = np.random.default_rng(0)
    coarse = [Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in PROMPTS]
    return np.stack([np.array(image.resize((width, height), Image.Resampling.BICUBIC)) for image in coarse])


def media(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def model_card_scores(model_folder: Path, processor: Path, pixels: np.ndarray) -> torch.Tensor:
    """As the model card has it: every prompt with its own picture, alone, and padded to the longest only."""
    model, tokenizer = CLIPModel.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(processor)
    image_processor = CLIPImageProcessorPil.from_pretrained(processor)
    scores = []
    for picture, prompt in zip(pixels, PROMPTS):
        image = model.get_image_features(**image_processor(Image.fromarray(picture), return_tensors="pt")).pooler_output
        length = model.config.text_config.max_position_embeddings  # 77 of the real one
        tokens = tokenizer(prompt, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = model.get_text_features(**tokens).pooler_output
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        scores.append(model.logit_scale.exp() * (text @ image.T)[0])
    return torch.cat(scores)


@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-4), ((64, 40), 0.1), ((100, 150), 0.1)])  # of about 30
def test_scores_equal_the_model_cards(size, tolerance, folders):
    model_folder, processor = folders
    pixels = pictures(*size)
    expected = model_card_scores(model_folder, processor, pixels)
    (reward,) = load_rewards(parse_rewards([f"pickscore={model_folder},processor={processor}"]), CPU).values()
    scores = reward(media(pixels), [{"prompt": prompt} for prompt in PROMPTS])
    assert (scores - expected).abs().max() < tolerance
    assert expected.std() > 1 and not scores.requires_grad


def test_scale_is_exact_in_bfloat16(folders):
    """exp of a bfloat16 logit_scale would be 98.8."""
    model_folder, processor = folders
    rows, images = [{"prompt": prompt} for prompt in PROMPTS], media(pictures(32, 32))
    low = load_pickscore(str(model_folder), CPU, processor=str(processor), dtype="bfloat16")(images, rows)
    cosine = load_clip(str(CLIP_FOLDER), CPU, dtype="bfloat16")(images, rows)
    assert low.dtype == torch.float32
    assert torch.allclose(low / cosine, torch.tensor(100.0), atol=1e-3)


def test_processor_may_be_in_the_same_folder(folders):
    rows, images = [{"prompt": prompt} for prompt in PROMPTS], media(pictures(32, 32))
    scale = CLIPModel.from_pretrained(CLIP_FOLDER).logit_scale.exp().item()
    scores = load_pickscore(str(CLIP_FOLDER), CPU)(images, rows)
    assert torch.allclose(scores, scale * load_clip(str(CLIP_FOLDER), CPU)(images, rows), atol=1e-4)


def test_mistakes(folders, tmp_path):
    model_folder, processor = folders
    with pytest.raises(UserError, match="pickscore=FOLDER"):
        load_pickscore(None, CPU)
    with pytest.raises(UserError, match="pickscore=nowhere: there is no such folder"):
        load_pickscore("nowhere", CPU)
    with pytest.raises(UserError, match=rf"pickscore={model_folder}: {model_folder} has no tokenizer\.json: processor=FOLDER says where"):
        load_pickscore(str(model_folder), CPU)
    with pytest.raises(UserError, match=r"nowhere has no tokenizer\.json"):
        load_pickscore(str(model_folder), CPU, processor="nowhere")
    with pytest.raises(UserError, match=rf"pickscore={processor}: {processor} has no config\.json"):
        load_pickscore(str(processor), CPU)
    reward = load_pickscore(str(model_folder), CPU, processor=str(processor))
    with pytest.raises(UserError, match=r"pickscore scores pictures .* not clips of shape \(1, 3, 5, 32, 32\)"):
        reward(torch.zeros(1, 3, 5, 32, 32), [{"prompt": "a"}])


@pytest.mark.parametrize(("damage", "message"), [("missing", "lacks 1 weights, such as logit_scale"), ("extra", "such as score_head")])
def test_weights_must_be_the_models(damage, message, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders[0], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    if damage == "missing":
        del weights["logit_scale"]
    else:
        weights["score_head"] = torch.zeros(3)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_pickscore(str(tmp_path / "model"), CPU, processor=str(folders[1]))
