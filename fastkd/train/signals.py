"""Preemption: a signal sets a flag, polled at every micro-batch, evaluation batch and the stage's end; a second one exits at once.

Ranks have to stop at the same instant: where there are several, they tell each other of their flags at every optimizer step and
evaluation batch, and stop together.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import numpy as np

from .ranks import Ranks

_ECHO_SECONDS = 1.0  # a scheduler may signal every process, and torchrun then passes its own on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to stop; everything up to its last finished step is saved."""

    exit_code = 143


class SignalFlag:
    """`with SignalFlag() as flag:` and `flag.poll()` wherever work could stop; outside the main thread no signal is taken."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def poll(self) -> None:
        """Raise `Preempted` if this rank or another was signalled. All ranks call."""
        self.heed(int(self.ranks.sum(np.array([self.mark]))[0]))

    def poll_alone(self) -> None:
        """The same for work that this rank does while the others wait."""
        self.heed(self.mark)

    @property
    def mark(self) -> float:
        """What a rank adds to the sum by which all hear of a signal."""
        return float(self.received is not None)

    def heed(self, marks: float) -> None:
        """Raise `Preempted` if the sum of all ranks' marks says that one was signalled."""
        if marks:
            name = "a signal to another rank" if self.received is None else signal.Signals(self.received).name
            raise Preempted(f"stopped by {name}; run the same command again to go on.")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > _ECHO_SECONDS or self.ranks.world_size == 1:
            raise SystemExit(128 + number)
