"""Prompt-embedding caches: the text encoders run once, before training, which then reads a few rows at a time.

A cache is a folder. `shard-00002-of-00010.safetensors` stacks `shard_size` rows, each tensor key as (n, ...), and holds the rows, their
checksums and the encoders' fingerprint in its own header, so a killed run can be resumed. `index.json`, written last, makes it complete.
For models that are guided by their own prediction without a prompt, the last row is the empty prompt, {"prompt": ""}.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from fastvideo.errors import UserError
from fastvideo.files import whole_file
from fastvideo.parallel.distributed import Ranks, all_gather_object, on_main, together

Encode = Callable[[list[dict]], dict[str, torch.Tensor]]

INDEX_FORMAT = 1
INDEX_TYPES = {"fingerprint": dict, "tensors": dict, "shard_size": int, "shards": list, "rows": list, "crc32": list}
REMAKE = "run the preprocessing again with the same --output_dir (intact shards are kept)"


def write_cache(
    output_dir: str | Path, rows: list[dict], encode: Encode, fingerprint: dict, ranks: Ranks, shard_size: int, batch_size: int
) -> None:
    """Collective. Encode `rows` (JSON objects with a "prompt") into a cache in `output_dir`, sharing the shards among the processes.

    `encode` takes up to `batch_size` rows and returns finite tensors (n, ...) of any dtype and device, of the same keys and per-row shapes
    each time. A batch never crosses a shard, so the bytes do not depend on the number of processes. Shards that an earlier run of the same
    rows and fingerprint finished are verified and kept. Raises UserError for shards of another run, and for what cannot be written.
    """
    output_dir = Path(output_dir)
    parts = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
    paths = [output_dir / _shard_name(k, len(parts)) for k in range(len(parts))]

    def prepare() -> None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            for leftover in output_dir.glob(".*.tmp"):  # a killed run was writing it
                leftover.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {output_dir}: {error.strerror}") from error
        for path in set(output_dir.glob("shard-*.safetensors")) - set(paths):
            raise UserError(f"{path} is left from other prompts or another --shard_size: choose another --output_dir or empty this one")

    def find_unfinished() -> list[int]:
        shards = range(ranks.rank, len(paths), ranks.world_size)
        progress = tqdm(shards, "checking finished shards", delay=2, leave=False, disable=not ranks.is_main)
        return [k for k in progress if not _is_finished(paths[k], parts[k], fingerprint)]

    def write_index() -> None:
        headers = [_read_header(path) for path in paths]
        tensors = headers[0][0]
        for path, header in zip(paths, headers):
            if header[0] != tensors:
                raise UserError(f"{path} does not hold the tensors of {paths[0]}: delete it, and {REMAKE}")
        shards = [{"name": path.name, "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns} for path in paths]
        crc32 = [checksum for _, header in headers for checksum in header["crc32"]]
        index = {"format": INDEX_FORMAT, "fingerprint": fingerprint, "tensors": tensors, "shard_size": shard_size, "shards": shards}
        _write_whole(output_dir / "index.json", json.dumps(index | {"rows": rows, "crc32": crc32}).encode())

    on_main(prepare)
    unfinished = sorted(k for shards in all_gather_object(together(find_unfinished)) for k in shards)
    finished_rows = len(rows) - sum(len(parts[k]) for k in unfinished)
    with tqdm(total=len(rows), initial=finished_rows, unit="prompt", disable=not ranks.is_main) as progress:
        # All processes meet after every shard: a failure stops everyone at once, and nobody waits long enough for a timeout.
        for start in range(0, len(unfinished), ranks.world_size):
            turn = unfinished[start : start + ranks.world_size]
            mine = turn[ranks.rank] if ranks.rank < len(turn) else None
            together(lambda k=mine: k is None or _write_shard(paths[k], parts[k], encode, fingerprint, batch_size))
            progress.update(sum(len(parts[k]) for k in turn))
    on_main(write_index)


class EmbeddingCache:
    """A finished cache, read lazily: only the rows' JSON stays in memory, and no file stays open.

    path: Path. rows: list of dict. fingerprint: as given to `write_cache`. tensors: {key: {"dtype": "BF16", "shape": [...] of a row}}.
    digest: str, of all that it holds.
    """

    def __init__(self, path: str | Path, expected_fingerprint: dict | None = None, ranks: Ranks | None = None):
        """Check index.json and every shard's size and header, but read none of its rows unless its modification time is not the recorded
        one: it was copied or altered, and is then verified in full. With `ranks` this is collective, and the processes share the work.

        Raises UserError for anything damaged or missing, and for an entry of `expected_fingerprint` that differs in the cache's.
        """
        self.path = Path(path)
        if ranks is None:
            self._open(expected_fingerprint or {}, 0, 1)
        else:
            together(lambda: self._open(expected_fingerprint or {}, ranks.rank, ranks.world_size))

    def _open(self, expected_fingerprint: dict, rank: int, world_size: int) -> None:
        index = _read_index(self.path)
        self.rows, self.fingerprint, self.tensors = index["rows"], index["fingerprint"], index["tensors"]
        self._shard_size, self._crc32 = index["shard_size"], index["crc32"]
        self.digest = hashlib.sha256(json.dumps([self.fingerprint, self.rows, self._crc32]).encode()).hexdigest()
        self._paths = [self.path / shard["name"] for shard in index["shards"]]
        refuse_difference(self.path, self.fingerprint, expected_fingerprint, "this run")
        for k in tqdm(range(rank, len(self._paths), world_size), f"checking {self.path}", delay=2, leave=False, disable=rank != 0):
            path, recorded, part = self._paths[k], index["shards"][k], slice(k * self._shard_size, (k + 1) * self._shard_size)
            header = {"fingerprint": self.fingerprint, "rows": self.rows[part], "crc32": self._crc32[part]}
            if _read_header(path) != (self.tensors, header) or path.stat().st_size != recorded["size"]:
                raise UserError(f"{path} is not the shard that index.json describes: {REMAKE}")
            if path.stat().st_mtime_ns != recorded["mtime_ns"]:
                for i in range(len(self))[part]:
                    self.get([i])

    def __len__(self) -> int:
        """Number of rows, the empty prompt's included."""
        return len(self.rows)

    @property
    def num_prompts(self) -> int:
        """Number of rows to sample from: the first ones, all but that of the empty prompt."""
        return len(self.rows) - (not self.rows[-1]["prompt"])

    @property
    def unconditional(self) -> int:
        """Index of the empty prompt's row, the last one. Raises UserError if the cache has none."""
        if self.rows[-1]["prompt"]:
            raise UserError(f"{self.path} was made without an embedding of the empty prompt, which guidance needs")
        return len(self.rows) - 1

    def get(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Read these rows: each key (len(indices), ...), on the CPU. Raises UserError if a row does not have its checksum."""
        samples = []
        for i in indices:
            path = self._paths[i // self._shard_size]
            samples.append(_read_row(path, i % self._shard_size))
            if _crc32(samples[-1]) != self._crc32[i]:
                raise UserError(f"{path} is damaged: the embedding of {self.rows[i]['prompt'][:60]!r} has a wrong checksum: {REMAKE}")
        return {key: torch.stack([sample[key] for sample in samples]) for key in self.tensors}


def _is_finished(path: Path, rows: list[dict], fingerprint: dict) -> bool:
    """Whether an earlier run wrote this shard and it is undamaged. UserError if that run had other rows or another fingerprint."""
    if not path.exists():
        return False
    try:
        _, header = _read_header(path)
    except UserError as error:
        print(f"warning: {error}; encoding its prompts again", file=sys.stderr)
        return False
    refuse_difference(path, header["fingerprint"], fingerprint, "this run")
    if header["rows"] != rows:
        raise UserError(f"{path} holds other prompts than this run: choose another --output_dir or empty this one")
    if [_crc32(_read_row(path, row)) for row in range(len(rows))] != header["crc32"]:
        print(f"warning: {path} has a wrong checksum; encoding its prompts again", file=sys.stderr)
        return False
    return True


def _write_shard(path: Path, rows: list[dict], encode: Encode, fingerprint: dict, batch_size: int) -> None:
    batches = [encode(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    tensors = {key: torch.cat([batch[key].cpu() for batch in batches]) for key in batches[0]}
    for key, tensor in tensors.items():
        assert len(tensor) == len(rows), f"encode() gave {len(tensor)} rows of {key} for {len(rows)} prompts"
        for row, finite in zip(rows, tensor.reshape(len(rows), -1).isfinite().all(dim=1)):
            if not finite:
                raise UserError(f"{key} of {row['prompt'][:60]!r} has infinite or undefined numbers in {tensor.dtype}: try another --dtype")
    crc32 = [_crc32({key: tensor[row] for key, tensor in tensors.items()}) for row in range(len(rows))]
    header = json.dumps({"fingerprint": fingerprint, "rows": rows, "crc32": crc32})
    # One entry of metadata only: safetensors writes several in random order, and equal shards should have equal bytes.
    _write_whole(path, save(tensors, {"cache": header}))


def _write_whole(path: Path, data: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(data)  # safetensors' save_file would let only the owner read the file


def _shard_name(k: int, num_shards: int) -> str:
    return f"shard-{k:05d}-of-{num_shards:05d}.safetensors"


@contextmanager
def _open_shard(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}): {REMAKE}") from error


def _read_header(path: Path) -> tuple[dict, dict]:
    """The dtype and per-row shape of each tensor key, and what `_write_shard` put beside them."""
    with _open_shard(path) as shard:
        slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 (it is no dict)
        try:
            header = json.loads(shard.metadata()["cache"])
            lengths = {len(header["rows"]), len(header["crc32"])} | {piece.get_shape()[0] for piece in slices.values()}
            if len(lengths) != 1 or not isinstance(header["fingerprint"], dict):
                raise ValueError("its parts do not agree")
        except (TypeError, KeyError, IndexError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a shard of an embedding cache ({type(error).__name__}: {error}): {REMAKE}") from error
        return {key: {"dtype": piece.get_dtype(), "shape": piece.get_shape()[1:]} for key, piece in slices.items()}, header


def _read_row(path: Path, row: int) -> dict[str, torch.Tensor]:
    with _open_shard(path) as shard:
        return {key: shard.get_slice(key)[row] for key in shard.keys()}  # noqa: SIM118 (it is no dict)


def _crc32(sample: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for key in sorted(sample):
        checksum = zlib.crc32(sample[key].contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def _read_index(folder: Path) -> dict:
    path = folder / "index.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished embedding cache: it has no index.json")
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != INDEX_FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {INDEX_FORMAT}")
        for key, kind in INDEX_TYPES.items():
            if not isinstance(index[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        num_shards = -(-len(index["rows"]) // index["shard_size"])
        # Only these names: a path in place of a name could lead out of the folder.
        if [shard["name"] for shard in index["shards"]] != [_shard_name(k, num_shards) for k in range(num_shards)]:
            raise ValueError("wrong shard names")
        if not all(isinstance(shard[key], int) for shard in index["shards"] for key in ("size", "mtime_ns")):
            raise TypeError("a size or time is no number")
        if not index["rows"] or index["shard_size"] < 1 or not all(isinstance(row["prompt"], str) for row in index["rows"]):
            raise ValueError("wrong rows")
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {REMAKE}") from error
    return index


def refuse_difference(path: Path, found: dict, wanted: dict, wanted_by: str) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            remedy = ": the text may have been read wrongly, so make it again in an empty --output_dir" if key == "token_ids" else ""
            raise UserError(f"{path} was made with {key} {found.get(key)!r}, but {wanted_by} has {value!r}{remedy}")
