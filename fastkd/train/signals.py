"""Preemption: a signal sets a flag, polled at every micro-batch, evaluation batch and the stage's end; a second one exits at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to stop; everything up to its last finished step is saved."""


class SignalFlag:
    """`with SignalFlag() as flag:` and `flag.poll()` wherever work could stop; outside the main thread no signal is taken."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is None:  # a signal after the last poll stops the run before its next stage
            self.poll()

    def poll(self) -> None:
        if self.received is not None:
            raise Preempted(f"stopped by {signal.Signals(self.received).name}; run the same command again to go on.")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
