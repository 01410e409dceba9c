"""Signals that ask a run to stop: it saves the last whole iteration and ends, however it was started, and the same command goes on."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, MODEL, REPOSITORY, TRAIN, command, flag_list, start_forked
from test_resume import assert_same_run

from fastvideo.runs import stop
from fastvideo.runs.tracking import read_metrics

ENDLESS = {"--iterations": 500, "--checkpoint_every": 1000}


def iterations(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_saved(run: Path) -> int:
    """All that the metrics tell of is in the checkpoint; give the number of iterations."""
    done = iterations(run)
    assert [row["iteration"] for row in read_metrics(run)] == list(range(1, done + 1))
    assert (run / "checkpoints" / "latest").read_text() == f"iteration_{done:06d}"
    return done


SLOW = ["SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("name", ["SIGHUP", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_signal_saves(run_flags, tmp_path, name):
    assert [signal.Signals(number).name for number in sorted(stop.SIGNALS)] == sorted(
        ["SIGHUP", *SLOW], key=lambda each: signal.Signals[each]
    )
    [process] = start_forked(TRAIN, *run_flags(tmp_path / "run", ENDLESS), log=tmp_path / "log")
    wait_until(lambda: iterations(tmp_path / "run") >= 2)
    os.kill(process.pid, signal.Signals[name])
    process.join(60)
    assert process.exitcode == 128 + signal.Signals[name]
    said = (tmp_path / "log.0.stderr").read_text()
    assert f"stopped by {name}; the same command goes on from the last checkpoint" in said and "Traceback" not in said
    assert_saved(tmp_path / "run")


def test_signal_to_one_of_two_processes(train, run_flags, tmp_path):
    """And resumed it ends like a run that nothing happened to."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    forked = start_forked(TRAIN, *run_flags(run, ENDLESS), processes=2, log=tmp_path / "log")
    wait_until(lambda: iterations(run) >= 2)
    os.kill(forked[1].pid, signal.SIGHUP)
    for process in forked:
        process.join(60)
    assert [process.exitcode for process in forked] == [128 + signal.SIGHUP] * 2
    flags = {"--iterations": assert_saved(run) + 2}
    assert "resuming from" in train(run, flags, processes=2).stdout
    train(whole, flags, processes=2)
    assert_same_run(run, whole)


# ------------------------------------------------------------------------------------------------- started as by a user's hands


def own_terminal() -> None:
    """In a new process: the terminal that is its stdin is its own, and ends with SIGHUP."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def launch_script(folder: Path, script: Path, words: str = "", last: str = "exec python") -> list[str]:
    """A script as those of scripts/, which starts `script` with two processes."""
    path = folder / "train_small.sh"
    path.write_text(
        f"source {REPOSITORY}/scripts/setup.sh requirements-dev.txt\n"
        f'echo "$OMP_NUM_THREADS" >{folder}/threads\n'
        f'{last} "$repository/scripts/launch.py" "${{rendezvous[@]}}" --nproc_per_node 2 {script} {words}\n'
    )
    return ["bash", str(path)]


def launcher(folder: Path, run: Path, run_flags) -> list[str]:
    return launch_script(folder, TRAIN, " ".join(flag_list(*run_flags(run, ENDLESS))))


# Notes that it is there; then as asked: refuses its flags, waits without listening, or listens and takes a second to save.
WORKER = """
import os, signal, sys, time
mode, folder = sys.argv[1:]
rank = int(os.environ["RANK"])
def save(number, frame):
    time.sleep(1)
    open(f"{folder}/saved_{rank}", "w").close()
    os._exit(128 + number)
if mode == "listens":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, save)
open(f"{folder}/started_{rank}", "w").write(str(os.getpid()))
while not (os.path.exists(f"{folder}/started_0") and os.path.exists(f"{folder}/started_1")):
    time.sleep(0.01)
if mode == "refuses":
    if rank == 0:
        print("error: --shift -1 must be above 0", file=sys.stderr, flush=True)
        sys.exit(2)
if mode == "dies" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("mode", "number", "last", "code", "says"),
    [
        ("refuses", None, "exec python", 2, "error: --shift -1 must be above 0"),
        ("dies", None, "exec python", 137, "error: rank 1, which was the first to fail on this node, was ended by SIGKILL"),
        ("loads", signal.SIGINT, "exec python", 130, ""),
        ("listens", signal.SIGTERM, "exec python", 143, ""),
        ("listens", signal.SIGINT, "attend python", 130, ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("refuses", None, "attend python", 2, "error: --shift -1 must be above 0"),
                ("loads", signal.SIGTERM, "attend python", 143, ""),
                ("loads", signal.SIGHUP, "exec python", 129, ""),
                ("listens", signal.SIGUSR1, "exec python", 138, ""),
            )
        ),
    ],
)
def test_a_launch_script_passes_signals_on_and_ends_as_its_processes_do(tmp_path, mode, number, last, code, says):
    """The signal goes to the script's process alone, twice, as by an impatient user; nothing is left, and all that is said is `says`."""
    (tmp_path / "worker.py").write_text(WORKER)
    words = launch_script(tmp_path, tmp_path / "worker.py", f"{mode} {tmp_path}", last)
    with open(tmp_path / "log", "w") as log:
        script = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, start_new_session=True)
    started = [tmp_path / f"started_{rank}" for rank in range(2)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in started))
    if number:
        script.send_signal(number)
        time.sleep(0.3)
        script.send_signal(number)
    assert script.wait(30) == code, (tmp_path / "log").read_text()
    assert not any(Path(f"/proc/{path.read_text()}").exists() for path in started)
    assert all((tmp_path / f"saved_{rank}").exists() == (mode == "listens") for rank in range(2))
    said = (tmp_path / "log").read_text().strip()
    assert said.startswith(says) and said.count("\n") == 0 and bool(said) == bool(says)


@pytest.mark.slow
def test_kill_of_a_launch_script_saves_and_leaves_nothing(cache, run_flags, tmp_path):
    """scripts/train_flux.sh itself, with rewards of its user's own; then the same command with a mistake."""
    run = tmp_path / "run"
    flags = flag_list(*run_flags(run, ENDLESS | {"--dtype": "float32", "--shift": 3}))
    given = os.environ | ENVIRONMENT | {"MODEL": str(MODEL), "EMBEDDINGS": str(cache), "GPUS": "2"}
    words = ["bash", "scripts/train_flux.sh", *flags, "--rollout_batch_size", "8"]
    with open(tmp_path / "log", "w") as log:
        script = subprocess.Popen(words, stdout=log, stderr=log, env=given, cwd=REPOSITORY, start_new_session=True)
    wait_until(lambda: iterations(run) >= 2)
    script.send_signal(signal.SIGTERM)
    assert script.wait(60) == 128 + signal.SIGTERM
    said = (tmp_path / "log").read_text()
    assert said.splitlines()[-1] == "stopped by SIGTERM; the same command goes on from the last checkpoint" and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.killpg(script.pid, 0)
    done = assert_saved(run)
    again = subprocess.run([*words, "--iterations", str(done)], env=given, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    wrong = subprocess.run([*words, "--noise_level", "-1"], env=given, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: --noise_level") and "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("by", ["python", "launch script"])
def test_closed_terminal(run_flags, tmp_path, by):
    """All it says from then on fails: it must still save."""
    run = tmp_path / "run"
    words = command(TRAIN, *run_flags(run, ENDLESS)) if by == "python" else launcher(tmp_path, run, run_flags)
    ours, theirs = pty.openpty()
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=own_terminal, cwd=tmp_path)
    os.close(theirs)
    os.set_blocking(ours, False)

    def read_and_look() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65536)
        return iterations(run) >= 3

    wait_until(read_and_look)
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    wait_until(lambda: (run / "checkpoints" / "latest").exists(), 60)
    assert_saved(run)


@pytest.mark.slow
def test_nohup(run_flags, tmp_path):
    """It goes on at SIGHUP, and saves at SIGTERM to the script alone."""
    run = tmp_path / "run"
    words = ["nohup", *launcher(tmp_path, run, run_flags)]
    with open(tmp_path / "log", "w") as log:
        group = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, start_new_session=True, cwd=tmp_path)
    wait_until(lambda: iterations(run) >= 2)
    os.killpg(group.pid, signal.SIGHUP)
    before = iterations(run)
    wait_until(lambda: iterations(run) >= before + 3)
    group.send_signal(signal.SIGTERM)
    assert group.wait(60) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in (tmp_path / "log").read_text()
    assert_saved(run)
    assert (tmp_path / "threads").read_text() == "1\n"


@pytest.mark.parametrize(("gpus", "threads"), [(1, os.cpu_count()), (1000, 1)])
def test_settings_of_the_launch_scripts(tmp_path, gpus, threads):
    path = tmp_path / "train_small.sh"
    path.write_text(f"source {REPOSITORY}/scripts/setup.sh requirements-dev.txt\nenv\n")
    before = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"GPUS": str(gpus)}
    said = subprocess.run(["bash", path], env=before, capture_output=True, text=True, check=True).stdout
    settings = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    assert settings["OMP_NUM_THREADS"] == str(threads)
    assert settings["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert settings["TORCH_FR_BUFFER_SIZE"] == "2000" and settings["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


@pytest.mark.slow
def test_a_mistyped_flag_is_told(tmp_path):
    """By rank 0, also where another process has found it first and would end all."""
    words = ["scripts/launch.py", "--standalone", "--nproc_per_node", "3", TRAIN, "--no_such_flag", "1"]
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, *words], env=os.environ | ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 2 and "no_such_flag" in result.stderr, result.stderr
