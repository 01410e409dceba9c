"""Files and folders that appear whole or not at all: written under a temporary name, flushed to disk, then renamed."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastvideo.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where something inside cannot be written, for want of space or of rights, UserError says so in a sentence that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Inside, write to the yielded temporary path; on a clean exit it becomes `path`, replacing what stood there.

    Makes the folders above it. If anything fails nothing is left; UserError for what cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):  # whatever failed before is told
            temporary.unlink()
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Like `whole_file` for a folder: yields a new empty temporary folder beside `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            rename_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def rename_folder(temporary: Path, path: Path) -> None:
    """Flush a finished temporary folder to disk and give it its name; an older folder of that name is removed."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in [*temporary.rglob("*"), temporary]:
        if entry.is_file():
            entry.chmod(0o666 & ~umask)  # safetensors' save_file lets only the owner read
        sync(entry)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)  # also what a kill between the two left
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write flat float32 tensors as a safetensors file and flush it to disk: {"size": bytes, "crc32": checksum}, found on the way.

    One tensor at a time is on the CPU. safetensors' own function wants all of them there at once, and does not tell the checksum.
    """
    head, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.ndim == 1
        begin, end = end, end + tensor.nbytes
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    pieces = chain([len(text).to_bytes(8, "little"), text], (tensor.detach().cpu().numpy().data for tensor in tensors.values()))
    checksum = 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            checksum = zlib.crc32(piece, checksum)
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + end, "crc32": checksum}


def crc32(path: Path) -> int:
    """Checksum of a file's bytes, read piece by piece."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(2**24):
            checksum = zlib.crc32(piece, checksum)
    return checksum
