"""HPS-v2, and open_clip's files for the CLIP reward: the scores of their own packages (tests/golden/make_hps.py) on tiny random files."""

import json
import re
from pathlib import Path

import pytest
import torch
from golden import make_hps as golden

from fastvideo.errors import UserError
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.clip import load_clip
from fastvideo.rewards.hpsv2 import load_hpsv2
from fastvideo.rewards.open_clip import clip_config, convert, load_open_clip, load_tokenizer

GOLDEN = json.loads(golden.RESULT.read_text())
CPU = torch.device("cpu")


def media(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(golden.picture(height, width)).permute(2, 0, 1)[None].float() / 127.5 - 1


def rows(prompts: list[str]) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


def all_scores(reward) -> torch.Tensor:
    """Scores of each of the golden sizes (rows) and prompts (columns)."""
    return torch.stack([reward(media(*size).repeat(len(golden.PROMPTS), 1, 1, 1), rows(golden.PROMPTS)) for size in golden.SIZES])


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    golden.save_hps(path)
    return path


@pytest.fixture(scope="module")
def hps(hps_file):
    return load_hpsv2(str(hps_file), CPU)


@pytest.fixture(scope="module")
def dfn_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dfn")
    torch.save(golden.random_weights(golden.DFN, seed=2), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": golden.DFN, "preprocess_cfg": golden.PREPROCESSING["squash"]}))
    return folder


# ---------------------------------------------------------------------------------------------------- equal to the originals


def test_tokens_equal_open_clips():
    ids = load_tokenizer()(golden.TEXTS)["input_ids"]
    assert ids.shape == (len(golden.TEXTS), 77)
    for text, row, expected in zip(golden.TEXTS, ids.tolist(), GOLDEN["tokens"]):
        assert row == expected + [0] * (77 - len(expected)), text


def test_hps_scores_equal_hpsv2s(hps):
    """From picture and prompt on: square, wide, tall, large and small pictures; short and too long prompts."""
    expected = torch.tensor(GOLDEN["hps"])
    assert (all_scores(hps) - expected).abs().max() < 1e-5
    assert expected.std(0).min() > 0.02, "the pictures must differ for this to say anything"


def test_hps_scores_equal_hpsv2s_live(hps, hps_file):
    pytest.importorskip(
        "hpsv2.src.open_clip", reason="the package hpsv2 with torchvision is not here (it is a cross-check)", exc_type=ImportError
    )
    assert (all_scores(hps) - torch.tensor(golden.hps_scores(hps_file))).abs().max() < 1e-5


def test_open_clip_network_equals_open_clips(dfn_folder):
    model, tokenize, _ = load_open_clip("clip", dfn_folder / "open_clip_pytorch_model.bin")
    with torch.no_grad():
        image = model.eval().get_image_features(pixel_values=golden.random_pixels()).pooler_output
        text = model.get_text_features(**tokenize(golden.PROMPTS)).pooler_output
    cosines = torch.cosine_similarity(image[:, None], text[None], dim=-1)
    assert (cosines - torch.tensor(GOLDEN["open_clip"]["no preprocessing"])).abs().max() < 1e-5


@pytest.mark.parametrize("how", golden.PREPROCESSING)
def test_clip_scores_equal_open_clips(how, tmp_path, dfn_folder):
    """open_clip resizes with PIL, in whole numbers, and a sum near a half may be rounded to either: hence not 1e-5. Such sums are rare by
    bicubic weights (1 in 5,000), less so by bilinear ones (up to 1 in 20)."""
    (tmp_path / "open_clip_pytorch_model.bin").hardlink_to(dfn_folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": golden.DFN, "preprocess_cfg": golden.PREPROCESSING[how]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    difference = (all_scores(load_clip(str(tmp_path), CPU)) - torch.tensor(GOLDEN["open_clip"][how])).abs()
    bound = 3e-3 if "bilinear" in golden.PREPROCESSING[how].values() else 1e-3
    assert difference.max() < bound and difference.mean() < bound / 5


def test_the_real_hps_checkpoints_keys_and_shapes_fit():
    """686 keys of ViT-H-14, on the meta device."""
    from transformers import CLIPModel

    shapes = {}
    for key, shape in GOLDEN["vit_h_14"]["shapes"].items():
        layers = 1 if "resblocks" not in key else 32 if key.startswith("visual") else 24
        shapes |= {key.replace("resblocks.0", f"resblocks.{i}"): torch.empty(shape, device="meta") for i in range(layers)}
    assert len(shapes) == GOLDEN["vit_h_14"]["number"] == 686
    network = {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
    from fastvideo.rewards.hpsv2 import _network

    assert clip_config(_network("real", shapes)).to_dict() == clip_config(network).to_dict()
    with torch.device("meta"):
        model = CLIPModel(clip_config(network))
    assert model.vision_model.config.num_attention_heads == model.text_model.config.num_attention_heads == 16
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert convert(shapes, model.state_dict()).keys() == model.state_dict().keys()


# --------------------------------------------------------------------------------------------------------------- as a reward


def test_hps_by_name_with_a_threshold_and_a_dtype(hps_file, hps):
    prompts, pictures = golden.PROMPTS[:2] * 2, media(180, 320).repeat(4, 1, 1, 1)
    exact = hps(pictures, rows(prompts))
    (binary,) = score(load_rewards(parse_rewards([f"hpsv2={hps_file}@0"]), CPU), pictures, rows(prompts)).values()
    assert binary.tolist() == (exact > 0).float().tolist() and 0 < binary.sum() < 4
    (low,) = score(load_rewards(parse_rewards([f"hpsv2={hps_file},dtype=bfloat16"]), CPU), pictures, rows(prompts)).values()
    assert low.dtype == torch.float32 and 0 < (low - exact).abs().max() < 0.03


def test_hps_does_not_depend_on_the_batch_and_takes_any_values(hps):
    batch = torch.cat([media(128, 96), media(128, 96).flip(3), media(128, 96) * 1.5])  # beyond [-1, 1]: clipped, as when saved
    together = hps(batch, rows(golden.PROMPTS[:3]))
    alone = torch.cat([hps(batch[i : i + 1], rows(golden.PROMPTS[i : i + 1])) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5) and not together.requires_grad
    assert torch.equal(hps(batch[2:].clamp(-1, 1), rows(golden.PROMPTS[2:3])), alone[2:])
    assert hps(media(100, 224), rows(["x"])).isfinite().all()  # the long side as it should be, not square: hpsv2 itself fails here


def test_open_clip_files_and_safetensors(tmp_path, dfn_folder):
    from safetensors.torch import save_file

    pictures, prompts = media(128, 96).repeat(2, 1, 1, 1), rows(golden.PROMPTS[:2])
    expected = load_clip(str(dfn_folder), CPU)(pictures, prompts)
    assert torch.equal(load_clip(str(dfn_folder / "open_clip_pytorch_model.bin"), CPU)(pictures, prompts), expected)
    weights = golden.random_weights(golden.DFN, seed=2)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text((dfn_folder / "open_clip_config.json").read_text())
    assert torch.equal(load_clip(str(tmp_path), CPU)(pictures, prompts), expected)


# ------------------------------------------------------------------------------------------------------------------- mistakes


def test_clips_are_refused(hps):
    with pytest.raises(UserError, match=r"hpsv2 scores pictures .* not clips of shape \(1, 3, 5, 32, 32\)"):
        hps(torch.zeros(1, 3, 5, 32, 32), rows(["a"]))


def test_wrong_hps_files(tmp_path, hps_file, dfn_folder):
    with pytest.raises(UserError, match=r"hpsv2=HPS_v2\.1_compressed\.pt"):
        load_hpsv2(None, CPU)
    with pytest.raises(UserError, match=rf"hpsv2={tmp_path}: that is a folder; name the file in it, such as HPS_v2\.1_compressed\.pt"):
        load_hpsv2(str(tmp_path), CPU)
    with pytest.raises(UserError, match=r"hpsv2=no/such\.pt: there is no such file"):
        load_hpsv2("no/such.pt", CPU)
    with pytest.raises(UserError, match=r'open_clip_pytorch_model\.bin has no "state_dict"'):
        load_hpsv2(str(dfn_folder / "open_clip_pytorch_model.bin"), CPU)
    with pytest.raises(UserError, match="dtype=float16; it can be auto, float32 or bfloat16"):
        load_hpsv2(str(hps_file), CPU, dtype="float16")
    other = tmp_path / "other.pt"
    torch.save({"state_dict": golden.random_weights(golden.DFN, seed=2)}, other)
    with pytest.raises(UserError, match=r"other\.pt is no HPS-v2 checkpoint.* widths are 64 and 48"):
        load_hpsv2(str(other), CPU)
    other.write_bytes(b"<!DOCTYPE html> not found")
    with pytest.raises(UserError, match=r"other\.pt can't be read as a file of weights"):
        load_hpsv2(str(other), CPU)


def test_no_code_is_run_from_a_file(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("",))

    torch.save({"state_dict": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt can't be read"):
        load_hpsv2(str(tmp_path / "evil.pt"), CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("visual.conv1.weight", None, "lacks 'visual.conv1.weight'"),
        ("transformer.resblocks.1.mlp.c_fc.bias", None, "it lacks transformer.resblocks.1.mlp.c_fc.bias"),
        ("logit_scale", None, "it lacks logit_scale"),
        ("visual.ln_post.bias", torch.zeros(3), r"visual.ln_post.bias has shape \(3,\)"),
        ("visual.transformer.resblocks.0.attn.in_proj_bias", torch.zeros(90), r"in_proj_bias has shape \(90,\)"),
        ("score_predictor.weight", torch.zeros(3), "score_predictor.weight has no place in it"),
    ],
)
def test_incomplete_hps_files(key, change, message, tmp_path):
    weights = golden.random_weights(golden.HPS, seed=1)
    if change is None:
        del weights[key]
    else:
        weights[key] = change
    torch.save({"state_dict": weights}, tmp_path / "hps.pt")
    with pytest.raises(UserError, match=message) as error:
        load_hpsv2(str(tmp_path / "hps.pt"), CPU)
    assert str(tmp_path / "hps.pt") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": golden.DFN["vision_cfg"] | {"timm_model_name": "vit_base"}}, "has 'timm_model_name'"),
        ({"text_cfg": golden.DFN["text_cfg"] | {"hf_tokenizer_name": "bert"}}, "has 'hf_tokenizer_name'"),
        ({"vision_cfg": golden.DFN["vision_cfg"] | {"image_size": 84}}, r"visual.positional_embedding has shape \(26, 64\)"),
        ({"vision_cfg": golden.DFN["vision_cfg"] | {"layers": 1}}, r"visual.transformer.resblocks.1.* has no place in it"),
        ({"text_cfg": None}, "needs its open_clip_config.json"),
        ({"vision_cfg": golden.DFN["vision_cfg"] | {"image_size": [70, 84]}}, "its settings are of no vision transformer"),
        ({"text_cfg": golden.DFN["text_cfg"] | {"context_length": "77"}}, "its settings are of no vision transformer"),
    ],
)
def test_open_clip_configurations_that_do_not_fit(change, message, tmp_path, dfn_folder):
    (tmp_path / "open_clip_pytorch_model.bin").hardlink_to(dfn_folder / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": golden.DFN | change, "preprocess_cfg": {}}))
    with pytest.raises(UserError, match=message) as error:
        load_clip(str(tmp_path), CPU)
    assert re.search(rf"clip={tmp_path}\S*open_clip_pytorch_model.bin", str(error.value))


def test_open_clip_configurations_in_other_words(tmp_path, dfn_folder):
    """null for no settings, two equal sides for one, one mean for three channels, a fill colour of three channels for one."""
    (tmp_path / "open_clip_pytorch_model.bin").hardlink_to(dfn_folder / "open_clip_pytorch_model.bin")

    def scores(preprocessing: dict | None, image_size: int | list[int] = 70) -> torch.Tensor:
        network = golden.DFN | {"vision_cfg": golden.DFN["vision_cfg"] | {"image_size": image_size}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": network, "preprocess_cfg": preprocessing}))
        return load_clip(str(tmp_path), CPU)(media(128, 96), rows(golden.PROMPTS[:1]))

    longest = golden.PREPROCESSING["longest"]
    assert torch.equal(scores(None), scores({}, [70, 70]))
    assert torch.equal(scores({"mean": 0.5, "std": [0.2, 0.2, 0.2]}), scores({"mean": [0.5, 0.5, 0.5], "std": 0.2}))
    assert torch.equal(scores(longest | {"fill_color": [100, 100, 100]}), scores(longest))
    assert not torch.equal(scores(longest | {"fill_color": [100, 100, 200]}), scores(longest))
    for wrong in ({"fill_color": [100, 100]}, {"mean": "grey"}, {"std": [1, 1, 0]}):
        with pytest.raises(UserError, match=r"preprocess_cfg in open_clip_config\.json can't be followed"):
            scores(longest | wrong)
    with pytest.raises(UserError, match=r"needs its open_clip_config\.json beside it"):
        scores("none")


def test_open_clip_files_need_their_configuration(tmp_path, dfn_folder):
    (tmp_path / "open_clip_pytorch_model.bin").hardlink_to(dfn_folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"needs its open_clip_config\.json beside it"):
        load_clip(str(tmp_path), CPU)
    config = {"model_cfg": golden.DFN, "preprocess_cfg": {"resize_mode": "stretch"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="resize_mode='stretch', which is not known"):
        load_clip(str(tmp_path), CPU)
