"""Runs commands, as many at a time as there are processors: `python scripts/paper/run_jobs.py FOLDER DOING`.

FOLDER/jobs has a line for each, NAME COMMAND... DOING is a word for the progress bar. What a command prints goes to FOLDER/logs/NAME.log;
its seconds and exit code are a line of FOLDER/seconds.txt. One that has ended well is noted in FOLDER/done/NAME, and not run again while
its words stay the same. A failure does not keep the others from running, but the exit code is 1. Ctrl-C and SIGTERM are passed on to what
runs, and nothing more is started. JOBS: how many at a time.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

running: set[subprocess.Popen] = set()
lock, stopping = threading.Lock(), threading.Event()


def stop(number: int, _) -> None:
    stopping.set()
    with lock:
        for process in running:
            process.send_signal(signal.SIGTERM)


def run(folder: Path, name: str, command: list[str]) -> int | None:
    """Exit code of the command, None if it was not started."""
    log, done = folder / "logs" / f"{name}.log", folder / "done" / name
    log.parent.mkdir(parents=True, exist_ok=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    with lock:  # so that what is started is known to whoever stops it
        if stopping.is_set():
            return None
        with log.open("a") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        running.add(process)
    start = time.monotonic()
    code = process.wait()
    with lock:
        running.discard(process)
        with (folder / "seconds.txt").open("a") as file:
            file.write(f"{time.monotonic() - start:.0f} {code} {name}\n")
    if code == 0:
        done.write_text(shlex.join(command))
    return code


def main() -> int:
    folder, doing = Path(sys.argv[1]), sys.argv[2]
    jobs = {name: command for name, *command in map(shlex.split, (folder / "jobs").read_text().splitlines())}
    left = {
        name: command
        for name, command in jobs.items()
        if not (folder / "done" / name).is_file() or (folder / "done" / name).read_text() != shlex.join(command)
    }
    if not jobs:
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with (folder / "jobs.lock").open("a+") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # also what a killed script has left running
            lock_file.seek(0)
            print(f"error: process {lock_file.read()} is at work in {folder}: wait for it, or stop it with kill", file=sys.stderr)
            return 2
        lock_file.truncate(0)
        print(os.getpid(), end="", file=lock_file, flush=True)
        return run_all(folder, doing, jobs, left)


def run_all(folder: Path, doing: str, jobs: dict[str, list[str]], left: dict[str, list[str]]) -> int:
    """Exit code."""
    failed = []
    workers = int(os.environ.get("JOBS") or os.cpu_count())
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="job", desc=doing) as progress:
        futures = {pool.submit(run, folder, name, command): name for name, command in left.items()}
        for future in as_completed(futures):
            name, code = futures[future], future.result()
            if code == 0:
                progress.set_postfix_str(name)
                progress.update()
            elif code is not None and not stopping.is_set():
                failed.append(name)
                progress.write(f"{name} failed with exit code {code}: see {folder / 'logs' / name}.log", file=sys.stderr)
    if stopping.is_set():
        print("stopped: the same command goes on", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
