"""A server that scores batches for many trainers, whose reward is then `http=http://HOST:PORT` (docs/rewards.md).

    python -m fastvideo.rewards.server --rewards clip=models/clip-vit-large-patch14

POST /score?reward=NAME takes a safetensors file (`fastvideo.rewards.wire.pack`), or one sample for &prompt=TEXT as image/png or video/mp4.
Its answer is {"scores": [...], "reward": NAME}.
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
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from fastvideo.errors import UserError
from fastvideo.flags import check_numbers
from fastvideo.parallel import devices, distributed
from fastvideo.rewards import load_rewards, parse_rewards
from fastvideo.rewards.preflight import preflight_alone
from fastvideo.rewards.scorer import Scorer
from fastvideo.rewards.wire import KINDS, SAFETENSORS, confine_images, unpack

UPLOAD_SECONDS = 120  # for one body; it holds a place in the queue


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
    """Largest body of a request, and largest picture or clip unpacked to 8 bits."""
    max_queue_megabytes: float = 2048
    """Media of all requests in the server, as they were sent (PNG and mp4 in 8 bits); more get status 503."""
    images: Path | None = None
    """Folder, shared with the trainers, within which an "image" of a prompt's row may be opened; without it rows lose theirs."""

    def __post_init__(self) -> None:
        parse_rewards(self.rewards)
        check_numbers(vars(self), {"above 0": "max_batch max_queue max_megabytes max_queue_megabytes", "0 or more": "port"})
        if self.max_queue_megabytes < self.max_megabytes:
            raise UserError(
                f"--max_queue_megabytes {self.max_queue_megabytes:g} is less than one request's --max_megabytes {self.max_megabytes:g}"
            )


def make_app(scorer: Scorer, args: Args, token: str) -> FastAPI:
    """The web application. Refusals are {"detail": SENTENCE} with a status of 400 or more."""
    max_bytes = args.max_megabytes * 2**20

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
    async def post_score(request: Request, reward: str | None = None, prompt: str | None = None) -> dict[str, list[float] | str]:
        if reward is None and len(scorer.rewards) == 1:
            reward = next(iter(scorer.rewards))
        if reward not in scorer.rewards:
            which = "are several rewards" if reward is None else f"is no reward {reward!r}"
            raise HTTPException(404, f"there {which} here ({', '.join(scorer.rewards)}): choose one by reward=NAME")
        kind = request.headers.get("content-type", SAFETENSORS).partition(";")[0].strip().lower()
        if kind not in KINDS:
            raise HTTPException(415, f"a body of type {kind!r} can't be read here, only {', '.join(KINDS)}: send its Content-Type")
        sent = request.headers.get("content-length") if kind == SAFETENSORS else None  # PNG and mp4 may become as large as is allowed
        room = max_bytes if sent is None else min(int(sent), max_bytes)
        why = "the server is about to end" if scorer.draining else scorer.full(room)
        if why:
            raise HTTPException(503, why, {"Retry-After": "1"})
        scorer.accepted += 1
        try:
            # The scores may take long, and others may wait for the same ones, hence the shield.
            return {"scores": await asyncio.shield(await accept(request, kind, reward, prompt, room)), "reward": reward}
        except (ValueError, UserError) as error:
            raise HTTPException(422, str(error)) from error
        finally:
            scorer.accepted -= 1

    async def accept(request: Request, kind: str, reward: str, prompt: str | None, room: float) -> asyncio.Future:
        """The scores to come; `room` is taken while the request is read. What was read is the job's alone."""
        scorer.held += room
        try:
            body = await read_body(request, args.max_megabytes)
            return scorer.submit(reward, *await asyncio.to_thread(prepare, body, kind, prompt))
        finally:
            scorer.held -= room

    def prepare(body: bytes, kind: str, prompt: str | None) -> tuple[bytes, torch.Tensor, list[dict]]:
        media, rows = unpack(body, kind, prompt, max_bytes)
        if len(rows) > args.max_batch:
            raise ValueError(f"the batch has {len(rows)} samples, but the server's --max_batch is {args.max_batch}")
        confine_images(rows, args.images)
        content = hashlib.blake2b(json.dumps([kind, prompt]).encode())  # JSON says itself where it ends
        content.update(body)
        return content.digest(), media, rows

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
    token = os.environ.get("REWARD_TOKEN", "").strip()
    if not token and not is_loopback(args.host):
        raise UserError(f"--host {args.host} can be reached from elsewhere: set REWARD_TOKEN in the environment of server and trainers")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # TCP by name, else asyncio leaves Nagle's delay of 40 ms on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {args.host} --port {args.port} can't be listened at: {error}") from error
    if fault := devices.own_fault():
        raise UserError(fault)
    device = torch.device("cuda" if devices.on_gpu() else "cpu")
    rewards = load_rewards(parse_rewards(args.rewards), device)
    preflight_alone(rewards, device)
    scorer = Scorer(rewards, device, args.max_batch, args.max_queue, args.max_queue_megabytes)
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
