"""Micro-batches made ahead are those that were asked for, whatever happens in between."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from fastkd.train.prefetch import MicroBatch, Prefetch


def batch(number: int) -> MicroBatch:
    return MicroBatch(number, float(number), 10 * number)


def test_the_coming_ones_are_made_while_the_taken_ones_are_used():
    made, was_made = [], threading.Event()

    def make(number: int) -> MicroBatch:
        made.append(number)
        if number == 3:
            was_made.set()
        return batch(number)

    with closing(Prefetch(make)) as prefetch:
        assert [x.batch for x in prefetch.take(range(2), range(2, 4))] == [0, 1]
        assert was_made.wait(10) and made == [0, 1, 2, 3]
        assert [x.batch for x in prefetch.take(range(2, 4), ())] == [2, 3] and made == [0, 1, 2, 3]


def test_ones_that_were_not_foreseen_are_made_too():
    with closing(Prefetch(batch)) as prefetch:
        prefetch.take([0], [1])
        assert [x.tokens for x in prefetch.take([7, 5], [1])] == [70, 50]


def test_what_making_one_raises_is_raised_where_it_is_taken():
    def make(number: int) -> MicroBatch:
        if number == 1:
            raise ValueError("row 12 has no text")
        return batch(number)

    with closing(Prefetch(make)) as prefetch:
        assert prefetch.take([0], [1])[0].weight == 0.0
        with pytest.raises(ValueError, match="row 12 has no text"):
            prefetch.take([1], ())


def test_what_is_not_taken_is_left_out():
    started, go_on, made = threading.Event(), threading.Event(), []

    def make(number: int) -> MicroBatch:
        made.append(number)
        if number == 1:
            started.set()
            assert go_on.wait(10)
        return batch(number)

    prefetch = Prefetch(make)
    prefetch.take([0], [1, 2, 3])
    assert started.wait(10)
    threading.Timer(0.1, go_on.set).start()
    prefetch.close()
    assert made == [0, 1] and "batches_0" not in {thread.name for thread in threading.enumerate()}
