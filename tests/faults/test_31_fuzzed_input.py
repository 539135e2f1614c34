"""Fault 31: any input at all. Random changes of configurations and flags end as a command or as a refusal in a sentence.

`python -m tests.faults.fuzz` runs thousands of cases, and also judges the time that a refusal takes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fastkd.train import curves
from tests.faults import fuzz


def test_every_case_ends_as_a_command_or_a_sentence(tmp_path: Path) -> None:
    cases = list(fuzz.fuzz(150, tmp_path, seed=31))
    assert [str(case) for case in cases if case.faults] == []
    assert {0, 2} <= {case.code for case in cases}


def test_the_harness_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        (tmp_path / ".out.tmp-1").touch()
        return {}["loss"]  # type: ignore[no-any-return]

    monkeypatch.setattr(curves, "plot_logs", broken)
    case = fuzz.Case(tmp_path, ["plot", str(tmp_path)])
    fuzz.run_case(case)
    assert case.code == 1 and case.faults == ["left are .out.tmp-1"]
    monkeypatch.setattr("fastkd.cli.plot.doing", lambda what: fuzz.contextlib.nullcontext())
    fuzz.run_case(case)
    assert "'This is a bug in fastkd' is told" in case.faults
    monkeypatch.setenv("FASTKD_TRACEBACK", "1")
    fuzz.run_case(case)
    assert any(fault.startswith("an exception escaped: Traceback") for fault in case.faults)
