"""Floor 5, train: the run's log (one JSON object a line), the progress bar, and the memory figure."""

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

LOG_FILE = "log.jsonl"


class RunLog:
    """Appends one JSON object a line to `output_dir/log.jsonl`, each handed to the system as soon as it is written.

    Args:
        output_dir: an existing folder; None writes nowhere, as ranks other than the first do.
        stage: put into every line as `stage`.
        keep: `size` as it was at the point that the run resumes from. What the log holds beyond it is cut off: it is about to happen
            again. None keeps every line.

    A half line at the end, left by a killed process, is dropped in either case.
    """

    def __init__(self, output_dir: str | Path | None, *, stage: str | None = None, keep: int | None = None) -> None:
        path = Path(os.devnull) if output_dir is None else Path(output_dir) / LOG_FILE
        self.stage = stage
        if path.is_file():
            os.truncate(path, sum(map(len, _whole_lines(path.read_bytes()[:keep]))))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # line-buffered: one write per line

    @property
    def size(self) -> int:
        """Bytes that are written."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line such as `{"step": 10, "loss": 2.1}`. NaN and infinities are written as "nan", "inf", "-inf"."""
        stage = {} if self.stage is None else {"stage": self.stage}
        self._file.write(json.dumps(_strict({**stage, **values}), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a log, which may still be growing: a half line at its end is left out.

    Raises `ValueError` naming the line if any other is not JSON.
    """
    entries = []
    for number, line in enumerate(_whole_lines(Path(path).read_bytes()), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}.") from error
    return entries


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines that were written to their end; JSON escapes line breaks, so a half line never holds one."""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def _strict(value: Any) -> Any:
    """`value` with its non-finite floats as strings, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class Progress(tqdm):
    """tqdm's bar when stderr is a terminal and it is to be `shown`, and not one character otherwise."""

    def __init__(self, total: int, *, initial: int = 0, description: str | None = None, shown: bool = True) -> None:
        super().__init__(total=total, initial=initial, desc=description, disable=None if shown else True, dynamic_ncols=True)


def peak_memory_mb() -> float:
    """The most memory held so far, in MiB: allocated by torch on the current CUDA device if in use, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB
