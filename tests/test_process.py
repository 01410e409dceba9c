"""How a process ends: with the exit code that it was given, and with all that it has printed."""

import ctypes
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ENVIRONMENT, FORK_SERVER, REPOSITORY, start_fork_server

from fastvideo.errors import UserError
from fastvideo.parallel import distributed
from fastvideo.runs.stop import Stopped

ENDS = {"success": 0, "error": 1, "user error": 2, "signal": 143, "sys.exit": 7}


def leave(end: str, rank: int, meeting: str) -> None:
    """In a forked process, one of two: end in this way while gloo's threads are still at work with tensors."""
    os.dup2(os.open(f"{meeting}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

    def main() -> None:
        dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2, timeout=timedelta(minutes=1))
        for _ in range(100):
            dist.all_reduce(torch.ones(300), async_op=True)
        if end == "error":
            raise ValueError("as said")
        if end == "user error":
            raise UserError("as said")
        if end == "signal":
            raise Stopped(15)
        if end == "sys.exit":
            sys.exit(7)

    try:
        distributed.run(main)
    except SystemExit as left:
        code = left.code
    except Exception:
        code = 1
    else:
        code = 0
    ctypes.pythonapi.Py_Exit(code)  # what the interpreter does at the end of a script, and multiprocessing does not


@pytest.mark.slow
def test_exit_codes_are_exact(tmp_path):
    """1,000 of 1,000 refusals, where many used to end with SIGABRT: the interpreter takes itself apart while gloo's threads are at work."""
    start_fork_server()
    codes, running = Counter(), []
    counts = {end: 1000 if end == "user error" else 100 for end in ENDS}
    ends = [end for end, count in counts.items() for _ in range(count // 2)]  # of two processes each
    for number, end in enumerate(ends):
        running.append((end, [FORK_SERVER.Process(target=leave, args=(end, rank, f"{tmp_path}/{number}")) for rank in range(2)]))
        for process in running[-1][1]:
            process.start()
        while len(running) == 4 or (running and number == len(ends) - 1):
            end, processes = running.pop(0)
            for process in processes:
                process.join()
                codes[end, process.exitcode] += 1
    assert codes == {(end, code): counts[end] for end, code in ENDS.items()}


# What a process does at its end: the rest of its output, a thread that still writes, whoever has registered with atexit.
AT_THE_END = """
import atexit, sys, threading, time
from fastvideo.parallel import distributed

def main():
    distributed.init()
    atexit.register(lambda: print("from atexit"))
    threading.Thread(target=lambda: (time.sleep(0.3), print("from a thread"))).start()
    sys.stdout.write("without a newline; ")
    if sys.argv[1] == "none":
        return
    raise {"user": distributed.UserError("a mistake"), "bug": ValueError("a bug"), "exit": SystemExit("a word")}[sys.argv[1]]

distributed.run(main)
"""


@pytest.mark.parametrize(("end", "code", "said"), [("user", 2, "error: a mistake"), ("bug", 1, "ValueError: a bug")])
def test_nothing_is_lost_at_the_end(tmp_path, end, code, said):
    (tmp_path / "script.py").write_text(AT_THE_END)
    result = run(tmp_path / "script.py", end, tmp_path)
    assert result.returncode == code
    assert result.stdout == "without a newline; from a thread\nfrom atexit\n"
    assert result.stderr.strip().endswith(said)
    assert ("Traceback" in result.stderr) == (end == "bug")


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "said"), [("none", 0, ""), ("exit", 1, "a word")])
def test_nothing_is_lost_at_other_ends(tmp_path, end, code, said):
    test_nothing_is_lost_at_the_end(tmp_path, end, code, said)


def run(script: Path, word: str, folder: Path) -> subprocess.CompletedProcess:
    """By plain python: what is looked at is the interpreter's own end."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), word]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


# A reader that leaves after the first line, as `| head -1` does.
WITHOUT_READER = """
import sys, time
from fastvideo.parallel import distributed

def main():
    print("first", flush=True)
    print("first", file=sys.stderr, flush=True)
    time.sleep(1)
    for number in range(10_000):
        print(number)
        print(number, file=sys.stderr)
    open("reached", "w").close()

distributed.run(main)
"""


@pytest.mark.parametrize("unbuffered", [False, True])
def test_output_that_nobody_reads_ends_no_run(tmp_path, unbuffered):
    (tmp_path / "script.py").write_text(WITHOUT_READER)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *["-u"] * unbuffered, "script.py"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for stream in (process.stdout, process.stderr):
        assert stream.readline() == b"first\n"
        stream.close()
    assert process.wait(60) == 0
    assert (tmp_path / "reached").exists()
