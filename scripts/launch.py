"""torchrun as the scripts beside it use it, with its command line: python scripts/launch.py --standalone ... SCRIPT FLAGS

- What asks the run to stop is passed on and waited for, half an hour; then it ends with 128 + the signal's number. A signal that its
  processes do not listen for, as while they load their models, ends them at once.
- It ends with the exit code of the process that failed first, and without a report where that process has said itself what is wrong.
- LAUNCH_LOGS, set by slurm.sh, names a folder: each process writes to rank_N.log there, start after start, and failed.NODE gets the time,
  rank and exit code of the first failure. SLURM sends its signals to every process of a step, so they are not passed on.
"""

# ruff: noqa: E402
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, while the packages load

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LOGS = os.environ.get("LAUNCH_LOGS")
# Python turns SIGINT into a traceback until a script listens for it. So it is ignored until then, and SIGTERM sent in its place.
START = 'trap "" INT; exec "$@"' + ' >>"$LAUNCH_LOGS/rank_$RANK.log" 2>&1' * bool(LOGS)
received: list[int] = []


def receive(number: int, frame: FrameType | None) -> None:
    """The first signal has torchrun pass it on and wait; later ones are only passed on."""
    if LOGS and number in (signal.SIGTERM, signal.SIGUSR1):
        return  # caught, not ignored, which the processes would inherit
    received.append(number)
    children = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    if not children:
        os._exit(128 + received[0])
    passed_on = signal.SIGTERM if number == signal.SIGINT and not any(map(listens_for_interrupts, children)) else signal.Signals(number)
    if len(received) == 1:
        raise SignalException(f"{passed_on.name}", passed_on)
    for pid in children:
        os.kill(pid, passed_on)


def listens_for_interrupts(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> signal.SIGINT - 1 & 1)


def note(when: float, rank: int, code: int) -> None:
    if LOGS:
        Path(LOGS, f"failed.{os.environ['NODE_RANK']}").write_text(f"{when} {rank} {code}\n")


def first_failure(failed: ChildFailedError) -> int:
    """Exit code of the process that failed first; says which one it was, unless that has said enough by itself."""
    rank, failure = failed.get_first_failure()
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    note(failure.timestamp, rank, code)
    if failure.exitcode < 0:
        memory = ", as by the system when memory runs out" * (failure.exitcode == -signal.SIGKILL)
        how = f"was ended by {signal.Signals(-failure.exitcode).name}{memory}"
    else:
        said = failure.message.splitlines()[0] if Path(failure.error_file).is_file() else "see what it has said"
        how = f"failed with exit code {code}: {said}"
    if code not in (2, *(128 + number for number in SIGNALS)):
        print(f"error: rank {rank}, which was the first to fail on this node, {how}", file=sys.stderr)
    return code


def main() -> int:
    args = get_args_parser().parse_args()
    args.signals_to_handle = "SIGURG"  # not those above, whose handlers torchrun would replace
    args.shutdown_timeout = args.shutdown_timeout or (30 if LOGS else 1800)
    args.no_python = True
    args.training_script_args = ["-c", START, "bash", sys.executable, "-u", args.training_script, *args.training_script_args]
    args.training_script = "bash"
    logging.disable(logging.ERROR)  # torchrun's account of what is said here in a line
    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, receive)
        run(args)
    except ChildFailedError as failed:
        return first_failure(failed)
    except SignalException:
        return 128 + received[0]
    except (DistError, ValueError) as error:  # of the address, the port, or the number of processes
        print(f"error: the processes cannot be started: {str(error).splitlines()[0]}", file=sys.stderr)
        note(time.time(), int(os.environ.get("NODE_RANK", 0)) * int(os.environ.get("GPUS", 1)), 1)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # not through the interpreter's end, at which another signal would give another code
