"""preprocess/embed_{sd,hunyuan,skyreels}.py: caches hold what the pipelines' own functions give; wrong images are named.

What all embedding scripts share is tested with FLUX's, in test_embed_flux.py.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from PIL import Image

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.embeddings.fingerprint import check_encoder
from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.parallel.distributed import exit_code_of

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = REPOSITORY / "shapes" / "models"
PROMPTS = ("a red circle", "a blue square", "a green triangle")
LONG = "a red circle and a blue square and a green triangle and a yellow circle and a red square and a blue triangle"
SIZE = ("--height", 32, "--width", 32)


def main_of(family: str, *flags: object):
    """The main function of preprocess/embed_<family>.py, its command line in place, and no processes yet."""
    leave_processes()
    script = REPOSITORY / "preprocess" / f"embed_{family}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    sys.argv = [str(script), *map(str, flags)]
    return module.main


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    yield
    leave_processes()


def embed(family: str, prompts: Path, output_dir: Path, *flags: object) -> EmbeddingCache:
    """Run the script in this process."""
    main_of(family, "--model", MODELS / family, "--prompts", prompts, "--output_dir", output_dir, *flags)()
    return EmbeddingCache(output_dir)


def error_of(capsys, family: str, prompts: Path, output_dir: Path, *flags: object) -> str:
    """What the script says on stderr before it ends with exit code 2."""
    main = main_of(family, "--model", MODELS / family, "--prompts", prompts, "--output_dir", output_dir, *flags)
    assert exit_code_of(main) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:], LONG]))
    return path


@pytest.fixture
def image_file(tmp_path) -> Path:
    """Three rows, two of them of the same prompt with different images; a PNG with an alpha channel and a JPEG among them."""
    pixels = torch.rand(3, 32, 32, 4, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    Image.fromarray(pixels[0], "RGBA").save(tmp_path / "first.png")
    Image.fromarray(pixels[1, ..., :3]).save(tmp_path / "second.png")
    Image.fromarray(pixels[2, ..., :3]).save(tmp_path / "third.jpg")
    rows = [(PROMPTS[0], "first.png"), (PROMPTS[0], "second.png"), (PROMPTS[1], "third.jpg"), (PROMPTS[0], "first.png")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "image": image}) + "\n" for prompt, image in rows))
    return path


@torch.no_grad()
def test_sd_cache_is_encode_prompt_and_ends_with_the_empty_prompt(prompt_file, tmp_path, capsys):
    cache = embed("sd", prompt_file, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert "1 prompts cut at 16 tokens: line 5\n" in printed
    assert "4 prompts of " in printed
    assert [row["prompt"] for row in cache.rows] == [*PROMPTS, LONG, ""]
    assert (cache.num_prompts, cache.unconditional) == (4, 4)
    assert cache.fingerprint["family"] == "sd"

    pipeline = DiffusionPipeline.from_pretrained(MODELS / "sd", dtype=torch.float32)
    prompt_embeds, negative_prompt_embeds = pipeline.encode_prompt([*PROMPTS, LONG], "cpu", 1, do_classifier_free_guidance=True)
    embeddings = cache.get(range(5))["prompt_embeds"]
    torch.testing.assert_close(embeddings[:4], prompt_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings[4], negative_prompt_embeds[0], rtol=1e-5, atol=1e-5)

    with pytest.raises(UserError, match="cache was made with family 'sd', but this run has 'hunyuan'"):
        EmbeddingCache(tmp_path / "cache", {"family": "hunyuan"})


@torch.no_grad()
def test_hunyuan_cache_is_encode_prompt(prompt_file, tmp_path, capsys):
    cache = embed("hunyuan", prompt_file, tmp_path / "cache")
    assert "1 prompts cut at 16 tokens: line 5\n" in capsys.readouterr().out
    settings = {"family": "hunyuan", "max_sequence_length": 16, "dtype": "float32"}
    assert settings.items() <= cache.fingerprint.items()
    assert cache.num_prompts == 4
    with pytest.raises(UserError, match="without an embedding of the empty prompt"):
        _ = cache.unconditional

    pipeline = DiffusionPipeline.from_pretrained(MODELS / "hunyuan", dtype=torch.float32)
    prompt_embeds, pooled_prompt_embeds, mask = pipeline.encode_prompt([*PROMPTS, LONG], max_sequence_length=16)
    embeddings = cache.get(range(4))
    torch.testing.assert_close(embeddings["prompt_embeds"], prompt_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings["pooled_prompt_embeds"], pooled_prompt_embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(embeddings["prompt_attention_mask"], mask)
    assert 0 < mask[0].sum() < mask[3].sum() == 16  # padded, on the right as the network's mask wants it; and cut
    assert mask[0].diff().max() == 0


@torch.no_grad()
def test_skyreels_cache_has_the_posterior_mean_of_each_image(image_file, tmp_path, capsys, monkeypatch):
    transparent = image_file.with_name("first.png").read_bytes()
    cache = embed("skyreels", image_file, tmp_path / "cache", *SIZE)
    assert "1 duplicates dropped: line 4\n" in capsys.readouterr().out
    assert [(row["prompt"], Path(row.get("image", "")).name) for row in cache.rows] == [
        (PROMPTS[0], "first.png"),
        (PROMPTS[0], "second.png"),
        (PROMPTS[1], "third.jpg"),
        ("", ""),
    ]
    assert (cache.num_prompts, cache.unconditional) == (3, 3)
    assert {"family": "skyreels", "height": 32, "width": 32}.items() <= cache.fingerprint.items()

    pipeline = DiffusionPipeline.from_pretrained(MODELS / "skyreels", dtype=torch.float32)
    prompt_embeds, pooled_prompt_embeds, mask = pipeline.encode_prompt([PROMPTS[0], PROMPTS[0], PROMPTS[1], ""], max_sequence_length=16)
    embeddings = cache.get(range(4))
    torch.testing.assert_close(embeddings["prompt_embeds"], prompt_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings["pooled_prompt_embeds"], pooled_prompt_embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(embeddings["prompt_attention_mask"], mask)

    images = [Image.open(image_file.with_name(name)) for name in ("first.png", "second.png", "third.jpg")]
    colour, alpha = np.asarray(images[0])[..., :3].astype(float), np.asarray(images[0])[..., 3:] / 255
    images[0] = Image.fromarray((colour * alpha + 255 * (1 - alpha)).round().astype(np.uint8))  # on white
    pixels = pipeline.video_processor.preprocess(images, height=32, width=32)
    # The pipeline's own latents, but for its draw from the posterior.
    pipeline.vae.encode = lambda x, encode=pipeline.vae.encode: type("Output", (), {"latents": encode(x).latent_dist.mode()})()
    channels = pipeline.transformer.config.in_channels // 2
    _, image_latents = pipeline.prepare_latents(pixels, 3, channels, 32, 32, 1, torch.float32, "cpu")
    assert embeddings["image_latents"].shape == (4, channels, 1, 8, 8)
    torch.testing.assert_close(embeddings["image_latents"][:3], image_latents, rtol=1e-5, atol=1e-5)
    assert not embeddings["image_latents"][3].any()

    # Made again, an intact shard is kept; a missing one is the same as before.
    shard = tmp_path / "cache" / "shard-00000-of-00001.safetensors"
    data, written = shard.read_bytes(), shard.stat().st_mtime_ns
    embed("skyreels", image_file, tmp_path / "cache", *SIZE)
    assert shard.stat().st_mtime_ns == written
    shard.unlink()
    embed("skyreels", image_file, tmp_path / "cache", *SIZE)
    assert shard.read_bytes() == data

    # The VAE is of the fingerprint, and is compared even where there are no text encoders.
    model = tmp_path / "model"
    shutil.copytree(MODELS / "skyreels" / "vae", model / "vae")
    check_encoder(cache, model)
    with open(model / "vae" / "config.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="cache was made with vae 'sha256:"):
        check_encoder(cache, model)

    # A row remembers the pixels that were encoded: a file written anew with the same ones is the same row.
    digest = hashlib.sha256(b"32 x 32" + np.asarray(images[0]).tobytes()).hexdigest()
    assert cache.rows[0]["pixels_sha256"] == digest
    images[0].save(image_file.with_name("first.png"), compress_level=0)
    embed("skyreels", image_file, tmp_path / "cache", *SIZE)

    # A cache made when pictures were read otherwise, here without regard for the transparency, is not gone on with.
    with monkeypatch.context() as patch:
        patch.setattr("fastvideo.embeddings.encoders.to_rgb", lambda image: image.convert("RGB"))
        image_file.with_name("first.png").write_bytes(transparent)
        embed("skyreels", image_file, tmp_path / "old", *SIZE)
    assert "holds other prompts than this run" in error_of(capsys, "skyreels", image_file, tmp_path / "old", *SIZE)

    # A picture that changed under its name is another row.
    images[0].save(image_file.with_name("second.png"))
    assert "holds other prompts than this run" in error_of(capsys, "skyreels", image_file, tmp_path / "cache", *SIZE)


def test_images_of_another_size_are_refused_or_stretched(image_file, tmp_path, capsys):
    image = Image.open(image_file.with_name("second.png")).resize((48, 40))
    image.save(image_file.with_name("second.png"))
    error = error_of(capsys, "skyreels", image_file, tmp_path / "cache", *SIZE)
    assert f"line 2 of {image_file}: image {image_file.with_name('second.png')} is 48 x 40 pixels, not 32 x 32 as --width" in error
    assert not (tmp_path / "cache").exists()

    cache = embed("skyreels", image_file, tmp_path / "cache", *SIZE, "--resize")
    pipeline = DiffusionPipeline.from_pretrained(MODELS / "skyreels", dtype=torch.float32)
    pixels = pipeline.video_processor.preprocess(image, height=32, width=32)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(cache.get([1])["image_latents"], latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no picture", lambda data: data[:-200]], ids=["empty", "text", "cut"])
@pytest.mark.parametrize(("line", "name"), [(1, "first.png"), (3, "third.jpg")])
def test_broken_images_are_named(image_file, tmp_path, capsys, damage, line, name):
    path = image_file.with_name(name)
    path.write_bytes(damage(path.read_bytes()))
    error = error_of(capsys, "skyreels", image_file, tmp_path / "cache", *SIZE)
    assert f"error: line {line} of {image_file}: image {path} cannot be read: " in error
    assert not (tmp_path / "cache").exists()


def test_missing_image_is_named(image_file, tmp_path, capsys):
    image_file.with_name("third.jpg").unlink()
    error = error_of(capsys, "skyreels", image_file, tmp_path / "cache", *SIZE)
    assert f"line 3 of {image_file}" in error
    assert "third.jpg" in error


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("sd", ("--batch_size", 0), "--batch_size must be at least 1, not 0"),
        ("hunyuan", ("--max_sequence_length", 257), "--max_sequence_length must be from 1 to HunyuanVideo's 256, not 257"),
        ("skyreels", ("--max_sequence_length", 0), "--max_sequence_length must be from 1 to SkyReels' 256, not 0"),
        ("wan", ("--max_sequence_length", 513), "--max_sequence_length must be from 1 to Wan's 512, not 513"),
        ("skyreels", ("--height", 40), "--height 40 and --width 640 must be multiples of 16"),
        ("skyreels", ("--prompts", "prompts.txt"), "--prompts prompts.txt must be a .jsonl file"),
    ],
)
def test_wrong_flags(image_file, tmp_path, capsys, family, flags, message):
    assert message in error_of(capsys, family, image_file, tmp_path / "cache", *flags)


@pytest.mark.parametrize("family", FAMILIES)
def test_launcher_passes_its_flags_on(tmp_path, family):
    """From another folder, with a python that only shows its arguments, where all is installed."""
    repository = tmp_path / "repository"
    for folder in ("scripts", ".venv/bin"):
        (repository / folder).mkdir(parents=True)
    for name in ("requirements.txt", "scripts/setup.sh", f"scripts/preprocess_{family}.sh"):
        launcher = shutil.copy(REPOSITORY / name, repository / name)
    (repository / ".venv" / "installed-requirements.txt").write_text(2 * (REPOSITORY / "requirements.txt").read_text())
    (repository / ".venv" / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (repository / ".venv" / "bin" / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "GPUS": "3", "MODEL": "model dir", "PROMPTS": "p.txt"}
    command = ["bash", launcher, "--batch_size", "8"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "set OUTPUT_DIR" in result.stderr
    environment["OUTPUT_DIR"] = "cache"
    arguments = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert arguments[:6] == [f"{repository}/preprocess/check_model.py", "model dir", "--family", family, "--use", "embedding"]
    assert arguments[6:8] == [f"{repository}/scripts/launch.py", "--standalone"]
    assert arguments[8:11] == ["--nproc_per_node", "3", f"{repository}/preprocess/embed_{family}.py"]
    assert "model dir" in arguments[8:]
    assert arguments[-2:] == ["--batch_size", "8"]
