"""Stages of one measurement, each in a process of its own with a time limit, whose rows go into one JSON file.

The file is whole after every row, so that whatever ends the run leaves what was measured until then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastkd.store import write_json_atomic

TIME_IS_UP = "the time is up"
LOG_LINES = 20
_POLL_SECONDS = 0.05
_LEAST_SECONDS = 5.0
"""No stage is begun with less left: it could not even import torch."""


@dataclass(frozen=True)
class Stage:
    """A part of the measurement.

    `command` is given a path as its last argument, and appends a line of JSON to that file for every row.
    """

    name: str
    command: Sequence[str]
    limit: float
    """Seconds until its process, and every process that this one has started, is killed."""
    is_check: bool = False
    """Whether it has failed, and not only left rows out, if its process does not end well."""
    why_not: str = ""
    """Why it is not begun here."""


def run_stages(stages: Sequence[Stage], path: Path, head: Mapping[str, Any], deadline: float) -> bool:
    """Run one after the other until `deadline` of `time.monotonic`; return whether no check failed.

    The file `path` has what `head` has; under "stages", by name, the rows of each stage that was begun, its seconds, and how it ended
    if not well; under "not_measured" why the others were not. A check that the deadline cut short has not failed.
    """
    record: dict[str, Any] = {**head, "stages": {}, "not_measured": {}}
    passed = True
    for stage in stages:
        left = deadline - time.monotonic()
        reason = stage.why_not or (TIME_IS_UP if left < _LEAST_SECONDS else "")
        if reason:
            record["not_measured"][stage.name] = reason
            print(f"{stage.name}: not measured: {reason}", flush=True)
        else:
            print(stage.name, flush=True)
            result: dict[str, Any] = {"rows": [], "seconds": None, "ended": None}
            record["stages"][stage.name] = result
            started, run = time.monotonic(), Run(stage, min(stage.limit, left))
            for row in run.rows():
                print(f"  {_summary(row)}", flush=True)
                result["rows"].append(row)
                passed = passed and row.get("passed", True)
                write_json_atomic(path, record)
            result["seconds"] = time.monotonic() - started
            if run.ended:
                result |= {"ended": run.ended, "log": run.log}
                print(f"  {stage.name} {run.ended}", *run.log, sep="\n    ", flush=True)
                was_cut_short = run.was_killed and run.limit < stage.limit
                passed = passed and not (stage.is_check and not was_cut_short)
        record["passed"] = passed
        write_json_atomic(path, record)
    return passed


class Run:
    """A stage's process: `ended` says how it ended if not well, `was_killed` whether at its limit; `log` has the last lines printed."""

    def __init__(self, stage: Stage, limit: float) -> None:
        self.stage, self.limit = stage, limit
        self.ended: str | None = None
        self.was_killed = False
        self.log: list[str] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Run it and yield its rows as they come."""
        with TemporaryDirectory() as folder:
            part, log = Path(folder) / "rows", Path(folder) / "log"
            part.touch()
            with part.open(encoding="utf-8") as lines, log.open("wb") as output:
                command = [*self.stage.command, str(part)]
                end = time.monotonic() + self.limit
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
                try:
                    while True:
                        is_over = process.poll() is not None  # before reading, so that its last rows are read
                        yield from _whole_rows(lines)
                        if is_over or time.monotonic() > end:
                            break
                        time.sleep(_POLL_SECONDS)
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
                        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds cannot be killed
                            process.wait(5)
            if not is_over:
                self.was_killed = True
                self.ended = f"was killed after {self.limit:.0f} s"
            elif process.returncode:
                self.ended = f"ended with status {process.returncode}"
            self.log = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            if self.ended and self.log:
                self.ended += f": {self.log[-1]}"


def _whole_rows(lines: Any) -> Iterator[dict[str, Any]]:
    """The rows that were appended since; a line whose end is not written yet is left for the next time."""
    while True:
        at = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(at)
            return
        yield json.loads(line)


def _summary(row: Mapping[str, Any]) -> str:
    """What of a row is short."""
    short = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    return ", ".join(f"{name} {value}" for name, value in short.items() if not isinstance(value, dict | list))
