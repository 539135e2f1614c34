"""Fault 1: SIGKILL at random instants, during saves too.

Resuming works every time, from a checkpoint that verifies; nothing half-written is mistaken for a checkpoint; the end is that of an
undisturbed run, bit for bit, and so is that of its neighbours in the same folder and with the same cache. Here are a few kills;
kills.py delivers as many as one likes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.disturbed import SERVER


def kill_and_report(method: str, number: int, folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(vars(kills.kill_repeatedly(method, number, folder, num_train_epochs=2.0))))


@pytest.mark.parametrize(("method", "number"), [("glmd", 6), ("ted", 3), ("crild", 3)])
def test_killed_runs_end_bit_for_bit(tmp_path, method, number):
    harness = SERVER.Process(target=kill_and_report, args=(method, number, tmp_path))  # it forks, so it has to be without threads
    harness.start()
    harness.join(600)
    harness.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    assert report["kills"] == number and report["runs"] >= 1 and report["resumes"] >= 1
    assert report["neighbours"].keys() == {"cached", "beside"}
