"""Micro-batches that are made in a thread while the step before them runs, so that no step waits for its rows or their copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Rows as the objective takes them, on their device, and what they add to the step's sums."""

    batch: Any
    weight: float | np.ndarray
    """What `Objective.weight` says of it."""
    tokens: int


class Prefetch:
    """Makes micro-batches by their numbers. What a number gives does not depend on when it is asked for, so that resuming is exact.

    Args:
        make: the micro-batch of a number; called in one thread, one number after the other. What it raises, `take` does.
    """

    def __init__(self, make: Callable[[int], MicroBatch]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._begun: dict[int, Future[MicroBatch]] = {}

    def take(self, numbers: Iterable[int], coming: Iterable[int]) -> list[MicroBatch]:
        """The micro-batches of `numbers`, in their order; those of `coming` are begun."""
        numbers = list(numbers)
        for number in [*numbers, *coming]:
            if number not in self._begun:
                self._begun[number] = self._thread.submit(self._make, number)
        return [self._begun.pop(number).result() for number in numbers]

    def close(self) -> None:
        """Leave out what was not taken; return when the thread has ended."""
        self._thread.shutdown(cancel_futures=True)
