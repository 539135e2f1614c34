"""An evaluation that is shared: every item once, the results in the order of the items, and as many calls on every process."""

from __future__ import annotations

import pytest

from fastkd.methods.objective import Share


@pytest.mark.parametrize("items", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_see_all_results_in_order(items, world_size):
    letters = "abcdefg"[:items]
    own, calls = [], []
    for rank in range(world_size):
        done: list[str] = []
        polls: list[int] = []

        def gather(results: list[str]) -> list[list[str]]:
            own.append(results)
            return [results] * world_size

        Share(rank, world_size, lambda polls=polls: polls.append(1), gather).map(lambda x, done=done: done.append(x) or x, letters)
        calls.append((len(done), len(polls)))
    assert len(set(calls)) == 1  # nobody waits for a collective that another one does not make
    results = [Share(rank, world_size, gather=lambda _: own).map(str.upper, letters) for rank in range(world_size)]
    assert results == [list(letters)] * world_size
    kept = [x for rank, part in enumerate(own) for x in part[: len(range(rank, items, world_size))]]
    assert sorted(kept) == list(letters)
