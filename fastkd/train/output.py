"""Floor 5, train: the output folder of a run: one process at a time holds it, and it belongs to one run (`run.json`)."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastkd import __version__
from fastkd.files import write_json_atomic
from fastkd.models.load import VOCAB_MAP_FOLDER
from fastkd.train.checkpoint import discard_checkpoints_after, list_checkpoints
from fastkd.train.log import LOG_FILE

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


@dataclass
class OutputFolder:
    """An output folder that this process holds the lock of, until `close` or the process's end, a kill included."""

    path: Path
    lock: IO[str]

    def close(self) -> None:
        self.lock.close()

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare_output_dir(output_dir: str | Path, run: Mapping[str, Any], *, overwrite: bool = False) -> OutputFolder:
    """Create and lock `output_dir`, tie it to `run` (`run.json`), and clear what killed processes left half-written.

    `run` is the part of the configuration that decides the result, as JSON-able data. A folder that belongs to another
    run is refused, unless `overwrite` (the YAML key `overwrite_output_dir`): then that run's stages, checkpoints and log
    are deleted. A folder of the same run is never emptied, so a restarted job resumes whatever `overwrite` says.

    Raises `ValueError` when the folder cannot be written, is in use, or belongs to another run.
    """
    path = Path(output_dir)
    lock = _lock(path)
    try:
        for leftover in list(path.rglob("*.tmp-*")):  # we hold the lock, so whoever was writing these is gone
            logger.warning("removing %s, left half-written by a process that ended", leftover.name)
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)  # one may lie in another
        _claim(path, run, overwrite)
    except BaseException:
        lock.close()
        raise
    return OutputFolder(path, lock)


def _lock(path: Path) -> IO[str]:
    """Take the exclusive lock of folder `path`. The kernel drops it with the process, so no stale lock can exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output_dir={str(path)!r} cannot be written ({error.strerror}): name a folder that this user may write to."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ValueError(
            f"output_dir={str(path)!r} is in use by {holder or 'another process'}: wait for it, end it, or choose another output_dir."
        ) from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _claim(path: Path, run: Mapping[str, Any], overwrite: bool) -> None:
    """Write `run.json`, or find that it already says the same, or refuse; see `prepare_output_dir`."""
    run = json.loads(json.dumps(run))  # as it will be read back: tuples become lists, keys strings
    fingerprint = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    conflict = None
    if (path / RUN_FILE).exists():
        recorded = json.loads((path / RUN_FILE).read_bytes())
        if recorded["fingerprint"] == fingerprint:
            return
        if _was_trained_in(path):
            conflict = "belongs to a run with other settings: " + "; ".join(_differences(recorded["run"], run))
        else:
            _delete_run(path)  # refused before its first step: the corrected settings may have the folder
    elif list_checkpoints(path):
        conflict = f"holds checkpoints and no {RUN_FILE}, so they are not known to be of this run"
    if conflict and not overwrite:
        raise ValueError(
            f"output_dir={str(path)!r} {conflict}. Choose another output_dir, or set overwrite_output_dir to delete "
            f"what that run left in it."
        )
    if conflict:
        _delete_run(path)
    write_json_atomic(path / RUN_FILE, {"fingerprint": fingerprint, "fastkd": __version__, "run": run})


def _was_trained_in(path: Path) -> bool:
    return bool(list_checkpoints(path)) or any(path.glob(LOG_FILE)) or any(path.glob(f"*/{LOG_FILE}"))


def _delete_run(path: Path) -> None:
    """Delete what a run left in `path`: checkpoints, log, vocabulary map, and the folders of its stages. Nothing else is touched."""
    discard_checkpoints_after(path, -1)
    (path / LOG_FILE).unlink(missing_ok=True)
    for child in path.iterdir():
        if child.is_dir() and (child.name == VOCAB_MAP_FOLDER or (child / LOG_FILE).is_file()):
            shutil.rmtree(child)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase per key, dotted where nested, whose value is not the same in both."""
    phrases = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            phrases += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            phrases.append(f"{prefix}{key} ({before!r} there, {after!r} here)")
    return phrases
