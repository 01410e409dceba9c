"""The facts of each model agree with its scripts and its folder, and are enough to make a tiny folder that works."""

import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, metrics_of, run_script

import evaluate
from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.models.model_folder import check_model
from shapes.untrained import make

MODELS = REPOSITORY / "shapes" / "models"
PROMPTS = REPOSITORY / "shapes" / "prompts"
MEASURED = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}  # of a VAE's latents, after its training
pytestmark = pytest.mark.parametrize("name", FAMILIES)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_script_has_the_same_sampling_settings(name):
    module, facts = importlib.import_module(f"train_grpo_{name}"), FAMILIES[name]
    assert re.findall(r'Run\(args, "(\w+)", __file__', Path(module.__file__).read_text()) == [name]
    defaults = {field.name: field.default for field in fields(module.Args)}
    for setting, (_, default) in facts.sampling.items():
        if setting == "max_sequence_length":  # of preprocessing
            assert facts.cached["prompt_embeds"][0] == facts.text_before + default
        elif default is not None:
            assert defaults[setting] == default, setting
    for key, size in facts.full_size.items():
        assert key.startswith(name), "pytest -k NAME finds its tests by it"
        given = defaults | size.flags
        frames = given.get("num_frames", 1)
        assert size.media == (3, *([frames] if frames > 1 else []), given["height"], given["width"])


def test_a_trained_folder_has_these_tiny_sizes(name):
    if not (MODELS / name).is_dir():
        pytest.skip("has no trained folder")
    facts = FAMILIES[name]
    for folder, part in {facts.network_folder: facts.network, "vae": facts.vae, **facts.encoders}.items():
        config = json.loads((MODELS / name / folder / "config.json").read_bytes())
        expected = {setting: list(value) if isinstance(value, tuple) else value for setting, value in part.tiny.items()}
        assert {setting: config[setting] for setting in expected.keys() - MEASURED} == {
            k: v for k, v in expected.items() if k not in MEASURED
        }


# The tokenizer that the pipeline cuts a prompt by, in which max_sequence_length counts.
LIMITED_BY = {"flux": "tokenizer_2", "hunyuan": "tokenizer", "skyreels": "tokenizer", "wan": "tokenizer"}


def test_text_is_as_long_as_the_right_tokenizer_allows(name, tmp_path):
    facts = FAMILIES[name]
    if "max_sequence_length" not in facts.sampling:
        pytest.skip("its text has one length")
    published = facts.sampling["max_sequence_length"][1]
    tokenizers = {f"tokenizer{f'_{i}' * (i > 1)}": SimpleNamespace(model_max_length=10 + i) for i in range(1, 4)}
    vae = SimpleNamespace(config=SimpleNamespace(sample_size=32))
    args = evaluate.Args(tmp_path, tmp_path, prompts=tmp_path, rewards=("shapes",))
    limit = LIMITED_BY.get(name, facts.length_limit)

    def length() -> int:
        pipeline = type(facts.pipeline, (), tokenizers | {"vae": vae})()
        return evaluate.sampling_settings(args, pipeline)["max_sequence_length"]

    assert length() == tokenizers[limit].model_max_length
    tokenizers[limit].model_max_length = 100_000
    assert length() == published


def test_an_untrained_folder_is_complete_and_the_same_each_time(name, tmp_path):
    for folder, seed in (("one", 0), ("same", 0), ("other", 1)):
        make(name, tmp_path / folder, seed)
    check_model(tmp_path / "one", name)
    one, same, other = (files(tmp_path / folder) for folder in ("one", "same", "other"))
    assert one == same
    assert one.keys() == other.keys()
    assert {path for path in one if one[path] != other[path]} == {path for path in one if path.endswith(".safetensors")}
    with pytest.raises(UserError, match="exists already"):
        make(name, tmp_path / "one")


def documented_commands() -> list[list[str]]:
    """Those of docs/new_model.md from an untrained folder to an evaluation."""
    text = (REPOSITORY / "docs" / "new_model.md").read_text()
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "shapes/untrained.py" in block)
    return [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_an_untrained_folder_is_embedded_trained_and_evaluated(name, tmp_path):
    """By the documented commands."""
    facts = FAMILIES[name]
    clips = "num_frames" in facts.sampling
    instead = {"train.txt": "i2v_train.jsonl", "heldout.txt": "i2v_heldout.jsonl"} if facts.from_images else {}
    instead = instead or ({"train.txt": "video_train.txt", "heldout.txt": "video_heldout.txt"} if clips else {})
    commands = documented_commands()
    scripts = [command[0].replace("NAME", name) for command in commands]
    assert scripts[2:4] == [f"preprocess/embed_{name}.py", f"train_grpo_{name}.py"] and len(commands) == 5
    for script, (_, *words) in zip(scripts, commands, strict=True):
        words = [word.replace("NAME", name).replace("runs/tiny", str(tmp_path)) for word in words]
        prompts = [str(PROMPTS / instead.get(Path(word).name, Path(word).name)) if word.startswith("shapes/") else word for word in words]
        more = {"--height": 32, "--width": 32} if script.startswith("preprocess/embed") and facts.from_images else {}
        more |= {"--num_frames": 9} if script.startswith("train") and clips else {}
        result = run_script(REPOSITORY / script, *prompts, more, log=tmp_path / "log")
        assert result.returncode == 0, (script, result.stderr)
    rows = metrics_of(tmp_path / "run")
    assert [row["policy/ratio_max_dev"] < 2e-6 for row in rows] == [True, True]
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["scores"]["base"] != results["scores"]["run"]
    assert results["sampling"] == json.loads((tmp_path / "run" / "manifest.json").read_text())["sampling"]
