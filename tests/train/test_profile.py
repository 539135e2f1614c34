"""Shares of time: what is done is found in its own section, in forward and in backward, by a clock that the tests put in."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import record_function

import fastkd
from fastkd.train import loop, prefetch, profile
from fastkd.train.profile import SECTIONS, SHARES_FILE, TRACE_FILE, section, section_seconds
from tests import runs

PROBE = "probe"
MICROSECONDS = 50_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("profile")
    teacher, text = runs.bert_teacher(folder), runs.write_text(folder)
    return runs.settings(folder, method="kd", teacher_model_name_or_path=teacher, text=text, max_steps=4, profile_steps=2)


def shares(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Milliseconds of an optimizer step, by section."""
    fastkd.distill({**settings, "output_dir": str(folder)})
    written = folder / "distill" / "profile"
    assert json.loads((written / TRACE_FILE).read_text())["traceEvents"]
    found = json.loads((written / SHARES_FILE).read_text())
    assert found["steps"] == 2 and tuple(found["sections"]) == SECTIONS
    assert sum(entry["share"] for entry in found["sections"].values()) == pytest.approx(1)
    return {name: 1e3 * entry["seconds_per_step"] for name, entry in found["sections"].items()}


def probe() -> None:
    """An operation, and all that takes time by the clock of `probes_alone`."""
    with record_function(PROBE):
        pass


def probes_alone(events: Iterable[Any]) -> list[Any]:
    """The events of a trace, on a CPU, by a clock that runs in probes alone."""
    own = ("name", "sequence_nr", "fwd_thread", "cpu_parent")
    return [
        SimpleNamespace(
            **{name: getattr(event, name) for name in own},
            self_cpu_time_total=MICROSECONDS if event.name == PROBE else 0,
            self_device_time_total=0,
        )
        for event in events
    ]


class _ProbedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        probe()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _ProbedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        probe()
        return gradient


@pytest.mark.parametrize(
    ("done", "where"),
    [
        ("batches", "data"),
        ("student forward", "student backbone"),
        ("student backward", "student backbone"),
        ("teacher", "teacher backbone"),
        ("clipping", "optimizer"),
        ("row kernel", "losses: the rest"),
        ("saving", "evaluation and saving"),
    ],
)
def test_an_operation_is_found_in_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], done: str, where: str
) -> None:
    from transformers.models.bert.modeling_bert import BertEncoder

    def probed(owner: Any, name: str, applies: Any = lambda *_: True, then: Any = lambda x: probe() or x) -> None:
        before = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = before(*arguments, **options)
            return then(result) if applies(*arguments) else result

        monkeypatch.setattr(owner, name, call)

    def through(function: Any) -> Any:
        def apply(output: Any) -> Any:
            output.last_hidden_state = function.apply(output.last_hidden_state)
            return output

        return apply

    def is_student(model: Any, *_: Any) -> bool:
        return bool(model.training)

    if done == "batches":
        probed(prefetch.Prefetch, "take")
    elif done == "student forward":
        probed(BertEncoder, "forward", is_student, through(_ProbedForward))
    elif done == "student backward":
        probed(BertEncoder, "forward", is_student, through(_ProbedBackward))
    elif done == "teacher":
        probed(BertEncoder, "forward", lambda *x: not is_student(*x))
    elif done == "clipping":
        probed(loop, "gradient_norm")
    elif done == "row kernel":
        probed(sys.modules["fastkd.ops.fused_loss"], "_finish")
    else:
        probed(loop.StageTrainer, "_catch_up")
    monkeypatch.setattr(profile, "section_seconds", lambda events: section_seconds(probes_alone(events)))
    found = shares(settings, tmp_path)
    assert found == {name: pytest.approx(MICROSECONDS / 1e3 if name == where else 0.0) for name in SECTIONS}


def test_a_trace_changes_no_bit_and_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]) -> None:
    with caplog.at_level(logging.INFO, logger="fastkd"):
        found = shares(settings, tmp_path / "traced")
    assert all(found[name] > 0 for name in SECTIONS)
    assert all(name in caplog.text for name in SECTIONS)
    fastkd.distill({**settings, "output_dir": str(tmp_path / "plain"), "profile_steps": 0})
    assert not (tmp_path / "plain" / "distill" / "profile").exists()
    left, right = (tmp_path / name / "distill" for name in ("traced", "plain"))
    assert runs.same_bits(runs.weights(left / "student"), runs.weights(right / "student"))
    assert runs.log_lines(left) == runs.log_lines(right)


def test_a_section_costs_nothing_where_nothing_is_traced() -> None:
    assert type(section("data")).__name__ == "nullcontext"


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_ends_before_a_step_is_traced_ends_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], steps: int
) -> None:
    with caplog.at_level(logging.INFO, logger="fastkd"):
        result = fastkd.distill({**settings, "output_dir": str(tmp_path / "run"), "max_steps": steps})
    assert result["distill"]["steps"] == steps
    assert not (tmp_path / "run" / "distill" / "profile").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_an_error_is_not_hidden_by_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], step: int
) -> None:
    made = iter(range(1, 9))

    def breaks(*_: Any) -> None:
        if next(made) == step:
            raise RuntimeError("this one")

    monkeypatch.setattr(loop.StageTrainer, "_log", breaks)
    with pytest.raises(RuntimeError, match="this one"):
        shares(settings, tmp_path / "run")
