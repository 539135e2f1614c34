"""What the compiled backends share: how their libraries are kept, trusted and opened, and how a call's options travel to them."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..store import open_own, sync, write_bytes_synced
from .divergence import Divergence
from .row_call import LogitTransform

logger = logging.getLogger("fastkd")

_KINDS = {"forward_kl": 1, "reverse_kl": 2, "mixed": 3, "tvd": 4, "nla": 5, "jsd": 6, "skew_kl": 7, "skew_rkl": 8}
_UNUSABLE = (OSError, RuntimeError, ImportError)


class CompiledLibrary:
    """A shared library, compiled once and found again in later processes.

    Its file's name carries a hash of all that it was made from and the SHA-256 of its content. It is opened only if this user or root
    owns it and its folder, nobody else may write to either, and its content has that hash. So what others planted never runs, and a
    truncated file, which would end the process with SIGBUS, is never mapped.

    Args:
        title: in messages, a plural.
        module: compiles it ahead of time by `python -m`.
        stem: the first part of the file's name, which changes with all that it is made from.
        compile_: makes its content; RuntimeError if it cannot.
        load: opens a file.
    """

    def __init__(
        self, title: str, module: str, *, stem: Callable[[], str], compile_: Callable[[], bytes], load: Callable[[Path], Any]
    ) -> None:
        self.title, self.module, self.stem, self.compile, self.load = title, module, stem, compile_, load
        self.is_kept = False
        self._loaded: Any = None
        self._is_sought = False

    def get(self, *, build: bool) -> Any:
        """The opened library; None if none is kept that can be used and none is to be built. It is sought once a process.

        A library that is there and cannot be used, or a folder that cannot be read, is told by one warning. With `build` the library is
        compiled instead, and RuntimeError says why that cannot be done.
        """
        if not self._is_sought:
            self._is_sought = True
            try:
                self._loaded = self._kept()
                self.is_kept = self._loaded is not None
            except _UNUSABLE as error:
                if not build:
                    logger.warning(
                        "The compiled %s are not used, and torch's serve with the same numbers: %s Mend that, or set XDG_CACHE_HOME to "
                        "a folder of your own, and run `python -m %s`.",
                        *(self.title, _sentence(error), self.module),
                    )
        if self._loaded is None and build:
            self._loaded = self._built()
        return self._loaded

    def _kept(self) -> Any:
        """The first of the libraries kept that can be used; None if there is none. Raises what is wrong with the last."""
        folder, problem = cache_folder(), None
        try:
            with _pinned(folder) as pinned:
                names = sorted(name for name in os.listdir(pinned) if name.startswith(f"{self.stem()}-"))
        except FileNotFoundError:
            return None
        for name in names:
            try:
                return self._open(folder, name)
            except _UNUSABLE as error:
                problem = error
        if problem is not None:
            raise problem
        return None

    def _built(self) -> Any:
        content = self.compile()
        name = f"{self.stem()}-{hashlib.sha256(content).hexdigest()}.so"
        try:
            _keep(cache_folder(), name, content)
            loaded = self._open(cache_folder(), name)
            self.is_kept = True
            return loaded
        except _UNUSABLE as error:
            logger.warning("The %s serve this process alone, since they could not be kept: %s", self.title, _sentence(error))
        try:
            with TemporaryDirectory() as private:
                _keep(Path(private), name, content)
                return self._open(Path(private), name)
        except _UNUSABLE as error:
            raise RuntimeError(f"The {self.title} were compiled and cannot be used: {_sentence(error)} Use backend='torch'.") from error

    def _open(self, folder: Path, name: str) -> Any:
        with _pinned(folder) as pinned:
            try:
                with open_own(pinned / name, os.O_RDONLY) as file:
                    _refuse_others(pinned / name, os.fstat(file.fileno()))
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if name != f"{self.stem()}-{digest}.so":
                    raise RuntimeError(f"{pinned / name} is damaged: its content is not what was compiled.")
                return self.load(pinned / name)
            except _UNUSABLE as error:
                raise RuntimeError(str(error).replace(str(pinned), str(folder))) from error


def cache_folder() -> Path:
    """Where compiled libraries are kept between processes. RuntimeError for a user who has no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd"


@contextmanager
def _pinned(folder: Path) -> Iterator[Path]:
    """A path to `folder` that leads to the same one until the block ends, whoever moves it. RuntimeError if others may write to it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _refuse_others(folder, os.lstat(folder))
        _refuse_others(folder, os.fstat(descriptor))
        pinned = Path(f"/proc/self/fd/{descriptor}")
        yield pinned if pinned.exists() else folder
    finally:
        os.close(descriptor)


def _refuse_others(path: Path, found: os.stat_result) -> None:
    """RuntimeError if another user owns what was found at `path` or may write to it; the mode of a link says nothing."""
    if found.st_uid not in (0, os.geteuid()):
        raise RuntimeError(f"{path} belongs to another user (uid {found.st_uid}), whose code is not run.")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(found.st_mode):
        raise RuntimeError(f"others may write to {path}, and their code is not run: chmod go-w {path}.")


def _keep(folder: Path, name: str, content: bytes) -> None:
    """Put a library in place whole. It is written in a folder of mode 0700: at no time can others write to it, whatever the umask."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _pinned(folder) as pinned, TemporaryDirectory(dir=pinned) as private:
        made = Path(private) / name
        write_bytes_synced(made, content)
        made.chmod(0o644)
        os.replace(made, pinned / name)
        sync(pinned)


def _sentence(error: BaseException) -> str:
    words = str(error)
    return words if words.endswith(".") else f"{words}."


def kind_and_mixing(divergence: Divergence | None) -> tuple[int, float]:
    """The sources' `Kind`, 0 without a divergence, and the mixing weight, which is ignored where there is none."""
    if divergence is None:
        return 0, 0.5
    return _KINDS[divergence.kind], 0.5 if divergence.mixing is None else divergence.mixing


def scale_and_softcap(transform: LogitTransform) -> tuple[float, float]:
    """The sources' `Transform`: a soft-cap of 0 is none."""
    return transform.scale, transform.softcap or 0.0
