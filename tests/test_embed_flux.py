"""preprocess/embed_flux.py: the cache holds what FluxPipeline.encode_prompt gives, whatever the processes; mistakes end in one sentence."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.parallel.distributed import exit_code_of

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "preprocess" / "embed_flux.py"
MODEL = REPOSITORY / "shapes" / "models" / "flux"
PROMPTS = (REPOSITORY / "shapes" / "prompts" / "train.txt").read_text().splitlines()[:7]
LONG = "a red circle and a blue square and a green triangle and a yellow circle and a red square and a blue triangle"


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join([*PROMPTS[:3], "", PROMPTS[0], LONG, *PROMPTS[3:], ""]))
    return path


def launch(*flags: object, processes: int = 1, **options: object) -> subprocess.CompletedProcess:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, SCRIPT, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def cache_dir(prompt_file) -> Path:
    """Made from another working directory, with relative paths."""
    result = launch(
        *("--model", MODEL, "--prompts", prompt_file.name, "--output_dir", "cache", "--shard_size", 3, "--batch_size", 2),
        cwd=prompt_file.parent,
    )
    assert result.returncode == 0, result.stderr
    assert "1 empty lines skipped: line 4\n" in result.stdout
    assert "1 duplicates dropped: line 5\n" in result.stdout
    assert "1 prompts cut at 16 tokens: line 6\n" in result.stdout
    assert "8 prompts of prompts.txt in 3 shards: cache\n" in result.stdout
    return prompt_file.parent / "cache"


@pytest.fixture(scope="module")
def embed_flux() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embed_flux", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["embed_flux"] = module  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    return module


def test_cache_holds_what_encode_prompt_gives(cache_dir, embed_flux):
    cache = EmbeddingCache(cache_dir)
    prompts = [*PROMPTS[:3], LONG, *PROMPTS[3:]]
    assert [row["prompt"] for row in cache.rows] == prompts
    settings = {"family": "flux", "max_sequence_length": 16, "dtype": "float32"}
    assert settings.items() <= cache.fingerprint.items()

    pipeline = embed_flux.FluxPipeline.from_pretrained(MODEL, transformer=None, vae=None)
    with torch.no_grad():
        prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompts, max_sequence_length=16)
    embeddings = cache.get(range(len(cache)))
    torch.testing.assert_close(embeddings["prompt_embeds"], prompt_embeds, rtol=1e-5, atol=1e-5)  # other batch sizes, other rounding
    torch.testing.assert_close(embeddings["pooled_prompt_embeds"], pooled_prompt_embeds, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompts[:2], max_sequence_length=16)
    assert torch.equal(embeddings["prompt_embeds"][:2], prompt_embeds)  # the script's own first batch
    assert torch.equal(embeddings["pooled_prompt_embeds"][:2], pooled_prompt_embeds)


@pytest.mark.slow
def test_two_processes_make_the_same_shards(cache_dir, prompt_file, tmp_path):
    flags = ("--model", MODEL, "--prompts", prompt_file, "--output_dir", tmp_path / "two", "--shard_size", 3, "--batch_size", 2)
    result = launch(*flags, processes=2)
    assert result.returncode == 0, result.stderr
    shards = sorted(cache_dir.glob("shard-*"))
    assert len(shards) == 3
    for path in shards:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert result.stdout.count("3 shards") == 1  # said once, by rank 0

    result = launch(*flags[:5], cache_dir, *flags[6:], "--max_sequence_length", 8, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("was made with max_sequence_length 16, but this run has 8") == 1, result.stderr


def test_mistake_ends_plain_python_with_one_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    result = launch("--model", MODEL, "--prompts", tmp_path / "empty.txt", "--output_dir", tmp_path / "cache")
    assert result.returncode == 2
    assert f"error: prompt file {tmp_path / 'empty.txt'} holds no prompts" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cache").exists()


# The same, in this process


@pytest.fixture
def error_of(embed_flux, monkeypatch, capsys):
    """Runs the script with flags that must end it with exit code 2; gives the text on stderr."""

    def run_script(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        try:
            code = exit_code_of(embed_flux.main)
        except SystemExit as left:  # of tyro's
            code = left.code
        assert code == 2
        return capsys.readouterr().err

    yield run_script
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the text half of the model, to be broken."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MODEL / name, tmp_path / "model" / name)
    shutil.copy(MODEL / "model_index.json", tmp_path / "model")
    return tmp_path / "model"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "there is no folder"),
        (lambda model: shutil.rmtree(model / "text_encoder"), "text_encoder"),
        (lambda model: shutil.rmtree(model / "tokenizer_2"), "tokenizer_2"),
        (lambda model: (model / "text_encoder_2" / "config.json").unlink(), "text_encoder_2"),
        (lambda model: (model / "text_encoder_2" / "config.json").write_text("{"), "text_encoder_2"),
        (lambda model: truncate(model / "text_encoder_2" / "model.safetensors"), "text_encoder_2"),
        (lambda model: (model / "text_encoder" / "model.safetensors").unlink(), "text_encoder"),
        (lambda model: (model / "tokenizer" / "tokenizer.json").unlink(), "has no tokenizer.json and no vocab.json and merges.txt"),
        (lambda model: (model / "tokenizer_2" / "tokenizer.json").unlink(), "has no tokenizer.json and no spiece.model"),
        (lambda model: (model / "tokenizer_2" / "tokenizer.json").write_text("{"), "model"),
        (lambda model: (model / "model_index.json").unlink(), "model"),
        (lambda model: (model / "model_index.json").write_text("{"), "model"),
    ],
)
def test_broken_model_folder(error_of, model, prompt_file, tmp_path, damage, message):
    damage(model)
    error = error_of("--model", model, "--prompts", prompt_file, "--output_dir", tmp_path / "cache")
    sentence = error.splitlines()[-1]
    assert sentence.startswith("error: --model")
    assert message in sentence
    assert not (tmp_path / "cache").exists()


def test_cache_of_other_encoders_or_settings(error_of, cache_dir, model, prompt_file):
    flags = ("--prompts", prompt_file, "--output_dir", cache_dir, "--shard_size", 3)
    with open(model / "tokenizer" / "tokenizer_config.json", "a") as file:
        file.write("\n")
    assert "was made with tokenizer 'sha256:" in error_of("--model", model, *flags)
    dist.destroy_process_group()
    assert "was made with dtype 'float32', but this run has 'bfloat16'" in error_of("--model", MODEL, *flags, "--dtype", "bfloat16")
    EmbeddingCache(cache_dir)  # untouched


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size", 0), "--batch_size must be at least 1, not 0"),
        (("--shard_size", -1), "--shard_size must be at least 1, not -1"),
        (("--max_sequence_length", 513), "--max_sequence_length must be from 1 to FLUX's 512, not 513"),
        (("--prompt_file", "x"), "--prompt_file"),
        (("--dtype", "float16"), "float16"),
    ],
)
def test_wrong_flags(error_of, prompt_file, tmp_path, flags, message):
    error = error_of("--model", MODEL, "--prompts", prompt_file, "--output_dir", tmp_path / "cache", *flags)
    assert message in " ".join(error.split())
