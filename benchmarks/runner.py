"""The stopwatch of every claim: named cases in interleaved rounds, so that a drifting clock or a busy neighbour hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_LEAD_CYCLES = 2_000_000
"""About a millisecond of a GPU."""
Run = Callable[[], object]
Stopwatch = Callable[[Run], float]
"""Runs it once and returns the seconds it took."""


@dataclass(frozen=True)
class Case:
    """What is timed, and what is made ready before each round of it without being timed."""

    run: Run
    prepare: Run = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds over all timed rounds."""

    rounds: int
    median: float
    minimum: float
    maximum: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        return cls(len(seconds), median, min(seconds), max(seconds), lower, upper)


def interleaved(cases: Mapping[str, Case], stopwatch: Stopwatch, *, repeats: int, budget: float = math.inf) -> dict[str, Timing]:
    """One warm-up round, then `repeats` timed rounds, each of which runs every case once in the same order.

    A case that has used its `budget` of seconds, warm-up included, sits out the later rounds; one whose warm-up alone used it is
    judged by the warm-up. `Timing.rounds` tells.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    spent = dict.fromkeys(cases, 0.0)
    for is_timed in [False] + [True] * repeats:
        for name, case in cases.items():
            if spent[name] >= budget:
                continue
            case.prepare()
            took = stopwatch(case.run)
            spent[name] += took
            if is_timed or took >= budget:
                seconds[name].append(took)
    return {name: Timing.of(values) for name, values in seconds.items()}


def stopwatch(device: torch.device) -> Stopwatch:
    """The host's clock for a CPU; for a GPU events around the run, with the second-level cache flushed before it."""
    if device.type == "cpu":
        return _host_seconds
    # Twice the cache, so that nothing that the run reads is left in it.
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def device_seconds(run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        flush.zero_()
        # The device is kept busy while the host prepares the first launches, whose time is not the device's.
        torch.cuda._sleep(_LEAD_CYCLES)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result  # what the run made is freed after the clock stopped
        return start.elapsed_time(end) / 1e3

    return device_seconds


def _host_seconds(run: Run) -> float:
    started = time.perf_counter()
    result = run()
    took = time.perf_counter() - started
    del result
    return took
