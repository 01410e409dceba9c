"""The `http` reward: batches are scored by servers (`fastvideo/rewards/server.py`), in processes and Python environments of their own.

A batch is one request: POST /score?reward=NAME with the body of `pack`. Its answer is {"scores": [...], "reward": NAME}, or
{"detail": SENTENCE}.
"""

import os
import ssl
import time
from collections.abc import Callable
from io import BytesIO
from urllib.parse import urlsplit

import torch

from fastvideo.errors import UserError, launch_rank, warn
from fastvideo.rewards.wire import SAFETENSORS, pack

MOST_BYTES = 128 * 2**20  # of media in one request of several samples
BUSY = (408, 429, 502, 503, 504)  # statuses after which to ask again, or another server; any other refusal is final
TELL_AFTER, TELL_EVERY = 3, 60  # seconds of waiting


def load_http(
    path: str | None, device: torch.device, *, reward: str = "", send: str = "float32", batch: int = 32, patience: float = 600.0
) -> Callable[[torch.Tensor, list[dict]], torch.Tensor]:
    """The reward: what a server of `path`, written URL[+URL...], scores a batch, (B,).

    reward: which of the server's rewards; may be left out if it has one. send: "float32", so that scores are what they would be in this
    process, or "uint8", a quarter of the bytes. batch: samples in one request, fewer if they would be over 128 MiB. patience: seconds;
    each server is tried again and again for so long, and a request may take a quarter of it, before UserError; what can't heal, such as a
    wrong certificate, is a UserError at once. REWARD_TOKEN of the environment is sent as a bearer token. The reward's attribute `served`
    is what the server calls the reward that it asked, once it has.
    """
    urls = [url.rstrip("/") for url in (path or "").split("+")]
    for url in urls:
        if not _is_address(url):
            raise UserError(f"--rewards: http needs addresses, written as http=http://HOST:PORT[+http://HOST:PORT...], not {url!r}")
    if send not in ("float32", "uint8"):
        raise UserError(f"--rewards: http sends float32 or uint8, not send={send}")
    if not patience > 0 or batch < 1:
        raise UserError(f"--rewards: the patience of http must be above 0 s and its batch 1 or more, not {patience} and {batch}")
    import requests

    session = requests.Session()
    session.trust_env = False  # no proxy between trainer and servers, and no password from ~/.netrc in place of the token
    if token := os.environ.get("REWARD_TOKEN", "").strip():
        if not token.isprintable():
            raise UserError("the environment variable REWARD_TOKEN has a line break or another character that no header may have")
        session.headers["Authorization"] = f"Bearer {token}".encode()
    first = launch_rank() % len(urls)
    urls = urls[first:] + urls[:first]  # each process has its own favourite
    failures = dict.fromkeys(urls, float("-inf"))
    final = (requests.exceptions.InvalidURL, requests.exceptions.SSLError)

    def post(body: bytes) -> tuple[str, requests.Response]:
        """The first answer that is not BUSY, and whose it is. The servers that failed in the last minute are tried last."""
        start, pause = time.monotonic(), 0.1
        tell = start + TELL_AFTER
        while True:
            begin = time.monotonic()
            for url in sorted(urls, key=lambda url: max(failures[url], begin - 60)):
                try:
                    answer = session.post(
                        f"{url}/score",
                        data=BytesIO(body),  # sent in pieces, each within the timeout, which would be that of all bytes
                        params={"reward": reward} if reward else None,
                        headers={"Content-Type": SAFETENSORS},
                        timeout=(min(10, patience / 4), patience / 4),
                        allow_redirects=False,  # they would take the token along
                    )
                except requests.RequestException as error:
                    cause = _cause(error)
                    problem = f"{url}: {type(cause).__name__}: {cause}"
                    lost = isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))  # while it was being made: no fault of the address
                    if isinstance(error, final) and not lost:
                        raise UserError(problem) from error
                else:
                    if answer.status_code not in BUSY:
                        return url, answer
                    problem = f"{url}: {_detail(answer)}"
                    wish = answer.headers.get("Retry-After", "")
                    pause = max(pause, min(int(wish), 30) if wish.isdigit() else 0)
                failures[url] = time.monotonic()
            if time.monotonic() + pause > start + patience:
                raise UserError(
                    f"no reward server answered within {patience:g} s of trying {' and '.join(urls)}; the last error: {problem}"
                )
            if time.monotonic() > tell:
                waited = time.monotonic() - start
                warn(f"waiting for the reward server {' or '.join(urls)}, for {waited:.0f} of {patience:g} s so far; {problem}")
                tell = time.monotonic() + TELL_EVERY
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def remote(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        sample_bytes = media[0].numel() * (1 if send == "uint8" else 4)
        count = max(1, min(batch, MOST_BYTES // sample_bytes))
        starts = range(0, len(rows), count)
        return torch.cat([ask(media[start : start + count], rows[start : start + count]) for start in starts])

    def ask(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        url, answer = post(pack(media, rows, send))
        if answer.status_code != 200:
            raise UserError(f"{url}: {_detail(answer)}")
        try:
            said = answer.json()
            remote.served = said.get("reward", reward)
            return torch.tensor(said["scores"], dtype=torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{url} is no reward server: it answered {answer.text[:100]!r}") from None

    return remote


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and parts.username is None
    except ValueError:
        return False


def _detail(answer) -> str:
    """What the server has to say."""
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}, {answer.text[:100]!r}"


def _cause(error: BaseException) -> BaseException:
    """The innermost error, such as "[Errno 111] Connection refused"; requests and urllib3 wrap it in three of their own."""
    while error.__context__ is not None:
        error = error.__context__
    return error
