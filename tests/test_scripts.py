"""The training scripts: what they copy from each other is equal, they have the same sections in the same order, and every flag is read."""

import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
import tyro
from conftest import ENVIRONMENT, EVALUATE, MODEL, PROMPTS, REPOSITORY

import evaluate
from fastvideo.models.families import FAMILIES
from fastvideo.rewards.videoalign import frame_size, sample_frames
from scripts.sync_copies import functions, markers, stale_copies

TRAINING_SCRIPTS = sorted(REPOSITORY.glob("train_grpo_*.py"))
BASELINES = sorted((REPOSITORY / "baselines").glob("*.py"))
SCRIPTS = [*TRAINING_SCRIPTS, *BASELINES, EVALUATE, *sorted((REPOSITORY / "preprocess").glob("*.py"))]
LAUNCHERS = [*sorted((REPOSITORY / "scripts").glob("train_*.sh")), *sorted((REPOSITORY / "scripts").glob("preprocess_*.sh"))]
SECTIONS = ["1. Arguments", "2. Sampler", "3. Model", "4. Rollout", "5. Advantages", "6. Loss", "7. Algorithm 1"]
FUNCTIONS = {
    "2. Sampler": ["time_schedule", "noise_levels", "sde_step"],
    "3. Model": ["load_models", "latent_shape", "load_cond", "predict", "decode"],
    "4. Rollout": ["rollout"],
    "5. Advantages": ["group_advantages", "best_of_n", "select_timesteps", "trained_count"],
    "6. Loss": ["grpo_loss", "pick", "score_transitions", "reference_kl"],
    "7. Algorithm 1": [
        "main",
        "draw_prompts",
        "draw_steps",
        "sample_groups",
        "score_samples",
        "keep_best",
        "split_into_updates",
        "score_before_updates",
        "update_policy",
        "sample_pictures",
    ],
}
# fmt: off
SHARED_FLAGS = {
    "model", "embeddings", "output_dir", "iterations", "seed", "prompts_per_iteration", "num_generations", "updates_per_iteration",
    "sampling_steps", "noise_level", "noise_schedule", "timestep_fraction", "timestep_selection", "shared_noise", "clip_range",
    "advantage_clip", "best_of_n", "rewards", "reward_weights", "held_out_rewards", "learning_rate",
    "weight_decay", "max_grad_norm", "lr_warmup_steps", "ema_decay",
    "kl_weight", "lora_rank", "old_log_prob", "zero_stage", "offload", "dtype", "attention", "gradient_checkpointing", "height",
    "width", "rollout_batch_size", "micro_batch_size", "gather_for_rollout", "timeout_minutes", "resume", "checkpoint_every",
    "keep_checkpoints", "sample_every", "trackers",
}
# fmt: on


@pytest.fixture
def scripts(tmp_path):
    """Copies of the training scripts, to be spoilt."""
    for path in TRAINING_SCRIPTS:
        shutil.copy(path, tmp_path)
    return tmp_path


def test_copies_are_equal():
    assert stale_copies() == []
    for path in [*TRAINING_SCRIPTS, *BASELINES]:
        if path.name != "train_grpo_flux.py":
            text = path.read_text()
            assert len(markers(text.splitlines(), functions(text))) >= (12 if path in BASELINES else 15)


def test_a_changed_copy_is_found_and_mended(scripts):
    path = scripts / "train_grpo_hunyuan.py"
    before = path.read_text()
    path.write_text(before.replace("ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(1, 1 + clip_range)"))
    assert stale_copies(scripts) == ["train_grpo_hunyuan.py: grpo_loss differs from the one in train_grpo_flux.py"]
    stale_copies(scripts, write=True)
    assert path.read_text() == before


@pytest.mark.parametrize(("name", "changed"), [("train_grpo_wan.py", "best_of_n"), ("train_grpo_sd.py", "update_policy")])
def test_a_copy_may_go_its_own_way(scripts, name, changed):
    """With `# Own` above it in a section that is copied as a whole."""
    path = scripts / name
    path.write_text(re.sub(rf"^(def {changed}\(.*?\n)\n", r"# Own\n\1    print()\n\n", path.read_text(), flags=re.MULTILINE | re.DOTALL))
    before = path.read_text()
    assert before.count("# Own") == before.count("    print()\n") == 1
    assert stale_copies(scripts, write=True) == []
    assert path.read_text() == before
    path.write_text(before.replace("# Own\n", ""))
    assert stale_copies(scripts) == [f"{name}: {changed} differs from the one in train_grpo_flux.py"]


def test_a_change_of_the_original_reaches_all_copies(scripts):
    original = scripts / "train_grpo_flux.py"
    line = "        prompts = draw_prompts(run)"
    original.write_text(original.read_text().replace(line, f"{line}  # new\n        print(transformer)"))
    assert len(stale_copies(scripts)) == len(TRAINING_SCRIPTS) - 1
    stale_copies(scripts, write=True)
    assert stale_copies(scripts) == []
    assert "print(unet)" in (scripts / "train_grpo_sd.py").read_text()


@pytest.mark.parametrize("script", TRAINING_SCRIPTS, ids=lambda path: path.name)
def test_sections_and_functions_come_in_the_same_order(script):
    text = script.read_text()
    assert re.findall(r"^# (\d\. [\w ]+) =+$", text, re.MULTILINE) == SECTIONS
    for section, part in zip(SECTIONS, re.split(r"^# \d\. [\w ]+ =+$", text, flags=re.MULTILINE)[1:], strict=True):
        defined = re.findall(r"^def (\w+)\(", part, re.MULTILINE)
        assert [name for name in defined if name in FUNCTIONS.get(section, [])] == FUNCTIONS.get(section, [])


@pytest.mark.parametrize("script", [*TRAINING_SCRIPTS, *BASELINES], ids=lambda path: path.name)
def test_only_predict_calls_the_network(script):
    """Two calls, in rollout and update, are how a ratio stops being 1."""
    tree = ast.parse(script.read_text())
    callers = {
        function.name
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("transformer", "unet", "run.policy", "scorer")
    }
    assert callers == {"predict"}


def classes_of_arguments(script: Path) -> list[ast.ClassDef]:
    """Args, and what it extends that the script defines."""
    return [
        node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ClassDef) and re.fullmatch(r"Args|\w+Flags", node.name)
    ]


def fields_of(script: Path) -> set[str]:
    nodes = [node for part in classes_of_arguments(script) for node in part.body]
    return {node.target.id for node in nodes if isinstance(node, ast.AnnAssign)}


RUN = REPOSITORY / "fastvideo" / "runs" / "flags.py"


@pytest.mark.parametrize("script", TRAINING_SCRIPTS, ids=lambda path: path.name)
def test_shared_flags_have_the_same_names(script):
    assert not fields_of(script) & fields_of(RUN)
    assert fields_of(script) | fields_of(RUN) >= SHARED_FLAGS
    family = script.stem.removeprefix("train_grpo_")
    facts = FAMILIES[family]
    assert ("sp_size" in fields_of(script)) == (facts.parallelize is not None)
    for name in ("shift", "num_frames", "guidance_scale", "embedded_guidance"):
        assert (name in fields_of(script)) == (name in facts.sampling), name


@pytest.mark.parametrize("script", [*SCRIPTS, RUN], ids=lambda script: script.name)
def test_every_flag_is_used(script):
    """As args.X, or as self.X in a property of Args; being checked in __post_init__ is no use."""
    trees = [ast.parse(path.read_text()) for path in ([*TRAINING_SCRIPTS, RUN.with_name("run.py")] if script == RUN else [script])]
    used = set()
    for tree in trees:
        for part in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
            part.body = [node for node in part.body if getattr(node, "name", "") != "__post_init__"]
        used |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.fullmatch(r"args|self|(self|run)\.args", ast.unparse(node.value))
        }
    if script == EVALUATE:  # goes over these names
        used |= set(evaluate.SAMPLING)
    assert fields_of(script) - used == set()


@pytest.mark.parametrize("script", TRAINING_SCRIPTS, ids=lambda path: path.name)
def test_help_shows_the_flags_in_groups(script, monkeypatch, capsys):
    """What differs between models first, then the algorithm's, then the run's."""
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script.stem).main()
    shown = capsys.readouterr().out
    order = [" model options ", "--model ", " algorithm options ", "--clip_range ", " run options ", "--seed ", "--dtype "]
    assert [shown.count(word) for word in order] == [1] * len(order)
    assert sorted(order, key=shown.index) == order


def launched(shell_script: Path) -> tuple[Path, list[str]]:
    """The Python script that a shell script launches, and the words after it; variables without a default become a word."""
    text = re.sub(r"\\\n", " ", shell_script.read_text())
    command = next(line for line in text.splitlines() if re.match(r'(exec|attend) python "?\S*launch\.py', line))
    if rewards := re.search(r"^rewards=\((.*)\)$", text, re.MULTILINE):
        command = command.replace('"${rewards[@]}"', rewards[1])
    command = command.replace('"$@"', "").replace("$repository", str(REPOSITORY)).replace("$MODEL", "x")
    command = re.sub(r"\$\{\w+:-([\w.]*)\}", lambda found: found[1] or "x", command)
    command = re.sub(r"\$(PROMPTS|OUTPUT_DIR|EMBEDDINGS)", "x.jsonl", command)
    words = shlex.split(command)
    assert REPOSITORY / words[2] == REPOSITORY / "scripts" / "launch.py"
    place = next(i for i, word in enumerate(words) if word.endswith(".py") and i > 2)
    return Path(words[place]), words[place + 1 :]


@pytest.mark.parametrize("shell_script", LAUNCHERS, ids=lambda path: path.name)
def test_launch_scripts_are_accepted_by_their_scripts(shell_script):
    """Every flag exists and every value is allowed, together with what the user has to give."""
    script, words = launched(shell_script)
    arguments = runpy.run_path(str(script))["Args"]
    given = [] if "--output_dir" in words else ["--output_dir", "x"]
    assert tyro.cli(arguments, args=[*words, *given], use_underscores=True)


@pytest.mark.parametrize("family", [name for name, facts in FAMILIES.items() if "num_frames" in facts.sampling])
def test_launch_scripts_show_videoalign_as_many_frames_as_docs_say(family):
    """Of a clip of 53 frames: the release's 14 of a model of 24 frames a second, 20 of Wan's 16, at the table's cost."""
    _, words = launched(REPOSITORY / "scripts" / f"train_{family}.sh")
    rewards = [word for word in words if word.startswith("videoalign.")]
    options = [dict(option.split("=") for option in word.split(",")[1:]) for word in rewards]
    counts = [len(sample_frames(53, float(given.get("clip_fps", 24)), float(given["fps"]))) for given in options]
    assert counts and set(counts) == {20 if family == "wan" else 14}
    page = (REPOSITORY / "docs" / "rewards.md").read_text()
    for fps, frames in ((2, 4), (6, 14), (16, 36)):
        height, width = frame_size(480, 480, 128 * 28 * 28, 448 * 448)
        assert len(sample_frames(53, 24, fps)) == frames and f"| {fps} | {frames} | {frames // 2 * height * width // 28**2:,} |" in page


def test_every_script_has_its_launchers():
    families = {path.stem.removeprefix("train_grpo_") for path in TRAINING_SCRIPTS}
    assert {path.name for path in LAUNCHERS} == {f"{kind}_{family}.sh" for kind in ("train", "preprocess") for family in families}


@pytest.mark.parametrize("shell_script", LAUNCHERS, ids=lambda path: path.name)
def test_launch_scripts_check_the_model_first(shell_script):
    kind, family = shell_script.stem.split("_")
    lines = shell_script.read_text().splitlines()
    check = next(i for i, line in enumerate(lines) if "check_model.py" in line)
    assert lines[check].endswith(f"--family {family} --use {'training' if kind == 'train' else 'embedding'}")
    assert lines[check + 1].startswith('exec python "$repository/scripts/launch.py" "${rendezvous[@]}" ')  # whom to signal is this process
    assert "torchrun" not in shell_script.read_text()


def bash(command: str, **environment: object) -> subprocess.CompletedProcess:
    """In the repository, without what a SLURM job or a user may have set."""
    alone = {name: value for name, value in os.environ.items() if name not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    given = alone | {name: str(value) for name, value in environment.items()}
    return subprocess.run(["bash", "-c", command], env=given, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("shell_script", LAUNCHERS, ids=lambda path: path.name)
def test_launch_scripts_ask_for_all_that_is_missing_at_once(shell_script):
    """And for the files of their own rewards only if no others are given."""
    facts = FAMILIES[shell_script.stem.split("_")[1]]
    if shell_script.name.startswith("preprocess"):
        needed = "MODEL, PROMPTS, OUTPUT_DIR"
    else:
        needed = "MODEL, EMBEDDINGS, " + ("VIDEOALIGN" if "num_frames" in facts.sampling else "HPS, CLIP")
        assert "MODEL=" in shell_script.read_text()
    result = bash(f"bash {shell_script}", GPUS=1)
    assert (result.returncode, result.stderr) == (2, f"error: set {needed}: the head of {shell_script} shows how\n")
    if shell_script.name.startswith("train"):
        for given in ("--rewards aesthetic", "--rewards=aesthetic"):
            result = bash(f"bash {shell_script} {given}", GPUS=1)
            assert "error: set MODEL, EMBEDDINGS: the head" in result.stderr


def test_skyreels_prompts_without_their_beginning_are_warned_of(tmp_path):
    """Also that the documented command adds it, once, to what is shown and not to what is drawn."""
    path = tmp_path / "prompts" / "consisid_train" / "prompts.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"prompt": text, "image": "1.png", "image_prompt": text}) + "\n" for text in ("a fox", "a cat")))
    given = {"MODEL": tmp_path, "PROMPTS": path, "OUTPUT_DIR": tmp_path / "cache", "GPUS": 1}
    assert f"warning: 2 prompts in {path} do not begin with 'FPS-24, '" in bash("bash scripts/preprocess_skyreels.sh", **given).stderr
    command = next(line for line in (REPOSITORY / "docs" / "prompts.md").read_text().splitlines() if line.startswith("sed -i"))
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prompt"], row["image_prompt"]) for row in rows] == [("FPS-24, a fox", "a fox"), ("FPS-24, a cat", "a cat")]
    assert "warning" not in bash("bash scripts/preprocess_skyreels.sh", **given).stderr


def test_a_wrong_folder_is_refused_before_the_launch(tmp_path):
    command = "bash scripts/preprocess_flux.sh"
    given = {"MODEL": REPOSITORY / "shapes" / "models" / "sd", "PROMPTS": PROMPTS, "OUTPUT_DIR": tmp_path / "cache"}
    result = bash(command, **given)
    assert result.returncode == 2
    [said] = result.stderr.splitlines()
    assert said.startswith("error: MODEL ") and "is a StableDiffusionPipeline by its model_index.json" in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "--standalone"),
        ({"NNODES": 1}, "--standalone"),
        ({"NNODES": 1, "MASTER_PORT": 20123}, "--nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 20123"),  # as slurm.sh does
        ({"NNODES": 4, "NODE_RANK": 2, "MASTER_ADDR": "first"}, "--nnodes 4 --node_rank 2 --master_addr first --master_port 29500"),
    ],
)
def test_processes_meet_at_a_free_port_on_one_node(environment, expected):
    result = bash('source scripts/setup.sh requirements-dev.txt && echo "${rendezvous[@]}"', **environment)
    assert result.stdout.splitlines()[-1:] == [expected], result.stderr


def test_several_first_starts_install_once(tmp_path):
    """PYTHON is a command that writes down what it is asked for, and puts itself in the environment that it makes."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "requirements.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "python").write_text(
        """#!/usr/bin/env bash
        case "$1 ${2:-}" in
        "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;&
        "-m "*) echo "$2" >>"$ASKED" && sleep 0.5 ;;
        esac"""
    )
    (tmp_path / "python").chmod(0o755)
    given = os.environ | {"PYTHON": str(tmp_path / "python"), "ASKED": str(tmp_path / "asked")}
    started = [subprocess.Popen(["bash", tmp_path / "scripts" / "setup.sh", "requirements.txt"], env=given) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert (tmp_path / "asked").read_text().split() == ["venv", "pip"]


def test_preprocessing_takes_one_process_where_there_is_no_gpu():
    """torchrun's own word for all GPUs ends in a traceback there."""
    result = bash("bash -c 'source scripts/setup.sh requirements-dev.txt && echo $GPUS' preprocess_flux.sh", GPUS="")
    assert result.stdout.split()[-1:] == ["1"], result.stderr


@pytest.mark.slow
def test_two_launch_scripts_at_once_on_one_node(tmp_path):
    shell_script = REPOSITORY / "scripts" / "preprocess_flux.sh"
    started = []
    for i in range(2):
        given = {"MODEL": MODEL, "PROMPTS": PROMPTS, "OUTPUT_DIR": tmp_path / str(i), "GPUS": 2}
        given = os.environ | ENVIRONMENT | {name: str(value) for name, value in given.items()}
        command = ["bash", shell_script, "--max_sequence_length", "32", "--dtype", "float32"]
        started.append(subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs


# Commands of SLURM, as much as slurm.sh asks of them: the end of the job, and a run that stops when it is warned.
SLURM_COMMANDS = {
    "scontrol": """case $1 in requeue) touch "$FOLDER/requeued" ;; *) echo "first EndTime=$END" ;; esac""",
    "scancel": """date +%s.%N >"$FOLDER/warned" """,
    "srun": """touch "$FOLDER/started"; while [ ! -f "$FOLDER/warned" ]; do sleep 0.1; done; exit 138""",
}


@pytest.mark.parametrize("flags", [[], ["--scores_dir", "SCORES"], ["--scores_dir=SCORES"]])
def test_slurm_starts_an_evaluation_again_as_long_as_it_adds_scores(tmp_path, flags):
    """Four starts that end a batch more each and crash, and two that only crash."""
    scores = tmp_path / "shared" if flags else tmp_path / "evaluation" / "scores"
    (scores / "digest").mkdir(parents=True)
    crash = """echo >>"$FOLDER/starts"; [ "$(wc -l <"$FOLDER/starts")" -gt 4 ] || echo '{}' >>"$SCORES/digest/a.jsonl"; exit 1"""
    command = ["evaluate.py", "--output_dir", str(tmp_path / "evaluation"), *(flag.replace("SCORES", str(scores)) for flag in flags)]
    given = slurm_job(tmp_path, SLURM_COMMANDS | {"srun": crash}) | {"SCORES": str(scores), "MAX_TRIES": "2", "END": ""}
    done = subprocess.run(["bash", "scripts/slurm.sh", *command], env=os.environ | given, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "2 starts in a row have finished no new iteration: giving up" in done.stdout, done.stderr
    assert (tmp_path / "starts").read_text() == 6 * "\n"


def slurm_job(folder: Path, commands: dict[str, str]) -> dict[str, str]:
    """The environment of a job with its logs in `folder`, and commands of SLURM that are these."""
    for name, text in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": 7, "JOB_NUM_NODES": 1, "JOB_NODELIST": "first", "SUBMIT_DIR": REPOSITORY, "CPUS_ON_NODE": 2, "GPUS_ON_NODE": 0}
    given = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {"LOGS": str(folder / "logs"), "CONTAINER": "env"}
    return given | {"FOLDER": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("left", "signals", "wait"),
    [
        (308, 1, 4),  # until 304 s are left: five minutes, and 4.7 s for the longest of the last iterations
        pytest.param(308, 2, 0, marks=pytest.mark.slow),  # somebody insists
        pytest.param(250, 1, 0, marks=pytest.mark.slow),  # too late to wait
        pytest.param(9000, 1, 0, marks=pytest.mark.slow),  # by hand, long before the limit
    ],
)
def test_slurm_warning_is_passed_on_when_an_iteration_and_five_minutes_are_left(tmp_path, left, signals, wait):
    given = slurm_job(tmp_path, SLURM_COMMANDS)
    (tmp_path / "run").mkdir()
    seconds = [99.9, *[2.0] * 6, 4.7, *[1.0] * 3]  # the first is not one of the last ten
    lines = [json.dumps({"iteration": i, "time/iteration_s": one, "samples": 8}) for i, one in enumerate(seconds)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    end = int(time.time()) + left
    given["END"] = datetime.fromtimestamp(end).isoformat()
    command = ["bash", "scripts/slurm.sh", "train_grpo_flux.py", "--output_dir", str(tmp_path / "run")]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, env=os.environ | given, cwd=REPOSITORY, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        warned = time.time()
        for _ in range(signals):
            job.send_signal(signal.SIGUSR1)
            time.sleep(1)
        assert job.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        job.kill()
    passed_on = float((tmp_path / "warned").read_text())
    if wait:
        assert end - 304.7 - 1 <= passed_on <= end - 304 + 3  # slurm.sh counts in whole seconds
    else:
        assert passed_on - warned < 3
    assert (tmp_path / "requeued").exists()
