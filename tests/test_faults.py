"""Damaged files, full disks, folders that cannot be written, losses that are not a number, a reward that hangs, a clock that goes back.

The run goes on, or ends with one sentence and a whole checkpoint; once the fault is mended, the same command ends like a run without it.
Kills are in test_kill.py and test_resume.py, lost processes in test_lost_process.py, rewards that fail in test_bad_input.py.
"""

import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import MODEL, REPOSITORY, TRAIN, run_script, start_forked
from test_resume import assert_same_run

from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.errors import UserError
from fastvideo.parallel.distributed import Ranks, init
from fastvideo.runs import integrity
from fastvideo.runs.tracking import Tracker, read_metrics

EMBED = REPOSITORY / "preprocess" / "embed_flux.py"


def flip_a_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def the_sentence(stderr: str) -> str:
    """The one that ends the run."""
    assert "Traceback" not in stderr, stderr
    sentences = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(set(sentences)) == 1, stderr
    return sentences[0]


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    yield init()
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------- damaged checkpoints


def test_no_bit_of_a_checkpoint_can_flip_unnoticed(run_copy):
    """Seeded places everywhere: headers, tensors, state.json from its first character to its last."""
    folder = run_copy / "checkpoints" / "iteration_000006"
    integrity.verify(folder)
    draw = random.Random(0)
    for name, ends in (("state.json", 60), ("shard_00000.safetensors", 5000)):
        path = folder / name
        size = path.stat().st_size
        for position in [0, 7, size - 1, *(draw.randrange(ends) for _ in range(6)), *(draw.randrange(size) for _ in range(6))]:
            bit = draw.randrange(8)
            flip_a_bit(path, position, bit)
            with pytest.raises(UserError, match=f"{path} is damaged"):
                integrity.verify(folder)
            flip_a_bit(path, position, bit)
    integrity.verify(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'{"crc32": 1}', b"[" * 100_000, b"\xff\xfe{}", b"null"])
def test_state_that_is_none(run_copy, content):
    path = run_copy / "checkpoints" / "iteration_000006" / "state.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        integrity.verify(path.parent)


def test_way_back_is_the_newest_whole_checkpoint_before(run_copy):
    folder = run_copy / "checkpoints"
    assert "write iteration_000004 into" in integrity.way_back(folder, "iteration_000006")
    flip_a_bit(folder / "iteration_000004" / "shard_00000.safetensors", -1)
    assert f"write iteration_000002 into {folder}/latest" in integrity.way_back(folder, "iteration_000006")
    assert "there is no whole checkpoint before it" in integrity.way_back(folder, "iteration_000002")
    assert "write iteration_000006 into" in integrity.way_back(folder)


@pytest.mark.parametrize(
    "content", [b"", b"../../elsewhere", b"/etc/passwd", b"iteration_000006/../../..", b"\xff\x00\xfe", b"x" * 9999, b"."]
)
def test_latest_never_leads_out_of_the_folder(run_copy, tmp_path, content):
    shutil.copytree(run_copy / "checkpoints" / "iteration_000006", tmp_path / "elsewhere")
    folder = run_copy / "checkpoints"
    (folder / "latest").write_bytes(content)
    with pytest.raises(UserError, match=f"{folder}/latest is damaged.*write iteration_000006 into {folder}/latest") as error:
        integrity.latest(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_latest_that_is_lost(run_copy):
    """As a kill leaves it that comes after the first checkpoint got its name."""
    folder = run_copy / "checkpoints"
    (folder / "latest").unlink()
    assert integrity.latest(folder) == folder / "iteration_000006"
    shutil.rmtree(folder)
    assert integrity.latest(folder) is None


# ------------------------------------------------------------------------------------------------- damaged embeddings, metrics


def test_bits_of_a_cache_that_flip(cache, tmp_path):
    """In the index and in headers each is refused by name, or changes nothing that is read."""
    expected = EmbeddingCache(cache)
    draw = random.Random(0)
    for name in ("index.json", "shard-00001-of-00003.safetensors"):
        shutil.copytree(cache, tmp_path / name)
        path = tmp_path / name / name
        for position in range(0, min(path.stat().st_size, 3000), 9):
            bit = draw.randrange(8)
            flip_a_bit(path, position, bit)
            try:
                opened = EmbeddingCache(tmp_path / name)
            except UserError as error:
                assert path.name in str(error) or "not the shard that index.json describes" in str(error), (position, error)
            else:
                assert (opened.rows, opened.fingerprint, opened.digest) == (expected.rows, expected.fingerprint, expected.digest)
                everything = list(range(len(opened)))
                assert all(tensor.equal(expected.get(everything)[key]) for key, tensor in opened.get(everything).items())
            flip_a_bit(path, position, bit)


def lines(*iterations: int) -> bytes:
    return b"".join(b'{"iteration": %d, "reward/x_mean": 0.5}\n' % iteration for iteration in iterations)


@pytest.mark.parametrize(
    ("damage", "number"),
    [(b"\x00" * 30 + b"\n", 3), (b'{"iteration": 3, "rew\n', 3), (b"[]\n", 3), (b'{"iteratiom": 3}\n', 3), (b"\xff\n", 3), (b"\n", 3)],
)
def test_damaged_line_of_metrics_is_refused(ranks, tmp_path, damage, number):
    """The good lines after it are not thrown away."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2) + damage + lines(4, 5))
    with pytest.raises(UserError, match=f"line {number} of {path} is damaged: mend or delete it"):
        Tracker(tmp_path, (), {}, 5)
    assert path.read_bytes() == lines(1, 2) + damage + lines(4, 5)


@pytest.mark.parametrize("rest", [b"", b'{"iteration": 5, "rew', b"\x00" * 30, lines(5)[:-1]])
def test_end_of_metrics_that_a_kill_cut_off(ranks, tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2, 3, 4) + rest)
    Tracker(tmp_path, (), {}, 3)
    assert path.read_bytes() == lines(1, 2, 3)


# ----------------------------------------------------------------------------------------------------------------- full disks

# train_grpo_flux.py, but something happens when rewards are scored for the CALL-th time, once an iteration; or before the export.
MISHAP = """
import os, resource, sys, time
import train_grpo_flux
from fastvideo.parallel import distributed
from fastvideo.runs import checkpoint

def fill_disk():
    with open("DISK/filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def limit_files():  # for this process: error EFBIG, as if there were no room for more
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))

def set_clock_back():
    seconds, nanoseconds = time.time, time.time_ns
    time.time, time.time_ns = lambda: seconds() - 3600, lambda: nanoseconds() - 3600 * 10**9

def hang():
    if os.environ["RANK"] == "1":
        time.sleep(1000)

def break_loss():
    loss = train_grpo_flux.grpo_loss
    train_grpo_flux.grpo_loss = lambda *inputs: (loss(*inputs)[0] * float("nan"), loss(*inputs)[1])

calls, score, export = 0, train_grpo_flux.score, checkpoint.export

def mishap_at_score(*inputs):
    global calls
    calls += 1
    if calls == CALL:
        WHAT()
    return score(*inputs)

def mishap_at_export(*inputs):
    if CALL == 0:
        WHAT()
    return export(*inputs)

train_grpo_flux.score, checkpoint.export = mishap_at_score, mishap_at_export
distributed.run(train_grpo_flux.main)
"""


def mishap(folder: Path, what: str, call: int, disk: Path | str = "") -> Path:
    """The script for it, written into `folder`."""
    path = folder / "mishap.py"
    path.write_text(MISHAP.replace("WHAT", what).replace("CALL", str(call)).replace("DISK", str(disk)))
    return path


def mount(*words: object) -> None:
    result = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"cannot mount a file system: {result.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A folder that is a file system of its own, to be mounted by the test."""
    path = tmp_path / "disk"
    path.mkdir()
    yield path
    while subprocess.run(["umount", "--lazy", str(path)], capture_output=True, check=False).returncode == 0:
        pass  # is_mount() does not see one that shows the same disk


@pytest.fixture(scope="module")
def undisturbed(finished_run, train, tmp_path_factory):
    """Function from a number of processes to a run of 6 iterations that nothing happened to."""
    runs = {1: finished_run}

    def run_of(processes: int) -> Path:
        if processes not in runs:
            runs[processes] = tmp_path_factory.mktemp("undisturbed") / "run"
            train(runs[processes], {"--iterations": 6}, processes=processes)
        return runs[processes]

    return run_of


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_room_for_a_checkpoint(train, undisturbed, tmp_path, processes):
    """On two processes, each finds none for its shard."""
    run = tmp_path / "run"
    flags = {"--iterations": 6}
    result = train(run, flags, script=mishap(tmp_path, "limit_files", 3), processes=processes, check=False)
    assert result.returncode == 2
    sentence = the_sentence(result.stderr)
    assert f"cannot write {run}/checkpoints/.iteration_000004.tmp/shard_00000.safetensors: " in sentence
    assert "File too large" in sentence
    assert sentence.endswith("; the last whole checkpoint is iteration_000002")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_000002", "latest"]
    assert [row["iteration"] for row in read_metrics(run)] == [1, 2, 3, 4]
    train(run, flags, processes=processes)
    assert_same_run(run, undisturbed(processes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "call", "message", "last"),
    [
        ("logging", 1, "cannot write {run}/metrics.jsonl: No space left on device", "there is no checkpoint yet"),
        ("saving", 3, "cannot write {run}/checkpoints/.iteration_000004.tmp/shard_00000.safetensors: ", "iteration_000002"),
        ("samples", 3, "cannot write {run}/samples/iteration_000003.png: No space left on device", "iteration_000002"),
        ("export", 0, "cannot write {run}/export: ", "iteration_000006"),
    ],
)
def test_full_disk(train, finished_run, tmp_path, disk, moment, call, message, last):
    mount("-t", "tmpfs", "-o", "size=200m", "tmpfs", disk)
    run = disk / "run"
    flags = {"--iterations": 6, "--sample_every": 3 if moment == "samples" else 0}
    result = train(run, flags, script=mishap(tmp_path, "fill_disk", call, disk), check=False)
    assert result.returncode == 2
    sentence = the_sentence(result.stderr)
    assert message.format(run=run) in sentence
    assert "No space left on device" in sentence
    assert sentence.endswith(last)
    assert not [path for path in run.rglob(".*")]
    (disk / "filler").unlink()
    train(run, flags)
    assert_same_run(run, finished_run)


@pytest.mark.slow
def test_disk_too_small_for_another_checkpoint(train, finished_run, disk):
    """Nothing else fills it: the third of three is too much."""
    size = sum(path.stat().st_size for path in (finished_run / "checkpoints" / "iteration_000006").iterdir())
    mount("-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", disk)
    result = train(disk / "run", {"--iterations": 6}, check=False)
    assert result.returncode == 2
    assert the_sentence(result.stderr).endswith("No space left on device; the last whole checkpoint is iteration_000004")
    mount("-o", f"remount,size={10 * size}", disk)
    train(disk / "run", {"--iterations": 6})
    assert_same_run(disk / "run", finished_run)


def fill(path: Path) -> None:
    try:
        with path.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return


@pytest.mark.filterwarnings("error")  # also of an error in TensorBoard's thread
@pytest.mark.parametrize("trackers", [(), pytest.param(("tensorboard",), marks=pytest.mark.slow)])
def test_metrics_on_a_full_disk_stay_readable(ranks, disk, monkeypatch, trackers):
    """Where the last line did not fit it is cut off, and goes when the run goes on."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    mount("-t", "tmpfs", "-o", "size=100k", "tmpfs", disk)
    tracker = Tracker(disk, trackers, {}, 0)
    tracker.log(1, {"value": 0.5})
    fill(disk / "filler")
    with pytest.raises(UserError, match=f"cannot write {disk}/(metrics.jsonl|tensorboard): No space.*; there is no checkpoint yet"):
        for iteration in range(2, 1000):
            tracker.log(iteration, {"value": 0.5})
    written = (disk / "metrics.jsonl").read_bytes().count(b"\n")
    assert written >= iteration - 1
    (disk / "filler").unlink()
    Tracker(disk, (), {}, written - 1).log(written, {"value": 0.5})
    assert [row["iteration"] for row in read_metrics(disk)] == list(range(1, written + 1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_while_embedding(cache, prompt_file, tmp_path, disk, processes):
    size = (cache / "shard-00000-of-00003.safetensors").stat().st_size
    mount("-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", disk)
    flags = {"--model": MODEL, "--prompts": prompt_file, "--output_dir": disk / "cache", "--shard_size": 4}
    result = run_script(EMBED, flags, processes=processes, log=tmp_path / "log")
    assert result.returncode == 2
    sentence = the_sentence(result.stderr)
    assert f"cannot write {disk}/cache/shard-0000" in sentence and "No space left on device" in sentence
    assert not list(disk.rglob(".*"))
    mount("-o", f"remount,size={20 * size}", disk)
    assert run_script(EMBED, flags, processes=processes, log=tmp_path / "log").returncode == 0
    for path in cache.glob("shard-*"):
        assert path.read_bytes() == (disk / "cache" / path.name).read_bytes()


# -------------------------------------------------------------------------------------------------- folders that are read-only


@pytest.mark.parametrize("folder", ["/dev/null/run", pytest.param("/proc/run", marks=pytest.mark.slow)])
def test_impossible_output_folder(run_flags, tmp_path, folder):
    result = run_script(TRAIN, *run_flags(folder), log=tmp_path / "log")
    assert result.returncode == 2
    assert f"cannot use --output_dir {folder}: " in the_sentence(result.stderr)


@pytest.mark.slow
def test_read_only_folders(run_flags, finished_run, cache, prompt_file, tmp_path, disk):
    shutil.copytree(finished_run, disk / "run")
    shutil.copytree(cache, disk / "cache")
    (disk / "cache" / "shard-00001-of-00003.safetensors").unlink()
    mount("--bind", disk, disk)
    mount("-o", "remount,ro,bind", disk)
    for name in ("run", "new"):
        result = run_script(TRAIN, *run_flags(disk / name, {"--iterations": 8}), log=tmp_path / "log")
        assert result.returncode == 2
        assert f"cannot use --output_dir {disk / name}: [Errno 30] Read-only file system" in the_sentence(result.stderr)
    for name in ("cache", "new"):
        flags = {"--model": MODEL, "--prompts": prompt_file, "--output_dir": disk / name, "--shard_size": 4}
        result = run_script(EMBED, flags, log=tmp_path / "log")
        assert result.returncode == 2
        assert "Read-only file system" in the_sentence(result.stderr)
    subprocess.run(["umount", str(disk)], check=True)
    assert_same_run(disk / "run", finished_run)


# ------------------------------------------------------------------------------------------------------ numbers, time, clocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "stage", "dtype"), [(1, 0, "float32"), (2, 1, "float32"), (1, 2, "float32"), (1, 3, "float32"), (1, 1, "bfloat16")]
)
def test_loss_that_is_not_a_number(train, tmp_path, processes, stage, dtype):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = {"--zero_stage": stage, "--checkpoint_every": 1, "--dtype": dtype, "--clip_range": 1}
    result = train(run, flags, script=mishap(tmp_path, "break_loss", 3), processes=processes, check=False)
    assert result.returncode == 2
    assert "the gradient norm is " in the_sentence(result.stderr)
    assert (run / "checkpoints" / "latest").read_text() == "iteration_000002"
    train(run, flags, processes=processes)
    train(whole, flags, processes=processes)
    assert_same_run(run, whole)


@pytest.mark.slow
def test_reward_that_hangs(train, undisturbed, run_flags, tmp_path):
    """One of two processes does not come back from its reward in the fifth iteration: the other one says where it is."""
    run = tmp_path / "run"
    flags = run_flags(run, {"--iterations": 6, "--timeout_minutes": 10 / 60})
    forked = start_forked(mishap(tmp_path, "hang", 5), *flags, processes=2, log=tmp_path / "log")
    for process in forked:
        process.join(90)
    assert [process.exitcode for process in forked] == [1, 1]
    said = (tmp_path / "log.0.stderr").read_text()
    assert "error: rank 1 on " in said and "keeps the others waiting: it is at " in said and "in hang" in said
    assert (run / "checkpoints" / "latest").read_text() == "iteration_000004"
    train(run, {"--iterations": 6}, processes=2)
    assert_same_run(run, undisturbed(2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_clock_that_goes_back(train, undisturbed, tmp_path, processes):
    """By an hour in the third iteration: what is newest is decided by names, and no timeout is missed."""
    run = tmp_path / "run"
    script = mishap(tmp_path, "set_clock_back", 3)
    for iterations in (4, 6):
        train(run, {"--iterations": iterations, "--keep_checkpoints": 2}, script=script, processes=processes)
    assert_same_run(run, undisturbed(processes))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_000004", "iteration_000006", "latest"]
