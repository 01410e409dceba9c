"""Embedding caches: what is written is read back, nothing damaged or foreign is accepted, killed runs continue, opening reads no rows."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastvideo.embeddings import fingerprint
from fastvideo.embeddings.cache import EmbeddingCache, write_cache
from fastvideo.embeddings.fingerprint import check_encoder, encoder_fingerprint
from fastvideo.embeddings.prompts import by_text_length, read_prompts
from fastvideo.errors import UserError
from fastvideo.models.tokenizers import own_digest
from fastvideo.parallel.distributed import Ranks, init

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = [{"prompt": f"prompt {i}", "extra": i} for i in range(7)]
FINGERPRINT = {"text_encoder": "sha256:ab", "dtype": "float32"}


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    yield init()
    dist.destroy_process_group()


def encode(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Several shapes and dtypes, all depending on the prompt."""
    numbers = torch.tensor([float(row["prompt"].split()[1]) for row in rows])
    return {
        "number": numbers.long(),
        "mask": numbers[:, None] > torch.arange(3.0),
        "embeds": numbers[:, None, None] + torch.arange(12.0).reshape(3, 4),
        "half": (numbers[:, None] / 7).bfloat16().expand(-1, 5),
    }


@pytest.fixture
def cache_dir(ranks, tmp_path) -> Path:
    write_cache(tmp_path / "cache", ROWS, encode, FINGERPRINT, ranks, shard_size=3, batch_size=2)
    return tmp_path / "cache"


def rewrite_index(cache_dir: Path, **changes: object) -> None:
    index = json.loads((cache_dir / "index.json").read_text())
    (cache_dir / "index.json").write_text(json.dumps({key: value for key, value in (index | changes).items() if value is not None}))


def grown_shards(cache_dir: Path) -> list[dict]:
    return [shard | {"size": shard["size"] + 1} for shard in json.loads((cache_dir / "index.json").read_text())["shards"]]


def drop_last_row(shard: Path) -> None:
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    save_file({key: tensor[:-1] for key, tensor in load_file(shard).items()}, shard, metadata)


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# Reading back


def test_rows_read_back_in_any_order(cache_dir):
    cache = EmbeddingCache(cache_dir, FINGERPRINT)
    assert (len(cache), cache.rows, cache.fingerprint) == (7, ROWS, FINGERPRINT)
    indices = [6, 0, 3, 3]
    expected = encode([ROWS[i] for i in indices])
    actual = cache.get(indices)
    assert actual.keys() == expected.keys()
    for key in expected:
        assert actual[key].dtype == expected[key].dtype
        assert torch.equal(actual[key], expected[key])
    assert cache.tensors["half"] == {"dtype": "BF16", "shape": [5]}


def test_prompts_with_a_text_mask_are_put_in_order_of_their_length(cache_dir, ranks, tmp_path):
    drawn = {4: 2, 5: 0, 6: 5, 7: 1}
    assert list(by_text_length(drawn, EmbeddingCache(cache_dir)).items()) == list(drawn.items())  # no text mask
    lengths = torch.tensor([3, 1, 3, 4, 2, 2, 4])

    def masks(rows: list[dict]) -> dict[str, torch.Tensor]:
        return {"prompt_attention_mask": torch.arange(4) < lengths[[row["extra"] for row in rows]][:, None]}

    write_cache(tmp_path / "masked", ROWS, masks, FINGERPRINT, ranks, shard_size=3, batch_size=2)
    assert list(by_text_length(drawn, EmbeddingCache(tmp_path / "masked")).items()) == [(7, 1), (6, 5), (4, 2), (5, 0)]


def test_collective_open(cache_dir, ranks):
    assert len(EmbeddingCache(cache_dir, FINGERPRINT, ranks)) == 7


def test_shards_can_be_read_by_others_and_no_temporary_file_is_left(cache_dir):
    names = sorted(path.name for path in cache_dir.iterdir())
    assert names == ["index.json", *(f"shard-0000{k}-of-00003.safetensors" for k in range(3))]
    assert {path.stat().st_mode & 0o777 for path in cache_dir.iterdir()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_equal_input_gives_equal_bytes(cache_dir, ranks, tmp_path):
    write_cache(tmp_path / "again", ROWS, encode, FINGERPRINT, ranks, shard_size=3, batch_size=2)
    for path in cache_dir.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_opening_and_reading_200_mb_stays_out_of_memory(ranks, tmp_path):
    rows = [{"prompt": f"prompt {i}"} for i in range(48)]
    shape = (512, 4096)  # a bfloat16 FLUX row: 4 MiB
    write_cache(
        tmp_path / "big",
        rows,
        lambda rows: {"embeds": torch.ones(len(rows), *shape, dtype=torch.bfloat16)},
        {},
        ranks,
        shard_size=8,
        batch_size=4,
    )
    script = f"""
import psutil
from fastvideo.embeddings.cache import EmbeddingCache
mebibytes = lambda: psutil.Process().memory_info().rss / 2**20
before = mebibytes()
cache = EmbeddingCache({str(tmp_path / "big")!r})
opened = mebibytes()
for i in range(len(cache)):
    cache.get([i])
print(opened - before, mebibytes() - before)
"""
    # What the cache holds, not what malloc keeps of it: freed rows go back to the system at once.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    opened, read = map(float, output.stdout.split())
    assert opened < 8
    assert read < 32  # all 192 MiB were read, a row at a time


# Damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, shard: shard.unlink(), "No such file"),
        (lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-7]), "cannot read .*shard-00001"),
        (lambda folder, shard: shard.write_bytes(b""), "cannot read .*shard-00001"),
        (lambda folder, shard: flip_bit(shard, -1), "shard-00001.* is damaged: the embedding of 'prompt [345]'"),
        (lambda folder, shard: shutil.copy(folder / "shard-00000-of-00003.safetensors", shard), "not the shard that index.json describes"),
        (lambda folder, shard: drop_last_row(shard), "not a shard of an embedding cache"),
        (lambda folder, shard: save_file({"x": torch.ones(3)}, shard), "not a shard of an embedding cache"),
        (lambda folder, shard: (folder / "index.json").unlink(), "not a finished embedding cache"),
        (lambda folder, shard: shutil.rmtree(folder), "not a finished embedding cache"),
        (lambda folder, shard: (folder / "index.json").write_text("{"), "index.json is damaged"),
        (lambda folder, shard: (folder / "index.json").write_text("[]"), "index.json is damaged"),
        (lambda folder, shard: (folder / "index.json").write_bytes(b"\xff\xfe"), "index.json is damaged"),
        (lambda folder, shard: rewrite_index(folder, format=2), "its format is 2, not 1"),
        *[
            (lambda folder, shard, key=key: rewrite_index(folder, **{key: None}), f"index.json is damaged .*{key}")
            for key in ("format", "fingerprint", "tensors", "shard_size", "shards", "rows", "crc32")
        ],
        (lambda folder, shard: rewrite_index(folder, shard_size="3"), "shard_size is no int"),
        (lambda folder, shard: rewrite_index(folder, shard_size=0), "index.json is damaged"),
        (lambda folder, shard: rewrite_index(folder, shard_size=-3, shards=[]), "index.json is damaged"),
        (lambda folder, shard: rewrite_index(folder, rows=[], shards=[]), "index.json is damaged"),
        (lambda folder, shard: rewrite_index(folder, rows=["x"] * 7), "index.json is damaged"),
        (lambda folder, shard: rewrite_index(folder, rows=[{"prompt": "another"}] * 7), "not the shard that index.json describes"),
        (lambda folder, shard: rewrite_index(folder, crc32=[0] * 7), "not the shard that index.json describes"),
        (lambda folder, shard: rewrite_index(folder, tensors={}), "not the shard that index.json describes"),
        (lambda folder, shard: rewrite_index(folder, shards=[{"name": "../../secret", "size": 1, "mtime_ns": 1}] * 3), "wrong shard names"),
        (lambda folder, shard: rewrite_index(folder, shards=grown_shards(folder)), "not the shard that index.json describes"),
        (lambda folder, shard: rewrite_index(folder, shards=[1, 2, 3]), "index.json is damaged"),
    ],
)
def test_damage_is_found_at_open(cache_dir, damage, message):
    damage(cache_dir, cache_dir / "shard-00001-of-00003.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        EmbeddingCache(cache_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [0, 9, 60, 150])
def test_no_bit_of_a_header_can_flip_unnoticed(cache_dir, position):
    flip_bit(cache_dir / "shard-00002-of-00003.safetensors", position)
    with pytest.raises(UserError, match="shard-00002"):
        EmbeddingCache(cache_dir)


def test_damage_under_an_unchanged_modification_time_is_found_when_read(cache_dir):
    shard = cache_dir / "shard-00002-of-00003.safetensors"
    time_ns = shard.stat().st_mtime_ns
    flip_bit(shard, -1)
    os.utime(shard, ns=(time_ns, time_ns))
    cache = EmbeddingCache(cache_dir)
    cache.get([0, 5])
    with pytest.raises(UserError, match=r"shard-00002.* is damaged: the embedding of 'prompt 6'"):
        cache.get([6])


def test_shard_that_vanishes_after_opening(cache_dir):
    cache = EmbeddingCache(cache_dir)
    (cache_dir / "shard-00000-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*shard-00000"):
        cache.get([0])


def test_copied_cache_is_accepted(cache_dir, tmp_path):
    shutil.copytree(cache_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    assert torch.equal(EmbeddingCache(tmp_path / "copy").get([4])["embeds"], encode(ROWS[4:5])["embeds"])


def test_fingerprint_difference_names_the_entry_and_both_values(cache_dir):
    with pytest.raises(UserError, match="cache was made with dtype 'float32', but this run has 'bfloat16'"):
        EmbeddingCache(cache_dir, FINGERPRINT | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="with max_sequence_length None, but this run has 512"):
        EmbeddingCache(cache_dir, {"max_sequence_length": 512})


# Writing over what is there


def test_finished_cache_is_not_written_again(cache_dir, ranks):
    before = {path.name: path.stat().st_mtime_ns for path in cache_dir.glob("*.safetensors")}

    def must_not_run(rows):
        raise AssertionError

    write_cache(cache_dir, ROWS, must_not_run, FINGERPRINT, ranks, shard_size=3, batch_size=2)
    assert before == {path.name: path.stat().st_mtime_ns for path in cache_dir.glob("*.safetensors")}
    EmbeddingCache(cache_dir)


@pytest.mark.parametrize(
    "damage", [lambda shard: flip_bit(shard, -1), lambda shard: shard.write_bytes(b"x" * 100), lambda shard: flip_bit(shard, 0)]
)
def test_damaged_shard_alone_is_written_again(cache_dir, ranks, damage, capsys):
    before = {path.name: path.read_bytes() for path in cache_dir.glob("*.safetensors")}
    encoded = []
    damage(cache_dir / "shard-00001-of-00003.safetensors")
    write_cache(cache_dir, ROWS, lambda rows: encoded.extend(rows) or encode(rows), FINGERPRINT, ranks, shard_size=3, batch_size=2)
    assert encoded == ROWS[3:6]
    assert before == {path.name: path.read_bytes() for path in cache_dir.glob("*.safetensors")}
    assert "shard-00001" in capsys.readouterr().err
    EmbeddingCache(cache_dir)


@pytest.mark.parametrize(
    ("rows", "fingerprint", "shard_size", "message"),
    [
        (ROWS, FINGERPRINT | {"dtype": "bfloat16"}, 3, "made with dtype 'float32', but this run has 'bfloat16'"),
        (
            [*ROWS[:6], {"prompt": "prompt 9"}],
            FINGERPRINT,
            3,
            "shard-00002.* holds other prompts than this run: choose another --output_dir",
        ),
        (ROWS[:4], FINGERPRINT, 3, "left from other prompts or another --shard_size: choose another --output_dir"),
        (ROWS, FINGERPRINT, 2, "left from other prompts or another --shard_size"),
    ],
)
def test_cache_of_another_run_is_refused_and_kept(cache_dir, ranks, rows, fingerprint, shard_size, message):
    before = {path.name: path.read_bytes() for path in cache_dir.iterdir()}
    with pytest.raises(UserError, match=message):
        write_cache(cache_dir, rows, encode, fingerprint, ranks, shard_size=shard_size, batch_size=2)
    assert before == {path.name: path.read_bytes() for path in cache_dir.iterdir()}


def test_not_finite_embedding_is_refused(ranks, tmp_path):
    def broken(rows):
        return {"embeds": torch.tensor([[1.0, float("nan") if row["prompt"] == "prompt 4" else 0.0] for row in rows])}

    with pytest.raises(UserError, match="embeds of 'prompt 4' has infinite or undefined numbers"):
        write_cache(tmp_path / "cache", ROWS, broken, {}, ranks, shard_size=3, batch_size=2)
    assert not (tmp_path / "cache" / "index.json").exists()


def test_output_dir_that_is_a_file(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file: File exists"):
        write_cache(tmp_path / "file", ROWS, encode, {}, ranks, shard_size=3, batch_size=2)


WRITER = """
import sys, time
from pathlib import Path
from fastvideo.parallel.distributed import init, run
from fastvideo.embeddings.cache import write_cache
from tests.test_embedding_cache import FINGERPRINT, ROWS, encode
hang = Path(sys.argv[2]) if len(sys.argv) > 2 else None

def slow_encode(rows):
    if hang is not None and rows[0]["extra"] == 4:
        hang.touch()
        time.sleep(600)
    return encode(rows)

run(lambda: write_cache(sys.argv[1], ROWS, slow_encode, FINGERPRINT, init(timeout_minutes=1), shard_size=2, batch_size=2))
"""


def test_killed_run_continues(ranks, tmp_path):
    """kill -9 while the third shard of four is encoded; the first two are neither encoded nor written again."""
    (tmp_path / "writer.py").write_text(WRITER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, tmp_path / "writer.py", tmp_path / "cache", tmp_path / "hanging"], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"shard-0000{k}-of-00004.safetensors" for k in range(2)]
    with pytest.raises(UserError, match="not a finished embedding cache"):
        EmbeddingCache(tmp_path / "cache")

    (tmp_path / "cache" / ".shard-00001-of-00004.safetensors.tmp").write_bytes(b"half a shard")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    encoded = []
    write_cache(tmp_path / "cache", ROWS, lambda rows: encoded.extend(rows) or encode(rows), FINGERPRINT, ranks, shard_size=2, batch_size=2)
    assert encoded == ROWS[4:]
    assert before == {path: path.stat().st_mtime_ns for path in before}

    write_cache(tmp_path / "undisturbed", ROWS, encode, FINGERPRINT, ranks, shard_size=2, batch_size=2)
    shards = sorted(path.name for path in (tmp_path / "undisturbed").glob("shard-*"))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["index.json", *shards]
    for name in shards:
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    EmbeddingCache(tmp_path / "cache")


def test_two_processes_write_the_same_shards_and_stop_together(ranks, tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "writer.py"]
    subprocess.run([*command, tmp_path / "two"], env=environment, check=True, timeout=180)
    write_cache(tmp_path / "one", ROWS, encode, FINGERPRINT, ranks, shard_size=2, batch_size=2)
    for path in (tmp_path / "one").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    EmbeddingCache(tmp_path / "two")

    shutil.copy(
        tmp_path / "one" / "shard-00002-of-00004.safetensors", tmp_path / "two" / "shard-00001-of-00004.safetensors"
    )  # rank 1's share
    output = subprocess.run([*command, tmp_path / "two"], env=environment, capture_output=True, text=True, timeout=180)
    assert output.returncode != 0
    assert output.stderr.count("shard-00001-of-00004.safetensors holds other prompts") == 1, output.stderr


# Fingerprints


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """An encoder in two shards, a VAE in one file, a tokenizer that works."""
    encoder, vae = tmp_path / "model" / "text_encoder", tmp_path / "model" / "vae"
    for folder in (encoder, vae):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in shards:
        (encoder / name).write_text(name)
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}))
    (vae / "diffusion_pytorch_model.safetensors").write_text("vae")
    shutil.copytree(REPOSITORY / "shapes" / "models" / "sd" / "tokenizer", tmp_path / "model" / "tokenizer")
    return tmp_path / "model"


FOLDERS = ("text_encoder", "tokenizer", "vae")


def test_fingerprint_follows_names_and_contents_of_the_files_that_are_loaded(model_dir):
    first = encoder_fingerprint(model_dir, FOLDERS, dtype="float32")
    assert list(first) == [*FOLDERS, "dtype"]
    seen = {first["text_encoder"]}
    shard = model_dir / "text_encoder" / "model-00002-of-00002.safetensors"
    index = model_dir / "text_encoder" / "model.safetensors.index.json"

    def rename() -> None:
        shard.rename(shard.with_name("moved.safetensors"))
        index.write_text(index.read_text().replace(shard.name, "moved.safetensors"))

    for change in (
        lambda: shard.write_text("changed"),
        rename,
        lambda: (model_dir / "text_encoder" / "config.json").write_text('{"a": 1}'),
        lambda: (model_dir / "text_encoder" / "model.safetensors").write_text("all in one"),
    ):
        change()
        changed = encoder_fingerprint(model_dir, FOLDERS)
        assert changed["text_encoder"] not in seen
        assert (changed["tokenizer"], changed["vae"]) == (first["tokenizer"], first["vae"])
        seen.add(changed["text_encoder"])
    (model_dir / "vae" / "diffusion_pytorch_model.safetensors").write_text("changed")
    (model_dir / "tokenizer" / "tokenizer_config.json").write_text("{}")
    changed = encoder_fingerprint(model_dir, FOLDERS)
    assert changed["vae"] != first["vae"] and changed["tokenizer"] != first["tokenizer"]


def test_fingerprint_is_of_nothing_that_is_not_loaded(model_dir):
    """What lies in published folders beside the safetensors, and is often left out of a download."""
    first = encoder_fingerprint(model_dir, FOLDERS)
    for name in (
        *("text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.bin.index.json", "text_encoder/model.fp16.safetensors"),
        *("text_encoder/flax_model.msgpack", "text_encoder/README.md", "text_encoder/.cache/download/a.lock", "text_encoder/.hidden"),
        *(
            "vae/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
        ),
        *("text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/model.safetensors.index.fp16.json"),
    ):
        (model_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (model_dir / name).write_text(name)
    assert encoder_fingerprint(model_dir, FOLDERS) == first


def test_fingerprint_is_of_the_vocabulary_where_there_is_no_tokenizer_json(model_dir):
    (model_dir / "tokenizer" / "tokenizer.json").rename(model_dir / "tokenizer" / "vocab.json")
    first = encoder_fingerprint(model_dir, FOLDERS)
    (model_dir / "tokenizer" / "merges.txt").write_text("a b")
    assert encoder_fingerprint(model_dir, FOLDERS)["tokenizer"] != first["tokenizer"]


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}, "weight_map": null}'])
def test_fingerprint_of_a_broken_index(model_dir, index):
    (model_dir / "text_encoder" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors\.index\.json is damaged"):
        encoder_fingerprint(model_dir, FOLDERS)


@pytest.fixture
def counted(model_dir, monkeypatch, tmp_path) -> list[str]:
    """The names of the files that are read to be hashed. The VAE's are large enough to be remembered."""
    (model_dir / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * fingerprint.REMEMBERED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    names, digest = [], hashlib.file_digest

    def counting(file, kind):
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", counting)
    return names


VAE_FILE = "diffusion_pytorch_model.safetensors"


def test_large_files_are_hashed_once(counted, model_dir, tmp_path):
    first = encoder_fingerprint(model_dir, ("vae",))
    assert sorted(counted) == ["config.json", VAE_FILE]
    assert encoder_fingerprint(model_dir, ("vae",)) == first
    assert sorted(counted) == ["config.json", "config.json", VAE_FILE]  # small files are read each time

    linked = tmp_path / "snapshot"  # as in the hub's cache
    linked.mkdir()
    (linked / "vae").symlink_to(model_dir / "vae")
    assert encoder_fingerprint(linked, ("vae",)) == first and counted.count(VAE_FILE) == 1

    path = model_dir / "vae" / VAE_FILE
    modified = path.stat().st_mtime_ns
    path.write_bytes(b"y" * fingerprint.REMEMBERED)
    os.utime(path, ns=(modified, modified))  # of the same size and time as before
    assert encoder_fingerprint(model_dir, ("vae",)) != first and counted.count(VAE_FILE) == 2


def test_remembered_checksums_are_whole_or_absent(counted, model_dir, tmp_path):
    first = encoder_fingerprint(model_dir, ("vae",))
    (note,) = (tmp_path / "home" / "fastvideo" / "sha256").iterdir()
    right = note.read_bytes()
    assert right.decode() == hashlib.sha256(b"x" * fingerprint.REMEMBERED).hexdigest()
    for broken in (b"", right[:40], right + right, b"\xff" * 64, b"g" * 64):
        note.write_bytes(broken)
        assert encoder_fingerprint(model_dir, ("vae",)) == first
        assert note.read_bytes() == right
    assert counted.count(VAE_FILE) == 6


def test_many_may_remember_the_same_file_at_once(counted, model_dir, tmp_path):
    path, folder = model_dir / "vae" / VAE_FILE, tmp_path / "home" / "fastvideo" / "sha256"
    right = hashlib.sha256(b"x" * fingerprint.REMEMBERED).hexdigest()
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: fingerprint._sha256(path), range(64))) == {right}
    assert [note.read_text() for note in folder.iterdir()] == [right]  # and nothing half-written beside it


@pytest.mark.parametrize("home", ["a file", "of nobody"])
def test_where_nothing_can_be_remembered_files_are_hashed_each_time(counted, model_dir, tmp_path, monkeypatch, home):
    if home == "a file":  # as good as one that may not be written, to root as well
        (tmp_path / "home").write_text("")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.chdir(tmp_path)
    assert encoder_fingerprint(model_dir, ("vae",)) == encoder_fingerprint(model_dir, ("vae",))
    assert counted.count(VAE_FILE) == 2 and not (tmp_path / "relative").exists()


def test_fingerprint_of_missing_folder(model_dir):
    with pytest.raises(UserError, match="text_encoder_2 is missing or empty"):
        encoder_fingerprint(model_dir, ("text_encoder", "text_encoder_2"))


def test_check_encoder(model_dir, ranks, tmp_path, capsys):
    made_by = encoder_fingerprint(model_dir, ("text_encoder", "tokenizer"), token_ids=own_digest(model_dir, ["tokenizer"]), dtype="float32")
    write_cache(tmp_path / "cache", ROWS, encode, made_by, ranks, shard_size=3, batch_size=2)
    cache = EmbeddingCache(tmp_path / "cache", ranks=ranks)
    check_encoder(cache, model_dir)
    (model_dir / "text_encoder" / "pytorch_model.bin").write_text("of no concern")
    check_encoder(cache, model_dir)
    (model_dir / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cache was made with tokenizer 'sha256:\w+', but .*model has 'sha256:\w+'"):
        check_encoder(cache, model_dir)
    shutil.rmtree(model_dir / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing or empty"):
        check_encoder(cache, model_dir)
    shutil.rmtree(model_dir / "text_encoder")
    capsys.readouterr()
    check_encoder(cache, model_dir)
    assert "holds no text encoders" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere does not exist"):
        check_encoder(cache, tmp_path / "nowhere")


# Prompt files


def test_text_file(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\r\n a dog \na\u2028b\na cat\n   \n日本\nlast".encode())
    rows, report = read_prompts(tmp_path / "p.txt")
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "a\u2028b", "日本", "last"]
    assert report == {"lines": [1, 3, 4, 7, 8], "empty": [2, 6], "duplicates": [5]}


def test_jsonl_file(tmp_path):
    lines = ['{"prompt": "a", "n": 1}', "", '{"prompt": " a ", "n": 2}', '{"prompt": "b", "n": 3}', '{"prompt": "", "n": 4}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows, report = read_prompts(tmp_path / "p.jsonl")
    assert rows == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 3}]
    assert report == {"lines": [1, 4], "empty": [2, 5], "duplicates": [3]}


def test_rows_with_images_are_pairs_with_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "data" / "images").mkdir(parents=True)
    first, second = (tmp_path / "data" / "images" / name for name in ("1.png", "2.png"))
    first.touch()
    second.touch()
    rows = [("a", "images/1.png"), ("a", "images/2.png"), (" a ", "images/../images/1.png"), ("b", "images/1.png"), ("a", str(second))]
    lines = [json.dumps({"prompt": prompt, "image": image}) for prompt, image in rows]
    (tmp_path / "data" / "p.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    rows, report = read_prompts("data/p.jsonl", identity=("prompt", "image"))
    assert [(row["prompt"], row["image"]) for row in rows] == [("a", str(first)), ("a", str(second)), ("b", str(first))]
    assert report == {"lines": [1, 2, 4], "empty": [], "duplicates": [3, 5]}
    assert [row["prompt"] for row in read_prompts("data/p.jsonl")[0]] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\n \n", "holds no prompts, only 2 empty lines"),
        ("p.txt", b"caf\xe9\n", "is not UTF-8: byte 3 is 0xe9"),
        ("p.csv", b"a", "must end in .txt or .jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 of .* is not valid JSON"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}\n', "line 1 of .* is not valid JSON"),
        ("p.jsonl", b'{"prompt": 3}\n', 'line 1 of .* must be an object with a string as "prompt", not {"prompt": 3}'),
        ("p.jsonl", b'{"text": "a"}\n', 'line 1 of .* must be an object with a string as "prompt"'),
        ("p.jsonl", b'\n["a"]\n', 'line 2 of .* must be an object with a string as "prompt"'),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "image": 3}\n', 'line 2 of .*p.jsonl must have a string as "image", not 3'),
        (
            "p.jsonl",
            b'{"prompt": "a", "image": "no.png"}\n',
            r"line 1 of .*p.jsonl names the image 'no.png', but there is no file /.*/no.png",
        ),
        ("p.jsonl", b'{"prompt": "a", "image": ""}\n', "line 1 of .*p.jsonl names the image '', but there is no file"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_prompt_file_and_missing_identity(tmp_path):
    with pytest.raises(UserError, match=r"cannot read prompt file .*nowhere.txt: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match='string as "image"'):
        read_prompts(tmp_path / "p.jsonl", identity=("prompt", "image"))


def test_shard_header_holds_one_entry(cache_dir):
    with safe_open(cache_dir / "shard-00000-of-00003.safetensors", framework="pt") as shard:
        assert list(shard.metadata()) == ["cache"]
