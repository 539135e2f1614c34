"""The kill harness: a run that is killed again and again, at random instants and inside its saves, must end as one that never was.

    python -m tests.faults.kills --method glmd --kills 100 --seed 0 --output report.json

A run is a process forked from this one, which has imported everything and trains nothing itself. Two kills in three come from here,
after a random part of the time that a whole run takes. By every third, the run ends itself, at a random one of its calls that write a
file durably; if that call writes tensors, it leaves half of them. After every kill, no checkpoint may be damaged, and the same run must
go on without an error. A run that reaches its end is compared with the undisturbed one, bit for bit, and starts over while kills are
still to be delivered, with an empty cache.

Two neighbours run meanwhile, again and again, with a slow disk: `cached` shares the killed run's cache_dir, and `beside` has its own
output_dir in the killed run's too. Whenever one of them ends, it must have ended as it does alone, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (what a run imports is imported once, here)
import pytest
import safetensors.torch
import torch
import transformers  # noqa: F401
from tqdm import tqdm

import fastkd
from fastkd.train.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint
from fastkd.train.log import LOG_FILE
from fastkd.train.run import RESULT_FILE
from tests.faults.disturbed import config, differences, leave_out_drawing

FORK = multiprocessing.get_context("fork")
LONGEST_RUN = 180.0
"""Seconds; runs take a few."""
SHOW_STACKS = signal.SIGUSR2
"""One that a run has no use for."""
BESIDE = "beside"
"""The neighbour in the killed run's folder."""
SLOW_SECONDS = 0.05
DURABLE_CALLS = ((os, "fsync"), (os, "rename"), (os, "replace"), (safetensors.torch, "save_file"))


@dataclass
class Report:
    """What was done to a method's run, and what came of it: exact resume holds where `failures` stays empty."""

    method: str
    seed: int
    stages: list[str]
    kills: int = 0
    kills_inside_a_save: int = 0
    """Those at a durable call, and those whose process left something under its temporary name."""
    kills_at: Counter[str] = field(default_factory=Counter)
    """By what struck: a random instant, or a durable call."""
    kills_in: Counter[str] = field(default_factory=Counter)
    """By the stage that was not finished; "before <stage>" if its log had no line yet."""
    runs: int = 0
    """Runs that reached their end and were compared."""
    resumes: int = 0
    """Processes that went on with what a killed one had left."""
    neighbours: Counter[str] = field(default_factory=Counter)
    """How often each of the runs that nobody killed reached its end, and was compared."""
    durable_calls: int = 0
    """How many the undisturbed run makes."""
    whole_run_seconds: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Durable:
    """Counts the calls of a process that write a file durably, and ends it at one of them, if that is asked for."""

    def __init__(self) -> None:
        self.made = FORK.RawValue(ctypes.c_long, 0)  # memory that the process shares with this one
        self.deadly = -1

    def patch(self) -> None:
        """In the process itself."""
        self.made.value = 0
        for module, name in DURABLE_CALLS:
            setattr(module, name, self._counting(getattr(module, name), name))

    def _counting(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.made.value += 1
            if self.made.value == self.deadly:
                if name == "save_file":
                    original(*arguments, **options)
                    os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
                print(name, file=sys.stderr)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call


def before_every_rename(act: Callable[[], Any]) -> None:
    """Let this process call `act` before it gives a name to what it has written."""

    def acting_before(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            act()
            return original(*arguments)

        return call

    for name in ("rename", "replace"):
        setattr(os, name, acting_before(getattr(os, name)))


def slow_disk() -> None:
    before_every_rename(lambda: time.sleep(SLOW_SECONDS))


class Run:
    """One configuration, run by processes whose errors are kept in `folder`."""

    def __init__(self, configuration: Mapping[str, Any], output_dir: Path, folder: Path) -> None:
        self.configuration = {**configuration, "output_dir": str(output_dir)}
        self.output_dir, self.errors_file = output_dir, folder / f"errors-of-{output_dir.name}.txt"

    def use_cache(self, folder: Path) -> None:
        """From the next process on."""
        self.configuration = {**self.configuration, "cache_dir": str(folder)}

    def alone(self, prepare: Callable[[], None] | None = None) -> str | None:
        """What kept an undisturbed run from its end."""
        process = self.start(prepare)
        wait_for_end(process)
        return None if process.exitcode == 0 else f"the undisturbed {self.output_dir.name} ended with {process.exitcode}: {self.errors}"

    def left(self) -> list[Path]:
        """What lies in its folder, but for a neighbour's."""
        return [path for path in self.output_dir.glob("*") if path.name != BESIDE]

    def start_over(self) -> None:
        """Delete what it left; it has ended."""
        for path in self.left():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self, prepare: Callable[[], None] | None = None) -> Any:
        """A process that runs it; prepare: called in it first."""

        def body() -> None:
            take_own_bar_locks()
            faulthandler.register(SHOW_STACKS, file=os.fdopen(os.dup(sys.stderr.fileno()), "w"))
            with self.errors_file.open("w") as file:
                os.dup2(file.fileno(), sys.stderr.fileno())
            leave_out_drawing(pytest.MonkeyPatch())
            if prepare is not None:
                prepare()
            fastkd.distill(self.configuration)

        process = FORK.Process(target=body)
        process.start()
        return process

    @property
    def errors(self) -> str:
        return self.errors_file.read_text().strip()


class Neighbour:
    """A run that nobody kills, started anew whenever it has ended as it does alone."""

    def __init__(self, name: str, run: Run, whole: Run, report: Report) -> None:
        self.name, self.run, self.whole, self.report = name, run, whole, report
        self._process: Any = None

    def tend(self, cache_dir: Path) -> None:
        """Compare it if it has ended, and start it where it does not run."""
        if self._process is not None and self._process.is_alive():
            return
        self.finish()
        self.run.start_over()
        self.run.use_cache(cache_dir)
        self._process = self.run.start(slow_disk)

    def finish(self) -> None:
        """Wait for its end, and compare that."""
        if self._process is None:
            return
        wait_for_end(self._process)
        if self._process.exitcode == 0:
            self.report.neighbours[self.name] += 1
            found = differences(self.whole.output_dir, self.run.output_dir, list(self.run.configuration["stages"]))
        else:
            found = [f"it ended with {self._process.exitcode}: {self.run.errors}"]
        self.report.failures += [f"the neighbour {self.name}: {difference}" for difference in found]


def kill_repeatedly(method: str, kills: int, folder: Path, seed: int = 0, **more: Any) -> Report:
    """Deliver so many kills to runs of `method` in `folder`, and compare every run's end with that of an undisturbed one.

    `more` is set in the runs' configuration. The process that calls must have no threads.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be missing in every fork, which would wait for them
    started, chance, durable = time.monotonic(), random.Random(seed), Durable()
    configuration = config(method, folder, cache_dir=str(folder / "cache"), **more)
    report = Report(method, seed, stages=list(configuration["stages"]))
    killed, whole = (Run(configuration, folder / name, folder) for name in ("killed", "whole"))
    neighbours = []
    for number, (name, place) in enumerate({"cached": folder / "cached", BESIDE: killed.output_dir / BESIDE}.items(), start=1):
        own = {**configuration, "seed": number, "stages": {report.stages[0]: {}}}
        neighbours.append(Neighbour(name, Run(own, place, folder), Run(own, folder / f"whole-{name}", folder), report))

    whole_started = time.monotonic()
    faults = [whole.alone(durable.patch)]
    report.whole_run_seconds, report.durable_calls = round(time.monotonic() - whole_started, 2), durable.made.value
    faults += [neighbour.whole.alone() for neighbour in neighbours]
    report.failures += [fault for fault in faults if fault is not None]

    while not report.failures and (report.kills < kills or not report.runs or killed.left()):
        cache_dir = folder / f"cache-{report.runs}"
        killed.use_cache(cache_dir)
        for neighbour in neighbours:
            neighbour.tend(cache_dir)
        report.resumes += bool(killed.left())
        cause = chance.choice(["instant", "instant", "call"]) if report.kills < kills else None
        if cause == "call":
            durable.deadly = chance.randint(1, report.durable_calls // 4)  # not all of it, so that every part of a run is reached
        process = killed.start(durable.patch if cause == "call" else None)
        if cause == "instant":
            process.join(chance.uniform(0, report.whole_run_seconds))
            process.kill()
        wait_for_end(process)
        if process.exitcode == -signal.SIGKILL:
            report.kills += 1
            struck = killed.errors.splitlines()[-1] if cause == "call" else "a random instant"
            report.kills_at[struck] += 1
            folders = [folder for place in (killed.output_dir, cache_dir) for folder in os.walk(place)]  # neighbours rotate theirs
            half_written = [name for _, inner, files in folders for name in (*inner, *files) if f".tmp-{process.pid}-" in name]
            report.kills_inside_a_save += cause == "call" or bool(half_written)
            report.kills_in[_standing(killed.output_dir, report.stages)] += 1
            report.failures += [f"kill {report.kills} ({struck}): {damage}" for damage in _damaged(killed.output_dir)]
        elif process.exitcode == 0:
            report.runs += 1
            ends = whole.output_dir, killed.output_dir
            report.failures += [f"run {report.runs}: {difference}" for difference in differences(*ends, report.stages)]
            if not report.failures:
                killed.start_over()
        else:
            report.failures.append(f"after kill {report.kills}, the run ended with {process.exitcode}: {killed.errors}")
    for neighbour in neighbours:
        neighbour.finish()
    report.seconds = round(time.monotonic() - started, 1)
    return report


def wait_for_end(process: Any) -> None:
    """One that hangs shows where on the harness's stderr, and is ended, and the harness with it."""
    process.join(LONGEST_RUN)
    if process.is_alive():
        os.kill(process.pid, SHOW_STACKS)
        process.join(1.0)
        process.kill()
        raise TimeoutError(f"A run did not end in {LONGEST_RUN:.0f} s.")


def take_own_bar_locks() -> None:
    """Let this process's progress bars lock nothing that another one holds.

    tqdm's lock is shared by all processes forked from the one that first drew a bar, and stays taken when its holder is killed.
    """
    kinds = [tqdm]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
        kind.set_lock(threading.RLock())


def _standing(output_dir: Path, stages: list[str]) -> str:
    for stage in stages:
        if not (output_dir / stage / RESULT_FILE).exists():
            log = output_dir / stage / LOG_FILE
            return stage if log.exists() and log.stat().st_size else f"before {stage}"
    return "the end"


def _damaged(output_dir: Path) -> list[str]:
    """Why folders that are named as checkpoints are none."""
    damages = []
    for stage in output_dir.glob("*/"):
        for checkpoint in list_checkpoints(stage):
            try:
                verify_checkpoint(checkpoint)
            except CheckpointError as damage:
                damages.append(str(damage))
    return damages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["glmd", "ted", "crild"], required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the random instants (default: 0)")
    parser.add_argument("--async_save", action="store_true", help="write checkpoints while training goes on")
    parser.add_argument("--output", type=Path, help="file for the report as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_repeatedly(arguments.method, arguments.kills, Path(folder), arguments.seed, async_save=arguments.async_save)
    text = json.dumps(vars(report), indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
