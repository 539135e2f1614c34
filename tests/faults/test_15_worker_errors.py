"""Fault 15: an exception in a data worker, one that does not pickle among them, or a worker that is killed.

It surfaces in the caller within seconds and never hangs, and the count goes on from its last saved row. Training itself has no
workers: its rows are memory-mapped. Counting a vocabulary has.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkd.tasks.corpus import Corpus
from fastkd.vocab import count
from fastkd.vocab.count import count_tokens
from tests import tiny

ROWS = [*tiny.lines()[:40]]
TRIGGER = ROWS[25]


class Unpicklable(Exception):
    """Its constructor wants more than what pickle gives back to it, and it holds what cannot be pickled at all."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.handle = lambda: second


class HalfPicklable(Exception):
    """Goes into a pickle and does not come out again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def _failing(act: Callable[[], Any], batch: list[str]) -> Any:
    if TRIGGER in batch:
        act()
    return count._worker_counter(batch)


def raise_unpicklable() -> None:
    raise Unpicklable("the tokenizer broke", "twice")


def raise_half_picklable() -> None:
    raise HalfPicklable("the tokenizer broke", "twice")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unpicklable(batch: list[str]) -> Any:
    return _failing(raise_unpicklable, batch)


def half_picklable(batch: list[str]) -> Any:
    return _failing(raise_half_picklable, batch)


def killed(batch: list[str]) -> Any:
    return _failing(be_killed, batch)


CORPUS = Corpus("the toy corpus", "00", lambda start, _: iter([(None, ROWS[start:])]))


@pytest.mark.parametrize(
    ("worker", "error", "said"),
    [
        (unpicklable, Exception, "pickle"),
        (half_picklable, RuntimeError, "could not report.*lower num_proc"),
        (killed, RuntimeError, "was killed.*goes on behind the last saved row"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_happens_in_a_counting_process_surfaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: Any, error: type[Exception], said: str
) -> None:
    monkeypatch.setattr(count, "_count_in_worker", worker)
    started = time.monotonic()
    with pytest.raises(error, match=said):
        count_tokens(CORPUS, tiny.wordpiece(), tmp_path, num_proc=2, batch_size=5, save_every=1)
    assert time.monotonic() - started < 60
    monkeypatch.undo()
    whole = count_tokens(CORPUS, tiny.wordpiece(), tmp_path / "whole")
    mended = count_tokens(CORPUS, tiny.wordpiece(), tmp_path)
    assert mended.rows == len(ROWS) and mended.counts.equal(whole.counts)
