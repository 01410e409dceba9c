"""Run by scripts/slurm.sh on each node of a job, with torchrun's command line: torchrun itself, fit for SLURM.

- SLURM sends its signals to every process of a step. They are for the training processes, which save and stop; torchrun would kill these
  30 seconds later.
- Each process writes to LOGS/rank_N.log, start after start.
- The process that failed first is noted in LOGS/failed.NODE: time, rank and exit code, of which a signal's is 128 + its number.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

# Caught, not ignored, which the processes that torchrun starts would inherit: what comes before they listen should end them.
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: None)

args = get_args_parser().parse_args()
args.signals_to_handle, args.shutdown_timeout = "SIGINT", 30
args.no_python = True
command = [sys.executable, "-u", args.training_script, *args.training_script_args]
args.training_script_args = ["-c", 'exec "$@" >>"$LOGS/rank_$RANK.log" 2>&1', "bash", *command]
args.training_script = "bash"
try:
    run(args)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if code not in (128 + signal.SIGTERM, 128 + signal.SIGUSR1):
        print(error, file=sys.stderr)
    Path(os.environ["LOGS"], f"failed.{os.environ['SLURM_NODEID']}").write_text(f"{failure.timestamp} {rank} {code}\n")
    sys.exit(code)
