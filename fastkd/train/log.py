"""The run's log (one JSON object a line), the progress bar, and the memory figure."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from ..sealed import read_bytes
from ..store import write_bytes_atomic

LOG_FILE = "log.jsonl"
_SECONDS_A_LINE = 30.0
log = logging.getLogger("fastkd")


class RunLog:
    """Appends one JSON object a line to `output_dir/log.jsonl`, each handed to the system as soon as it is written.

    Args:
        output_dir: an existing folder; None writes nowhere, as ranks other than the first do.
        stage: put into every line as `stage`.
        keep: `size` as it was at the point that the run resumes from. What the log holds beyond it is cut off: it is about to happen
            again. None keeps every line.
        bar: shows what every line says.
        report_to: "tensorboard" shows every line's numbers there too.

    A half line at the end, left by a killed process, is dropped in either case. Raises `OSError` where the log is a link.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        *,
        stage: str | None = None,
        keep: int | None = None,
        bar: Progress | None = None,
        report_to: str = "none",
    ) -> None:
        self.stage, self._bar = stage, bar
        self._board: TensorBoard | None = None
        if output_dir is None:
            self._file: TextIO = os.fdopen(os.open(os.devnull, os.O_WRONLY), "a")
            return
        self._file, lines = _open_log(Path(output_dir) / LOG_FILE, keep)
        if report_to != "none":
            self._board = TensorBoard(Path(output_dir) / "tensorboard", _last_step(lines))

    @property
    def size(self) -> int:
        """Bytes that are written."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line such as `{"step": 10, "loss": 2.1}`. NaN and infinities are written as "nan", "inf", "-inf"."""
        stage = {} if self.stage is None else {"stage": self.stage}
        self._file.write(json.dumps(_strict({**stage, **values}), allow_nan=False) + "\n")
        if self._board is not None:
            self._board.write(values)
        if self._bar is not None:
            self._bar.show(values)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: str | Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """Read the lines of a log, which may still be growing: a half line at its end is left out.

    Raises `ValueError` naming the line if any other is no JSON object; with `strict=False` such lines are passed over.
    """
    entries = []
    for number, line in enumerate(_whole_lines(Path(path).read_bytes()), start=1):
        entry = _entry(line)
        if entry is not None:
            entries.append(entry)
        elif strict:
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:80]!r}. Remove that line.")
    return entries


def _open_log(path: Path, keep: int | None) -> tuple[TextIO, list[bytes]]:
    """Open a log to append to, cut to the whole lines among its first `keep` bytes, and return these too.

    It is opened once, and never through a link: what is cut is the file that was read.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(f"The log {str(path)!r} is a link, and what it leads to may not be this run's; remove the link.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file, and a log has to be one; move it away", str(path))
    if os.fstat(descriptor).st_nlink > 1:  # a copy made by hard links has this file too, and keeps what it holds
        os.close(descriptor)
        write_bytes_atomic(path, read_bytes(path))
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
    file = os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)  # line-buffered: one write per line
    with os.fdopen(descriptor, "rb", closefd=False) as existing:
        existing.seek(0)
        lines = _whole_lines(existing.read()[:keep])
    os.ftruncate(descriptor, sum(len(line) + 1 for line in lines))
    return file, lines


def _whole_lines(content: bytes) -> list[bytes]:
    """Split off the lines that were written to their end; JSON escapes line breaks, so a half line never holds one."""
    return content.split(b"\n")[:-1]


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line of a log; None where it is no JSON object."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _last_step(lines: Sequence[bytes]) -> int:
    """Find the last step that these lines of a log tell of."""
    steps = [(_entry(line) or {}).get("step") for line in lines]
    return max((step for step in steps if isinstance(step, int)), default=0)


def _strict(value: Any) -> Any:
    """`value` with its non-finite floats as strings, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class TensorBoard:
    """The log's numbers as TensorBoard's scalars. It is a view of the log: whatever fails in it is told once, and training goes on."""

    def __init__(self, folder: Path, steps: int) -> None:
        """steps: the last one in the log; what an earlier process has shown beyond it is hidden, as it is about to happen again."""
        self._writer: Any = None
        try:
            if folder.is_symlink():
                raise OSError(f"{folder} is a link")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=steps + 1)
        except ModuleNotFoundError:
            log.warning(
                "report_to is tensorboard, which is not installed: pip install 'fastkd[tensorboard]'. %s has the log.", LOG_FILE
            )
        except Exception as error:
            self._give_up(error)

    def write(self, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, values["step"])
            self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("TensorBoard cannot be written (%s); training goes on without it.", error)
        self._writer = None


class Progress(tqdm):
    """A bar with the time left, when stderr is a terminal and it is to be `shown`; elsewhere logged lines.

    There is one for every line of the run's log (`show`); of what counts in a `unit` and has no such log, one every half minute.
    """

    def __init__(
        self, total: int, *, initial: int = 0, description: str | None = None, shown: bool = True, unit: str | None = None
    ) -> None:
        disable = None if shown and sys.stderr is not None else True  # there is no stderr where it is closed
        layout = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        super().__init__(total=total, initial=initial, desc=description, disable=disable, dynamic_ncols=True, bar_format=layout)
        self._shown, self._description, self._steps, self._unit = shown, description, total, unit
        self._initial = self._done = initial
        self._started = self._told = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more, and log how far it is if that is due."""
        if self._shown and self.disable and self._unit is not None:
            self._done += int(n or 0)
            now = time.monotonic()
            if now - self._told >= _SECONDS_A_LINE and self._done > self._initial:
                self._told = now
                left = self._left(self._done, now)
                log.info("%s: %d/%d %s, %s", self._description, self._done, self._steps, self._unit, left)
        return super().update(n)

    def _left(self, done: int, now: float) -> str:
        seconds = (now - self._started) / (done - self._initial) * (self._steps - done)
        return f"{self.format_interval(seconds)} left"

    def show(self, values: Mapping[str, Any]) -> None:
        """Put what a line of the log says behind the bar, or into a line of its own: losses, speed and memory, or scores."""
        shown = [
            f"{name.removeprefix('loss_').removeprefix('eval_')} {value:.4g}"
            for name, value in values.items()
            if name.startswith(("loss", "eval_")) and isinstance(value, int | float)
        ]
        if "eval_events" in values:
            shown[-1] += f" over {values['eval_events']}"
        for name, unit in (("tokens_per_second", "tokens/s"), ("peak_memory_mb", "MB")):
            shown += [f"{values[name]:,.0f} {unit}"] if name in values else []
        if self._shown and self.disable:
            step = values["step"]
            if step > self._initial:
                shown.append(self._left(step, time.monotonic()))
            log.info("%s: step %d/%d, %s", self._description, step, self._steps, ", ".join(shown))
        elif "loss" in values:
            meter = self.format_dict
            room = (meter["ncols"] or math.inf) - len(self.format_meter(**{**meter, "postfix": None})) - 2
            while len(", ".join(shown)) > room:  # half a number would be another one
                shown.pop()
            self.set_postfix_str(", ".join(shown))


def peak_memory_mb() -> float:
    """The most memory held so far, in MiB: allocated by torch on the current CUDA device if in use, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB
