"""The CLIP reward: its preprocessing, its folder, and what the embedded CLIP knows of the shapes world."""

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

from fastvideo.errors import UserError
from fastvideo.rewards import RewardSpec, parse_rewards, score
from fastvideo.rewards.clip import load_clip, preprocess
from fastvideo.rewards.hpsv2 import load_hpsv2
from fastvideo.rewards.pickscore import load_pickscore
from shapes.world import caption, mutate, render, sample_spec

CLIP_FOLDER = Path(__file__).resolve().parent.parent / "shapes" / "models" / "clip"
CPU = torch.device("cpu")


def picture(height: int, width: int) -> np.ndarray:
    """A smooth random picture with hard edges in it: (height, width, 3) uint8."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(coarse)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (255, 0, 128)
    return pixels


@pytest.mark.parametrize(
    ("size", "options", "tolerance"),
    [
        ((32, 32), {}, 1e-5),  # nothing to resize: exact
        ((37, 33), {"do_resize": False}, 1e-5),
        ((20, 27), {"do_resize": False}, 1e-5),  # smaller than the crop: padded
        ((32, 32), {"do_normalize": False}, 1e-5),
        ((64, 64), {}, 0.016),  # a float32 sum may round to the next of 256 levels, which is 0.015 after normalisation
        ((50, 75), {}, 0.016),
        ((75, 50), {}, 0.016),
        ((20, 24), {}, 0.016),
        ((50, 75), {"resample": 2}, 0.016),
        ((50, 75), {"size": {"height": 32, "width": 32}}, 0.016),
    ],
)
def test_preprocessing_equals_transformers(size, options, tolerance):
    processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | options)
    pixels = picture(*size)
    expected = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    media = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    result = preprocess(media, json.loads(processor.to_json_string()))
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < tolerance
    assert (result - expected).abs().mean() < tolerance / 50


def test_right_captions_score_higher_than_mutated_ones():
    rng = np.random.default_rng(11)
    specs = [sample_spec(rng) for _ in range(400)]
    media = torch.from_numpy(render(specs, rng)) * 2 - 1
    reward = load_clip(str(CLIP_FOLDER), CPU)
    right = reward(media, [{"prompt": caption(spec)} for spec in specs])
    wrong = reward(media, [{"prompt": caption(mutate(spec, rng))} for spec in specs])
    assert right.shape == (400,) and right.abs().max() <= 1 + 1e-6
    assert (right > wrong).float().mean() >= 0.85
    assert right.mean() > wrong.mean() + 0.1


def test_scores_do_not_depend_on_the_batch_and_take_any_size_and_text():
    rng = np.random.default_rng(12)
    specs = [sample_spec(rng) for _ in range(5)]
    media = torch.from_numpy(render(specs, rng)) * 2 - 1
    rows = [{"prompt": caption(spec)} for spec in specs]
    reward = load_clip(str(CLIP_FOLDER), CPU)
    together = reward(media, rows)
    alone = torch.cat([reward(media[i : i + 1], rows[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not together.requires_grad
    enlarged = torch.nn.functional.interpolate(media, scale_factor=2, mode="bilinear")
    assert (reward(enlarged, rows) - together).abs().max() < 0.2
    assert reward(media, [{"prompt": "a very long text about nothing that any shape could show, 猫 " * 5}] * 5).isfinite().all()


def test_clips_are_refused():
    with pytest.raises(UserError, match=r"clip scores pictures .* not clips of shape \(2, 3, 9, 32, 32\)"):
        load_clip(str(CLIP_FOLDER), CPU)(torch.zeros(2, 3, 9, 32, 32), [{"prompt": "a red circle"}] * 2)


def test_no_path_and_missing_folder_are_errors():
    with pytest.raises(UserError, match="clip=FOLDER"):
        load_clip(None, CPU)
    with pytest.raises(UserError, match="clip=no/such/folder"):
        load_clip("no/such/folder", CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_broken_folders_are_errors_that_name_the_folder(tmp_path, name, damage):
    folder = tmp_path / "clip"
    shutil.copytree(CLIP_FOLDER, folder)
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"{ not a file of this kind")
    with pytest.raises(UserError) as error:
        load_clip(str(folder), CPU)
    assert str(folder) in str(error.value)
    if damage == "missing" and name in ("config.json", "tokenizer.json"):  # of which transformers would make its own
        assert f"has no {name}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None}, "KeyError: 'image_mean'"),
        ({"image_mean": [0.5, 0.5]}, "RuntimeError"),
        ({"image_std": 0}, "or not finite"),
        ({"image_std": "large"}, "can't be followed"),
        ({"resample": 1}, "KeyError: 1"),
        ({"size": {"longest_edge": 32}}, "KeyError: 'height'"),
        ({"size": "32"}, "can't be followed"),
        ({"crop_size": 40}, "pictures become 40 x 40, or not finite, for a network of 32 x 32"),
        ({"do_center_crop": False}, "pictures become 32 x 48"),
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_followed_is_an_error_at_load(tmp_path, change, message):
    shutil.copytree(CLIP_FOLDER, tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=rf"clip={tmp_path}/clip: preprocessor_config\.json .*{message}"):
        load_clip(str(tmp_path / "clip"), CPU)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "lacks 1 weights, such as visual_projection.weight"), ("extra", "has, but CLIPModel has not, 1 weights, such as extra")],
)
def test_weights_must_be_the_models(damage, message, tmp_path):
    shutil.copytree(CLIP_FOLDER, tmp_path / "clip")
    weights = load_file(CLIP_FOLDER / "model.safetensors")
    if damage == "missing":
        del weights["visual_projection.weight"]
    else:
        weights["extra"] = torch.zeros(3)
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"clip={tmp_path}/clip {message}"):
        load_clip(str(tmp_path / "clip"), CPU)


def test_bfloat16_is_near_and_other_dtypes_are_errors():
    rng = np.random.default_rng(13)
    specs = [sample_spec(rng) for _ in range(16)]
    media, rows = torch.from_numpy(render(specs, rng)) * 2 - 1, [{"prompt": caption(spec)} for spec in specs]
    exact, low = (load_clip(str(CLIP_FOLDER), CPU, dtype=dtype)(media, rows) for dtype in ("auto", "bfloat16"))
    assert low.dtype == exact.dtype == torch.float32
    assert 0 < (low - exact).abs().max() < 0.005 and (low - exact).std() < exact.std() / 10
    for load in (
        load_clip,
        load_hpsv2,
        load_pickscore,
    ):  # on a GPU too: bfloat16's noise is not small beside what samples of a prompt differ by
        assert inspect.signature(load).parameters["dtype"].default == "float32"
    with pytest.raises(UserError, match="clip has dtype=half; it can be auto, float32 or bfloat16"):
        load_clip(str(CLIP_FOLDER), CPU, dtype="half")


# ------------------------------------------------------------------------------------------------- names, and where a reward failed


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("clip.Large_2=a/b@0.3", RewardSpec("clip.Large_2", "a/b", 0.3)),
        ("clip=runs@2/clip", RewardSpec("clip", "runs@2/clip")),
        ("clip=runs/clip@2/", RewardSpec("clip", "runs/clip@2/")),
        ("clip=clip@2/@0.3", RewardSpec("clip", "clip@2/", 0.3)),
        ("clip=a@1@-0.3", RewardSpec("clip", "a@1", -0.3)),
        ("clip=a,b,dtype=bfloat16@1e-1", RewardSpec("clip", "a,b", 0.1, {"dtype": "bfloat16"})),
    ],
)
def test_rewards_are_read(text, spec):
    assert parse_rewards([text]) == [spec]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip=", "nothing stands after = in 'clip='"),
        ("clip=@0.3", "nothing stands after ="),
        ("clip=,dtype=float32", "nothing stands after ="),
        ("clip.a b=a", "the label 'a b' in 'clip.a b=a' must have letters, digits and _ alone, as clip.LABEL"),
        ("videoalign.vq.a/b=a", "the label 'a/b' .* as videoalign.vq.LABEL"),
        ("clip.=a", "the label '' "),
        ("clip.a.b=a", "unknown reward 'clip.a.b=a'"),
        ("clip=models/clip@v2", "the threshold 'v2' in 'clip=models/clip@v2' is not a number"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        parse_rewards([text])


def test_an_error_names_the_last_line_of_the_rewards_own_file(tmp_path, monkeypatch):
    """Or of a file beside it; not that of numpy, in which it fails, nor those of torch around it."""
    (tmp_path / "helper_of_mine.py").write_text("import numpy\n\ndef look(media):\n    numpy.linalg.inv(numpy.zeros((2, 2)))\n")
    (tmp_path / "reward_of_mine.py").write_text(
        "import helper_of_mine\nimport torch\n\n@torch.no_grad()\ndef function(media, rows):\n    helper_of_mine.look(media)\n\n"
        "class Module(torch.nn.Module):\n    def forward(self, media, rows):\n        function(media, rows)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import reward_of_mine

    place = rf"LinAlgError: Singular matrix \({tmp_path}/helper_of_mine\.py, line 4\)"
    for reward in (reward_of_mine.function, reward_of_mine.Module()):
        with pytest.raises(UserError, match=f"reward 'mine' failed on a batch of 1 .*{place}$"):
            score({"mine": reward}, torch.zeros(1, 3, 8, 8), [{"prompt": "a"}])
    with pytest.raises(UserError, match=rf"\({re.escape(__file__)}, line \d+\)$"):
        score({"mine": lambda media, rows: media.no_such_thing}, torch.zeros(1, 3, 8, 8), [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"TypeError: .*rewards/__init__\.py, line \d+\)$"):  # called wrongly: no line of its own
        score({"mine": len}, torch.zeros(1, 3, 8, 8), [{"prompt": "a"}])
