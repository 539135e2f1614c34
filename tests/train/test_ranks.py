"""What ranks tell each other, and that one which fails or does not come is named."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from fastkd.train.ranks import RankError, Ranks
from tests.ranks import spawn

LIMIT = 5.0
"""Seconds of a collective: more than a busy machine keeps a rank from its turn, and no more than a test can wait for."""


def talk(rank: int, folder: str) -> None:
    with Ranks.join(use_cpu=True, timeout_seconds=LIMIT) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (rank, 2, rank == 0)
        assert ranks.sum(np.array([1.5, rank])).tolist() == [3.0, 1.0]
        long, short = {"text": "é" * 1000, "nothing": None}, [rank]
        assert ranks.gather(long if rank else short) == [[0], long]

        def count() -> int:
            """How often the file has been written to; rank 0 comes first, however slow it is."""
            file = Path(folder) / "calls"
            if rank == 0:
                time.sleep(0.5)
            before = file.read_text() if file.exists() else ""
            file.write_text(before + str(rank))
            return len(before)

        assert ranks.main_first(count) == rank
        assert ranks.on_main(lambda: "only here") == (None if rank else "only here")

        def fail() -> None:
            assert rank == 0, "what fails on rank 0 is not tried elsewhere"
            raise ValueError("no such file")

        with pytest.raises(RankError if rank else ValueError, match="rank 0 stopped: no such file" if rank else "no such file"):
            ranks.main_first(fail)
        with pytest.raises(RuntimeError, match=r"^shapes differ$"), ranks.naming_absentees("the test"):
            raise RuntimeError("shapes differ")  # of no collective
        # Work of one rank may take longer than a collective's limit.
        ranks.on_main(lambda: time.sleep(LIMIT + 1))


def absent(rank: int, folder: str) -> None:
    given_up = Path(folder) / "given up"
    with pytest.raises(RankError) as failure, Ranks.join(use_cpu=True, timeout_seconds=LIMIT) as ranks:  # noqa: PT012 (the end of it fails)
        if rank == 0:
            try:
                with ranks.naming_absentees("the test"):
                    ranks.barrier()
            finally:
                given_up.touch()
        while not given_up.exists():  # and then come too late
            time.sleep(0.05)
    assert rank == 1 or "failed in the test, and rank 1 did not answer" in str(failure.value)


def test_two_ranks_agree(tmp_path):
    spawn(talk, str(tmp_path))


def test_a_rank_that_does_not_come_is_named(tmp_path):
    spawn(absent, str(tmp_path))


def test_one_process_is_its_own_group():
    with Ranks.join(use_cpu=True) as ranks:
        assert ranks.world_size == 1 and ranks.gather({"a": 1}) == [{"a": 1}] and ranks.main_first(lambda: 3) == 3
        assert ranks.sum(np.array([2.0])).tolist() == [2.0]
        with pytest.raises(RuntimeError, match="timed out waiting"), ranks.naming_absentees("one"):
            raise RuntimeError("timed out waiting")
