"""Fault 27: the clock jumps, the log cannot be written or was damaged, matplotlib is broken, TensorBoard is missing.

Clocks decide nothing: weights, losses and evaluations are bit for bit those of an undisturbed run. A log that cannot be written stops
the run cleanly, as a checkpoint that cannot be written does; checkpoints are kept, and with space the run goes on to the same end.
"""

from __future__ import annotations

import errno
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.train import curves
from fastkd.train.checkpoint import list_checkpoints, verify_checkpoint
from fastkd.train.log import RunLog
from tests import runs

STEPS = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("clocks")
    teacher, text = runs.bert_teacher(folder), runs.write_text(folder)
    return runs.settings(
        folder,
        method="kd",
        teacher_model_name_or_path=teacher,
        text=text,
        max_steps=STEPS,
        save_steps=1,
        dropout={"hidden_dropout_prob": 0.1},
    )


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any]) -> Path:
    fastkd.distill(settings)
    return Path(settings["output_dir"]) / "distill"


def ends_alike(whole: Path, other: Path) -> bool:
    same_weights = runs.same_bits(runs.weights(whole / "student"), runs.weights(other / "student"))
    return same_weights and runs.log_lines(whole) == runs.log_lines(other)


CLOCKS: dict[str, Callable[[], Any]] = {
    "backwards": lambda: map(float, itertools.count(1e9, -3600)),
    "forwards": lambda: map(float, itertools.count(0, 10**9)),
    "standing": lambda: itertools.repeat(5.0),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], whole: Path, clock: str
) -> None:
    for name in ("time", "perf_counter", "monotonic"):
        readings = CLOCKS[clock]()
        monkeypatch.setattr(time, name, lambda readings=readings: next(readings))
    fastkd.distill({**settings, "output_dir": str(tmp_path / "run")})
    monkeypatch.undo()
    assert ends_alike(whole, tmp_path / "run" / "distill")


@pytest.mark.parametrize("line", [1, STEPS])
def test_a_log_on_a_full_disk_stops_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], whole: Path, line: int
) -> None:
    settings = {**settings, "output_dir": str(tmp_path / "run")}
    write, written = RunLog.write, []

    def failing(log: RunLog, values: Any) -> None:
        written.append(values)
        if len(written) == line:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(log, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", failing)
        with pytest.raises(OSError, match="No space left on device"):
            fastkd.distill(settings)
    kept = list_checkpoints(tmp_path / "run" / "distill")
    assert [path.name for path in kept[:1]] == [f"checkpoint-{step}" for step in [line - 1] if step]
    for path in kept:
        verify_checkpoint(path)
    fastkd.distill(settings)
    assert ends_alike(whole, tmp_path / "run" / "distill")


def test_nothing_needs_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], whole: Path) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    fastkd.distill({**settings, "output_dir": str(tmp_path / "run")})
    assert ends_alike(whole, tmp_path / "run" / "distill")


@pytest.mark.parametrize("error", [RuntimeError("compiled against another ABI"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_stage_is_finished_without_its_curves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    whole: Path,
    error: Exception,
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(curves, "_figure", failing)
    settings = {**settings, "output_dir": str(tmp_path / "run")}
    first = fastkd.distill(settings)
    assert [str(error) in record.getMessage() for record in caplog.records if "is not drawn" in record.getMessage()] == [True]
    assert ends_alike(whole, tmp_path / "run" / "distill")
    assert fastkd.distill(settings) == first  # its seconds too: it is not trained again


def test_a_damaged_line_of_the_log_stops_neither_resuming_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], whole: Path
) -> None:
    settings = {**settings, "output_dir": str(tmp_path / "run"), "report_to": "tensorboard"}
    write = RunLog.write

    def failing(log: RunLog, values: Any) -> None:
        if values["step"] == STEPS:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(log, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", failing)
        with pytest.raises(OSError, match="No space left on device"):
            fastkd.distill(settings)
    log = tmp_path / "run" / "distill" / "log.jsonl"
    damaged = b"\0" * 20 + log.read_bytes()[20:]
    log.write_bytes(damaged)
    fastkd.distill(settings)
    assert log.read_bytes().startswith(damaged)
    assert runs.same_bits(runs.weights(whole / "student"), runs.weights(tmp_path / "run" / "distill" / "student"))
