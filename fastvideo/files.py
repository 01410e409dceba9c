"""Files and folders that appear whole or not at all: written under a temporary name, flushed to disk, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Inside, write to the yielded temporary path; on a clean exit it becomes `path`, replacing what stood there."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Like `whole_file` for a folder: yields a new empty temporary folder beside `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    rename_folder(temporary, path)


def rename_folder(temporary: Path, path: Path) -> None:
    """Flush a finished temporary folder to disk and give it its name; an older folder of that name is removed."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in [*temporary.rglob("*"), temporary]:
        if entry.is_file():
            entry.chmod(0o666 & ~umask)  # safetensors' save_file lets only the owner read
        sync(entry)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
