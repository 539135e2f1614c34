"""Files and folders that are whole or absent, name who is making them, and are removed by nobody else.

Everything durable is prepared beside its place under a temporary name, flushed to the disk and renamed: a reader finds what was there
before or all of the new, and a power cut cannot undo it. The temporary name says which process of which host is writing, so that what a
killed one left can be told from what a running one is at.

Three rules keep what is not fastkd's: a name that exists is never taken by a new folder; nothing is written over or through a link;
what no temporary name and no manifest claims is never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger("fastkd")

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-(?P<pid>\d+)-(?P<start>\d+)-(?P<boot>\w{8})-[0-9a-f]{8}@(?P<host>.+)", re.DOTALL)
_HOLDER = re.compile(rb"process \d+ on [^\n]*\n")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class InUse(ValueError):
    """Another process holds a lock; the message names it."""


# Writing.


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill at any instant, finds the old content or the new, never a part."""
    path = Path(path)
    _refuse_link(path)
    temporary = temporary_path(path)
    write_bytes_synced(temporary, data)
    commit_file(temporary, path)


def commit_file(temporary: Path, path: Path) -> None:
    """Let a file that is flushed, under a temporary name of `path`, take that name and the place of what has it."""
    try:
        _refuse_link(path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise FileExistsError(errno.EEXIST, "it is a link, which fastkd neither replaces nor writes through; move it away", str(path))


def write_json_atomic(path: str | Path, data: Any) -> None:
    """`write_bytes_atomic` of `json_bytes(data)`."""
    write_bytes_atomic(path, json_bytes(data))


def write_bytes_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which must not exist, and flush it to the disk; what fails leaves nothing."""
    file = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_own(path: str | Path, flags: int) -> Any:
    """Open the regular file `path` in binary, with the access that `flags` name; `OSError` for a link and for what is no file."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    mode = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}[flags & os.O_ACCMODE]
    return os.fdopen(descriptor, mode)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends; it is deleted if the block raises.

    Every file in it is flushed to the disk before that. Raises `FileExistsError` where `path` exists, be it empty.
    """
    temporary = start_folder(path)
    try:
        yield temporary
        commit_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def start_folder(path: Path) -> Path:
    """An empty folder under a temporary name of `path`, which must not exist."""
    _refuse_existing(path)
    temporary = temporary_path(path)
    temporary.mkdir()
    return temporary


def commit_folder(temporary: Path, path: Path) -> None:
    """Flush everything in `temporary` and give it its name."""
    for written in (*temporary.rglob("*"), temporary):
        sync(written)
    _refuse_existing(path)  # an empty folder would be replaced without a word
    os.rename(temporary, path)
    sync(path.parent)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "it exists, and fastkd did not make it or cannot replace it; move it away", str(path))


@contextmanager
def disk_space(folder: Path, advice: str) -> Iterator[None]:
    """Name the folder, and what would help, in the error of a full disk that is raised in the block: the system's names nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)}: {advice}", str(folder)) from error


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


# Temporary names, and what killed processes leave under them.


@dataclass(frozen=True)
class Maker:
    """A process: its host, its number there, when it started (clock ticks since boot), and a digest of the boot."""

    host: str
    pid: int
    start: int
    boot: str

    def is_gone(self) -> bool:
        """Whether this was a process of this host and runs no more. What other hosts run cannot be seen."""
        if self.host != socket.gethostname():
            return False
        return self.boot != _boot() or _started(self.pid) != self.start


def temporary_path(path: Path) -> Path:
    """A name beside `path`, like no other, that says that this process is preparing or disposing of it."""
    maker = f"{os.getpid()}-{_started(os.getpid())}-{_boot()}-{secrets.token_hex(4)}@{socket.gethostname()}"
    return path.with_name(f".{path.name}.tmp-{maker}")


def with_final_names(text: str) -> str:
    """Replace the temporary names in a message by those that they were to become."""
    return re.sub(r"\.([^/\s]+)\.tmp-\d+-\d+-\w{8}-[0-9a-f]{8}@[^/\s:'\"]+", r"\1", text)


def sweep(folder: Path, is_known: Callable[[str], bool]) -> None:
    """Remove what killed processes of this host left in `folder` under temporary names of names that `is_known`.

    The caller holds the lock under which these names are written. Sub-folders are not looked into; links, other users' files and what
    running processes or other hosts are writing stay.
    """
    for entry in _entries(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None or not is_known(match["name"]) or entry.is_symlink():
            continue
        maker = Maker(match["host"], int(match["pid"]), int(match["start"]), match["boot"])
        if not maker.is_gone() or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
            logger.info("%s, which process %d on %s was or is writing, stays.", entry.path, maker.pid, maker.host)
            continue
        logger.warning("removing %s, left half-written by process %d, which has ended", match["name"], maker.pid)
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it runs no more. 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


@functools.cache
def _boot() -> str:
    """Eight hexadecimal digits of the boot; zeros where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0" * 8


# Locks.


class Lock:
    """An exclusive lock that the kernel drops with the process, so that no stale one can exist. Its file stays."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(path: Path, *, poll: Callable[[], None] | None = None) -> Lock:
    """Take the lock whose file is `path`.

    poll: called again and again while another process holds it, until it is free; what it raises ends the wait. None: do not wait.

    Raises `InUse`, naming the holder, where it is held; `OSError` where the file cannot be a lock: a link, a file of something else.
    """
    file = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        while not _locked(file):
            if poll is None:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise InUse(f"{path.parent} is in use by {holder}: wait for it, end it, or choose another folder.")
            poll()
            time.sleep(0.1)
        content = file.read(200)
        if content and not _HOLDER.fullmatch(content):
            raise FileExistsError(errno.EEXIST, "it is a file of something else, where a lock has to be; move it away", str(path))
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
    except BaseException:
        file.close()
        raise
    return Lock(file)


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
