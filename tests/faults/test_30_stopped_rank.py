"""Fault 30: `kill -STOP` of one rank for longer than the timeout. The job fails with the rank named, and does not hang."""

from __future__ import annotations

import signal
import time

import pytest

from fastkd.train.checkpoint import newest_checkpoint
from tests.faults.test_06_sigterm_to_one_rank import free_port, start, wait_for, write


@pytest.mark.parametrize(("silent", "moment"), [(0, "4"), (1, "5"), (0, "checkpoint-2")])
def test_the_rank_that_does_not_come_is_named(tmp_path, silent, moment):
    config, marks = write(tmp_path, ddp_timeout=3, save_steps=1), tmp_path / "marks"
    marks.mkdir()
    processes = start(config, marks, free_port())
    try:
        wait_for(marks / f"{silent}-{moment}", processes)
        processes[silent].send_signal(signal.SIGSTOP)
        began, other = time.monotonic(), processes[1 - silent]
        error = other.communicate(timeout=60)[1]
        assert other.returncode == 1 and time.monotonic() - began < 40
        assert f"rank {silent} did not answer" in error, error
        assert newest_checkpoint(tmp_path / "run" / "train") is not None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
