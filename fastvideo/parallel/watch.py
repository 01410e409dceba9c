"""A process that dies or hangs ends the job, and is named.

A collective that fails says only that some peer is gone or slow, and a process may wait for a peer that itself waits for the lost one. So
each process has a thread that writes the time and how many collectives it has begun into the store by which the processes met, every
second, and looks at one neighbour. Once a collective has failed anywhere, or a neighbour is silent for too long, has ended by an error, or
is behind in its collectives for nearly the timeout, all threads look at all processes, the lowest living rank says which one is missing,
and every process ends.

No thread relies on the main thread, which on GPUs waits in a kernel's results for a collective that never ends. There NCCL's watchdog also
ends processes whose collective failed or took longer than the timeout, with lines of its own and SIGABRT; this one is a little earlier.
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
LOST = 120.0  # when nothing has failed, a process without a sign of life for this long; suspended alone for less, it goes on
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


def collectives_begun() -> tuple[int, int]:
    """How many collectives this process has begun: in groups of all processes, where all begin the same ones; and in all its groups.

    DeepSpeed's too. On GPUs a collective has begun when it is put in the queue, whatever the GPU is at.
    """
    everywhere = total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        backends = {group._get_backend(device) for device in group._device_types}  # gloo beside NCCL; or one for all devices
        begun = sum(backend._get_sequence_number_for_group() for backend in backends)
        everywhere += begun if group.size() == dist.get_world_size() else 0
        total += begun
    return everywhere, total


class Watch:
    """The thread of this process; it runs from here on.

    store, timeout: of the process group. Even if no collective has failed, a neighbour is lost after silence for LOST seconds or half of
        `timeout`, and hangs if it is behind in its collectives, and begins none, for nearly `timeout`: before NCCL's watchdog, which would
        end the processes that wait, leaving only the culprit.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta):
        # A connection of its own: the main thread may be waiting in the other one.
        self.store = dist.PrefixStore("watch", store.clone())
        self.rank, self.world_size = rank, world_size
        self.limit = max(min(timeout.total_seconds() / 2, LOST), SILENCE)
        self.late_limit = max(timeout.total_seconds() - 2 * SILENCE, 0.75 * timeout.total_seconds())
        self.error = None  # of a collective, from the main thread
        self.answered = time.monotonic()  # when the store last did
        self.stopped = threading.Event()
        self.store.set(f"host/{rank}", socket.gethostname())
        self._beat()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        # A thread inside the store would not survive the end of the interpreter. Who is done or has an error has stopped it by then.
        atexit.register(self.stop, "it left by sys.exit")

    def stop(self, last_word: str = FINISHED) -> None:
        """No more signs of life. `last_word` tells the others why: FINISHED, or the error that ends this process."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.thread.join(PATIENCE)
        if not self.thread.is_alive():
            self._say(last_word)

    def last_word(self, rank: int) -> str:
        """What `rank` has left, "" if nothing or if the store is gone."""
        try:
            return self._read("word", rank)
        except dist.DistError:
            return ""

    def give_up(self, error: Exception) -> NoReturn:
        """A collective failed with `error`: find out whose fault it is, have it said, end this process with exit code 1."""
        self.error = error
        self.answered = time.monotonic()
        while self.thread.is_alive() and time.monotonic() - self.answered < SILENCE + PATIENCE:
            self.thread.join(PERIOD)  # it ends this process, unless the store does not answer
        self._end_without_store()

    def _run(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        beat, own = "", None
        silent = late = failed = idle = 0.0  # seconds, counted in own periods, so that a job that is suspended as a whole goes on
        try:
            while not self.stopped.wait(PERIOD):
                own_before, own = own, self._beat()
                idle = idle + PERIOD if own == own_before else 0.0
                if self.rank == 0 and self.late_limit < idle <= self.late_limit + PERIOD:
                    self._warn_of_standstill(idle)
                before, beat, word = beat, self._read("beat", neighbour), self._read("word", neighbour)
                silent = silent + PERIOD if beat and beat == before and not word else 0.0
                count = self._begun(beat)
                late = late + PERIOD if beat and count == self._begun(before) and count[0] < own[0] and not word else 0.0
                failed = failed + PERIOD if word not in ("", FINISHED, LEFT) else 0.0
                if self.error is not None or silent > self.limit or late > self.late_limit or failed > SILENCE:
                    self.store.set("over", "")
                if self.store.check(["over"]):
                    self._judge()
        except dist.DistError:  # the store is gone: a collective of the main thread will fail soon, or a GPU keeps it waiting
            lost = time.monotonic()
            while self.error is None and not self.stopped.wait(PERIOD / 10):
                if time.monotonic() - lost > self.limit:
                    self._end_without_store()

    def _warn_of_standstill(self, seconds: float) -> None:
        """Nobody is behind, or it would be said: all are at something that takes long, or hang alike, as for a server's answer."""
        message = f"nothing was sent between processes for {seconds:.0f} s: rank 0 is at {self._place()}"
        print(f"\nwarning: {message}", file=sys.stderr, flush=True)

    @staticmethod
    def _place() -> str:
        """Where the main thread is."""
        frame = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])[-1]
        return f"{frame.filename}:{frame.lineno}, in {frame.name}"

    def _beat(self) -> tuple[int, int]:
        begun = collectives_begun()
        self.store.set(f"beat/{self.rank}", f"{time.time()} {begun[0]} {begun[1]}")
        return begun

    @staticmethod
    def _begun(beat: str) -> tuple[int, int]:
        return tuple(map(int, beat.split()[1:])) if beat else (0, 0)

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
        self.store.set(f"place/{self.rank}", self._place())
        self.store.set(f"waits/{self.rank}", "yes" if waits else "")
        ranks = range(self.world_size)
        before = [self._read("beat", rank) for rank in ranks]
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(PERIOD / 2)
            self._beat()
        words = [self._read("word", rank) for rank in ranks]
        beats = [self._read("beat", rank) for rank in ranks]
        silent = [rank for rank in ranks if not words[rank] and beats[rank] == before[rank]]
        failed = [rank for rank in ranks if words[rank] not in ("", FINISHED, LEFT)]
        named = [(rank, self._read("host", rank)) for rank in ranks]

        reasons = [f"rank {rank} on {host} stopped: {words[rank]} (see its own output)" for rank, host in named if rank in failed]
        by_host = defaultdict(list)
        for rank in silent:
            by_host[named[rank][1]].append(rank)
        for host, lost in by_host.items():
            since = min(float(before[rank].split()[0] if before[rank] else "inf") for rank in lost)
            name = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
            if not host:
                reasons.append(f"{name} never arrived")
                continue
            when = f"{datetime.fromtimestamp(since):%H:%M:%S}, {time.time() - since:.0f} s ago"
            reasons.append(f"{name} on {host} gave the last sign of life at {when}: killed, stopped, or cut off")
        if not reasons:  # all live: is one not where the others wait for it?
            begun = {rank: self._begun(beats[rank]) for rank in ranks if words[rank] in ("", LEFT)}  # others may be through
            if len({everywhere for everywhere, _ in begun.values()}) > 1:
                late = [rank for rank in begun if begun[rank] == min(begun.values())]
            else:  # it waits for no collective, as between a send and a receive
                late = [rank for rank in begun if not self._read("waits", rank)]
            places = [(*named[rank], self._read("place", rank)) for rank in late]
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
