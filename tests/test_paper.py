"""The paper's experiments in small: every arm's command is one that its script takes, what is said is about arms that are there, and the
numbers under it are right."""

import functools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tyro
from conftest import REPOSITORY
from test_scripts import launched

import evaluate
from fastvideo.evaluation.benchmarks import BENCHMARKS

PAPER = REPOSITORY / "scripts" / "paper"
SCRIPTS = sorted(path for path in PAPER.glob("*.sh") if path.name not in ("common.sh", "all.sh"))
sys.path.insert(0, str(PAPER))
import experiments  # noqa: E402
import summary  # noqa: E402


def bash(command, **environment):
    given = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(["bash", "-c", command], env=given, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@functools.cache
def listed() -> tuple[dict[str, list[str]], list[list[str]]]:
    """SETTING/ARM_SEED -> its command on the tiny models, of all experiments; and the commands for the real ones."""
    result = bash('source scripts/paper/all.sh --full; for run in "${order[@]}"; do echo "$run ${trainings[$run]}"; done', SEEDS=0)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line, comments=True) for line in result.stdout.splitlines() if not line.startswith("#")]
    return {name: words for name, *words in lines if "sbatch" not in [name, *words]}, [words for words in lines if "sbatch" in words]


@functools.cache
def arguments(script: str) -> type:
    return runpy.run_path(str(REPOSITORY / script))["Args"]


def test_every_arm_is_a_command_that_its_scripts_take():
    """On the tiny models and in full, where it is the same algorithm, and on the paper's number of GPUs."""
    runs, full = listed()
    trainings = [words for words in full if "evaluate.py" not in words]
    assert len(trainings) == len(runs) > 20
    for (run, (python, script, *words)), command in zip(runs.items(), trainings):
        tiny = tyro.cli(arguments(script), args=words, use_underscores=True)
        assert (python, str(tiny.output_dir)) == ("python", f"runs/paper/{run}")
        assert run.endswith(f"_{tiny.seed}")
        assert tiny.model.name in script and (REPOSITORY / tiny.model).is_dir()
        judged = [reward for reward in tiny.rewards + tiny.held_out_rewards if "@" not in reward]
        assert len(judged) == 4  # whoever judges is trained on or watched

        variables = dict(word.split("=", 1) for word in command[: command.index("sbatch")])
        shell_script = next(word for word in command if word.startswith("scripts/train_"))
        path, given = launched(REPOSITORY / shell_script)
        assert variables.get("SCRIPT", path.name) == script
        given = given[: given.index("--rewards")] + given[given.index("--iterations") :] + command[command.index(shell_script) + 1 :]
        real = tyro.cli(arguments(script), args=given, use_underscores=True)
        assert str(real.output_dir) == f"runs/paper_full/{run}"
        assert len(real.rewards) == len(tiny.rewards) and real.reward_weights == tiny.reward_weights
        assert ["@" in reward for reward in real.rewards] == ["@" in reward for reward in tiny.rewards]
        own = command[command.index(shell_script) + 1 :]
        for flag in ("--timestep_selection", "--timestep_fraction", "--noise_schedule", "--no-shared_noise"):  # what both sizes compare
            if flag in own:
                assert getattr(real, name := flag.removeprefix("--").removeprefix("no-")) == getattr(tiny, name), (run, flag)
        gpus = 8 * int(next(word for word in command if word.startswith("--nodes=")).removeprefix("--nodes="))
        assert gpus == {"sd": 8, "flux": 32, "hunyuan_image": 32, "hunyuan": 64, "skyreels": 32}[run.partition("/")[0]]
        assert real.prompts_per_iteration % (gpus // getattr(real, "sp_size", 1)) == 0


def test_evaluation_in_full_is_of_all_runs_by_flags_that_it_takes():
    runs, full = listed()
    evaluations = [words for words in full if "evaluate.py" in words]
    assert len(evaluations) == 5 + 3  # a setting, and those of which people see pairs
    evaluated = []
    for words in evaluations:
        args = tyro.cli(evaluate.Args, args=words[words.index("evaluate.py") + 1 :], use_underscores=True)
        for text in args.benchmarks:
            name, _, rest = text.partition("=")
            assert f",{BENCHMARKS[name].option[0]}=" in rest
        if args.human_pairs:
            assert args.scores_dir.parent in [other.output_dir for other in evaluated]  # what has been sampled is not again
        else:
            evaluated.append(args)
    exports = sorted(path for args in evaluated for path in args.checkpoints)
    assert exports == sorted(f"runs/paper_full/{run}/export" for run in runs if "/grid_" not in run)


def test_a_grid_differs_in_its_rates_on_real_models_too():
    commands = {words[words.index("--output_dir") + 1]: words for words in listed()[1] if "evaluate.py" not in words}
    rates = {}
    for folder, words in commands.items():
        if "/grid_" in folder:
            method = folder.rpartition("/")[2].removeprefix("grid_").rsplit("_", 2)[0]
            rates.setdefault(method, []).append(float(words[words.index("--learning_rate") + 1]))
    assert len(rates) == 10
    assert all(found == [5e-6, 1e-5, 2e-5, 4e-5, 8e-5] for found in rates.values())


def test_what_is_said_is_about_arms_that_are_there():
    runs, _ = listed()
    arms = {run.rpartition("_")[0] for run in runs}
    assert {path.stem for path in SCRIPTS} == set(experiments.EXPERIMENTS)
    for name, experiment in experiments.EXPERIMENTS.items():
        named = {(panel.setting, arm) for panel in experiment.panels for arm in panel.arms}
        named |= {(table.setting, arm) for table in experiment.tables for arm in table.arms}
        named |= {(claim.setting, arm) for claim in experiment.claims for arm in (claim.arm, claim.other) if arm != "base"}
        assert {f"{setting}/{arm}" for setting, arm in named} <= arms
        own = bash(f'source scripts/paper/{name}.sh --full >/dev/null; echo "${{order[@]}}"', SEEDS=0).stdout.split()
        assert {f"{setting}/{arm}" for setting, arm in named} <= {run.rpartition("_")[0] for run in own}, name  # trained by its own script


def test_the_page_of_results_has_a_place_for_each():
    page = (REPOSITORY / "docs" / "results.md").read_text()
    for name, experiment in experiments.EXPERIMENTS.items():
        assert page.count(f"## {experiment.title}\n\n<!-- {name} -->\n") == page.count(f"<!-- end of {name} -->") == 1


@pytest.fixture
def results(tmp_path):
    """Two arms of known numbers."""
    for arm, level in (("taste", 0.5), ("taste_caption", 0.2)):
        for seed in range(3):
            run = tmp_path / "flux" / f"{arm}_{seed}"
            (run / "export").mkdir(parents=True)
            rows = [{"iteration": i, "reward/aesthetic_mean": level + seed / 10 + i / 100} for i in range(1, 9)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return summary.Results(tmp_path)


def test_the_readme_counts_what_the_page_of_results_says():
    page, readme = ((REPOSITORY / name).read_text() for name in ("docs/results.md", "README.md"))
    said = re.findall(r"\| (agrees|disagrees|too weak to say) \|$", page, re.MULTILINE)
    same, other, weak = map(said.count, ("agrees", "disagrees", "too weak to say"))
    assert f"of {len(said)} statements of the paper {same} come out the same, {other} do not, and {weak} are too weak to say" in readme


def test_numbers_of_runs(results):
    assert [run.name for run in results.runs("flux", "taste")] == ["taste_0", "taste_1", "taste_2"]
    assert results.curves("flux", "taste", "reward/aesthetic_mean").shape == (3, 8)
    assert results.values("flux", "taste", "end reward/aesthetic_mean") == pytest.approx([0.575, 0.675, 0.775])  # iterations 7 and 8
    assert results.values("flux", "taste", "all reward/aesthetic_mean") == pytest.approx([0.545, 0.645, 0.745])
    assert results.values("flux", "nothing", "end reward/aesthetic_mean").size == 0


def test_a_measure_that_two_benchmarks_have_is_the_firsts(results):
    parts = {"prompts": {"diversity.pixels": {"mean": 0.2}}, "geneval": {"diversity.pixels": {"mean": 0.9}, "geneval": {"mean": 0.5}}}
    results.evaluations["flux"] = {"base": parts, "taste_0": parts, "taste_2": parts}
    assert results.values("flux", "base", "diversity.pixels").tolist() == [0.2]
    assert results.values("flux", "taste", "diversity.pixels").tolist() == [0.2, 0.2]
    assert results.values("flux", "taste", "geneval").tolist() == [0.5, 0.5]
    assert results.values("flux", "taste", "clip").size == 0


@pytest.mark.parametrize(
    ("setting", "metric", "real"),
    [
        ("sd", "aesthetic", "hpsv2"),
        ("sd", "end reward/aesthetic_mean", "end reward/hpsv2_mean"),
        ("sd", "reward/aesthetic.binary_mean", "reward/hpsv2.binary_mean"),
        ("flux", "held_out/shapes_mean", "held_out/pickscore_mean"),
        ("flux", "clip", "clip"),
        ("hunyuan", "shapes_strict", "http.visionreward"),
        ("hunyuan", "shapes", "videoalign.ta"),
        ("skyreels", "reward/motion_mean", "reward/videoalign.mq_mean"),
    ],
)
def test_real_models_have_other_judges(tmp_path, setting, metric, real):
    assert summary.Results(tmp_path, full=True).judged(setting, metric) == real
    assert summary.Results(tmp_path).judged(setting, metric) == metric


def test_seeds_of_several_digits_are_evaluated_and_grids_are_not(tmp_path):
    for run in ("taste_1", "taste_10", "taste_11", "taste_100", "grid_taste_1e-4_10"):
        (tmp_path / "sd" / run / "export").mkdir(parents=True)
    result = bash(f'source scripts/paper/common.sh; finished sd {tmp_path}; printf "%s\\n" "${{exports[@]}}"', SEEDS="10 11")
    assert result.stdout.split() == [f"{tmp_path}/sd/taste_{seed}/export" for seed in (10, 11)]


def test_intervals_by_the_tables_of_student():
    """t of 2 and of 4 degrees of freedom is 4.302653 and 2.776445."""
    values = np.array([0.575, 0.675, 0.775])
    assert summary.half_width(values) == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    change, low, high = summary.difference(values, np.array([0.5]))
    assert (change, high - low) == pytest.approx((0.175, 2 * 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    change, low, high = summary.difference(np.array([0.5]), values)
    assert (change, high - low) == pytest.approx((-0.175, 2 * 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    change, low, high = summary.difference(values, values - 0.3)  # of equal variance: Welch's degrees of freedom are 4
    assert (change, high - low) == pytest.approx((0.3, 2 * 2.776445 * 0.1 * (2 / 3) ** 0.5), rel=1e-6)


@pytest.mark.parametrize(
    ("alike", "low", "high", "said"),
    [
        (None, 0.1, 0.3, "agrees"),
        (None, -0.3, -0.1, "disagrees"),
        (None, -0.1, 0.3, "too weak to say"),
        (0.05, -0.04, 0.03, "agrees"),
        (0.05, 0.01, 0.04, "agrees"),
        (0.05, 0.01, 0.06, "disagrees"),
        (0.05, -0.06, 0.03, "too weak to say"),
    ],
)
def test_verdicts(alike, low, high, said):
    assert summary.verdict(experiments.Claim("", "flux", "", "a", "b", alike), low, high) == said


def jobs(folder, *lines, **environment):
    (folder / "jobs").write_text("".join(f"{line}\n" for line in lines))
    command = [sys.executable, str(PAPER / "run_jobs.py"), str(folder), "trying"]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_jobs_are_done_once_and_failures_named(tmp_path):
    lines = f"a/good bash -c 'echo x >>{tmp_path}/good'", "bad bash -c 'echo why; exit 3'"
    process = jobs(tmp_path, *lines)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"bad failed with exit code 3: see {tmp_path}/logs/bad.log" in said
    assert (tmp_path / "logs" / "bad.log").read_text() == "why\n"
    assert {line.split(" ", 1)[1] for line in (tmp_path / "seconds.txt").read_text().splitlines()} == {"0 a/good", "3 bad"}
    process = jobs(tmp_path, lines[0], "bad true")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "good").read_text() == "x\n"  # not again
    process = jobs(tmp_path, lines[0].replace("echo x", "echo y"))
    process.communicate(timeout=60)
    assert (tmp_path / "good").read_text() == "x\ny\n"  # another command


def test_one_at_a_time_works_in_a_folder(tmp_path):
    first = jobs(tmp_path, f"first bash -c 'echo >{tmp_path}/started; sleep 5'")
    deadline = time.time() + 30
    while not (tmp_path / "started").exists() and time.time() < deadline:
        time.sleep(0.05)
    second = jobs(tmp_path, "second true")
    said, _ = second.communicate(timeout=60)
    assert (second.returncode, said) == (2, f"error: process {first.pid} is at work in {tmp_path}: wait for it, or stop it with kill\n")
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_signal_reaches_what_runs_and_starts_nothing_more(tmp_path):
    wait = f"bash -c 'trap \"echo stopped >{tmp_path}/stopped; exit 143\" TERM; echo >{tmp_path}/started; while :; do sleep 0.1; done'"
    process = jobs(tmp_path, f"first {wait}", f"second touch {tmp_path}/second", JOBS="1")
    deadline = time.time() + 30
    while not (tmp_path / "started").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped: the same command goes on" in said
    assert (tmp_path / "stopped").exists() and not (tmp_path / "second").exists()
    assert not (tmp_path / "done" / "first").exists()


@pytest.mark.slow
def test_an_experiment_from_training_to_its_table(tmp_path):
    given = {"RUNS": tmp_path, "SEEDS": "0 1", "JOBS": 2, "TRAIN": "--iterations 2", "EVALUATE": "--num_seeds 1 --images_per_prompt 1"}
    result = bash("bash scripts/paper/figure_9.sh", **given)
    assert result.returncode == 0, result.stdout + result.stderr
    said = (tmp_path / "summary" / "results.md").read_text()
    block = said.split("## Figure 9")[1]
    assert (tmp_path / "summary" / "figure_9.png").stat().st_size > 5000
    models = json.loads((tmp_path / "evaluation" / "flux" / "results.json").read_text())
    assert block.count("shapes: ") == 2
    before = [path.stat().st_mtime for path in sorted(tmp_path.glob("flux/*/metrics.jsonl"))]
    again = bash("bash scripts/paper/figure_9.sh", **given)
    assert again.returncode == 0
    assert [path.stat().st_mtime for path in sorted(tmp_path.glob("flux/*/metrics.jsonl"))] == before
    assert models
