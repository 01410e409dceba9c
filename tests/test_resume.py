"""A run that is killed at any moment and started again by the same command is the run that was never killed, bit for bit."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, MODEL, REPOSITORY, TRAIN, command, metrics_of, run_script, start_forked, weights_of

from fastvideo.errors import UserError
from fastvideo.runs.run_folder import _lock, _meaning


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# What to wait for before the kill, and how many seconds after it at most (drawn from a seed).
MOMENTS = {
    "in_the_first_iteration": (lambda run: (run / "manifest.json").exists(), 0.1),
    "between_the_first_checkpoints": (lambda run: lines_of(run) >= 3, 0.3),
    "in_the_middle": (lambda run: lines_of(run) >= 4, 0.6),
    "while_the_first_checkpoint_is_written": (lambda run: (run / "checkpoints" / ".iteration_000002.tmp").exists(), 0.0),
    "while_a_later_checkpoint_is_written": (lambda run: any((run / "checkpoints").glob(".iteration_000004.tmp/*")), 0.005),
    "while_the_export_is_written": (lambda run: (run / ".export.tmp").exists(), 0.0),
}


def wait_for_moment(name: str, run: Path) -> None:
    event, seconds = MOMENTS[name]
    deadline = time.monotonic() + 240
    while not event(run):
        assert time.monotonic() < deadline, f"never came to {name}"
        time.sleep(0.002)
    time.sleep(random.Random(name).uniform(0, seconds))


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    assert metrics_of(run) == metrics_of(uninterrupted)
    exported, expected = weights_of(run / "export" / "transformer"), weights_of(uninterrupted / "export" / "transformer")
    assert exported.keys() == expected.keys()
    assert all(exported[name].equal(expected[name]) for name in expected)
    assert not list(run.rglob(".*"))  # nothing half-written is left


@pytest.fixture(scope="module")
def finished_run_of_two(train, tmp_path_factory) -> Path:
    """The same as `finished_run` on two processes, at ZeRO stage 2."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(run, {"--iterations": 6}, processes=2)
    return run


QUICK_CASES = [*((1, moment) for moment in MOMENTS), (2, "in_the_middle"), (2, "while_a_later_checkpoint_is_written")]
FURTHER_CASES = [(2, moment) for moment in MOMENTS if (2, moment) not in QUICK_CASES]


@pytest.mark.parametrize(("processes", "moment"), [*QUICK_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER_CASES)])
def test_killed_run_goes_on(run_flags, request, tmp_path, processes, moment):
    uninterrupted = request.getfixturevalue("finished_run" if processes == 1 else "finished_run_of_two")
    run, log = tmp_path / "run", tmp_path / "log"
    flags = run_flags(run, {"--iterations": 6})
    forked = start_forked(TRAIN, *flags, processes=processes, log=log)
    wait_for_moment(moment, run)
    for process in forked:
        process.kill()
    for process in forked:
        process.join()
    assert [process.exitcode for process in forked] == [-signal.SIGKILL] * processes  # none had finished before
    checkpointed = (run / "checkpoints" / "latest").exists()
    assert checkpointed == (moment not in ("in_the_first_iteration", "while_the_first_checkpoint_is_written"))

    result = run_script(TRAIN, *flags, processes=processes, log=log)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_killed_torchrun_goes_on(run_flags, finished_run_of_two, tmp_path):
    """The command as a user gives it, killed twice, by one signal to the process group of torchrun and its two processes."""
    run = tmp_path / "run"
    command_line = command(TRAIN, *run_flags(run, {"--iterations": 6}), processes=2)
    environment = os.environ | ENVIRONMENT
    for moment in ("in_the_first_iteration", "in_the_middle", None):
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(command_line, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            if moment is None:
                assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
            else:
                wait_for_moment(moment, run)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL
    assert_same_run(run, finished_run_of_two)


def test_longer_run_and_finished_run(train, finished_run, tmp_path):
    """A finished run goes on with more --iterations; started again as it is, it changes nothing; fewer are refused."""
    run = tmp_path / "run"
    train(run, {"--iterations": 4})
    train(run, {"--iterations": 6})
    assert_same_run(run, finished_run)
    train(run, {"--iterations": 6})
    assert_same_run(run, finished_run)
    result = train(run, {"--iterations": 3}, check=False)
    assert result.returncode == 2
    assert "iteration_000006 is at iteration 6, beyond --iterations 3" in result.stderr


# --------------------------------------------------------------------------------------------------------------------- refused


def refusal(train, run: Path, *flags: object, processes: int = 1) -> str:
    """The sentence that ends this run, which must leave its folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = train(run, {"--iterations": 8}, *flags, processes=processes, check=False)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(set(sentences)) == 1, result.stderr
    return sentences[0]


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_resume_never_refuses_a_folder_with_a_run(train, finished_run, tmp_path):
    assert "has a run in it and --resume is never" in refusal(train, finished_run, {"--resume": "never"})
    train(tmp_path / "new", {"--resume": "never", "--iterations": 1})
    assert len(metrics_of(tmp_path / "new")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--dtype": "bfloat16"}, "was saved with --dtype float32 and cannot be resumed with bfloat16"),
    ],
)
def test_checkpoint_of_another_kind_is_refused(train, finished_run, flags, message):
    sentence = refusal(train, finished_run, flags)
    assert message in sentence
    assert "iteration_000006" in sentence


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "altered"])
def test_damaged_checkpoint_is_refused_by_name(train, run_copy, name, damage):
    """And what to do is said: go back to the newest one before it that is whole."""
    path = run_copy / "checkpoints" / "iteration_000006" / name
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(path.read_bytes()[:-10] + b"0123456789")
    else:
        path.write_bytes(path.read_bytes()[:-10])
    sentence = refusal(train, run_copy)
    assert f"{path}" in sentence if (name, damage) != ("state.json", "missing") else "iteration_000006, which is not there" in sentence
    assert "damaged" in sentence or "which is not there" in sentence
    assert f"write iteration_000004 into {run_copy}/checkpoints/latest" in sentence
    if damage == "truncated" and name != "state.json":
        assert f"{path} has {path.stat().st_size} bytes, but {path.stat().st_size + 10} were saved" in sentence


@pytest.mark.slow
def test_damage_that_only_the_second_process_looks_at(train, finished_run_of_two, tmp_path):
    shutil.copytree(finished_run_of_two, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "iteration_000006" / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10] + b"0123456789")
    sentence = refusal(train, tmp_path / "run", processes=2)
    assert f"{path} is damaged" in sentence and "write iteration_000004 into" in sentence


def test_last_checkpoint_can_be_given_up(train, run_copy, finished_run):
    """What the refusal says: write the name of an earlier checkpoint into `latest`."""
    shutil.rmtree(run_copy / "checkpoints" / "iteration_000006")
    assert "iteration_000006" in refusal(train, run_copy)
    (run_copy / "checkpoints" / "latest").write_text("iteration_000004")
    train(run_copy, {"--iterations": 6})
    assert_same_run(run_copy, finished_run)


def test_going_back_while_later_checkpoints_exist(train, run_copy, finished_run):
    """They are the future of a past that is done again: never kept in place of the checkpoints of this run."""
    (run_copy / "checkpoints" / "latest").write_text("iteration_000002")
    train(run_copy, {"--iterations": 6, "--keep_checkpoints": 1})
    assert_same_run(run_copy, finished_run)
    assert [path.name for path in (run_copy / "checkpoints").iterdir() if path.is_dir()] == ["iteration_000006"]


def test_changed_arguments(train, run_copy):
    """Those that change what is computed are refused, unless the user insists and the checkpoint does not decide them."""
    changed = {"--noise_level": 0.4, "--learning_rate": 1e-3, "--micro_batch_size": 5}
    sentence = refusal(train, run_copy, changed)
    assert (
        "--learning_rate was 0.0001 and is 0.001; --noise_level" in sentence or "--noise_level was 0.3 and is 0.4; --learning" in sentence
    )
    assert "micro_batch_size" not in sentence
    assert "--lora_rank was 0 and is 4" in refusal(train, run_copy, {"--lora_rank": 4}, "--allow_changed_args")
    assert "--ema_decay was 0.5 and is 0" in refusal(train, run_copy, {"--ema_decay": 0}, "--allow_changed_args")
    result = train(run_copy, {"--iterations": 7}, changed, "--allow_changed_args")
    assert "warning: the run in" in result.stderr and "--noise_level was 0.3 and is 0.4" in result.stderr
    assert metrics_of(run_copy)[-1]["policy/lr"] == 1e-3
    manifest = json.loads((run_copy / "manifest.json").read_text())
    assert manifest["arguments"]["noise_level"] == 0.4 and manifest["from_iteration"] == 6
    assert [start["arguments"]["noise_level"] for start in manifest["history"]] == [0.3]
    assert "source" not in manifest["history"][0]  # only what was not the same


def test_the_same_files_elsewhere(train, cache, run_copy, tmp_path):
    """Of model and embeddings it matters what they are, not where."""
    shutil.copytree(cache, tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MODEL.name).symlink_to(MODEL)
    train(run_copy, {"--iterations": 7}, {"--embeddings": tmp_path / "moved", "--model": tmp_path / "elsewhere" / MODEL.name})
    (tmp_path / "other.txt").write_text("a red circle\na blue square\n")
    flags = {"--model": MODEL, "--prompts": tmp_path / "other.txt", "--output_dir": tmp_path / "fewer"}
    run_script(REPOSITORY / "preprocess" / "embed_flux.py", flags, log=tmp_path / "log")
    assert "which holds other embeddings" in refusal(train, run_copy, {"--embeddings": tmp_path / "fewer"})


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_run_without_its_manifest(train, run_copy, damage):
    """Its arguments cannot be compared: only who insists goes on."""
    path = run_copy / "manifest.json"
    path.unlink() if damage == "missing" else path.write_text('{"arguments": {')
    assert f"{path} is {damage}" in refusal(train, run_copy)
    result = train(run_copy, {"--iterations": 7}, "--allow_changed_args")
    assert "so arguments are not compared" in result.stderr
    assert json.loads(path.read_text())["history"] == []


def test_run_whose_checkpoints_are_gone(train, run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    assert "has a finished run whose checkpoints are gone" in refusal(train, run_copy)
    shutil.rmtree(run_copy / "export")
    result = train(run_copy, {"--iterations": 1})
    assert "was ended before its first checkpoint: it begins anew" in result.stderr


def test_metrics_that_are_gone_are_said(train, run_copy):
    (run_copy / "metrics.jsonl").unlink()
    assert "metrics.jsonl has 0 of the 6 iterations that were done" in train(run_copy, {"--iterations": 7}).stderr


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("hpsv2=/a/HPS.pt,dtype=auto@0.28", "hpsv2=b/HPS.pt,dtype=auto@0.28", True),
        ("hpsv2=/a/HPS.pt", "hpsv2=/a/HPS_old.pt", False),
        ("clip=m/clip@0.3", "clip=m/clip@0.4", False),
        ("http.a=http://n1:8000+http://n2:8000,reward=ocr,patience=8@0.5", "http.a=http://n3:9000,reward=ocr@0.5", True),
        ("http.a=http://n1:8000,reward=ocr", "http.a=http://n1:8000,reward=clip", False),
    ],
)
def test_the_same_rewards_elsewhere(before, now, same):
    assert (_meaning("rewards", [before]) == _meaning("rewards", [now])) == same


# ------------------------------------------------------------------------------------------------------- one run at a time


def test_a_second_run_in_the_same_folder_is_refused(run_flags, finished_run_of_two, tmp_path):
    """Even if it comes from torchrun's second rank later; the first one goes on undisturbed, and after SIGKILL its lock means nothing."""
    run = tmp_path / "run"
    flags = run_flags(run, {"--iterations": 6})
    forked = start_forked(TRAIN, *flags, processes=2, log=tmp_path / "first")
    wait_for_moment("in_the_middle", run)
    os.kill(forked[0].pid, signal.SIGSTOP)  # so that it cannot end before the other comes
    second = run_script(TRAIN, *flags, log=tmp_path / "second")
    os.kill(forked[0].pid, signal.SIGCONT)
    assert second.returncode == 2
    assert f"{run} is in use by process {forked[0].pid} on {socket.gethostname()}, since " in second.stderr
    assert "Traceback" not in second.stderr
    for process in forked:
        process.join()
    assert [process.exitcode for process in forked] == [0, 0]
    assert_same_run(run, finished_run_of_two)
    assert not (run / "lock").exists()


def test_lock_that_a_killed_run_left(train, finished_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").write_text('{"host": "gone", "pid": 1, "job": "12", "since": "yesterday"}')
    train(run, {"--iterations": 6})
    assert_same_run(run, finished_run)


@pytest.mark.parametrize(("state", "refused"), [("RUNNING", True), ("", False)])
def test_lock_of_another_host_where_locks_do_not_reach(monkeypatch, tmp_path, state, refused):
    """SLURM knows whether the job that took the folder still runs."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --format=%T --jobs 12" ] && echo {state}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text('{"host": "gone", "pid": 1, "job": "12", "since": "yesterday"}')
    if refused:
        with pytest.raises(UserError, match="in use by process 1 on gone, SLURM job 12, since yesterday"):
            _lock(tmp_path / "run")
    else:
        _lock(tmp_path / "run")


def test_refused_run_leaves_no_folder(train, tmp_path):
    assert train(tmp_path / "run", {"--rewards": "clip=nowhere"}, check=False).returncode == 2
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_signal_saves_and_stops(run_flags, request, tmp_path, number, processes):
    """No iteration that was finished is lost, whatever --checkpoint_every is, even if one process alone gets the signal."""
    run = tmp_path / "run"
    flags = run_flags(run, {"--iterations": 6, "--checkpoint_every": 100})
    forked = start_forked(TRAIN, *flags, processes=processes, log=tmp_path / "log")
    wait_for_moment("between_the_first_checkpoints", run)
    os.kill(forked[-1].pid, number)
    for process in forked:
        process.join()
    assert [process.exitcode for process in forked] == [128 + number] * processes
    stderr = (tmp_path / "log.0.stderr").read_text()
    assert "Traceback" not in stderr
    assert f"stopped by {number.name}; the same command goes on from the last checkpoint" in stderr
    assert (run / "checkpoints" / "latest").read_text() == f"iteration_{lines_of(run):06d}"
    assert 3 <= lines_of(run) < 6
    run_script(TRAIN, *flags, processes=processes, log=tmp_path / "log")
    assert_same_run(run, request.getfixturevalue("finished_run" if processes == 1 else "finished_run_of_two"))
