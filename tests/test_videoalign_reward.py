"""The VideoAlign rewards on tiny random checkpoints in the layout that is published."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, SMALL_RUN, metrics_of, run_script

from fastvideo.errors import UserError
from fastvideo.media import read_video
from fastvideo.rewards import load_rewards, parse_rewards, score, videoalign
from fastvideo.rewards.videoalign import (
    REQUEST,
    frame_size,
    load_videoalign_mq,
    load_videoalign_ta,
    load_videoalign_vq,
    patchify,
    resize,
    sample_frames,
)
from fastvideo.rewards.videoalign_checkpoint import load_checkpoint

CPU = torch.device("cpu")
RANK, ALPHA = 3, 5.0
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PROMPTS = ["a red circle moving right", "a cat, filmed from above, that jumps over a small blue fence and then comes back to us"]


# --------------------------------------------------------------------------------------------------------- a tiny VideoAlign


def write_base(folder: Path) -> None:
    """config.json as Qwen2-VL-2B-Instruct has it (flat, of transformers 4.41), tiny; its tokenizer trained on the request."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([REQUEST] * 2, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    vocab = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        vocab + i: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for i, token in enumerate(TOKENS)
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": TOKENS[0],
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "unk_token": None,
    }
    settings |= {
        "added_tokens_decoder": added,
        "additional_special_tokens": TOKENS[1:],
        "model_max_length": 32768,
        "add_prefix_space": False,
    }
    settings |= {"split_special_tokens": False, "errors": "replace", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {token: vocab + i for i, token in enumerate(TOKENS)}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "mlp_ratio": 4,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vocab_size": vocab + len(TOKENS) + 5,  # padded, as the published one
    }
    (folder / "config.json").write_text(json.dumps(config))


def tensor(name: str, shape: torch.Size, scale: float) -> torch.Tensor:
    """Random numbers of this name, in bfloat16 as published."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
    return (torch.randn(shape, generator=generator) * scale + ("norm" in name or "ln_q.weight" in name)).bfloat16()


def write_videoalign(folder: Path, layout: str = "full") -> Path:
    """The same random VideoAlign in any layout: "full", "merged", "new_names" or "adapter"; its base model is inside the folder."""
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    base = folder / "Qwen2-VL-2B-Instruct"
    write_base(base)
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir()
    (folder / "checkpoint-900").mkdir()  # an older, empty one: the newest counts
    settings = {
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": 1,
            "use_special_tokens": True,
            "reward_token": "special",
        },
        "data_config": {"fps": 2, "max_frame_pixels": 200704, "num_frames": None, "prompt_template_type": "detailed_special"},
        "peft_lora_config": {"lora_enable": layout != "merged", "lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
        "inference_config": {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121},
    }
    (folder / "model_config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig.from_pretrained(base))
    shapes = {name.replace("language_model.", "model."): weight.shape for name, weight in model.state_dict().items()}
    weights = {name: tensor(name, shape, 0.2 if len(shape) > 1 else 0.1) for name, shape in shapes.items()}
    vocab = len(weights["model.embed_tokens.weight"]) - 2  # 8 tokens are known to the tokenizer, 3 are added, 2 are left of the padding
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 5
    head = {"base_model.model.rm_head.weight": tensor("rm_head", torch.Size((1, 32)), 1.0)}
    lora = {}
    for name in [name for name in weights if "_proj.weight" in name]:
        (rows, columns), module = shapes[name], name.removesuffix(".weight")
        lora[f"{module}.lora_A"], lora[f"{module}.lora_B"] = (
            tensor(module + s, torch.Size(shape), 0.2) for s, shape in (("A", (RANK, columns)), ("B", (rows, RANK)))
        )

    if layout == "adapter":
        trained = {name: weight for name, weight in weights.items() if name.startswith("visual.merger.")}
        untrained = {name: tensor(f"untrained {name}", weight.shape, 0.2) for name, weight in trained.items()}
        save_file(weights | untrained, base / "model.safetensors")
        save_file({f"base_model.model.{name}.weight": weight for name, weight in lora.items()}, checkpoint / "adapter_model.safetensors")
        targets = sorted({name.rpartition(".")[0] for name in lora})
        (checkpoint / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "target_modules": targets}))
        torch.save(head | {f"base_model.model.{name}": weight for name, weight in trained.items()}, checkpoint / "non_lora_state_dict.pth")
        return folder
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:vocab].clone()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    full = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if f"{module}.lora_A" not in lora:
            full[name] = weight
        elif layout == "merged":
            delta = lora[f"{module}.lora_B"].float() @ lora[f"{module}.lora_A"].float() * (ALPHA / RANK)
            full[name] = weight.float() + delta if kind == "weight" else weight
        else:
            full[f"{module}.base_layer.{kind}"] = weight
            full |= {f"{module}.{part}.default.weight": lora[f"{module}.{part}"] for part in ("lora_A", "lora_B")}
    full = head | {f"base_model.model.{name}": weight for name, weight in full.items()}
    if layout == "merged":
        full = {name.removeprefix("base_model.model."): weight for name, weight in full.items()}
    if layout == "new_names":
        moves = {
            "base_model.model.model.": "base_model.model.model.language_model.",
            "base_model.model.visual.": "base_model.model.model.visual.",
        }
        for old, new in moves.items():
            full = {new + name.removeprefix(old) if name.startswith(old) else name: weight for name, weight in full.items()}
    torch.save(full, checkpoint / "model.pth")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The published layout. Not to be changed."""
    return write_videoalign(tmp_path_factory.mktemp("videoalign") / "VideoReward")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """The same as an adapter. Not to be changed."""
    return write_videoalign(tmp_path_factory.mktemp("videoalign") / "VideoReward", "adapter")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The published layout, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "VideoReward"))


def clips(batch: int = 2, frames: int = 9, height: int = 60, width: int = 90) -> torch.Tensor:
    """Smooth moving patterns, (B, 3, frames, height, width) in [-1, 1]."""
    t, y, x = torch.meshgrid(torch.arange(frames) / 3, torch.arange(height) / 11, torch.arange(width) / 7, indexing="ij")
    return torch.stack([torch.stack([torch.sin(x * (i + 1) + t + c) * torch.cos(y + c * t) for c in range(3)]) for i in range(batch)])


def rows(*prompts: str) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


OPTIONS = {"min_frame_pixels": 3136, "dtype": "float32"}  # 56 x 84 pixels of these clips, not 280 x 392


# -------------------------------------------------------------------------------------------------------------------- scores

# What VideoAlign's own code gives in transformers 4.45.2 and peft 0.13.2 (eager float32), for the clips and prompts here: VQ, MQ, TA.
RELEASED = torch.tensor([[4.680251, -6.514117, 2.672046], [4.227895, -6.629350, 1.181967]])
LOADERS = (load_videoalign_vq, load_videoalign_mq, load_videoalign_ta)


def ratings(folder: Path, media: torch.Tensor, prompts: list[str], **options) -> torch.Tensor:
    rewards = [load(str(folder), CPU, **OPTIONS | {"norm": 0} | options) for load in LOADERS]
    return torch.stack([reward(media, rows(*prompts)) for reward in rewards], 1)


@pytest.mark.parametrize("layout", ["full", "adapter", "merged", "new_names"])
def test_ratings_are_those_of_the_released_code(tmp_path, layout):
    result = ratings(write_videoalign(tmp_path / "VideoReward", layout), clips(), PROMPTS)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert (result - RELEASED).abs().max() < 2e-5


def test_normalised_by_default(folder):
    mean, std = torch.tensor([3.6757, 1.1646, 2.8105]), torch.tensor([2.2476, 1.3811, 2.5121])
    assert torch.allclose(ratings(folder, clips(), PROMPTS, norm=1), (RELEASED - mean) / std, atol=2e-5)
    text = f"videoalign.ta={folder},min_frame_pixels=3136,dtype=float32"
    scores = score(load_rewards(parse_rewards([text]), CPU), clips(), rows(*PROMPTS))
    assert torch.allclose(scores["videoalign.ta"], ((RELEASED - mean) / std)[:, 2], atol=2e-5)


def test_scored_clips_are_kept_if_asked(folder, tmp_path):
    """A call for each head, twice: the second call's clips come after the first's, not in their place."""
    media = clips(height=60, width=90)
    reward = load_videoalign_vq(str(folder), CPU, **OPTIONS, norm=0, save_videos=str(tmp_path / "kept"))
    for _ in range(2):
        reward(media, rows(*PROMPTS))
    lines = [json.loads(line) for line in (tmp_path / "kept" / "videoalign.vq_00000.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"videoalign.vq_00000_{i:07d}.mp4" for i in range(4)]
    assert [line["prompt"] for line in lines] == [*PROMPTS, *PROMPTS]
    assert torch.allclose(torch.tensor([line["rating"] for line in lines]), RELEASED[:, 0].repeat(2), atol=2e-5)
    kept = read_video(tmp_path / "kept" / lines[1]["file"]).float()
    assert kept.shape == media[1].shape
    grey, own, other = kept.mean(0), media[1].mean(0), media[0].mean(0)  # an mp4 stores colours coarsely
    assert (grey - own).abs().mean() < 0.03 < (grey - other).abs().mean()


def test_batches_and_the_padding_of_prompts_change_nothing(folder):
    media, prompts = clips(4), [PROMPTS[1], "x", PROMPTS[0], "猫 " * 40]
    together = ratings(folder, media, prompts)
    pairs = torch.cat([ratings(folder, media[i : i + 2], prompts[i : i + 2]) for i in (0, 2)])
    alone = torch.cat([ratings(folder, media[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=2e-5) and torch.allclose(pairs, alone, atol=2e-5)
    assert (together[1:] - together[:-1]).abs().min() > 1e-3


def test_clip_and_caption_matter_and_vq_and_mq_never_see_the_caption(folder):
    media = clips(1)
    one = ratings(folder, media, PROMPTS[:1])
    other_caption = (ratings(folder, media, PROMPTS[1:]) - one).abs()[0]
    assert other_caption[2] > 0.01 and other_caption[:2].max() < 2e-5  # the caption comes after their tokens
    assert (ratings(folder, media.flip(2), PROMPTS[:1]) - one).abs().max() > 0.01


def test_bfloat16_is_close(folder):
    assert (ratings(folder, clips(), PROMPTS, dtype="bfloat16") - RELEASED).abs().max() < 0.5  # the released code differs by 0.22


def test_one_model_and_one_forward_serve_the_three_rewards(folder, monkeypatch):
    calls = []
    whole = videoalign.VideoAlign.ratings
    monkeypatch.setattr(videoalign.VideoAlign, "ratings", lambda *args: calls.append(1) or whole(*args))
    names = [f"videoalign.{head}={folder},min_frame_pixels=784" for head in ("vq", "mq", "ta")]
    rewards = load_rewards(parse_rewards(names), CPU)
    assert len(videoalign._loaded) == 1
    media = clips()
    first = score(rewards, media, rows(*PROMPTS))
    assert len(calls) == 1 and list(first) == ["videoalign.vq", "videoalign.mq", "videoalign.ta"]
    score(rewards, media.clone(), rows(*PROMPTS))
    assert len(calls) == 2
    media.neg_()  # the same tensor, written to
    second = score(rewards, media, rows(*PROMPTS))
    assert len(calls) == 3 and (second["videoalign.vq"] - first["videoalign.vq"]).abs().max() > 0.01
    rewards["videoalign.vq"](media, rows(*PROMPTS))
    rewards["videoalign.ta"](media, rows("another", "prompt"))
    assert len(calls) == 5
    del rewards
    assert not videoalign._loaded


def test_weights_are_those_of_the_file(folder):
    """Nothing random is left: each weight of the model is the file's, the LoRA pairs added."""
    model, head, tokenizer, _ = load_checkpoint(folder, "", CPU, torch.float32)
    file = torch.load(folder / "checkpoint-11352" / "model.pth")
    assert torch.equal(head, file["base_model.model.rm_head.weight"].float())
    for name, weight in model.state_dict().items():
        old = "base_model.model." + name.replace("language_model.", "model.")
        module, _, kind = old.rpartition(".")
        if f"{module}.lora_A.default.weight" in file:
            expected = file[f"{module}.base_layer.{kind}"].double()
            if kind == "weight":
                expected += (
                    (file[f"{module}.lora_B.default.weight"].double() @ file[f"{module}.lora_A.default.weight"].double()) * ALPHA / RANK
                )
        else:
            expected = file[old].double()
        assert torch.allclose(weight.double(), expected, atol=1e-6), name
    assert len(tokenizer) == len(model.language_model.embed_tokens.weight)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_rslora_scales_by_the_root_of_the_rank(copy):
    plain = load_checkpoint(copy, "", CPU, torch.float32)[0].language_model.layers[0].mlp.up_proj.weight
    change_json(copy / "model_config.json", "peft_lora_config", use_rslora=True)
    rooted = load_checkpoint(copy, "", CPU, torch.float32)[0].language_model.layers[0].mlp.up_proj.weight
    base = torch.load(copy / "checkpoint-11352" / "model.pth")["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
    assert torch.allclose((rooted - base.float()), (plain - base.float()) * math.sqrt(RANK), atol=1e-5)


def test_the_published_file_has_the_size_of_these_weights():
    """checkpoint-11352/model.pth has 5,031,072,529 bytes: bfloat16 weights of Qwen2-VL-2B with 151,660 tokens, its output layer apart,
    LoRA of rank 64 on every linear layer of the language model, a head of 1536, and some 200 bytes a name."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig(text_config=text | {"vocab_size": 151660}, vision_config={"hidden_size": 1536}))
    linear = [module for module in model.language_model.layers.modules() if isinstance(module, torch.nn.Linear)]
    lora = sum(64 * (module.in_features + module.out_features) for module in linear)
    number = sum(weight.numel() for weight in model.state_dict().values()) + 151660 * 1536 + lora + 1536
    names = len(model.state_dict()) + 2 * len(linear) + 2
    assert 100 < (5_031_072_529 - 2 * number) / names < 400


# -------------------------------------------------------------------------------------------------------------- what it is shown


def test_every_token_has_one_position_and_the_request_its_words(folder, monkeypatch):
    model = videoalign.VideoAlign(folder, CPU, "", 24.0, 0.0, 0, 3136, "float32")
    given = {}
    whole = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: given.update(inputs) or whole(**inputs))
    with torch.no_grad():
        model.ratings(clips(), PROMPTS)
    ids, positions = given["input_ids"], given["position_ids"]
    assert torch.equal(positions, torch.arange(ids.shape[1]).expand(3, 2, -1))
    assert given["video_grid_thw"].tolist() == [[2, 4, 6]] * 2 and given["pixel_values_videos"].shape == (2 * 48, 1176)
    for row, mask, prompt in zip(ids, given["attention_mask"], PROMPTS):
        length = int(mask.sum())
        assert mask[:length].all() and (row[length:] == model.tokenizer.pad_token_id).all()
        video = "<|vision_start|>" + "<|video_pad|>" * 12 + "<|vision_end|>"
        start = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{video}\nYou are tasked with"
        end = f"\nTextual prompt - {prompt}\nPlease provide the ratings of Text Alignment: <|TA_reward|>\nEND\n<|im_end|>"
        text = model.tokenizer.decode(row[:length])
        assert text.startswith(start) and text.endswith(end + "\n<|im_start|>assistant\n")
        assert [int((row == token).sum()) for token in model.reward_ids] == [1, 1, 1]
    assert hashlib.sha256(REQUEST.encode()).hexdigest() == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"


def test_patches_are_what_the_patch_embedding_convolves():
    """A Conv3d of the patches' size over the whole video gives the same embeddings, each where its token is."""
    video = torch.randn(2, 4, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.Conv3d(3, 5, (2, 14, 14), (2, 14, 14), bias=False)
    patches = patchify(video)
    assert patches.shape == (2 * 2 * 4 * 6, 3 * 2 * 14 * 14)
    embeddings = F.linear(patches, conv.weight.flatten(1))
    expected = conv(video.transpose(1, 2))
    i = 0
    for clip in range(2):
        for time in range(2):
            for row in range(0, 4, 2):
                for column in range(0, 6, 2):
                    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        assert torch.allclose(embeddings[i], expected[clip, :, time, row + y, column + x], atol=1e-5)
                        i += 1


def test_frames_are_resized_in_8_bits_and_normalised():
    from PIL import Image

    clip = clips(1, 4, 60, 90)
    video = resize(clip, 84, 56)
    assert video.shape == (1, 4, 3, 84, 56)
    pixels = (clip[0, :, 2] * 127.5 + 127.5).round().numpy()
    channels = [Image.fromarray(channel).resize((56, 84), Image.Resampling.BICUBIC) for channel in pixels]  # in floats
    expected = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels]).round().clamp(0, 255) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (videoalign.PIXEL_MEAN, videoalign.PIXEL_STD))
    difference = (video[0, 2] - (expected - mean) / std).abs()
    assert difference.max() < 0.016 and difference.mean() < 1e-4  # a sum on the edge may round to the next of 256 levels


@pytest.mark.parametrize(
    ("frames", "clip_fps", "fps", "expected"),
    [
        (53, 24, 2, [0, 17, 35, 52]),
        (9, 24, 2, [0, 3, 5, 8]),
        (53, 8, 2, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]),  # as the paper's release stores and scores clips
        (
            53,
            24,
            6,
            [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52],
        ),  # the same in the clip's own time, as the launch scripts have it
        (81, 16, 2, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (3, 24, 2, [0, 2]),
        (2, 24, 2, [0, 1]),
        (5, 24, 24, [0, 1, 3, 4]),
        (8, 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_frames_are_spread_evenly_and_even_in_number(frames, clip_fps, fps, expected):
    assert sample_frames(frames, clip_fps, fps).tolist() == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 480), (448, 448)), ((32, 32), (336, 336)), ((400, 640), (336, 560)), ((720, 1280), (336, 588)), ((336, 448), (336, 448))],
)
def test_frame_sizes_between_the_limits(size, expected):
    assert frame_size(*size, 128 * 28 * 28, 200704) == expected


def test_options_change_what_is_shown(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(videoalign, "patchify", lambda video: shown.append(tuple(video.shape)) or patchify(video))
    ratings(folder, clips(1, 25), PROMPTS[:1], clip_fps=8.0, fps=4.0, max_frame_pixels=2400)
    ratings(folder, clips(1, 25), PROMPTS[:1], clip_fps=8.0)
    assert shown == [(1, 12, 3, 28, 56), (1, 6, 3, 56, 84)]


# -------------------------------------------------------------------------------------------------------------------- refusals


def change_json(path: Path, section: str, **values) -> None:
    settings = json.loads(path.read_text())
    settings[section] |= values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def change_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Names may leave out "base_model.model."; None deletes."""
    weights = torch.load(path)
    for name, value in changes.items():
        weights.pop(f"base_model.model.{name}", None)
        if value is not None:
            weights[f"base_model.model.{name}"] = value
    torch.save(weights, path)


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        load_videoalign_vq(str(folder), CPU, **OPTIONS | options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"visual.merger.mlp.0.weight": None}, "model.pth lacks visual.merger.mlp.0.weight"),
        ({"visual.merger.mlp.0.weight": None, "visual.merger.mlp.0.bias": None}, "lacks visual.merger.mlp.0.bias and 1 more"),
        ({"model.norm.weight": None}, "lacks language_model.norm.weight"),
        ({"model.layers.1.self_attn.q_proj.lora_A.default.weight": None}, "lacks language_model.layers.1.self_attn.q_proj.lora_A.weight"),
        ({"model.layers.1.self_attn.q_proj.base_layer.weight": None}, "lacks language_model.layers.1.self_attn.q_proj.base_layer.weight"),
        ({"model.layers.1.self_attn.q_proj.base_layer.bias": None}, "lacks language_model.layers.1.self_attn.q_proj.bias"),
        ({"model.layers.2.norm.weight": torch.ones(2)}, "has unknown weights: language_model.layers.2.norm.weight"),
        ({"visual.patch_embed.proj.weight": torch.ones(16, 3, 2, 7, 7)}, "is (16, 3, 2, 7, 7), but"),
        ({"model.embed_tokens.weight": torch.ones(50, 32)}, "embed_tokens.weight is (50, 32), but"),
        ({"model.layers.0.mlp.up_proj.lora_A.default.weight": torch.ones(7, 32)}, "(7, 32) and (48, 3), but rank 3 and (48, 32)"),
        ({"rm_head.weight": None}, "must have a reward head rm_head.weight of (1, 32), but has none"),
        ({"rm_head.weight": torch.ones(3, 32)}, "but has (3, 32)"),
    ],
)
def test_damaged_weights_are_refused(copy, changes, words):
    change_weights(copy / "checkpoint-11352" / "model.pth", **changes)
    sentence = refusal(copy)
    assert words in sentence and str(copy) in sentence


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model_config.json", None, "model_config.json can't be read"),
        ("model_config.json", b"{", "model_config.json can't be read"),
        ("model_config.json", b'{"model_config": {}}', "has no model_config.model_name_or_path"),
        ("model_config.json", b'{"model_config": ["model_name_or_path"]}', "has no model_config.model_name_or_path"),
        ("model_config.json", b"[]", "model_config.json holds a list, not an object"),
        ("checkpoint-11352/model.pth", 5000, "model.pth can't be read as weights"),
        ("checkpoint-11352/model.pth", b"not a zip file", "model.pth can't be read as weights"),
        ("checkpoint-11352/model.pth", None, "has neither model.pth nor adapter_model.safetensors: download it again"),
        ("Qwen2-VL-2B-Instruct/config.json", None, "say base=FOLDER"),
        ("Qwen2-VL-2B-Instruct/tokenizer.json", None, "say base=FOLDER"),
        ("Qwen2-VL-2B-Instruct/config.json", b"{", "can't be read as a Qwen2-VL folder"),
        ("Qwen2-VL-2B-Instruct/tokenizer.json", b"{", "Qwen2-VL-2B-Instruct is no tokenizer that works"),
    ],
)
def test_damaged_files_are_refused(copy, name, content, words):
    """content: what to write, how many bytes to keep, None to delete."""
    path = copy / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    sentence = refusal(copy)
    assert any(word in sentence for word in words.split("|")) and str(copy) in sentence


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model_config", {"output_dim": 3}, "model_config.output_dim is 3, but only 1 is supported"),
        ("model_config", {"use_special_tokens": False}, "use_special_tokens is False"),
        ("data_config", {"prompt_template_type": "simple"}, "prompt_template_type is 'simple'"),
        ("data_config", {"num_frames": 8}, "num_frames is 8"),
        ("data_config", {"sample_type": "multi_pts"}, "sample_type is 'multi_pts'"),
        ("peft_lora_config", {"lora_r": 4}, "rank 4"),
        ("peft_lora_config", {"lora_r": 0}, "peft_lora_config.lora_r is 0, but must be a number above 0"),
        ("peft_lora_config", {"lora_alpha": "5"}, "lora_alpha is '5', but must be a number above 0"),
        ("data_config", {"fps": [2]}, "data_config.fps is [2], but must be a number above 0"),
        ("data_config", {"max_frame_pixels": "200704"}, "max_frame_pixels is '200704', but must be a number above 0"),
        ("model_config", {"model_name_or_path": None}, "model_name_or_path is None, but must be a string"),
        ("inference_config", {"VQ_mean": "3.6"}, "VQ_mean and VQ_std are '3.6' and 2.2476, but must be finite numbers"),
        ("inference_config", {"VQ_std": 0}, "VQ_mean and VQ_std are 3.6757 and 0, but must be"),
    ],
)
def test_other_settings_are_refused(copy, section, values, words):
    change_json(copy / "model_config.json", section, **values)
    assert words in refusal(copy)


def test_pickles_are_not_unpickled(copy, tmp_path):
    torch.save({"base_model.model.rm_head.weight": PosixTrap(tmp_path / "ran")}, copy / "checkpoint-11352" / "model.pth")
    assert "can't be read as weights" in refusal(copy)
    assert not (tmp_path / "ran").exists()


class PosixTrap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "missing", ["pair", "head", "targets", "adapter_config.json", "non_lora_state_dict.pth", "adapter_model.safetensors", "base"]
)
def test_damaged_adapters_are_refused(adapter, tmp_path, missing):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter, tmp_path / "VideoReward"))
    checkpoint, base = folder / "checkpoint-11352", folder / "Qwen2-VL-2B-Instruct"
    if missing == "pair":
        weights = load_file(checkpoint / "adapter_model.safetensors")
        save_file(
            {name: weight for name, weight in weights.items() if "layers.1.mlp.up_proj" not in name},
            checkpoint / "adapter_model.safetensors",
        )
        assert "adapter_model.safetensors lacks language_model.layers.1.mlp.up_proj.lora_A.weight" in refusal(folder)
    elif missing == "head":
        change_weights(checkpoint / "non_lora_state_dict.pth", **{"rm_head.weight": None})
        assert "must have a reward head" in refusal(folder)
    elif missing == "targets":
        (checkpoint / "adapter_config.json").write_text('{"target_modules": {"q_proj": 1}}')
        assert "must have target_modules, as names or one pattern, not {'q_proj': 1}" in refusal(folder)
    elif missing == "base":
        (base / "model.safetensors").unlink()
        assert f"the *.safetensors of {base} must have embeddings" in refusal(folder)
    else:
        (checkpoint / missing).unlink()
        assert f"{checkpoint / missing} can't be read" in refusal(folder)


def test_an_adapter_that_peft_saved_with_the_embeddings_is_read(adapter, tmp_path):
    """peft adds the embeddings and the output layer by itself where the vocabulary was changed, and may shorten the targets' names."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter, tmp_path / "VideoReward"))
    checkpoint, base = folder / "checkpoint-11352", folder / "Qwen2-VL-2B-Instruct" / "model.safetensors"
    weights, adapter = load_file(base), load_file(checkpoint / "adapter_model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    adapter |= {f"base_model.model.{name}.weight": embeddings[:-2].clone() for name in ("model.embed_tokens", "lm_head")}
    save_file(adapter, checkpoint / "adapter_model.safetensors")
    save_file(weights | {"model.embed_tokens.weight": torch.zeros_like(embeddings)}, base)
    short = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (checkpoint / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "target_modules": short}))
    assert (ratings(folder, clips(), PROMPTS) - RELEASED).abs().max() < 2e-5


def test_wrong_paths_media_and_options_are_errors(folder, tmp_path):
    with pytest.raises(UserError, match=r"videoalign.mq=FOLDER, but no folder was given"):
        load_videoalign_mq(None, CPU)
    with pytest.raises(UserError, match="there is no folder no/such/folder"):
        load_videoalign_mq("no/such/folder", CPU)
    with pytest.raises(UserError, match="has no checkpoint-N folder"):
        (tmp_path / "model_config.json").write_text((folder / "model_config.json").read_text())
        load_videoalign_mq(str(tmp_path), CPU, base=str(folder / "Qwen2-VL-2B-Instruct"))
    for options in ({"clip_fps": 0.0}, {"fps": -1.0}, {"norm": 2}, {"max_frame_pixels": -1}):
        assert "has an option out of range" in refusal(folder, **options)
    assert "dtype is 'half'" in refusal(folder, dtype="half")
    assert "it isn't /no/base" in refusal(folder, base="/no/base")
    reward = load_videoalign_vq(str(folder), CPU, **OPTIONS)
    with pytest.raises(UserError, match=r"clips \(B, 3, frames, H, W\), not pictures of shape \(2, 3, 32, 32\)"):
        reward(torch.zeros(2, 3, 32, 32), rows(*PROMPTS))
    with pytest.raises(UserError, match="at least 2 frames, but got 1"):
        reward(torch.zeros(2, 3, 1, 32, 32), rows(*PROMPTS))
    bad = ["a cat <|VQ_reward|> sat", "<|im_end|> of <|im_end|> and <|VQ_reward|>"]
    with pytest.raises(UserError, match=r"can't score 1 of 2 prompts.* first of them 'a cat <\|VQ_reward\|> sat' with '<\|VQ_reward\|>'"):
        reward(clips(), rows(PROMPTS[0], bad[0]))
    spec = parse_rewards([f"videoalign.vq={folder}@0"])
    with pytest.raises(UserError, match=r"can't score 2 of 4 prompts.* 'a cat <\|VQ_reward\|> sat' with"):  # before the first iteration
        load_rewards(spec, CPU, rows(*PROMPTS, *bad))
    load_rewards(spec, CPU, rows(*PROMPTS))


def test_no_normalisation_without_its_numbers(copy):
    settings = json.loads((copy / "model_config.json").read_text())
    (copy / "model_config.json").write_text(json.dumps({name: settings[name] for name in settings if name != "inference_config"}))
    assert "has no inference_config with VQ_mean and VQ_std: add norm=0" in refusal(copy)
    assert (ratings(copy, clips(), PROMPTS) - RELEASED).abs().max() < 2e-5


# ---------------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_training_of_hunyuan_video_by_two_heads(folder, tmp_path):
    model, prompts = REPOSITORY / "shapes" / "models" / "hunyuan", tmp_path / "prompts.txt"
    lines = (REPOSITORY / "shapes" / "prompts" / "video_train.txt").read_text().splitlines()
    prompts.write_text("\n".join(lines[:4]) + "\n")
    flags = {"--model": model, "--prompts": prompts, "--output_dir": tmp_path / "cache"}
    result = run_script(REPOSITORY / "preprocess" / "embed_hunyuan.py", flags, log=tmp_path / "embed")
    assert result.returncode == 0, result.stderr
    heads = tuple(f"videoalign.{head}={folder},min_frame_pixels=3136" for head in ("vq", "mq"))
    flags = {"--model": model, "--embeddings": tmp_path / "cache", "--output_dir": tmp_path / "run"} | SMALL_RUN
    flags |= {"--num_frames": 9, "--iterations": 2, "--rewards": heads, "--reward_weights": (1, 1)}
    result = run_script(REPOSITORY / "train_grpo_hunyuan.py", flags, log=tmp_path / "train")
    assert result.returncode == 0, result.stderr
    metrics = metrics_of(tmp_path / "run")
    assert len(metrics) == 2
    for row in metrics:
        assert row["reward/videoalign.vq_group_std"] > 0 and row["reward/videoalign.mq_group_std"] > 0
        assert row["reward/zero_std_frac"] == 0
