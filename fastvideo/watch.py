"""A process that dies or hangs ends the job, and is named.

A collective that fails says only that some peer is gone or slow, and a process may wait for a peer that itself waits for the lost one. So
each process has a thread that writes the time into the store by which the processes met, every second, and looks at one neighbour. Once a
collective has failed anywhere, or a neighbour is silent for too long, all threads look at all processes, the lowest living rank says which
one is missing, and every process ends.

On GPUs NCCL's watchdog also ends processes whose collective failed or took longer than the timeout, with lines of its own and SIGABRT.
"""

import atexit
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from datetime import datetime, timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

PERIOD = 1.0  # seconds between signs of life
SILENCE = 5.0  # when something has failed, a process without a sign of life for this long is the lost one
PATIENCE = 10.0  # seconds for what should take none: an answer of the store, the others' ends
FINISHED, LEFT = "finished", "left"  # last words: of a process that is done, of one that ends because another is lost


class LostProcess(Exception):
    """How torchrun's report calls it."""


def from_collective(error: BaseException | None) -> bool:
    """Whether `error` was caused by a collective that failed: NCCL's and the store's errors have a type, gloo's only a message."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class Watch:
    """The thread of this process; it runs from here on.

    store, timeout: of the process group. A neighbour is lost, even if no collective has failed, after silence for half of `timeout`:
        half, so that this is said before NCCL's watchdog ends the process.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta):
        # A connection of its own: the main thread may be waiting in the other one.
        self.store = dist.PrefixStore("watch", store.clone())
        self.rank, self.world_size = rank, world_size
        self.limit = max(timeout.total_seconds() / 2, SILENCE)
        self.error = None  # of a collective, from the main thread
        self.answered = time.monotonic()  # when the store last did
        self.stopped = threading.Event()
        self.store.set(f"host/{rank}", socket.gethostname())
        self.store.set(f"beat/{rank}", str(time.time()))
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        atexit.register(self.stop)  # a thread inside the store would not survive the end of the interpreter

    def stop(self, last_word: str = FINISHED) -> None:
        """No more signs of life. `last_word` tells the others why: FINISHED, or the error that ends this process."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.thread.join(PATIENCE)
        if not self.thread.is_alive():
            self._say(last_word)

    def give_up(self, error: Exception) -> NoReturn:
        """A collective failed with `error`: find out whose fault it is, have it said, end this process with exit code 1."""
        self.error = error
        self.answered = time.monotonic()
        while self.thread.is_alive() and time.monotonic() - self.answered < SILENCE + PATIENCE:
            self.thread.join(PERIOD)  # it ends this process, unless the store does not answer
        self._end_without_store()

    def _run(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        beat, silence = "", 0.0  # counted in own periods, so that a job that is suspended as a whole goes on
        try:
            while not self.stopped.wait(PERIOD):
                self._beat()
                before, beat = beat, self._read("beat", neighbour)
                silence = silence + PERIOD if beat and beat == before else 0.0
                if self.error is not None or (silence > self.limit and not self._read("word", neighbour)):
                    self.store.set("over", "")
                if self.store.check(["over"]):
                    self._judge()
        except dist.DistError:  # the store is gone: a collective of the main thread will fail soon, or a GPU keeps it waiting
            lost = time.monotonic()
            while self.error is None and not self.stopped.wait(PERIOD / 10):
                if time.monotonic() - lost > self.limit:
                    self._end_without_store()

    def _beat(self) -> None:
        self.store.set(f"beat/{self.rank}", str(time.time()))

    def _read(self, key: str, rank: int) -> str:
        value = self.store.get(f"{key}/{rank}").decode() if self.store.check([f"{key}/{rank}"]) else ""
        self.answered = time.monotonic()
        return value

    def _say(self, last_word: str) -> None:
        """Leave the last word; rank 0, which may hold the store, waits for the others to leave theirs."""
        try:
            self.store.set(f"word/{self.rank}", last_word)
            if self.rank == 0 and last_word in (FINISHED, LEFT):
                deadline = time.monotonic() + (PATIENCE if last_word == FINISHED else 2 * PERIOD)
                while time.monotonic() < deadline and not all(self._read("word", rank) for rank in range(self.world_size)):
                    time.sleep(0.02)
        except dist.DistError:
            return  # nobody can hear it

    def _judge(self) -> NoReturn:
        """Look at all processes for a while, then end this one; the lowest rank that lives says why."""
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        waits = self.error is not None or any("torch/distributed/" in frame.filename for frame in stack)
        self.store.set(f"place/{self.rank}", "" if waits else f"{stack[-1].filename}:{stack[-1].lineno}, in {stack[-1].name}")
        ranks = range(self.world_size)
        before = [self._read("beat", rank) for rank in ranks]
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(PERIOD / 2)
            self._beat()
        words = [self._read("word", rank) for rank in ranks]
        silent = [rank for rank in ranks if not words[rank] and self._read("beat", rank) == before[rank]]
        failed = [rank for rank in ranks if words[rank] not in ("", FINISHED, LEFT)]
        named = [(rank, self._read("host", rank)) for rank in ranks]

        reasons = [f"rank {rank} on {host} stopped: {words[rank]} (see its own output)" for rank, host in named if rank in failed]
        by_host = defaultdict(list)
        for rank in silent:
            by_host[named[rank][1]].append(rank)
        for host, lost in by_host.items():
            since = min(float(before[rank] or "inf") for rank in lost)
            name = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
            if not host:
                reasons.append(f"{name} never arrived")
                continue
            when = f"{datetime.fromtimestamp(since):%H:%M:%S}, {time.time() - since:.0f} s ago"
            reasons.append(f"{name} on {host} gave the last sign of life at {when}: killed, stopped, or cut off")
        if not reasons:  # all live: is one not where the others wait for it?
            places = [(rank, host, self._read("place", rank)) for rank, host in named if words[rank] in ("", LEFT)]  # it may be through
            reasons = [f"rank {rank} on {host} keeps the others waiting: it is at {place}" for rank, host, place in places if place]
        living = [rank for rank in ranks if rank not in silent and words[rank] in ("", LEFT)]
        reason = "; ".join(reasons) or f"a collective failed although all processes live: {self.error}"
        self._report(reason, aloud=self.rank == living[0])
        self._say(LEFT)
        os._exit(1)  # the main thread may be in a collective that does not end

    def _end_without_store(self) -> NoReturn:
        """Who lives cannot be known, so that one process on each host speaks."""
        reason = f"rank 0 or its torchrun, on {os.environ['MASTER_ADDR']}, does not answer: killed, stopped, or cut off"
        self._report(reason, aloud=self.rank == 1 or os.environ["LOCAL_RANK"] == "0")
        os._exit(1)

    def _report(self, reason: str, aloud: bool) -> None:
        sys.stdout.flush()
        if aloud:
            print(f"\nerror: {reason}", file=sys.stderr, flush=True)  # a new line: there may be a progress bar
            if self.error is not None:
                traceback.print_exception(self.error)
        try:
            raise LostProcess(reason)
        except LostProcess as lost:
            get_error_handler().record_exception(lost)  # for torchrun's report, which comes last
