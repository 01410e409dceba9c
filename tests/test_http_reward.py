"""Rewards over HTTP: exactly the scores of the same process, whatever happens to servers; and servers that outlive what they are sent."""

import asyncio
import functools
import http.client
import http.server
import io
import json
import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import FORK_SERVER, REPOSITORY, flag_list, largest_difference, run_in_fork, start_fork_server, weights_of
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.media import save_video, to_pil
from fastvideo.rewards import http as http_reward
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.preflight import preflight
from fastvideo.rewards.scorer import Scorer
from fastvideo.rewards.wire import confine_images, pack, to_float, unpack

requests = pytest.importorskip("requests")
WORKER = REPOSITORY / "tests" / "reward_server_worker.py"
PROMPTS = ("a red circle", "a blue square", "two green circles")
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(event, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def answers_health(url: str, token: str = "") -> bool:
    try:
        return requests.get(f"{url}/health", headers={"Authorization": f"Bearer {token}"}, timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Function that starts a server and returns its url, port, process and log; all are ended after the tests."""
    started = []

    def start(*rewards: str, flags: dict | None = None, port: int = 0, token: str = "", ready: bool = True) -> SimpleNamespace:
        start_fork_server()
        port, log = port or free_port(), tmp_path_factory.mktemp("server") / "log"
        words = flag_list({"--rewards": rewards, "--port": port} | (flags or {}))
        process = FORK_SERVER.Process(target=run_in_fork, args=(str(WORKER), words, {"REWARD_TOKEN": token}, str(log)))
        process.start()
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        if ready:
            wait_for(lambda: process.exitcode is not None or answers_health(url, token))
            assert process.exitcode is None, Path(f"{log}.stderr").read_text()
        return SimpleNamespace(url=url, port=port, process=process, log=log)

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def server(serve):
    """One server for what does not harm it."""
    return serve("shapes", "aesthetic", "motion", "gated")


def batch(seed: int, size: int = 2, frames: int | None = None) -> tuple[torch.Tensor, list[dict]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 3, 32, 32) if frames is None else (size, 3, frames, 32, 32)
    return torch.rand(shape, generator=generator) * 2 - 1, [{"prompt": PROMPTS[(seed + i) % 3]} for i in range(size)]


def rewards(*texts: str) -> dict:
    return load_rewards(parse_rewards(texts), CPU)


def post(url: str, body: bytes, token: str = "", **params: str):
    return requests.post(f"{url}/score", data=body, params=params, headers={"Authorization": f"Bearer {token}"}, timeout=60)


# ------------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_same_process(server):
    """Of pictures, by several rewards of one server, one of them binary; sent in 8 bits, of the picture in 8 bits."""
    here = rewards("shapes", "aesthetic@0.395")
    there = rewards(f"http.s={server.url},reward=shapes", f"http.a={server.url}/,reward=aesthetic@0.395")
    coarse = rewards(f"http={server.url},reward=aesthetic,send=uint8")
    for seed in range(3):
        media, rows = batch(seed, 8)
        ours, theirs = score(here, media, rows), score(there, media, rows)
        assert torch.equal(theirs["http.s"], ours["shapes"]) and torch.equal(theirs["http.a"], ours["aesthetic"])
        rounded = ((media + 1) * 127.5).round() / 127.5 - 1
        assert torch.equal(score(coarse, media, rows)["http"], rewards("aesthetic")["aesthetic"](rounded, rows).float())


def test_clips(server):
    media, rows = batch(0, frames=5)
    rows = [{"prompt": "a red circle moving right"}] * 2
    theirs, ours = rewards(f"http={server.url},reward=motion"), rewards("motion")
    assert torch.equal(score(theirs, media, rows)["http"], score(ours, media, rows)["motion"])


def test_png_and_mp4(server, tmp_path):
    media, _ = batch(0, 1)
    png = io.BytesIO()
    to_pil(media)[0].save(png, "PNG")
    answer = requests.post(
        f"{server.url}/score?reward=aesthetic&prompt=a+red+circle", data=png.getvalue(), headers={"Content-Type": "image/png"}, timeout=60
    )
    rounded = ((media + 1) * 127.5).round() / 127.5 - 1
    assert answer.json()["scores"] == rewards("aesthetic")["aesthetic"](rounded, [{}]).float().tolist()

    clip = torch.linspace(-1, 1, 32).expand(3, 5, 32, 32)
    save_video(tmp_path / "clip.mp4", clip, fps=8)
    body = (tmp_path / "clip.mp4").read_bytes()
    unpacked, rows = unpack(body, "video/mp4", "a ramp", 1e6)
    assert rows == [{"prompt": "a ramp"}] and unpacked.shape == (1, *clip.shape) and (to_float(unpacked[0]) - clip).abs().mean() < 0.02
    with pytest.raises(ValueError, match="max_megabytes"):
        unpack(body, "video/mp4", "a ramp", 10_000)


def test_the_preflight_knows_which_reward_a_server_has(server, capsys):
    """Whatever it is called here; and so prints how it likes a drawing."""
    theirs = rewards(
        f"http={server.url},reward=shapes", f"http.clip={server.url},reward=gated", f"http.look={server.url},reward=aesthetic@0.9"
    )
    preflight({name: theirs[name] for name in ("http", "http.look")}, batch(0)[0], {"prompt": PROMPTS[0]})
    assert capsys.readouterr().out.count("for a drawing of 'a red circle'") == 2
    score(theirs, *batch(50))
    assert theirs["http"].served == "shapes" and theirs["http.clip"].served == "gated"


def test_an_answer_that_was_lost_is_given_again(server):
    """The same batch is scored once, whether asked again later or at the same time; another one, or another reward, anew."""
    body, other = pack(*batch(0), "float32"), pack(*batch(1), "float32")
    first = post(server.url, body, reward="gated").json()["scores"]
    assert post(server.url, body, reward="gated").json()["scores"] == first
    assert post(server.url, other, reward="gated").json()["scores"] == pytest.approx([value + 0.01 for value in first])
    assert post(server.url, body, reward="aesthetic").json()["scores"] != first


def test_a_reward_that_fails_is_the_clients_error(server, tmp_path):
    """With the sentence of the server; others that were scored in the same call get their scores."""
    media, rows = batch(0)
    theirs = rewards(f"http={server.url},reward=gated")
    with pytest.raises(
        UserError, match=r"reward 'http' failed.*'gated' failed on a batch of 2 .*ValueError: this prompt fails .*reward_server_worker.py"
    ):
        score(theirs, media, [{"prompt": "fail"}] * 2)

    gate = tmp_path / "gate"
    first, bad, good = ([{"prompt": prompt, "gate": str(gate)}] * 2 for prompt in ("first", "fail", "good"))
    before = queue(server)
    with ThreadPoolExecutor(3) as threads:
        answers = []
        for rows in (first, bad, good):
            answers.append(threads.submit(post, server.url, pack(media, rows, "float32"), reward="gated"))
            wait_for(lambda: queue(server) == before + len(answers))
        gate.touch()
        assert [answer.result().status_code for answer in answers] == [200, 422, 200]
    # A failure is not remembered: asked again, the call is made again.
    before = post(server.url, pack(*batch(100), "float32"), reward="gated").json()["scores"]
    assert post(server.url, pack(media, bad, "float32"), reward="gated").status_code == 422
    after = post(server.url, pack(*batch(101), "float32"), reward="gated").json()["scores"]
    assert after == pytest.approx([value + 0.02 for value in before])


# -------------------------------------------------------------------------------------------------------------------- queue


def queue(server) -> int:
    return requests.get(f"{server.url}/health", timeout=60).json()["queue"]


def test_what_waits_together_is_scored_together(serve, tmp_path):
    """Up to --max_batch samples, of one shape; each request gets its own scores."""
    server, gate = serve("gated", flags={"--max_batch": 5}), tmp_path / "gate"
    # The first is being scored while the others arrive; then the two narrow pairs and the next single, the wide one, and the last pair.
    sizes, widths, together = [1, 2, 1, 2, 2, 1], [32, 32, 64, 32, 32, 32], [1, 5, 1, 5, 2, 5]
    with ThreadPoolExecutor(8) as threads:
        answers = []
        for seed, (size, width) in enumerate(zip(sizes, widths)):
            media, rows = batch(seed, size)
            body = pack(media[..., :1].expand(-1, -1, -1, width), [row | {"gate": str(gate)} for row in rows], "float32")
            answers.append(threads.submit(post, server.url, body))
            wait_for(lambda: queue(server) == len(answers))
            if seed == 0:
                time.sleep(0.3)  # until it is being scored
        gate.touch()
        scores = [answer.result().json()["scores"] for answer in answers]
    assert [len(values) for values in scores] == sizes
    assert [int(values[0]) for values in scores] == together
    answer = post(server.url, pack(*batch(0, 6), "float32"))
    assert answer.status_code == 422 and "6 samples, but the server's --max_batch is 5" in answer.json()["detail"]


def test_heads_of_one_model_are_scored_together():
    """The first that is asked brings the others' scores of the same media, also for those who wait; rewards with labels are left alone."""
    calls = []

    def head(name: str):
        return lambda media, rows: calls.append((name, media)) or media.mean((1, 2, 3)) + len(name)

    async def ask() -> None:
        names = ("videoalign.vq", "videoalign.mqq", "clip.a", "clip.b")
        scorer = Scorer({name: head(name) for name in names}, CPU, 64, 64, 1)
        running = asyncio.create_task(scorer.run())
        for content in (b"1", b"2"):
            media, rows = batch(int(content))
            together = [scorer.submit(name, content, media, rows) for name in names[:3]]
            scores = [await answer for answer in together]
            assert scores == [pytest.approx((media.mean((1, 2, 3)) + len(name)).tolist()) for name in names[:3]]
            later = scorer.submit(names[1], content, media, rows)  # for example by another trainer
            assert later.done() and scorer.held == 0 and not scorer.waiting
        running.cancel()

    asyncio.run(asyncio.wait_for(ask(), 60))
    assert [name for name, _ in calls] == ["videoalign.vq", "videoalign.mqq", "clip.a"] * 2
    assert all(calls[i][1] is calls[i + 1][1] for i in (0, 3))  # by which videoalign knows that it needs no other pass


def test_media_wait_as_they_were_sent(serve, tmp_path):
    """More than --max_queue_megabytes of them get 503, until there is room; a request of the largest size always finds it."""
    for dtype in (torch.uint8, torch.float16, torch.float32):
        media, rows = unpack(safetensors.torch.save({"media": TWO.to(dtype)}, {"rows": json.dumps([{"prompt": "a"}] * 2)}), "", None, 1e6)
        assert media.dtype == dtype and to_float(media).dtype == torch.float32

    server, gate = serve("gated", flags={"--max_megabytes": 0.1, "--max_queue_megabytes": 0.1}), tmp_path / "gate"
    media, rows = batch(0, 8)  # 96 KB, and 24 KB in 8 bits
    gated = [row | {"gate": str(gate)} for row in rows]
    with ThreadPoolExecutor(4) as threads:
        waiting = []
        for seed in range(3):
            waiting.append(threads.submit(post, server.url, pack(batch(seed, 8)[0], gated, "uint8")))
            wait_for(lambda: queue(server) == len(waiting))
        refused = post(server.url, pack(media, rows, "float32"))
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "0 of --max_queue_megabytes 0.1 are taken" in refused.json()["detail"]
        gate.touch()
        assert [answer.result().status_code for answer in waiting] == [200] * 3
    for seed in range(3):  # what is done takes no room
        assert post(server.url, pack(batch(10 + seed, 8)[0], rows, "float32")).status_code == 200


def test_a_full_queue_then_a_drain(serve, tmp_path):
    """More than --max_queue requests get 503. SIGTERM: what was accepted is answered, new requests get 503, and the exit code is 0."""
    server, gate = serve("gated", flags={"--max_queue": 2}), tmp_path / "gate"
    bodies = [pack(media, [row | {"gate": str(gate)} for row in rows], "float32") for media, rows in map(batch, range(4))]
    with ThreadPoolExecutor(8) as threads:
        accepted = [threads.submit(post, server.url, body) for body in bodies[:2]]
        wait_for(lambda: queue(server) == 2)
        refused = post(server.url, bodies[2])
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1" and "--max_queue" in refused.json()["detail"]
        patient = threads.submit(rewards(f"http={server.url},patience=60")["http"], *batch(7))  # comes back until there is room
        time.sleep(0.5)
        assert not patient.done()
        gate.touch()
        assert [answer.result().status_code for answer in accepted] == [200, 200] and len(patient.result()) == 2

        gate.unlink()
        accepted = [threads.submit(post, server.url, pack(*batch(9), "float32")) for _ in range(1)]
        assert accepted[0].result().status_code == 200
        accepted = [threads.submit(post, server.url, body) for body in bodies[2:]]
        wait_for(lambda: queue(server) == 2)
        server.process.terminate()
        wait_for(lambda: requests.get(f"{server.url}/health", timeout=60).status_code == 503)
        time.sleep(0.5)  # the server must not have closed its port
        refused = post(server.url, bodies[0])
        assert refused.status_code == 503 and "about to end" in refused.json()["detail"]
        gate.touch()
        assert [answer.result().status_code for answer in accepted] == [200, 200]
    server.process.join(60)
    assert server.process.exitcode == 0


# ------------------------------------------------------------------------------------------------- servers that come and go


@pytest.mark.parametrize(("clients", "batches"), [(4, 25), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_clients_do_not_notice_that_the_server_is_killed(serve, clients, batches):
    """Each batch gets one answer, that of the same process, though the server is killed and started again midway."""
    server = serve("shapes")
    done = []

    def client(number: int) -> list[torch.Tensor]:
        reward = rewards(f"http={server.url},patience=120")["http"]
        scores = []
        for i in range(batches):
            scores.append(reward(*batch(number * batches + i)))
            done.append((number, i))
        return scores

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client, number) for number in range(clients)]
        wait_for(lambda: len(done) > clients * batches // 4)
        server.process.kill()
        server.process.join()
        at_kill = len(done)
        serve("shapes", port=server.port)
        scores = [running[number].result(timeout=300) for number in range(clients)]
    assert at_kill < clients * batches == len(done) == len(set(done))
    reward = rewards("shapes")["shapes"]
    for number in range(clients):
        for i in range(batches):
            assert torch.equal(scores[number][i], reward(*batch(number * batches + i)).float())


@contextmanager
def other_server(status: int):
    """A server whose answer is always "hello" with `status`: its url, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", "/other")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *words: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other, ThreadPoolExecutor(1) as threads:
        threads.submit(other.serve_forever)
        try:
            yield f"http://127.0.0.1:{other.server_port}", asked
        finally:
            other.shutdown()


def test_another_server_steps_in(server, monkeypatch):
    """Each process begins with its own of the servers, and goes on with the others if that does not answer, or is busy."""
    media, rows = batch(0)
    expected = rewards("aesthetic")["aesthetic"](media, rows).float()
    dead = f"http://127.0.0.1:{free_port()}"
    with other_server(503) as (busy, asked):
        for rank, tries in enumerate((1, 0, 1)):  # 0 begins with the busy one, 1 with the good one, 2 with the dead one, then the busy one
            monkeypatch.setenv("RANK", str(rank))
            reward = rewards(f"http={busy}+{server.url}+{dead},reward=aesthetic,patience=60")["http"]
            asked.clear()
            for _ in range(3):
                assert torch.equal(reward(media, rows), expected)
            assert len(asked) == tries  # the one that failed is left alone for a while


def test_none_answers():
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    reward = rewards(f"http={'+'.join(urls)},patience=0.5")
    with pytest.raises(UserError) as error:
        score(reward, *batch(0))
    assert "no reward server answered within 0.5 s" in str(error.value) and "Connection refused" in str(error.value)
    assert all(url in str(error.value) for url in urls)


@pytest.mark.parametrize(("every", "times"), [(0, 4), (60, 1)])
def test_it_is_said_who_is_waited_for(monkeypatch, capsys, every, times):
    """Tries at 0, 0.1, 0.3 and 0.7 s, and the last one at 1.5 s."""
    monkeypatch.setattr(http_reward, "TELL_AFTER", 0)
    monkeypatch.setattr(http_reward, "TELL_EVERY", every)
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError):
        score(rewards(f"http={url},patience=3"), *batch(0))
    said = capsys.readouterr().err
    assert said.count(f"warning: waiting for the reward server {url}, for ") == times and "of 3 s so far" in said and "refused" in said


def test_what_cannot_heal_is_final_at_once(monkeypatch):
    start = time.monotonic()
    with other_server(200) as (url, _), pytest.raises(UserError, match="SSLError"):
        score(rewards(f"http={url.replace('http:', 'https:')}"), *batch(0))
    with pytest.raises(UserError, match=r"http://\.a:1: InvalidURL"):
        score(rewards("http=http://.a:1"), *batch(0))
    monkeypatch.setenv("REWARD_TOKEN", "a\nsecret")
    with pytest.raises(UserError, match="REWARD_TOKEN has a line break") as error:
        rewards("http=http://a:1")
    assert "secret" not in str(error.value) and time.monotonic() - start < 60  # not the patience of 600 s


@pytest.mark.slow
def test_a_run_whose_server_dies_is_saved_and_resumed(serve, train, tmp_path):
    """It stops with a checkpoint of what was learned; resumed with a new server it ends where a run with the reward inside of it ends."""
    server = serve("mortal=2")
    flags = {"--rewards": f"http={server.url},patience=8"}
    stopped = train(tmp_path / "run", flags, check=False)
    assert stopped.returncode == 2, stopped.stderr
    assert f"no reward server answered within 8 s of trying {server.url}" in stopped.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("iteration_*")] == ["iteration_000001"]

    serve("aesthetic", port=server.port)
    train(tmp_path / "run", flags)
    train(tmp_path / "inside", {"--rewards": "aesthetic"})
    exports = [weights_of(tmp_path / run / "export" / "transformer") for run in ("run", "inside")]
    assert largest_difference(*exports) == 0


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("http", "http needs addresses"),
        ("http=127.0.0.1:8500", "http needs addresses.*not '127.0.0.1:8500'"),
        ("http=http://a:1+ftp://b:1", "http needs addresses.*not 'ftp://b:1'"),
        ("http=http://a:port", "http needs addresses"),
        ("http=http://user:password@a:1/", "http needs addresses"),
        ("http=http://a:1,send=float16", "sends float32 or uint8, not send=float16"),
        ("http=http://a:1,patience=0", "patience of http must be above 0 s.*not 0.0"),
        ("http.a.b=http://a:1", "unknown reward 'http.a.b=http://a:1'"),
    ],
)
def test_wrong_addresses_and_options(text, sentence):
    with pytest.raises(UserError, match=sentence):
        rewards(text)


def test_labels_may_not_repeat():
    assert [spec.name for spec in parse_rewards(["http.a=http://a:1", "http.b=http://a:1"])] == ["http.a", "http.b"]
    with pytest.raises(UserError, match=r"'http.a' is given twice"):
        parse_rewards(["http.a=http://a:1", "http.a=http://b:1"])


def test_rewards_are_chosen_by_name(server):
    media, rows = batch(0)
    with pytest.raises(UserError, match=r"there are several rewards here \(shapes, aesthetic, motion, gated\): choose one by reward=NAME"):
        score(rewards(f"http={server.url}"), media, rows)
    with pytest.raises(UserError, match="there is no reward 'clip' here"):
        score(rewards(f"http={server.url},reward=clip"), media, rows)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (200, "is no reward server: it answered 'hello'"),
        *((status, f"status {status}, 'hello'") for status in (307, 401, 403, 404, 415, 500)),
    ],
)
def test_what_is_no_reward_server(status, sentence):
    """Other servers' answers are the user's error, and redirects too, which would take the token along: none is tried again."""
    with other_server(status) as (url, asked), pytest.raises(UserError, match=f"{url}.*{sentence}"):
        rewards(f"http={url},patience=20")["http"](*batch(0))
    assert asked == ["/score"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"--host": "0.0.0.0"}, "--host 0.0.0.0 can be reached from elsewhere: set REWARD_TOKEN"),
        ({"--host": "192.0.2.1"}, "set REWARD_TOKEN"),
        ({"--max_queue": 0}, "--max_queue is 0, but must be above 0"),
        ({"--max_queue_megabytes": 1}, "--max_queue_megabytes 1 is less than one request's --max_megabytes 256"),
        ({"--rewards": "changing"}, "preflight: reward 'changing' gave"),
    ],
)
def test_servers_that_do_not_start(serve, flags, sentence):
    server = serve("shapes", flags=flags, ready=False)
    server.process.join(60)
    assert server.process.exitcode == 2 and sentence in Path(f"{server.log}.stderr").read_text()
    assert "scoring" not in Path(f"{server.log}.stdout").read_text()


def test_a_port_in_use(serve, server):
    other = serve("shapes", port=server.port, ready=False)
    other.process.join(60)
    assert other.process.exitcode == 2 and f"--port {server.port} can't be listened at" in Path(f"{other.log}.stderr").read_text()


@functools.cache
def png_bomb() -> bytes:
    """A small file of 3 MB of pixels."""
    file = io.BytesIO()
    Image.new("1", (1024, 1024)).save(file, "PNG")
    return file.getvalue()


def malformed(random: random.Random, images: Path, token: str):
    """A request that is wrong in one of many ways: (method, target, headers, body), or bytes to send as they are."""
    right = {"Authorization": f"Bearer {token}"}
    score_it = ("POST", "/score?reward=fidelity")
    good, rows = torch.zeros(2, 3, 2, 8, 8), [{"prompt": "a"}, {"prompt": "b"}]
    file, noise = pack(good, rows, "float32"), random.randbytes(random.randint(0, 300))

    text = json.dumps(rows)

    def body(media=good, text=text, name="media") -> tuple:
        return *score_it, right, safetensors.torch.save({name: media}, {"rows": text})

    def image(path: object) -> tuple:
        return body(text=json.dumps([rows[0], rows[1] | {"image": path}]))

    wrong = [
        lambda: noise + b"\r\n\r\n",
        lambda: b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: " + str(random.choice([-1, "x", 10**30])).encode() + b"\r\n\r\n",
        lambda: (*score_it, right | {"Content-Length": str(10 ** random.randint(7, 15))}, noise),
        lambda: (*score_it, right, iter([b"x" * 700_000] * 2)),  # in chunks, without a length
        lambda: (*score_it, right, noise),
        lambda: (*score_it, right, file[: random.randrange(len(file))]),
        lambda: (*score_it, right, random.randbytes(8) + file[8:]),
        lambda: (*score_it, right, file[:8] + noise + file[8 + len(noise) :]) if noise else (*score_it, right, b""),
        lambda: body(good.to(random.choice([torch.int64, torch.bool, torch.float64, torch.int8, torch.complex64, torch.float8_e4m3fn]))),
        lambda: body(torch.zeros(random.choice([(), (2,), (2, 3, 8), (2, 4, 8, 8), (0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 1, 1, 1, 1)]))),
        lambda: body(good + random.choice([float("nan"), float("inf"), 1.01, -300])),
        lambda: body(name="medium"),
        lambda: body(
            text=random.choice(["", "{}", "[]", "null", "[1, 2]", '[{"prompt": "a"}]', '[{"prompt": 1}, {"prompt": 2}]', "[" * 9999])
        ),
        lambda: body(text='[{"prompt": "\\ud83d"}, {"prompt": "b"}]'),
        lambda: image(
            random.choice(["/etc/passwd", "../../../etc/passwd", f"{images}/../x.png", f"{images}/link", f"{images}x/1.png", "a\0b"])
        ),
        lambda: image(random.choice([5, None, ["a"], {"a": 1}, "a" * 5000, f"{images}/missing.png"])),
        lambda: ("POST", "/score?reward=" + random.choice(["../fidelity", "", "%00", "%ff", "fidelity/..", "__class__"]), right, file),
        lambda: ("POST", random.choice(["/", "/score/", "/score/../score", "/../../etc/passwd", "//score", "/%2e%2e/score"]), right, file),
        lambda: (random.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS"]), "/score", right, b""),
        lambda: (*score_it, random.choice([{}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {token}x"}]), file),
        lambda: (*score_it, {"Authorization": random.choice([token, f"Basic {token}", "Bearer \xff", f"bearer {token[:-1]}"])}, file),
        lambda: ("GET", "/health", {}, b""),
        lambda: ("POST", "/score?reward=fidelity&prompt=a", right | {"Content-Type": "image/png"}, noise),
        lambda: ("POST", "/score?reward=fidelity&prompt=a", right | {"Content-Type": "image/png"}, png_bomb()),
        lambda: ("POST", "/score?reward=fidelity", right | {"Content-Type": random.choice(["image/png", "video/mp4"])}, file),
    ]
    return random.choice(wrong)()


def send(port: int, request) -> tuple[int, str]:
    """Status, and what the server says."""
    if isinstance(request, bytes):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request)
            answer = connection.recv(4096).decode("latin-1")
        return int(answer.split()[1]), answer
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    method, target, headers, body = request
    connection.request(method, target, body, headers)
    answer = connection.getresponse()
    said = answer.status, answer.read().decode()
    connection.close()
    return said


def test_the_server_outlives_malformed_requests(serve, tmp_path):
    """Each of 1,000 gets a status from 400 to 499 and a sentence; after them it works as before."""
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").touch()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "secret.png")
    server = serve("fidelity", flags={"--max_megabytes": 1, "--images": tmp_path / "images"}, token="secret")
    draws = random.Random(0)
    bad = [malformed(draws, tmp_path / "images", "secret") for _ in range(1000)]
    with ThreadPoolExecutor(8) as threads:
        for request, (status, said) in zip(bad, threads.map(lambda request: send(server.port, request), bad)):
            assert 400 <= status < 500 and said, (request, status, said)
            if not isinstance(request, bytes):
                assert isinstance(json.loads(said)["detail"], str), (request, said)
    assert "Traceback" not in Path(f"{server.log}.stderr").read_text()
    mp4 = requests.post(
        f"{server.url}/score?prompt=a",
        data=b"#EXTM3U\nhttp://127.0.0.1:1/\n",
        headers={"Authorization": "Bearer secret", "Content-Type": "video/mp4"},
        timeout=60,
    )
    assert mp4.status_code == 422 and "no mp4 file" in mp4.json()["detail"]

    health = requests.get(f"{server.url}/health", headers={"Authorization": "Bearer secret"}, timeout=60)
    assert health.status_code == 200 and health.json() == {"ready": True, "rewards": ["fidelity"], "queue": 0}
    image = tmp_path / "images" / "1.png"
    Image.new("RGB", (32, 32), "red").save(image)
    media, rows = batch(0, 2, frames=5)
    rows = [row | {"image": str(image)} for row in rows]
    outside = pack(media, [row | {"image": str(tmp_path / "secret.png")} for row in rows], "float32")
    assert "is not in the folder --images" in post(server.url, outside, token="secret").json()["detail"]
    answer = post(server.url, pack(media, rows, "float32"), token="secret")
    assert answer.json()["scores"] == score(rewards("fidelity"), media, rows)["fidelity"].tolist()


TWO = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("tensors", "rows", "sentence"),
    [
        ({"media": TWO, "x": TWO + 0}, None, "must have one tensor, \"media\", not ['media', 'x']"),
        ({"media": TWO.double()}, None, "the media are torch.float64"),
        ({"media": TWO.view(6, 1, 8, 8)}, None, "not (6, 1, 8, 8)"),
        ({"media": TWO + float("nan")}, None, "values outside of [-1, 1]"),
        ({"media": TWO + 1.01}, None, "values outside of [-1, 1]"),
        ({"media": TWO}, "[1", 'no safetensors file with "rows" in its metadata'),
        ({"media": TWO}, '[{"prompt": "\\ud83d"}, {"prompt": "b"}]', "surrogates not allowed"),
        ({"media": TWO}, '[{"prompt": "a"}]', "one entry for each of 2 samples"),
        ({"media": TWO}, '[{"prompt": "a"}, {"prompt": 5}]', 'a string as "prompt"'),
    ],
)
def test_bodies_that_are_wrong(tensors, rows, sentence):
    rows = json.dumps([{"prompt": "a"}] * 2) if rows is None else rows
    with pytest.raises(ValueError, match=re.escape(sentence)):
        unpack(safetensors.torch.save(tensors, {"rows": rows}), "", None, 1e6)


def test_a_picture_that_is_too_large():
    with pytest.raises(ValueError, match="1024 x 1024 pixels is too large for --max_megabytes"):
        unpack(png_bomb(), "image/png", "a", 2**20)


@pytest.mark.parametrize(("size", "frames"), [((1024, 1024), 1), ((256, 256), 16)], ids=["frames", "length"])
def test_a_clip_that_is_too_large_is_not_decoded(tmp_path, monkeypatch, size, frames):
    """Of 3 MB in a small file; without a look at its frames."""
    import imageio_ffmpeg

    save_video(tmp_path / "clip.mp4", torch.zeros(3, frames, *size), fps=8)
    body, read = (tmp_path / "clip.mp4").read_bytes(), []
    read_frames = imageio_ffmpeg.read_frames
    monkeypatch.setattr(
        imageio_ffmpeg, "read_frames", lambda *words, **options: (read.append(x) or x for x in read_frames(*words, **options))
    )
    assert len(body) < 2**17 and unpack(body, "video/mp4", "a", 2**22)[0].shape == (1, 3, frames, *size)
    assert len(read) == 1 + frames
    read.clear()
    with pytest.raises(ValueError, match="the clip is too large for --max_megabytes"):
        unpack(body, "video/mp4", "a", 2**21)
    assert len(read) == (frames > 1)  # what the file says of itself


def test_an_unknown_content_type_is_refused_by_name(server):
    body, url = pack(*batch(0), "float32"), f"{server.url}/score?reward=aesthetic"
    for kind, status in {"application/x-www-form-urlencoded": 415, "image/jpeg": 415, "Application/X-Safetensors; a=b": 200}.items():
        answer = requests.post(url, data=body, headers={"Content-Type": kind}, timeout=60)
        assert answer.status_code == status and (status == 200 or f"a body of type '{kind}' can't be read" in answer.json()["detail"])


def test_bodies_that_are_too_large(serve):
    """A declared length is refused before there is a body, a body without a length once it is too long; the client says what to do."""
    server = serve("aesthetic", flags={"--max_megabytes": 0.1})
    request = ("POST", "/score", {"Content-Length": str(10**12)}, b"")
    assert send(server.port, request)[0] == 413
    assert send(server.port, ("POST", "/score", {}, iter([b"x" * 60_000] * 2)))[0] == 413
    assert send(server.port, ("POST", "/score", {}, iter([b"x" * 60_000])))[0] == 422
    with pytest.raises(UserError, match=r"larger than the server's --max_megabytes 0.1: send fewer samples at once, or uint8"):
        score(rewards(f"http={server.url}"), *batch(0, 10))
    assert score(rewards(f"http={server.url},send=uint8"), *batch(0, 10))["http"].shape == (10,)


def test_the_token_comes_from_the_environment(serve, monkeypatch):
    server = serve("aesthetic", token="a secret")
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(UserError, match="the bearer token is missing or wrong: set REWARD_TOKEN"):
        score(rewards(f"http={server.url}"), *batch(0))
    monkeypatch.setenv("REWARD_TOKEN", "a secret")
    assert score(rewards(f"http={server.url}"), *batch(0))["http"].shape == (2,)


def test_a_rows_image_must_be_in_the_folder(tmp_path):
    """Whatever its path looks like; without a folder rows lose it, since a path means nothing to a server elsewhere."""
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "secret.png").touch()
    (images / "link").symlink_to(tmp_path / "secret.png")
    rows = [{"prompt": "a"}, {"prompt": "b", "image": f"{images}/../images/1.png"}]
    confine_images(rows, images)
    assert "image" in rows[1]
    for path in ("/etc/passwd", "../secret.png", f"{images}/../secret.png", f"{images}/link", f"{images}x/1.png", "a\0b", 5, None, ["a"]):
        with pytest.raises(ValueError, match="is not in the folder --images"):
            confine_images([{"prompt": "a", "image": path}], images)
    confine_images(rows, None)
    assert rows == [{"prompt": "a"}, {"prompt": "b"}]
