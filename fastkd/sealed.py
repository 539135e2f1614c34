"""Reading what may be of anybody, and sealed folders, whose `MANIFEST.json` lists their files with sizes and hashes.

Nothing is read but regular files, and a system's passing errors are tried again. What a manifest does not list is never deleted.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .store import json_bytes, temporary_path, write_bytes_synced

T = TypeVar("T")
logger = logging.getLogger("fastkd")

MANIFEST_FILE = "MANIFEST.json"
_PASSING = {errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR, errno.EIO}  # a network's file systems give these for a moment
_TRIES = 5
_FIRST_WAIT_SECONDS = 0.05
_SETTLED_NANOSECONDS = 2 * 10**9  # above the resolution of every file system's times


class Damaged(ValueError):
    """A sealed file or folder is not what was written; the message names the file and what is wrong with it."""


# Reading.


def retried(read: Callable[[], T]) -> T:
    """What `read` returns; errors that a network's file system gives for a moment are tried again, a few times."""
    for number in range(_TRIES - 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(_FIRST_WAIT_SECONDS * 2**number)
    return read()


def open_regular(path: str | Path) -> Any:
    """A regular file, perhaps through a link, open for reading; `OSError` for anything else, such as a pipe without a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file."""

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read()

    return retried(read)


def read_json(path: str | Path, *required: str) -> dict[str, Any]:
    """The object in a JSON file; `Damaged`, naming the file, where it holds none or lacks a key that is required."""
    content = read_bytes(path)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} {'is empty' if not content.strip() else f'is not JSON ({error})'}.") from error
    if not isinstance(data, dict):
        raise Damaged(f"{path} holds no JSON object.")
    if missing := [key for key in required if key not in data]:
        raise Damaged(f"{path} lacks {', '.join(missing)}.")
    return data


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""

    def digest() -> str:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retried(digest)


def content_sha256(path: str | Path) -> str:
    """`file_sha256`, remembered for as long as the file's inode, size and times of change stay what they are.

    Not of a file that was changed just now: another change might leave it the same times.
    """
    found = os.stat(path)
    if time.time_ns() - found.st_ctime_ns < _SETTLED_NANOSECONDS:
        return file_sha256(path)
    return _remembered_sha256(os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _remembered_sha256(path: str, *identity: int) -> str:
    return file_sha256(path)


# Sealed folders.


def described(file: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and hash."""
    return {"size": file.stat().st_size, "sha256": file_sha256(file)}


def seal(folder: Path, about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the manifest of a folder that nobody reads yet: `about`, and every file with its size and hash.

    files: those that are described already, by their names in the folder.
    """
    known = dict(files or {})
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in known:
            known[name] = described(file)
    write_bytes_synced(folder / MANIFEST_FILE, _sealed({**about, "files": known}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder, its own hash verified; no file that it lists is looked at.

    Raises `Damaged` where it is not what was written, and `OSError` where it cannot be read.
    """
    file = folder / MANIFEST_FILE
    content = read_bytes(file)
    try:
        manifest = json.loads(content)
        intact = content == _sealed({key: value for key, value in manifest.items() if key != "sha256"})
        names = list(manifest["files"].items())
        intact = intact and all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for _, entry in names)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):  # not JSON, or JSON of another shape
        intact = False
    if not intact:
        raise Damaged(f"{file} is damaged: its content does not match its own sha256.")
    for name, _ in names:
        if not _is_inside(name):
            raise Damaged(f"{file} lists {name!r}, which does not lie in its folder.")
    return manifest


def verify(folder: Path, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The manifest of a sealed folder, every file of which but `leave_out` has the size and hash that it says.

    Errors as of `read_manifest`.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if name in leave_out:
            continue
        file = folder / name
        try:
            found = described(file)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise Damaged(f"{file} is missing, and {MANIFEST_FILE} lists it.") from error
        if found["size"] != expected["size"]:
            raise Damaged(f"{file} has {found['size']} bytes, and {expected['size']} were written.")
        if found["sha256"] != expected["sha256"]:
            raise Damaged(f"{file} is damaged: its sha256 is not the one in {MANIFEST_FILE}.")
    return manifest


def remove_sealed(folder: Path) -> None:
    """Delete the files that the manifest of `folder` lists, and the folder if nothing else is in it.

    Killed half-way, it leaves a temporary folder or one without a manifest, never a part that looks whole. A link to a folder stays, as
    does a file that the manifest does not list, or lists with another size; a warning names them. Errors as of `read_manifest`.
    """
    if folder.is_symlink():
        logger.warning("%s is a link, which fastkd did not make: it stays.", folder)
        return
    ours, foreign = _split(folder)
    if not foreign:
        doomed = temporary_path(folder)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
        return
    (folder / MANIFEST_FILE).unlink()
    for file in ours:
        file.unlink(missing_ok=True)
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        with suppress(OSError):  # not empty
            if inner.relative_to(folder).as_posix() not in foreign:
                inner.rmdir()
    logger.warning("%s stays: fastkd did not write %s in it.", folder, ", ".join(foreign[:5]))


def foreign_files(folder: Path) -> list[str]:
    """What `remove_sealed` would leave in a sealed folder, by name; the folder's own where it is a link."""
    return [folder.name] if folder.is_symlink() else _split(folder)[1]


def _split(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a sealed folder that its manifest lists, and the names of everything else in it."""
    listed = {MANIFEST_FILE: None, **{name: entry["size"] for name, entry in read_manifest(folder)["files"].items()}}
    ours, foreign = [], []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() and not file.is_symlink():
            if not any(other.startswith(f"{name}/") for other in listed):
                foreign.append(name)
        elif name in listed and not file.is_symlink() and listed[name] in (None, file.stat().st_size):
            ours.append(file)
        else:
            foreign.append(name)
    return ours, foreign


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's exact bytes, its own hash included, so that a changed byte shows anywhere in it."""
    return json_bytes({**manifest, "sha256": hashlib.sha256(json_bytes(manifest)).hexdigest()})
