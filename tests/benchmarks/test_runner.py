"""Rounds are interleaved, the warm-up is not counted, a slow case does not sink the run: with a clock of our own."""

from __future__ import annotations

import pytest
import torch

from fastkd.benchmarks.runner import Case, Timing, interleaved, stopwatch


class Clock:
    """A stopwatch that runs the case and says what the test wants: the next of the case's `durations`, the last one for ever."""

    def __init__(self, **durations: list[float]) -> None:
        self.durations, self.calls = durations, []

    def case(self, name: str) -> Case:
        return Case(run=lambda: name, prepare=lambda: self.calls.append(f"prepare {name}"))

    def __call__(self, run) -> float:
        name = run()
        self.calls.append(name)
        left = self.durations[name]
        return left.pop(0) if len(left) > 1 else left[0]


def test_rounds_are_interleaved_and_the_warm_up_is_not_counted():
    clock = Clock(a=[100.0, 1.0, 3.0, 2.0], b=[9.0, 5.0])
    timings = interleaved({name: clock.case(name) for name in "ab"}, clock, repeats=3)
    assert clock.calls == ["prepare a", "a", "prepare b", "b"] * 4
    assert timings["a"] == Timing(rounds=3, median=2.0, minimum=1.0, maximum=3.0, lower_quartile=1.5, upper_quartile=2.5)
    assert timings["b"] == Timing(3, 5.0, 5.0, 5.0, 5.0, 5.0)


def test_a_case_that_used_its_budget_sits_out():
    clock = Clock(fast=[1.0], slow=[4.0])
    timings = interleaved({name: clock.case(name) for name in ("fast", "slow")}, clock, repeats=5, budget=10.0)
    assert (timings["fast"].rounds, timings["slow"].rounds) == (5, 2)
    assert clock.calls[-2:] == ["prepare fast", "fast"]


def test_a_warm_up_that_took_the_whole_budget_is_the_measurement():
    clock = Clock(slow=[60.0])
    assert interleaved({"slow": clock.case("slow")}, clock, repeats=5, budget=10.0)["slow"] == Timing.of([60.0])
    assert clock.calls == ["prepare slow", "slow"]


def test_an_outlier_moves_no_median():
    assert Timing.of([1.0, 1.1, 50.0]).median == 1.1
    assert Timing.of([2.0]) == Timing(1, 2.0, 2.0, 2.0, 2.0, 2.0)


def test_the_host_clock_times_the_run(monkeypatch):
    now = [7.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert stopwatch(torch.device("cpu"))(lambda: now.__setitem__(0, now[0] + 2.5)) == 2.5


def test_a_case_that_raises_is_not_hidden():
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleaved({"a": Case(fail)}, stopwatch(torch.device("cpu")), repeats=1)
