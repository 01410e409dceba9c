"""A signal asks the run to stop: it saves what it has learned and ends, so that the same command goes on from there."""

import contextlib
import os
import signal
import time
from types import FrameType

from fastvideo.errors import UserError, launch_rank
from fastvideo.parallel.distributed import all_gather_object

# What would end a run unsaved: from SLURM at preemption and requeue, or as a warning (sbatch --signal); Ctrl-C, Ctrl-\, a closed terminal;
# a limit of CPU time. Timers' are for who sets them; faults and SIGKILL cannot be caught; SIGPIPE and SIGXFSZ are errors in Python.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGXCPU)
REPEATS = 3.0  # seconds in which Ctrl-C is the same one again: torchrun passes on what its processes have got from the terminal as well


class Stopped(UserError):
    """Not an error: the run was asked to stop. `distributed.run` ends the process with `exit_code`, 128 + the signal's number."""

    on_all_ranks = True

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the same command goes on from the last checkpoint")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self):
        return Stopped, (self.signal_number,)


class StopSignals:
    """Listens from here on. A signal only asks, as SLURM sends several while a run saves; but a later Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.first = 0.0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is nohup's
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.first = number, time.monotonic()
            if launch_rank() == 0:  # not by print, which the signal may have interrupted
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, f"\n{name}: will save and stop as soon as the weights are those of a whole iteration\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.first > REPEATS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def requested(self) -> Stopped | None:
        """Collective. Whether any process was asked: the same answer on all, to be raised once the checkpoint is saved."""
        return next((Stopped(number) for number in all_gather_object(self.received) if number is not None), None)
