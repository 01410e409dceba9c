"""The queue of a reward server: which of the waiting requests are scored together, and which scores are remembered."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

import torch

from fastvideo.errors import UserError
from fastvideo.rewards import REWARDS, Reward, score
from fastvideo.rewards.wire import to_float

KEPT_ANSWERS = 4096  # for clients that lost theirs and ask again


@dataclass(eq=False)
class Job:
    """One request: which reward, of what, and the scores to come. content: a hash of all that it holds but the reward."""

    reward: str
    content: bytes
    media: torch.Tensor
    rows: list[dict]
    answer: asyncio.Future


class Scorer:
    """Scores jobs one call after the other, oldest first, with all that wait, are alike and fit; remembers answers by reward and content.

    accepted, held: requests in the server and bytes of their media. draining: no more are accepted.
    """

    def __init__(
        self, rewards: dict[str, Reward], device: torch.device, max_batch: int, max_queue: int, max_queue_megabytes: float
    ) -> None:
        self.rewards, self.device = rewards, device
        self.max_batch, self.max_queue, self.max_queue_megabytes = max_batch, max_queue, max_queue_megabytes
        self.accepted, self.held, self.draining = 0, 0, False
        self.waiting: list[Job] = []
        self.answers: OrderedDict[tuple[str, bytes], asyncio.Future] = OrderedDict()
        self.arrived = asyncio.Event()

    def full(self, room: float) -> str:
        """Why there is no place for another request with media of `room` bytes; empty if there is one."""
        if self.accepted >= self.max_queue:
            return f"{self.accepted} requests are waiting, as many as --max_queue"
        if self.held + room > self.max_queue_megabytes * 2**20:
            return f"{self.held / 2**20:.0f} of --max_queue_megabytes {self.max_queue_megabytes:g} are taken"
        return ""

    def submit(self, reward: str, content: bytes, media: torch.Tensor, rows: list[dict]) -> asyncio.Future:
        """The scores to come, a list of B numbers or UserError; those of an earlier job if they are known or on their way."""
        key = reward, content
        if key not in self.answers:
            self.waiting.append(Job(reward, content, media, rows, self.promise(key)))
            self.held += media.nbytes
            self.arrived.set()
        self.answers.move_to_end(key)
        return self.answers[key]

    def promise(self, key: tuple[str, bytes]) -> asyncio.Future:
        answer = self.answers[key] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda answer: answer.exception() and self.answers.pop(key, None))  # failures are not kept
        if len(self.answers) > KEPT_ANSWERS + self.accepted:
            self.answers.popitem(last=False)
        return answer

    async def run(self) -> None:
        while True:
            await self.arrived.wait()
            await self.score_some()

    async def score_some(self) -> None:
        jobs, first = [], self.waiting[0]
        for job in self.waiting:
            alike = job.reward == first.reward and job.media.shape[1:] == first.media.shape[1:]
            if alike and sum(len(taken.rows) for taken in jobs) + len(job.rows) <= self.max_batch:
                jobs.append(job)
        for job, result in zip(jobs, await asyncio.to_thread(self.score, jobs)):
            if isinstance(result, UserError):
                job.answer.set_exception(result)
                continue
            for name, scores in result.items():
                key = name, job.content
                answer = job.answer if name == job.reward else self.answers.get(key) or self.promise(key)
                if not answer.done():  # another head's may be known
                    answer.set_result(scores)
        done = [job for job in self.waiting if job.answer.done()]  # with those that waited for another head of the same
        self.held -= sum(job.media.nbytes for job in done)
        self.waiting = [job for job in self.waiting if job not in done]
        if not self.waiting:
            self.arrived.clear()

    def score(self, jobs: list[Job]) -> list[dict[str, list[float]] | UserError]:
        """The scores of each job by its reward and the others of its model, or why there are none."""
        try:
            media = torch.cat([to_float(job.media.to(self.device)) for job in jobs])
            values = score(self.heads(jobs[0].reward), media, [row for job in jobs for row in job.rows])
        except Exception as error:
            if len(jobs) == 1:
                return [error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")]
            return [result for job in jobs for result in self.score([job])]  # one job's fault is not the others'
        parts = {name: scores.split([len(job.rows) for job in jobs]) for name, scores in values.items()}
        return [{name: parts[name][i].tolist() for name in parts} for i in range(len(jobs))]

    def heads(self, name: str) -> dict[str, Reward]:
        """This reward and those that come with it from one forward pass, such as videoalign.vq and videoalign.mq; it is the first."""
        model = name.rpartition(".")[0]
        one_model = any(known.startswith(f"{model}.") for known in REWARDS)  # else what follows is a label
        others = [other for other in self.rewards if one_model and other != name and other.rpartition(".")[0] == model]
        return {other: self.rewards[other] for other in [name, *others]}
