"""Fault 7: two processes on one output_dir.

The second is refused, with the first one's process id and machine; the first ends as if nothing had been.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest

import fastkd
from tests.faults.disturbed import SERVER, config, differences, disturb, train_apart


def pause(there: Any, go_on: Any) -> None:
    """In the first process: wait in the middle of its training."""

    def wait() -> None:
        there.set()
        go_on.wait(60)

    disturb(pytest.MonkeyPatch(), "student", "forward", 5, wait)


def test_the_second_is_refused(tmp_path):
    run = config("ted", tmp_path, stages={"student": {}}, max_steps=4)
    fastkd.distill({**run, "output_dir": str(tmp_path / "whole")})
    there, go_on = SERVER.Event(), SERVER.Event()
    first = train_apart(run, tmp_path, pause, there, go_on)
    try:
        assert there.wait(60)
        with pytest.raises(ValueError, match=f"in use by process {first.pid} on {socket.gethostname()}"):
            fastkd.distill(run)
        with pytest.raises(ValueError, match="in use by process"):
            fastkd.distill({**run, "seed": 1, "overwrite_output_dir": True})
    finally:
        go_on.set()
        first.join()
    assert first.exitcode == 0
    assert differences(tmp_path / "whole", tmp_path / "run", ["student"]) == []
