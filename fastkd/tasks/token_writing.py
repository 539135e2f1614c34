"""An unfinished token cache on disk, which the next process goes on with after any interruption."""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from fastkd.sealed import Damaged, described, read_json, seal
from fastkd.store import new_folder, open_own, sweep, write_json_atomic
from fastkd.tasks.corpus import Bookmark

logger = logging.getLogger("fastkd")

IDS = "ids.npy"
OFFSETS = "offsets.npy"
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a corpus is tokenised; `ids` and `offsets` are the elements of the two files that count."""

    texts: int = 0
    truncated: int = 0
    dropped: int = 0
    ids: int = 0
    offsets: int = 0
    bookmark: Bookmark = field(default_factory=Bookmark)


class UnfinishedCache:
    """The files of a token cache while it is written, and what of them is known to be on the disk.

    What a killed process wrote beyond its last `save` is cut off, so that the bytes in the end are those of a process that was
    never interrupted. Nobody else may write the folder, and what fastkd did not put there stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is a link, which fastkd does not write through; move it away", str(folder))
        folder.mkdir(exist_ok=True)
        sweep(folder, _PROGRESS.__eq__)
        self.progress = self._saved()
        self.ids = ArrayWriter(folder / IDS, np.int32, self.progress.ids)
        self.offsets = ArrayWriter(folder / OFFSETS, np.int64, self.progress.offsets)
        if self.offsets.size == 0:
            self.offsets.append(np.zeros(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.ids.close()
        finally:
            self.offsets.close()

    def save(self) -> None:
        """Flush both files to the disk, then say how far they go."""
        self.ids.sync()
        self.offsets.sync()
        self.progress.ids, self.progress.offsets = self.ids.size, self.offsets.size
        write_json_atomic(self.folder / _PROGRESS, asdict(self.progress))

    def finish(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Make the whole cache, whose files are closed, appear under its name, sealed."""
        files = {name: described(self.folder / name) for name in (IDS, OFFSETS)}
        with new_folder(folder) as sealed:
            seal(sealed, about, files)
            for name in files:
                os.rename(self.folder / name, sealed / name)
        self.discard()

    def discard(self) -> None:
        """Delete what was written, and the folder if nothing else is in it."""
        for name in (IDS, OFFSETS, _PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def _saved(self) -> Progress:
        """What the folder holds; nothing if its files are shorter than they were when that was written."""
        path = self.folder / _PROGRESS
        if not path.exists():
            return Progress()
        try:
            saved = read_json(path)
            progress = Progress(**{**saved, "bookmark": Bookmark(**saved["bookmark"])})
        except (Damaged, KeyError, TypeError) as error:
            logger.warning("%s does not say how far it is (%s); it is written anew.", path, error)
            return Progress()
        held: list[tuple[str, type[np.integer], int]] = [(IDS, np.int32, progress.ids), (OFFSETS, np.int64, progress.offsets)]
        if all(_size_on_disk(self.folder / name) >= len(_header(dtype, size)) + size * dtype().nbytes for name, dtype, size in held):
            logger.info("Tokenising goes on behind text %d.", progress.texts)
            return progress
        logger.warning("%s lacks a part of what was tokenised; it is written anew.", self.folder)
        return Progress()


class ArrayWriter:
    """Appends to a one-dimensional .npy file, keeping its first `size` elements and no more.

    The header, which has the length, is written again at every `sync`: numpy pads it to one size for every length.
    """

    def __init__(self, path: Path, dtype: type[np.integer], size: int = 0) -> None:
        self.size = size
        self._dtype = dtype
        self._file: IO[bytes] = open_own(path, os.O_RDWR | os.O_CREAT)
        self._file.truncate(len(_header(dtype, size)) + size * dtype().nbytes)
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype).tobytes())
        self.size += len(values)

    def sync(self) -> None:
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self._dtype, self.size))
        self._file.seek(0, os.SEEK_END)


def _header(dtype: type[np.integer], size: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (size,)})
    return header.getvalue()


def _size_on_disk(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
