"""evaluate.py: base and trained model get the same noise, whatever the number of processes, with the run's sampling settings."""

import json
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EVALUATE, MODEL, REPOSITORY, launch, run_script
from PIL import Image

import evaluate as script
from fastvideo.parallel.distributed import Ranks, keyed_generator


@pytest.fixture(scope="module")
def evaluate(prompt_file, tmp_path_factory):
    """Function that evaluates a checkpoint with few pictures and gives the results."""

    def run(*flags: object, processes: int = 1, launcher=run_script, check: bool = True):
        folder = tmp_path_factory.mktemp("evaluation")
        basic = {"--model": MODEL, "--prompts": prompt_file, "--rewards": ("aesthetic", "shapes"), "--num_seeds": 2}
        basic |= {"--output_dir": folder / "evaluation"}
        options = {"log": folder / "log"} if launcher is run_script else {}
        result = launcher(EVALUATE, basic, *flags, processes=processes, **options)
        if not check:
            return result
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        return json.loads((folder / "evaluation" / "results.json").read_text()), folder / "evaluation"

    return run


@pytest.fixture(scope="module")
def results_of_run(evaluate, finished_run):
    return evaluate({"--checkpoint": finished_run / "export"})


@pytest.fixture
def base_as_checkpoint(finished_run, tmp_path) -> Path:
    """A run folder whose export is the base model itself."""
    shutil.copytree(MODEL / "transformer", tmp_path / "run" / "export" / "transformer")
    shutil.copy(finished_run / "manifest.json", tmp_path / "run")
    return tmp_path / "run" / "export"


def test_results_and_pictures(results_of_run, finished_run):
    results, folder = results_of_run
    for model in ("base", "trained"):
        for reward in ("aesthetic", "shapes"):
            summary = results[model][reward]
            assert summary.keys() == {"mean", "seed_std", "seed_means"}
            assert len(summary["seed_means"]) == 2
            assert summary["mean"] == pytest.approx(sum(summary["seed_means"]) / 2)
            assert summary["seed_std"] == pytest.approx(abs(summary["seed_means"][0] - summary["seed_means"][1]) / 2**0.5)
    assert results["base"]["aesthetic"]["mean"] != results["trained"]["aesthetic"]["mean"]
    assert (results["prompts"], results["images"]) == (10, 20)
    for name in ("samples.png", "rewards.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_settings_come_from_the_run(results_of_run, finished_run, evaluate):
    """Unless flags say otherwise."""
    settings = {"sampling_steps": 5, "shift": 3.0, "embedded_guidance": 3.5, "height": 32, "width": 32, "max_sequence_length": 16}
    assert json.loads((finished_run / "manifest.json").read_text())["sampling"] == settings
    assert results_of_run[0]["sampling"] == settings
    results, _ = evaluate({"--checkpoint": finished_run / "export", "--sampling_steps": 3, "--shift": 1})
    assert results["sampling"] == settings | {"sampling_steps": 3, "shift": 1.0}
    assert results["base"]["aesthetic"]["mean"] != results_of_run[0]["base"]["aesthetic"]["mean"]


def test_base_as_its_own_checkpoint(evaluate, base_as_checkpoint):
    """The same noise for both: no difference at all."""
    results, _ = evaluate({"--checkpoint": base_as_checkpoint, "--images_per_prompt": 2})
    assert results["trained"] == results["base"]
    assert results["images"] == 40


def test_base_alone(evaluate, results_of_run):
    results, folder = evaluate({"--sampling_steps": 5})
    assert results["base"] == results_of_run[0]["base"]
    assert "trained" not in results
    assert (folder / "samples.png").exists()
    assert not (folder / "rewards.png").exists()


def test_each_picture_of_each_seed_has_noise_of_its_own(monkeypatch):
    """By its key, in its place among the scores, whichever process has drawn it."""

    class FluxPipeline:  # draws noise
        def __call__(self, prompt, generator, **settings):
            assert len(prompt) == len(generator)
            return SimpleNamespace(images=torch.stack([torch.rand(3, 4, 4, generator=one) for one in generator]))

    def brightness(media, rows):
        return media.mean((1, 2, 3)) + torch.tensor([10.0 * len(row["prompt"]) for row in rows])

    parts = []
    monkeypatch.setattr(script.distributed, "all_gather_object", lambda value: parts.append(value) or parts[-1:])
    args = SimpleNamespace(num_seeds=2, images_per_prompt=3, batch_size=4)
    rows, rewards = [{"prompt": "a"}, {"prompt": "bb"}], {"brightness": brightness}
    run = partial(script.evaluate, "base", FluxPipeline(), {"height": 4}, rows, rewards, args)
    scores, shown = run(Ranks(0, 1, torch.device("cpu")))
    noise = {
        key: torch.rand(3, 4, 4, generator=keyed_generator(key[0], "evaluation", *key[1:])) * 2 - 1
        for key in product(range(2), range(2), range(3))
    }
    expected = [
        [10 * (prompt + 1) + noise[seed, prompt, k].mean().item() for prompt, k in product(range(2), range(3))] for seed in range(2)
    ]
    for found, wanted in zip(scores["brightness"], expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert len({round(value % 10, 5) for value in expected[0] + expected[1]}) == 12
    torch.testing.assert_close(shown, torch.stack([noise[0, prompt, 0] for prompt in range(2)]))
    whole = parts[0]
    parts.clear()
    for rank in range(2):
        with pytest.raises(KeyError):  # for want of what the other process has
            run(Ranks(rank, 2, torch.device("cpu")))
    for job, values in (parts[0] | parts[2]).items():
        assert whole.pop(job)["brightness"] == pytest.approx(values["brightness"], abs=1e-5)
    assert not whole


def assert_equal_scores(results, expected):
    for model in ("base", "trained"):
        for reward in ("aesthetic", "shapes"):
            for key in ("mean", "seed_std", "seed_means"):
                assert results[model][reward][key] == pytest.approx(expected[model][reward][key], abs=1e-6)


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 16), (1, 3), (2, 7)])
def test_layout_changes_nothing(evaluate, results_of_run, finished_run, processes, batch_size):
    results, folder = evaluate({"--checkpoint": finished_run / "export", "--batch_size": batch_size}, processes=processes)
    assert_equal_scores(results, results_of_run[0])
    assert {path.name for path in folder.iterdir()} == {"results.json", "samples.png", "samples.txt", "rewards.png"}


@pytest.mark.slow
def test_command_line_and_torchrun(evaluate, results_of_run, finished_run):
    for processes in (1, 2):
        results, _ = evaluate({"--checkpoint": finished_run / "export"}, processes=processes, launcher=launch)
        assert_equal_scores(results, results_of_run[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--checkpoint": MODEL}, "must be the export folder inside a run folder: there is no"),
        ({"--model": REPOSITORY / "shapes"}, "is no diffusers folder: it has no model_index.json"),
        ({"--prompts": "nowhere.txt"}, "cannot read prompt file nowhere.txt"),
        ({"--rewards": "beauty"}, "--rewards: unknown reward 'beauty'"),
    ],
    ids=["no_run", "no_model", "no_prompts", "unknown_reward"],
)
def test_mistakes(evaluate, flags, message):
    result = evaluate(flags, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert message in sentences[0]


def test_broken_checkpoint(evaluate, base_as_checkpoint):
    weights = next((base_as_checkpoint / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    result = evaluate({"--checkpoint": base_as_checkpoint}, check=False)
    assert result.returncode == 2
    assert f"error: --checkpoint: {base_as_checkpoint / 'transformer'} cannot be loaded" in result.stderr


def test_a_first_frame_of_another_size_is_refused(evaluate, tmp_path):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "wide.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "image": "wide.png"}\n')
    flags = {"--model": MODEL.parent / "skyreels", "--prompts": tmp_path / "p.jsonl", "--height": 32, "--width": 32, "--rewards": "motion"}
    result = evaluate(flags, check=False)
    assert result.returncode == 2
    assert f"error: line 1 of {tmp_path / 'p.jsonl'}: image {tmp_path / 'wide.png'} is 64 x 32 pixels, not 32 x 32" in result.stderr


@pytest.mark.slow
def test_a_first_frame_is_stretched_on_request(evaluate, tmp_path):
    """As if it had been stretched before; not cropped."""
    wide = Image.radial_gradient("L").resize((64, 32)).convert("RGB")
    wide.paste("red", (0, 0, 20, 32))
    pictures = {"wide": wide, "stretched": wide.resize((32, 32), Image.Resampling.LANCZOS), "cropped": wide.crop((16, 0, 48, 32))}
    scores = {}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        prompts = tmp_path / f"{name}.jsonl"
        prompts.write_text(json.dumps({"prompt": "a red circle moving left", "image": f"{name}.png"}))
        flags = {"--model": MODEL.parent / "skyreels", "--prompts": prompts, "--height": 32, "--width": 32, "--num_seeds": 1}
        flags |= {"--sampling_steps": 2, "--rewards": ("visual", "motion")}
        results, _ = evaluate(flags, *["--resize"] * (name == "wide"))
        scores[name] = [results["base"][reward]["mean"] for reward in ("visual", "motion")]
    assert scores["wide"] == pytest.approx(scores["stretched"], rel=1e-4)
    assert scores["wide"] != pytest.approx(scores["cropped"], rel=1e-2)
