"""A server that scores batches for many trainers, whose reward is then `http=http://HOST:PORT` (docs/rewards.md).

    python -m fastvideo.rewards.server --rewards clip=models/clip-vit-large-patch14

POST /score?reward=NAME takes a safetensors file (`fastvideo.rewards.wire.pack`), or one sample for &prompt=TEXT as image/png or video/mp4.
GET /health says whether it takes batches, which rewards it has, and how many requests are in it.
SIGTERM: batches that were accepted are answered, others get 503, then it exits with 0.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
import signal
import socket
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from fastvideo import distributed
from fastvideo.distributed import UserError
from fastvideo.flags import check_numbers
from fastvideo.rewards import Reward, load_rewards, parse_rewards, score
from fastvideo.rewards.wire import confine_images, unpack

UPLOAD_SECONDS = 120  # for one body; it holds a place in the queue
KEPT_ANSWERS = 4096  # for clients that lost theirs and ask again


@dataclass
class Args:
    rewards: tuple[str, ...]
    """Each NAME[=PATH][,OPTION=VALUE...][@THRESHOLD], as for training."""
    host: str = "127.0.0.1"
    """Address to listen at. All but loopback addresses need the environment variable REWARD_TOKEN, which clients must then send."""
    port: int = 8500
    """Port to listen at (0: any free one)."""
    max_batch: int = 64
    """Samples scored in one call. Requests of equal shape that wait together are joined up to it; a larger one is refused."""
    max_queue: int = 64
    """Requests uploading, waiting and being scored; more get status 503."""
    max_megabytes: float = 256
    """Largest body of a request, and largest picture or clip unpacked to 8 bits. Requests wait as float32, four times as large."""
    images: Path | None = None
    """Folder, shared with the trainers, within which an "image" of a prompt's row may be opened; without it rows lose theirs."""

    def __post_init__(self) -> None:
        parse_rewards(self.rewards)
        check_numbers(vars(self), {"above 0": "max_batch max_queue max_megabytes", "0 or more": "port"})


@dataclass(eq=False)
class Job:
    """One request: which reward, of what, and the scores to come."""

    reward: str
    media: torch.Tensor
    rows: list[dict]
    answer: asyncio.Future


class Scorer:
    """Scores jobs one call after the other, oldest first, with all that wait, are alike and fit; remembers answers by key.

    accepted: requests in the server. draining: no more are accepted.
    """

    def __init__(self, rewards: dict[str, Reward], device: torch.device, max_batch: int) -> None:
        self.rewards, self.device, self.max_batch = rewards, device, max_batch
        self.accepted, self.draining = 0, False
        self.waiting: list[Job] = []
        self.answers: OrderedDict[bytes, asyncio.Future] = OrderedDict()
        self.arrived = asyncio.Event()

    def submit(self, key: bytes, reward: str, media: torch.Tensor, rows: list[dict]) -> asyncio.Future:
        """The scores to come, a list of B numbers or UserError; those of the same key if they are known or on their way."""
        if key not in self.answers:
            self.answers[key] = asyncio.get_running_loop().create_future()
            self.answers[key].add_done_callback(lambda answer: answer.exception() and self.answers.pop(key, None))  # failures are not kept
            self.waiting.append(Job(reward, media, rows, self.answers[key]))
            self.arrived.set()
        self.answers.move_to_end(key)
        if len(self.answers) > KEPT_ANSWERS + self.accepted:
            self.answers.popitem(last=False)
        return self.answers[key]

    async def run(self) -> None:
        while True:
            await self.arrived.wait()
            jobs, first = [], self.waiting[0]
            for job in self.waiting:
                alike = job.reward == first.reward and job.media.shape[1:] == first.media.shape[1:]
                if alike and sum(len(taken.rows) for taken in jobs) + len(job.rows) <= self.max_batch:
                    jobs.append(job)
            self.waiting = [job for job in self.waiting if job not in jobs]
            if not self.waiting:
                self.arrived.clear()
            for job, result in zip(jobs, await asyncio.to_thread(self.score, jobs)):
                if isinstance(result, UserError):
                    job.answer.set_exception(result)
                else:
                    job.answer.set_result(result)

    def score(self, jobs: list[Job]) -> list[list[float] | UserError]:
        """The scores of each job, or why there are none."""
        name = jobs[0].reward
        try:
            media = torch.cat([job.media for job in jobs]).to(self.device)
            values = score({name: self.rewards[name]}, media, [row for job in jobs for row in job.rows])[name]
        except Exception as error:
            if len(jobs) == 1:
                return [error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")]
            return [result for job in jobs for result in self.score([job])]  # one job's fault is not the others'
        return [part.tolist() for part in values.split([len(job.rows) for job in jobs])]


def make_app(scorer: Scorer, args: Args, token: str) -> FastAPI:
    """The web application. Refusals are {"detail": SENTENCE} with a status of 400 or more."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        task = asyncio.create_task(scorer.run())
        yield
        task.cancel()

    async def check_token(request: Request) -> None:
        sent = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong: set REWARD_TOKEN to that of the server")

    app = FastAPI(lifespan=lifespan, dependencies=[Depends(check_token)], openapi_url=None, redirect_slashes=False)

    @app.get("/health")
    async def get_health() -> JSONResponse:
        state = {"ready": not scorer.draining, "rewards": list(scorer.rewards), "queue": scorer.accepted}
        return JSONResponse(state, 503 if scorer.draining else 200)

    @app.post("/score")
    async def post_score(request: Request, reward: str | None = None, prompt: str | None = None) -> dict[str, list[float]]:
        if reward is None and len(scorer.rewards) == 1:
            reward = next(iter(scorer.rewards))
        if reward not in scorer.rewards:
            raise HTTPException(404, f"there is no reward {reward!r} here, only {', '.join(scorer.rewards)}: choose one by reward=NAME")
        if scorer.draining or scorer.accepted >= args.max_queue:
            why = "the server is about to end" if scorer.draining else f"{scorer.accepted} requests are waiting, as many as --max_queue"
            raise HTTPException(503, why, {"Retry-After": "1"})
        scorer.accepted += 1
        try:
            body, kind = await read_body(request, args.max_megabytes), request.headers.get("content-type", "")
            key, media, rows = await asyncio.to_thread(prepare, body, kind, reward, prompt)
            del body  # the scores may take long; others may wait for the same ones, hence the shield
            return {"scores": await asyncio.shield(scorer.submit(key, reward, media, rows))}
        except (ValueError, UserError) as error:
            raise HTTPException(422, str(error)) from error
        finally:
            scorer.accepted -= 1

    def prepare(body: bytes, kind: str, reward: str, prompt: str | None) -> tuple[bytes, torch.Tensor, list[dict]]:
        media, rows = unpack(body, kind, prompt, args.max_megabytes * 2**20)
        if len(rows) > args.max_batch:
            raise ValueError(f"the batch has {len(rows)} samples, but the server's --max_batch is {args.max_batch}")
        confine_images(rows, args.images)
        head = json.dumps([reward, kind, prompt]).encode()
        key = hashlib.blake2b(head)  # JSON says itself where it ends
        key.update(body)
        return key.digest(), media, rows

    return app


async def read_body(request: Request, max_megabytes: float) -> bytes:
    """The request's body, as long as it stays within `max_megabytes`, which is known before it is read if its length is declared."""
    body, most = bytearray(), max_megabytes * 2**20
    too_large = f"the body is larger than the server's --max_megabytes {max_megabytes:g}: send fewer samples at once, or uint8"
    if int(request.headers.get("content-length", 0)) > most:
        raise HTTPException(413, too_large)
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise HTTPException(413, too_large)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {UPLOAD_SECONDS} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection was lost") from None
    return bytes(body)


class Server(uvicorn.Server):
    """Told to stop, it goes on until what was accepted is answered; uvicorn's own would close its port at once and exit by the signal."""

    def __init__(self, config: uvicorn.Config, scorer: Scorer) -> None:
        super().__init__(config)
        self.scorer = scorer

    def handle_exit(self, sig, frame) -> None:
        if sig == signal.SIGINT and self.scorer.draining:
            os._exit(130)  # the second Ctrl-C: a reward may hang
        self.scorer.draining = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self.scorer.draining and not self.scorer.accepted
        return await super().on_tick(counter)


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, description=__doc__.splitlines()[0])
    token = os.environ.get("REWARD_TOKEN", "")
    if not token and not is_loopback(args.host):
        raise UserError(f"--host {args.host} can be reached from elsewhere: set REWARD_TOKEN in the environment of server and trainers")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # TCP by name, else asyncio leaves Nagle's delay of 40 ms on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {args.host} --port {args.port} can't be listened at: {error}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = Scorer(load_rewards(parse_rewards(args.rewards), device), device, args.max_batch)
    config = uvicorn.Config(make_app(scorer, args, token), http="h11", ws="none", log_level="warning", access_log=False)
    print(f"scoring {', '.join(scorer.rewards)} on {device} at http://{args.host}:{listener.getsockname()[1]}", flush=True)
    Server(config, scorer).run([listener])


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    distributed.run(main)
