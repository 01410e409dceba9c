"""evaluate.py: base and trained model get the same noise, whatever the number of processes, with the run's sampling settings."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EVALUATE, MODEL, REPOSITORY, launch, run_script, start_forked
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate as script
from fastvideo.errors import UserError
from fastvideo.evaluation import human_pairs
from fastvideo.evaluation.benchmarks import Benchmark
from fastvideo.evaluation.checkpoints import parse_checkpoints, settings_of_runs
from fastvideo.evaluation.diversity import load_features
from fastvideo.evaluation.results import scored
from fastvideo.evaluation.statistics import margins
from fastvideo.evaluation.store import Job, Record, Store
from fastvideo.evaluation.tasks import Task
from fastvideo.media import to_pil
from fastvideo.parallel.distributed import Ranks, keyed_generator

HELDOUT = REPOSITORY / "shapes" / "prompts" / "heldout.txt"


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


def trained(run: Path) -> str:
    """Its checkpoint by that name."""
    return f"trained={run}/export"


@pytest.fixture(scope="module")
def results_of_run(evaluate, finished_run):
    return evaluate({"--checkpoints": trained(finished_run)})


@pytest.fixture
def base_as_checkpoint(finished_run, tmp_path) -> Path:
    """A run folder whose export is the base model itself, in a file that is not the same byte for byte."""
    shutil.copytree(MODEL / "transformer", tmp_path / "run" / "export" / "transformer")
    config = tmp_path / "run" / "export" / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    shutil.copy(finished_run / "manifest.json", tmp_path / "run")
    return tmp_path / "run" / "export"


def test_results_and_pictures(results_of_run, finished_run):
    results, folder = results_of_run
    for model in ("base", "trained"):
        for reward in ("aesthetic", "shapes"):
            summary = results["scores"][model]["prompts"][reward]
            assert summary.keys() == {"mean", "interval", "groups", "seed_std", "seed_means"}
            assert len(summary["seed_means"]) == 2
            assert summary["mean"] == pytest.approx(sum(summary["seed_means"]) / 2)
            assert summary["seed_std"] == pytest.approx(abs(summary["seed_means"][0] - summary["seed_means"][1]) / 2**0.5)
    base, after = (results["scores"][model]["prompts"]["aesthetic"] for model in ("base", "trained"))
    assert base["mean"] != after["mean"]
    benchmark = results["benchmarks"]["prompts"]
    assert (benchmark["prompts"], benchmark["samples"], benchmark["kind"]) == (10, 20, "picture")
    for name in ("samples.png", "rewards.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_settings_come_from_the_run(results_of_run, finished_run, evaluate):
    """Unless flags say otherwise."""
    settings = {"sampling_steps": 5, "shift": 3.0, "embedded_guidance": 3.5, "height": 32, "width": 32, "max_sequence_length": 16}
    assert json.loads((finished_run / "manifest.json").read_text())["sampling"] == settings
    assert results_of_run[0]["sampling"] == settings
    results, _ = evaluate({"--checkpoints": trained(finished_run), "--sampling_steps": 3, "--shift": 1})
    assert results["sampling"] == settings | {"sampling_steps": 3, "shift": 1.0}
    found = [one["scores"]["base"]["prompts"]["aesthetic"]["mean"] for one in (results, results_of_run[0])]
    assert found[0] != found[1]


def test_base_as_its_own_checkpoint(evaluate, base_as_checkpoint):
    """The same noise for both: no difference at all."""
    results, folder = evaluate({"--checkpoints": base_as_checkpoint, "--images_per_prompt": 2})
    assert results["scores"]["run"] == results["scores"]["base"]
    assert results["benchmarks"]["prompts"]["samples"] == 40
    assert len(list((folder / "scores").glob("*/*.jsonl"))) == 2  # both were sampled
    for reward in ("aesthetic", "shapes"):
        difference = results["differences"]["run"]["base"]["prompts"][reward]
        assert (difference["mean"], difference["interval"], difference["win_rate"]["mean"]) == (0, None, 0.5)


def test_base_alone(evaluate, results_of_run):
    results, folder = evaluate({"--sampling_steps": 5})
    assert results["scores"].keys() == {"base"}
    for name, found in results["scores"]["base"]["prompts"].items():
        expected = results_of_run[0]["scores"]["base"]["prompts"][name]
        assert found == expected | {"interval": pytest.approx(expected["interval"], rel=1e-12)}
    assert results["differences"] == {}
    assert (folder / "samples.png").exists()
    assert not (folder / "rewards.png").exists()


def test_each_picture_of_each_seed_has_noise_of_its_own(tmp_path):
    """By its key, in its place among the scores, whichever process has drawn it."""

    class FluxPipeline:  # draws noise
        def __call__(self, prompt, generator, **settings):
            assert len(prompt) == len(generator)
            return SimpleNamespace(images=torch.stack([torch.rand(3, 4, 4, generator=one) for one in generator]))

    def brightness(media, rows):
        return media.mean((1, 2, 3)) + torch.tensor([10.0 * len(row["prompt"]) for row in rows])

    jobs = [Job(*place) for place in product(range(2), range(2), range(3))]
    benchmark = Benchmark("prompts", [{"prompt": "a"}, {"prompt": "bb"}], ("brightness",), 3)
    task = Task(benchmark, {"brightness": brightness}, load_features(None, torch.device("cpu")), None, jobs)

    def run(folder: Path, todo: list[Job], rank: int = 0, processes: int = 1) -> dict[Job, Record]:
        store = Store(folder)
        ranks = Ranks(rank, processes, torch.device("cpu"))
        script.sample("base", FluxPipeline(), {"height": 4}, task, todo, {jobs[3]}, store, 4, ranks)
        return store.new

    whole = run(tmp_path / "one", jobs)
    scores = scored(whole, jobs).scores["brightness"]
    noise = {job: torch.rand(3, 4, 4, generator=keyed_generator(job.seed, "evaluation", job.prompt, job.k)) * 2 - 1 for job in jobs}
    for job in jobs:
        expected = 10 * (job.prompt + 1) + noise[job].mean().item()
        assert scores[job.prompt, job.seed, job.k] == pytest.approx(expected, abs=1e-5)
    assert len({round(float(value) % 10, 5) for value in scores.flatten()}) == 12
    with Image.open(Store(tmp_path / "one").media(jobs[3], clips=False)) as kept:
        assert kept.tobytes() == to_pil(noise[jobs[3]][None])[0].tobytes()
    assert len(list((tmp_path / "one" / "media").iterdir())) == 1
    parts = [run(tmp_path / "two", jobs, rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [6, 6]
    with pytest.raises(KeyError):  # for want of what the other process has
        scored(parts[0], jobs)
    read = Store(tmp_path / "two").read()
    assert read.keys() == whole.keys()
    for job in jobs:
        assert read[job].scores["brightness"] == pytest.approx(whole[job].scores["brightness"], abs=1e-5)
        assert (read[job].features["diversity.pixels"] == whole[job].features["diversity.pixels"]).all()


def sampled(scores: Path) -> list[tuple]:
    """The jobs that stand in a folder of stores, each as often as it was sampled."""
    whole = [(file.parent.name, line) for file in scores.glob("*/*.jsonl") for line in file.read_text().split("\n")[:-1]]
    return [(store, *json.loads(line)["job"]) for store, line in whole]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_evaluation_goes_on_where_it_was(number, results_of_run, finished_run, prompt_file, tmp_path):
    flags = {"--model": MODEL, "--prompts": prompt_file, "--rewards": ("aesthetic", "shapes"), "--num_seeds": 2, "--batch_size": 3}
    flags |= {"--checkpoints": trained(finished_run), "--output_dir": tmp_path / "evaluation"}
    (process,) = start_forked(EVALUATE, flags, log=tmp_path / "killed")
    scores = tmp_path / "evaluation" / "scores"
    while len(sampled(scores)) < 24:  # all of the base's, and some of the checkpoint's
        assert process.exitcode is None, (tmp_path / "killed.0.stderr").read_text()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    said = (tmp_path / "killed.0.stderr").read_text()
    if number == signal.SIGINT:
        assert process.exitcode == 130 and said.endswith("interrupted; the same command goes on from what is finished\n")
    before = len(sampled(scores))
    assert before < 40
    for file in scores.glob("*/*.jsonl"):
        with file.open("a") as lines:
            lines.write('{"job": [0, 9')  # as if that had been while it wrote
    result = run_script(EVALUATE, flags, log=tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert f"{MODEL} on prompts: 20 of 20 are in {scores}" in result.stdout
    assert f"{finished_run}/export on prompts: {before - 20} of 20 are in {scores}" in result.stdout
    assert_equal_scores(json.loads((scores.parent / "results.json").read_text()), results_of_run[0])
    assert len(sampled(scores)) == len(set(sampled(scores))) == 40


@pytest.fixture(scope="module")
def two_checkpoints(evaluate, results_of_run, finished_run, prompt_file, tmp_path_factory):
    """Evaluated with what `results_of_run` has: results, folder, and what the scores' folder had and has."""
    run = tmp_path_factory.mktemp("other") / "finished"  # of the same name, which is taken
    shutil.copytree(finished_run / "export", run / "export")
    shutil.copy(finished_run / "manifest.json", run)
    weights = run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    scores = tmp_path_factory.mktemp("scores") / "scores"
    shutil.copytree(results_of_run[1] / "scores", scores)
    before = sampled(scores)
    flags = {"--checkpoints": (finished_run / "export", run / "export"), "--scores_dir": scores}
    results, folder = evaluate(flags)
    return results, folder, before, flags


def test_another_checkpoint_is_sampled_alone(two_checkpoints, results_of_run):
    results, _, before, flags = two_checkpoints
    after = sampled(flags["--scores_dir"])
    assert (len(before), len(after), len(set(after))) == (40, 60, 60)
    assert len({store for store, *_ in after} - {store for store, *_ in before}) == 1
    assert [*results["scores"]] == ["base", "finished", "finished_2"]
    for name, earlier in (("base", "base"), ("finished", "trained")):
        for reward, entry in results_of_run[0]["scores"][earlier]["prompts"].items():
            found = results["scores"][name]["prompts"][reward]
            assert found == entry | {"interval": pytest.approx(entry["interval"], rel=1e-12)}
    assert {model: [*others] for model, others in results["differences"].items()} == {
        "finished": ["base"],
        "finished_2": ["base", "finished"],
    }


def test_tables_agree_with_each_other_and_with_the_pictures_scores(two_checkpoints):
    results, folder, *_ = two_checkpoints
    pictures = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    assert len(pictures) == 60
    of_model = {model: [row for row in pictures if row["model"] == model] for model in results["scores"]}
    flat = {(row["model"], row["reward"]): row for row in csv.DictReader((folder / "results.csv").read_text().splitlines())}
    assert len(flat) == 9
    markdown = (folder / "results.md").read_text()
    for model in results["scores"]:
        for reward in ("aesthetic", "shapes"):
            scores = [float(row[reward]) for row in of_model[model]]
            entry, row = results["scores"][model]["prompts"][reward], flat[model, reward]
            assert entry["mean"] == pytest.approx(statistics.fmean(scores))
            prompts = [statistics.fmean(float(row[reward]) for row in of_model[model] if row["prompt"] == str(i)) for i in range(10)]
            half = margins(np.array([prompts]))[0]
            assert entry["interval"] == pytest.approx([entry["mean"] - half, entry["mean"] + half])
            assert [float(row[name]) for name in ("mean", "low", "high", "seed_std")] == [
                entry["mean"],
                *entry["interval"],
                entry["seed_std"],
            ]
            assert f"| {reward} | {model} | {entry['mean']:.4f} ± {half:.4f} |" in markdown
            for against in results["differences"].get(model, ()):
                pairs = list(zip(scores, [float(row[reward]) for row in of_model[against]], strict=True))
                difference = results["differences"][model][against]["prompts"][reward]
                assert difference["mean"] == pytest.approx(statistics.fmean(a - b for a, b in pairs))
                rate = statistics.fmean((a > b) + (a == b) / 2 for a, b in pairs)
                assert difference["win_rate"]["mean"] == pytest.approx(rate)
                columns = [f"{name}_to_{against}" for name in ("difference", "low", "high", "win_rate")]
                expected = [difference["mean"], *difference["interval"], difference["win_rate"]["mean"]]
                assert [float(row[column]) for column in columns] == expected
                assert f"{difference['mean']:+.4f} ± " in markdown
                assert f"{rate:.0%} (" in markdown
    assert [row["text"] for row in of_model["base"][::2]] == [row["text"] for row in of_model["finished_2"][::2]]


def test_pictures_and_pairs_for_people(two_checkpoints, evaluate, prompt_file, monkeypatch, capsys):
    """The key says whose each file is; answers by it give the win rate."""
    *_, flags = two_checkpoints
    more = {"--human_pairs": 6, "--human_models": ("finished", "finished_2"), "--num_seeds": 1}
    before = sampled(flags["--scores_dir"])
    _, folder = evaluate(flags, more, "--save_pictures")
    assert len(sampled(flags["--scores_dir"])) - len(before) == 3 * 2  # prompts beyond the eight whose pictures are in the grid
    for model in ("base", "finished", "finished_2"):
        assert len(list((folder / "pictures" / model / "prompts").glob("prompt0000?_seed0_0.png"))) == 10
    pairs = folder / "human_pairs"
    key = list(csv.DictReader((pairs / "key.csv").read_text().splitlines()))
    rows = list(csv.DictReader((pairs / "pairs.csv").read_text().splitlines()))
    assert len(key) == len(rows) == 6
    assert len({row["prompt"] for row in key}) == 6
    assert {row["left"] for row in key} == {"finished", "finished_2"}  # shuffled
    prompts = prompt_file.read_text().splitlines()
    for row, pair in zip(key, rows, strict=True):
        assert pair["prompt"] == prompts[int(row["prompt"])]
        for side in ("left", "right"):
            source = folder / "pictures" / row[side] / "prompts" / f"prompt{int(row['prompt']):05d}_seed{row['seed']}_{row['k']}.png"
            assert (pairs / pair[side]).read_bytes() == source.read_bytes()
            assert not re.search("finished|base", pair[side])

    answers = [["left", "right", "tie", "", "LEFT ", "left"][i] for i in range(6)]
    for pair, answer in zip(rows, answers, strict=True):
        pair["answer"] = answer
    with (pairs / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    won = [
        0.5 if answer == "tie" else float(row[answer.strip().lower()] == "finished_2")
        for row, answer in zip(key, answers, strict=True)
        if answer
    ]
    found = human_pairs.win_rate(pairs)
    assert found[:4] == ("finished", "finished_2", 5, pytest.approx(sum(won) / 5))
    assert found[4] == pytest.approx(margins(np.array([won]))[0])
    monkeypatch.setattr("sys.argv", ["human_pairs", str(pairs)])
    human_pairs.main()
    assert f"finished_2 wins over finished in {sum(won) / 5:.1%} of 5 answers (95 % interval " in capsys.readouterr().out
    answered = (pairs / "pairs.csv").read_text()
    chosen = [("prompts", Job(0, 0, 0))]
    assert "is left as it is" in human_pairs.write_pairs(pairs, ("finished", "finished_2"), chosen, [], [])
    assert (pairs / "pairs.csv").read_text() == answered
    (pairs / "pairs.csv").write_text(answered.replace("tie", "both"))
    with pytest.raises(UserError, match="the answer 'both' to pair 3 must be one of left, right, tie"):
        human_pairs.win_rate(pairs)


def assert_equal_scores(results, expected):
    for model in ("base", "trained"):
        for reward in ("aesthetic", "shapes"):
            for key in ("mean", "seed_std", "seed_means"):
                found, wanted = (one["scores"][model]["prompts"][reward][key] for one in (results, expected))
                assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 16), (1, 3), (2, 7)])
def test_layout_changes_nothing(evaluate, results_of_run, finished_run, processes, batch_size):
    results, folder = evaluate({"--checkpoints": trained(finished_run), "--batch_size": batch_size}, processes=processes)
    assert_equal_scores(results, results_of_run[0])
    tables = {"results.json", "results.csv", "results.md", "scores.csv"}
    assert {path.name for path in folder.iterdir()} == tables | {"samples.png", "samples.txt", "rewards.png", "scores"}


@pytest.mark.slow
def test_command_line_and_torchrun(evaluate, results_of_run, finished_run):
    for processes in (1, 2):
        results, _ = evaluate({"--checkpoints": trained(finished_run)}, processes=processes, launcher=launch)
        assert_equal_scores(results, results_of_run[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--checkpoints": MODEL}, "must be the export folder inside a run folder: there is no"),
        ({"--model": REPOSITORY / "shapes"}, "is no diffusers folder: it has no model_index.json"),
        ({"--prompts": "nowhere.txt"}, "cannot read prompt file nowhere.txt"),
        ({"--rewards": "beauty"}, "--rewards: unknown reward 'beauty'"),
        ({"--human_pairs": 3}, "--human_pairs needs --checkpoints"),
        ({"--benchmarks": "beauty=x"}, "benchmark 'beauty=x' is not of the form"),
        ({"--benchmarks": f"clip={HELDOUT},model=nowhere"}, "error: --benchmarks: clip: clip=nowhere"),
    ],
    ids=["no_run", "no_model", "no_prompts", "unknown_reward", "pairs_of_one_model", "unknown_benchmark", "no_model_of_a_benchmark"],
)
def test_mistakes(evaluate, flags, message):
    result = evaluate(flags, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert message in sentences[0]


def test_names_of_checkpoints():
    texts = ["runs/a/export", "more/a/export", "best=runs/b/export", "runs/lr=1/export", "x/base/export"]
    found = [(checkpoint.name, str(checkpoint.export)) for checkpoint in parse_checkpoints(texts)]
    assert found == [
        ("a", "runs/a/export"),
        ("a_2", "more/a/export"),
        ("best", "runs/b/export"),
        ("lr_1", "runs/lr=1/export"),
        ("base_2", "x/base/export"),
    ]
    assert [checkpoint.name for checkpoint in parse_checkpoints(["runs/a/export", "a=runs/b/export"])] == ["a_2", "a"]
    for texts, message in (
        (["a=x/export", "a=y/export"], "the name 'a' is given twice"),
        (["base=x/export"], "'base' is --model's name"),
        (["=x/export"], "'=x/export' is not of the form [NAME=]RUN/export"),
        (["a="], "'a=' is not of the form [NAME=]RUN/export"),
    ):
        with pytest.raises(UserError) as error:
            parse_checkpoints(texts)
        assert message in str(error.value)


def test_runs_must_agree_on_sampling_settings_or_a_flag_settles_it(finished_run, tmp_path):
    manifest = json.loads((finished_run / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"sampling": manifest["sampling"] | {"shift": 5.0}}))
    checkpoints = parse_checkpoints([str(finished_run / "export"), str(tmp_path / "export")])
    known = manifest["sampling"].keys()
    with pytest.raises(UserError) as error:
        settings_of_runs(checkpoints, "FluxPipeline", known, (), script.NUMBERS)
    assert str(error.value) == (
        f"--checkpoints {finished_run}/export and {tmp_path}/export were trained with shift 3.0 and 5.0: give --shift, for all of them"
    )
    assert settings_of_runs(checkpoints, "FluxPipeline", known, ["shift"], script.NUMBERS) == manifest["sampling"]
    assert settings_of_runs(checkpoints[1:], "FluxPipeline", known, (), script.NUMBERS)["shift"] == 5


def test_a_named_benchmark_beside_prompts(evaluate, tmp_path):
    """GenEval's six kinds in the shapes world: groups in all tables, the whole their mean; what has changed begins anew, and is named."""
    lines = (MODEL.parents[1] / "prompts" / "geneval.jsonl").read_text().splitlines()
    (tmp_path / "questions.jsonl").write_text("\n".join(lines[::8] + lines[1:4]) + "\n")
    flags = {"--benchmarks": f"geneval={tmp_path}/questions.jsonl,detector=shapes,images=2", "--sampling_steps": 2, "--num_seeds": 1}
    flags |= {"--scores_dir": tmp_path / "scores"}
    results, folder = evaluate(flags)
    assert results["benchmarks"].keys() == {"prompts", "geneval"}
    entry = results["scores"]["base"]["geneval"]["geneval"]
    pictures = [row for row in csv.DictReader((folder / "scores.csv").read_text().splitlines()) if row["benchmark"] == "geneval"]
    assert len(pictures) == 24 and all(row["aesthetic"] == "" for row in pictures)
    kinds = [json.loads(line)["tag"] for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert entry["groups"].keys() == set(kinds)
    for kind, part in entry["groups"].items():
        own = [float(row["geneval"]) for row in pictures if kinds[int(row["prompt"])] == kind]
        assert (part["mean"], part["prompts"]) == (pytest.approx(statistics.fmean(own)), kinds.count(kind))
    assert entry["mean"] == pytest.approx(statistics.fmean(part["mean"] for part in entry["groups"].values()))
    flat = [row for row in csv.DictReader((folder / "results.csv").read_text().splitlines()) if row["reward"] == "geneval"]
    assert [row["group"] for row in flat] == ["", *entry["groups"]]
    assert [float(row["mean"]) for row in flat] == [entry["mean"], *(part["mean"] for part in entry["groups"].values())]
    markdown = (folder / "results.md").read_text()
    assert "## geneval: 24 pictures of 12 prompts by each model" in markdown
    for kind, part in entry["groups"].items():
        low, high = part["interval"]
        assert 0 <= low <= high <= 1
        shown = f"± {high - part['mean']:.4f}" if low + high == pytest.approx(2 * part["mean"]) else f"({low:.4f} to {high:.4f})"
        assert f"| geneval, {kind} | base | {part['mean']:.4f} {shown} |" in markdown
    assert all((folder / f"samples_{name}.png").is_file() for name in ("prompts", "geneval"))

    result = evaluate(flags, {"--rewards": "aesthetic", "--sampling_steps": 3}, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"{MODEL} on prompts begins anew: \S+ has it with another sampling and rewards\n", result.stdout)
    assert re.search(rf"{MODEL} on geneval begins anew: \S+ has it with another sampling\n", result.stdout)


def test_broken_checkpoint(evaluate, base_as_checkpoint, finished_run, tmp_path):
    """Told before rewards and networks are loaded: the rewards here cannot be."""
    unread = {"--rewards": f"clip={tmp_path}/nowhere"}
    for flags, message in (
        ({"--checkpoints": tmp_path / "no" / "export"}, f"there is no {tmp_path}/no/manifest.json"),
        ({"--checkpoints": finished_run / "checkpoints"}, f"--checkpoints: there is no folder {finished_run}/checkpoints/transformer"),
        ({"--checkpoints": base_as_checkpoint, "--num_frames": 5}, "--num_frames is not a setting of FluxPipeline"),
    ):
        result = evaluate(unread, flags, check=False)
        assert result.returncode == 2 and message in result.stderr
    weights = next((base_as_checkpoint / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    result = evaluate(unread, {"--checkpoints": base_as_checkpoint}, check=False)
    assert result.returncode == 2
    assert f"error: --checkpoints: {base_as_checkpoint / 'transformer'} cannot be loaded" in result.stderr


def test_a_reward_that_fails_is_found_before_anything_is_sampled(evaluate, tmp_path):
    """Of all benchmarks, not only the first."""
    dead = "http.dead=http://127.0.0.1:1,patience=0.1"
    (tmp_path / "p.txt").write_text("a red circle\n")
    benchmark = f"visionreward={tmp_path}/p.txt,server=http://127.0.0.1:1,patience=0.1"
    for flags in ({"--rewards": ("aesthetic", dead)}, {"--rewards": "aesthetic", "--benchmarks": benchmark}):
        result = evaluate(flags, {"--output_dir": tmp_path / "evaluation"}, check=False)
        assert result.returncode == 2 and "preflight: aesthetic: " in result.stdout
        assert "no reward server answered within 0.1 s of trying http://127.0.0.1:1" in result.stderr
        assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jsonl")]


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
        scores[name] = [results["scores"]["base"]["prompts"][reward]["mean"] for reward in ("visual", "motion")]
    assert scores["wide"] == pytest.approx(scores["stretched"], rel=1e-4)
    assert scores["wide"] != pytest.approx(scores["cropped"], rel=1e-2)
