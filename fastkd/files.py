"""Floor 0, below every room: files and folders that are whole or absent, whenever their writer is killed.

It knows bytes and paths alone. Whatever is written here is prepared under a temporary name, `<name>.tmp-<process id>`, flushed
to the disk, and renamed: a reader finds what was there before or all of the new, and a power cut cannot undo it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill at any instant, finds the old content or the new, never a part."""
    path = Path(path)
    temporary = temporary_path(path)
    try:
        write_bytes_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json_atomic(path: str | Path, data: Any) -> None:
    """`write_bytes_atomic` of `json_bytes(data)`."""
    write_bytes_atomic(path, json_bytes(data))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends; it is deleted if the block raises.

    Every file in it is flushed to the disk before that. `path` must not exist then, and nobody else may be writing it.
    """
    temporary = start_folder(path)
    try:
        yield temporary
        commit_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def start_folder(path: Path) -> Path:
    """An empty folder under the temporary name of `path`."""
    temporary = temporary_path(path)
    if temporary.exists():  # left by a killed process that had our process id
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


def commit_folder(temporary: Path, path: Path) -> None:
    """Flush everything in `temporary` and give it its name."""
    for written in (*temporary.rglob("*"), temporary):
        sync(written)
    os.rename(temporary, path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; killed half-way, it leaves a temporary one and never a part of `path`."""
    doomed = temporary_path(path)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def temporary_path(path: Path) -> Path:
    """The name under which this process prepares, or disposes of, `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def write_bytes_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which nobody reads yet, and flush it to the disk."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(data: Any) -> bytes:
    """`data` as indented JSON. Python's `json` reads every float back bit for bit."""
    return (json.dumps(data, indent=2) + "\n").encode()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
