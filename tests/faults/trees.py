"""Random trees of what is not fastkd's: files, folders, links, pipes and other runs, many of them called as fastkd calls its own."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import socket
import stat
import subprocess
from pathlib import Path

PLAIN = ("notes.txt", "photos", "a b", "-rf", "größe.csv", "IMG.tmp-1", "x.tmp-123", "l.tmp-1", ".student.tmp-1", "student.tmp-7-8")
"""Names that nothing of fastkd's has."""
OURS = (
    *("run.json", ".fastkd.lock", ".lock", "distill", "vocab_map", "vocab_map.json", "cache", "tokens", "counts", "MANIFEST.json"),
    *("checkpoint-1", "checkpoint-7", "checkpoint-7.damaged", "student", "teacher", "filters", "log.jsonl", "result.json", "loss.png"),
    *("tensorboard", "profile", "trace.json", "token_counts.json", "token_counts.lock", "token_counts-notes.safetensors"),
    *("token_counts-0123456789abcdef.safetensors", "header.json", "shard-00000-0123456789abcdef.safetensors", "ids.npy"),
    *("offsets.npy", "progress.json", "results.json", "scores.png", "divergence.png", "config.json", "model.safetensors"),
)
"""Names that fastkd gives to something, somewhere."""
KINDS = ("file", "file", "file", "empty", "read-only", "folder", "folder", "link", "link", "dangling", "hard link", "pipe")
Look = tuple[str, ...]


class Foreign:
    """What was planted, and how it looked then."""

    def __init__(self, outside: Path, chance: random.Random) -> None:
        """outside: a folder that links lead into."""
        self.outside, self.chance = outside, chance
        self.looks: dict[Path, Look] = {}
        outside.mkdir()
        for number in range(4):
            self._make(outside / f"file-{number}", "file")
        self._make(outside / "folder", "folder")

    def plant(self, place: Path, names: tuple[str, ...], copies: tuple[Path, ...] = ()) -> None:
        """Put something under one of `names` into a folder, unless something is there: sometimes one of `copies`, which are folders."""
        path = place / self.chance.choice(names)
        if os.path.lexists(path):
            return
        if copies and self.chance.random() < 0.15:
            shutil.copytree(self.chance.choice(copies), path, symlinks=True)
            self.adopt(path)
        else:
            self._make(path, self.chance.choice(KINDS))

    def adopt(self, folder: Path) -> None:
        """Remember a folder and all in it."""
        for path in (folder, *folder.rglob("*")):
            self.looks[path] = look(path)

    def folders(self) -> list[Path]:
        return [path for path, found in self.looks.items() if found[0].startswith("d")]

    def changes(self) -> list[str]:
        """What does not look as it did, and how."""
        found = {path: look(path) for path in self.looks}
        return [f"{path}: {self.looks[path]} is now {now}" for path, now in found.items() if now != self.looks[path]]

    def _make(self, path: Path, kind: str) -> None:
        chance = self.chance
        if kind == "empty" and path.name.endswith(".lock"):
            kind = "file"  # an empty lock is one whose process was killed as it made it
        if kind == "folder":
            path.mkdir()
            for _ in range(chance.randint(0, 3)):
                names = (*PLAIN, *OURS, of_dead_process(chance.choice(OURS)))
                self.plant(path, names)
        elif kind == "link":
            path.symlink_to(chance.choice([*self.looks, self.outside]))
        elif kind == "dangling":
            path.symlink_to(chance.choice(["nowhere", "/nowhere/at/all", str(self.outside / "not-there")]))
        elif kind == "hard link":
            os.link(chance.choice([p for p, found in self.looks.items() if found[0].startswith("-")]), path)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(b"" if kind == "empty" else chance.randbytes(chance.randint(1, 200)))
            path.chmod(0o400 if kind == "read-only" else chance.choice([0o600, 0o644]))
        self.looks[path] = look(path)


def look(path: Path) -> Look:
    """Kind and mode; content and time of a file, target of a link."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ("gone",)
    mode = stat.filemode(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return mode, os.readlink(path)
    if stat.S_ISREG(found.st_mode):
        return mode, hashlib.sha256(path.read_bytes()).hexdigest(), str(found.st_mtime_ns)
    return (mode,)


def of_dead_process(name: str) -> str:
    """The name under which a process of this host that has ended prepared `name`."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    digits = boot.read_text()[:8] if boot.exists() else "0" * 8
    return f".{name}.tmp-{_dead_pid()}-1-{digits}-0123abcd@{socket.gethostname()}"


@functools.cache
def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
