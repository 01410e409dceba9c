"""A process that dies, stops or hangs ends the job within the timeout, and is named."""

import os
import re
import signal
import subprocess
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, TRAIN, command, start_forked

# worker.py TIMEOUT MISHAP: two or more processes that meet every few milliseconds, until something happens to rank 1.
WORKER = """
import os, sys, time
import torch, torch.distributed as dist
from fastvideo.parallel import distributed

def main():
    ranks = distributed.init(timeout_minutes=float(sys.argv[1]) / 60)
    for step in range(1_000_000):
        dist.all_reduce(torch.ones(1000))
        time.sleep(0.005)
        if step == 50:
            open(f"{__file__}.{ranks.rank}.ready", "w").close()
            if sys.argv[2] == "no_collectives":  # as where a GPU waits, and python only for the GPU
                time.sleep(1000)
            if sys.argv[2].startswith("gpu_"):  # a collective is put in a queue, and its result is waited for outside torch.distributed
                if ranks.rank == 1 and sys.argv[2] == "gpu_out_of_memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
                if ranks.rank == 1 and sys.argv[2] == "gpu_exit":
                    sys.exit(3)
                if ranks.rank != 1:
                    work = dist.all_reduce(torch.ones(1000), async_op=True)
                time.sleep(1000)
            if sys.argv[2] == "standstill":
                time.sleep(20)
                return
            if ranks.rank == 1 and sys.argv[2] == "hang":
                time.sleep(1000)
            if ranks.rank == 1 and sys.argv[2] == "bug":
                raise ValueError("a bug in rank 1")
            if sys.argv[2] == "first_attempt":
                if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
                    return
                if ranks.rank == 1:
                    raise ValueError("a bug in rank 1")
            if ranks.rank == 1 and sys.argv[2] == "user":
                raise distributed.UserError("a mistake that only rank 1 sees")
            if sys.argv[2] == "end":
                time.sleep(ranks.rank)  # not all at once
                return

distributed.run(main)
"""


@pytest.fixture
def worker(tmp_path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def wait_for(event, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline, "never came to the moment of the mishap"
        time.sleep(0.01)


def ready(worker: Path, processes: int):
    return lambda: all(Path(f"{worker}.{rank}.ready").exists() for rank in range(processes))


def outcome(forked: list[BaseProcess], log: Path, lost: list[int], seconds: float) -> tuple[list[str], float]:
    """What each process wrote on stderr, and after how many seconds all but `lost` had ended; each with an exit code above 0."""
    start = time.monotonic()
    others = [process for rank, process in enumerate(forked) if rank not in lost]
    try:
        while any(process.exitcode is None for process in others) and time.monotonic() < start + seconds:
            wait([process.sentinel for process in others if process.exitcode is None], timeout=0.1)
        took, exitcodes = time.monotonic() - start, [process.exitcode for process in others]
    finally:
        for process in forked:
            process.kill()  # SIGKILL ends a stopped process too
            process.join()
    said = [Path(f"{log}.{rank}.stderr").read_text() for rank in range(len(forked))]
    assert all(code is not None and code > 0 for code in exitcodes), (exitcodes, said)
    return said, took


def errors(said: str) -> list[str]:
    """The sentences among what was said, and where a traceback begins."""
    return [line for line in said.splitlines() if line.startswith(("error: ", "Traceback"))]


# Rank 0 of three goes with the store; without it, nobody knows who lives.
@pytest.mark.parametrize(
    ("mishap", "rank", "timeout", "limit"),
    [
        (signal.SIGKILL, 1, 60, 15),  # the others' connections break: no need to wait
        (signal.SIGKILL, 0, 60, 15),
        pytest.param(signal.SIGSTOP, 1, 8, 25, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, 8, 35, marks=pytest.mark.slow),
    ],
)
def test_the_others_name_it(worker, tmp_path, mishap, rank, timeout, limit):
    """No launcher watches. The lowest rank left says the sentence first, then how it learned of it; the others are silent."""
    forked = start_forked(worker, timeout, "none", processes=3, log=tmp_path / "log")
    wait_for(ready(worker, 3))
    time.sleep(2)  # for signs of life
    os.kill(forked[rank].pid, mishap)
    said, _ = outcome(forked, tmp_path / "log", [rank], limit)
    speaker, other = (0, 2) if rank else (1, 2)
    sentence, *rest = errors(said[speaker])
    assert sentence.startswith("error: rank 1 on " if rank else "error: rank 0 or its torchrun, on 127.0.0.1, does not answer"), said
    if rank:
        assert os.uname().nodename in sentence and "s ago: killed, stopped, or cut off" in sentence
    assert rest == ["Traceback (most recent call last):"]
    assert not errors(said[other])


@pytest.mark.parametrize(
    ("mishap", "expected", "own"),
    [
        pytest.param(
            "hang",
            f"keeps the others waiting: it is at {{worker}}:{WORKER[: WORKER.index('hang')].count(chr(10)) + 2}, in main",
            [],
            marks=pytest.mark.slow,
        ),
        ("bug", "stopped: ValueError: a bug in rank 1 (see its own output)", ["ValueError: a bug in rank 1"]),
        pytest.param(
            "user",
            "stopped: a mistake that only rank 1 sees (see its own output)",
            ["error: a mistake that only rank 1 sees"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_cause_is_not_hidden(worker, tmp_path, mishap, expected, own):
    """A living process that does not come to a collective is named with the place where it is; one that failed, with its error."""
    forked = start_forked(worker, 8 if mishap == "hang" else 60, mishap, processes=3, log=tmp_path / "log")
    wait_for(ready(worker, 3))
    said, _ = outcome(forked, tmp_path / "log", [], 30)
    assert errors(said[0])[0] == f"error: rank 1 on {os.uname().nodename} {expected.format(worker=worker)}"
    assert not errors(said[2])
    for line in own:
        assert line in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_failing_collective(worker, tmp_path, rank):
    """Silence alone ends the job, within half of the timeout and the time to make sure."""
    forked = start_forked(worker, 14, "no_collectives", processes=3, log=tmp_path / "log")
    wait_for(ready(worker, 3))
    time.sleep(10)  # longer than half of the timeout: nothing happens to the living
    assert [process.exitcode for process in forked] == [None] * 3
    forked[rank].kill()
    said, took = outcome(forked, tmp_path / "log", [rank], 20)
    assert errors(said[0 if rank else 1])[0].startswith(f"error: rank {rank} o"), said
    assert 6 < took < 17


@pytest.mark.parametrize(
    ("mishap", "timeout", "limit", "expected"),
    [
        ("gpu_out_of_memory", 1800, 20, "stopped: OutOfMemoryError: CUDA out of memory (see its own output)"),
        pytest.param("gpu_exit", 1800, 20, "stopped: it left by sys.exit (see its own output)", marks=pytest.mark.slow),
        pytest.param(
            "gpu_hang",
            20,
            30,
            f"keeps the others waiting: it is at {{worker}}:{WORKER[: WORKER.index('async_op')].count(chr(10)) + 2}, in main",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_while_the_others_wait_for_a_gpu(worker, tmp_path, mishap, timeout, limit, expected):
    """They are in a call that never ends and never touches torch.distributed; no launcher watches."""
    forked = start_forked(worker, timeout, mishap, processes=4, log=tmp_path / "log")
    wait_for(ready(worker, 4))
    said, took = outcome(forked, tmp_path / "log", [], limit)
    assert errors(said[0])[0] == f"error: rank 1 on {os.uname().nodename} {expected.format(worker=worker)}"
    assert not errors(said[2]) and not errors(said[3])
    if mishap == "gpu_hang":
        assert took > timeout / 2, "ended while it might have come"


@pytest.mark.slow
def test_a_standstill_of_all_is_said(worker, tmp_path):
    """Once, with the place; and if it was only slow, as here, the run goes on."""
    forked = start_forked(worker, 12, "standstill", processes=2, log=tmp_path / "log")
    for process in forked:
        process.join(60)
    said = [Path(f"{tmp_path / 'log'}.{rank}.stderr").read_text().strip() for rank in range(2)]
    place = f"{worker}:{WORKER[: WORKER.index('standstill')].count(chr(10)) + 2}, in main"
    assert re.fullmatch(rf"warning: nothing was sent between processes for 1\d s: rank 0 is at {re.escape(place)}", said[0]), said
    assert (said[1], [process.exitcode for process in forked]) == ("", [0, 0])


def test_end_is_quiet(worker, tmp_path):
    """Processes that end one after the other, the one that holds the store first, say nothing."""
    forked = start_forked(worker, 60, "end", processes=3, log=tmp_path / "log")
    for process in forked:
        process.join(60)
    assert [process.exitcode for process in forked] == [0, 0, 0]
    assert [Path(f"{tmp_path / 'log'}.{rank}.stderr").read_text() for rank in range(3)] == ["", "", ""]


# ------------------------------------------------------------------------------------------------------------ training


def iterations(run: Path, count: int):
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= count


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_training(run_flags, tmp_path, rank):
    """A process of a training run is killed in mid-iteration; what it had saved is whole, as test_resume.py checks."""
    run, log = tmp_path / "run", tmp_path / "log"
    flags = run_flags(run, {"--iterations": 1000, "--timeout_minutes": 1})
    forked = start_forked(TRAIN, *flags, processes=2, log=log)
    wait_for(iterations(run, 2))
    forked[rank].kill()
    said, _ = outcome(forked, log, [rank], 20)
    assert errors(said[1 - rank])[0].startswith(f"error: rank {rank} o"), said


# training.py MOMENT RANK flags: once training is on its way, RANK hangs before a backward pass or in a rollout. Collectives on
# tensors are those of a GPU: something else is at them, and the main thread waits without a call that waits in torch.distributed.
# Objects travel by gloo as ever.
HANGING_TRAINING = """
import sys, threading, time
import torch, torch.distributed as dist
import train_grpo_flux
from fastvideo.parallel import distributed, zero

moment, culprit = sys.argv.pop(1), int(sys.argv.pop(1))
calls, threads = 0, {}

def wait_for_gpu(collective):
    def kernel(*args, **kwargs):
        try:
            with torch.no_grad():
                collective(*args, **kwargs)
        except RuntimeError:  # a kernel does not learn of gloo's timeouts and broken connections: it goes on for ever
            return
        threads.pop(threading.current_thread().name)

    def queued(*args, async_op=False, **kwargs):
        if async_op:  # what DeepSpeed waits for later
            return collective(*args, async_op=True, **kwargs)
        thread = threading.Thread(target=kernel, args=args, kwargs=kwargs, daemon=True)
        threads[thread.name] = thread
        thread.start()
        while thread.name in threads:
            time.sleep(0.001)
    return queued

def hang_in(function):
    def hanging(*args, **kwargs):
        global calls
        calls += 1
        if calls >= CALLS[moment] and distributed.launch_rank() == culprit:
            open(f"{__file__}.ready", "w").close()
            time.sleep(1000)  # here
        return function(*args, **kwargs)
    return hanging

CALLS = {"backward": 4, "rollout": 2}
for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce", "all_to_all_single"):
    setattr(dist, name, wait_for_gpu(getattr(dist, name)))
if moment == "backward":
    zero.backward_and_step = hang_in(zero.backward_and_step)
else:
    train_grpo_flux.rollout = hang_in(train_grpo_flux.rollout)
distributed.run(train_grpo_flux.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "rank", "flags"),
    [("backward", 2, {"--zero_stage": 2}), ("rollout", 1, {"--sp_size": 2}), ("rollout", 3, {}), ("rollout", 1, {"--zero_stage": 3})],
)
def test_training_hangs(run_flags, tmp_path, moment, rank, flags):
    """All processes end within 1.5 timeouts, and the one that hangs is named with the place where it is."""
    script, timeout = tmp_path / "training.py", 30
    script.write_text(HANGING_TRAINING)
    training = run_flags(tmp_path / "run", {"--timeout_minutes": timeout / 60, "--prompts_per_iteration": 4, "--sample_every": 0}, flags)
    forked = start_forked(script, moment, rank, *training, processes=4, log=tmp_path / "log")
    wait_for(Path(f"{script}.ready").exists)
    said, _ = outcome(forked, tmp_path / "log", [], 1.5 * timeout)
    here = HANGING_TRAINING[: HANGING_TRAINING.index("# here")].count("\n") + 1
    place = f"keeps the others waiting: it is at {script}:{here}, in hanging"
    assert errors(said[0])[0] == f"error: rank {rank} on {os.uname().nodename} {place}", said


@pytest.mark.slow
@pytest.mark.parametrize(("mishap", "rank", "limit"), [(signal.SIGKILL, 0, 20), (signal.SIGKILL, 1, 20), (signal.SIGSTOP, 1, 10 + 20 + 40)])
def test_torchrun(run_flags, tmp_path, mishap, rank, limit):
    """torchrun ends the others at once, and its report names the rank. It gives a stopped process 30 s to end."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(TRAIN, *run_flags(run, {"--iterations": 1000, "--timeout_minutes": 10 / 60}), processes=2)
    with open(log, "w") as file:
        launcher = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
    try:
        wait_for(iterations(run, 2))
        ranks = {int(rank_of(pid)): pid for pid in children(launcher.pid)}
        os.kill(ranks[rank], mishap)
        start = time.monotonic()
        assert launcher.wait(limit) == 1
    finally:
        for pid in children(launcher.pid):
            os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()
    said = log.read_text()
    if mishap == signal.SIGSTOP:
        assert time.monotonic() - start < limit
        assert errors(said)[0].startswith(f"error: rank {rank} on "), said
        assert f"LostProcess: rank {rank} on " in said[said.index("Root Cause") :]
    else:
        assert f"rank      : {rank} " in said[said.index("Root Cause") :]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_torchrun_may_start_again(worker):
    """What an attempt that failed left in torchrun's store does not end the next one."""
    words = command(worker, 20, "first_attempt", processes=2)
    words[words.index("--nproc_per_node") : words.index("--nproc_per_node")] = ["--max_restarts", "1"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert "a bug in rank 1" in result.stderr
    assert result.returncode == 0, result.stderr


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(variable.removeprefix("RANK=") for variable in variables if variable.startswith("RANK="))
