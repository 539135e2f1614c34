"""What a command finds around it: closed streams, signals, and the other processes that torchrun has started."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ECHO_SECONDS = 1.0  # a scheduler may signal a process and its group


class Stopped(SystemExit):
    """A signal has ended the command."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)
        self.signal = signal.Signals(number).name


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Raise `Stopped` in the block at SIGINT, SIGTERM and SIGHUP, so that what is half-written is removed; a second one ends at once.

    A signal that the caller has the process ignore, as nohup does, stays ignored.
    """
    received_at: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received_at
        if received_at is None:
            received_at = time.monotonic()
            raise Stopped(number)
        if time.monotonic() - received_at > _ECHO_SECONDS:
            os._exit(128 + number)

    heeded: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        heeded = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def open_standard_streams() -> None:
    """Open what the caller has closed of stdin, stdout and stderr on the null device.

    A file that is opened later would else take the number of a closed stream, and hold what is printed. Characters that the encoding of
    stdout has not are printed as their escapes, as stderr does already.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (it is for as long as the process)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def stdout_is_closed() -> bool:
    """Whether the reader of stdout has gone, as `| head` does; what is still printed then goes to the null device."""
    number = sys.stdout.fileno()
    poll = select.poll()
    poll.register(number, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def is_main_process() -> bool:
    """Whether this process tells what all do: the first of those that torchrun started, or one that runs alone.

    Raises `ValueError` where the environment names several processes and not which one this is.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not world_size.isdecimal() or int(world_size) < 1:
        raise ValueError(f"WORLD_SIZE is {world_size!r} in the environment; unset it, or start the processes by torchrun.")
    rank = os.environ.get("RANK", "")
    if int(world_size) == 1:
        return True
    if not rank.isdecimal() or int(rank) >= int(world_size):
        raise ValueError(f"WORLD_SIZE is {world_size} in the environment and RANK {rank!r}; start the processes by torchrun.")
    return int(rank) == 0
