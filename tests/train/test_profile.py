"""Shares of time: what is made slow is found in its own section, in forward and in backward."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.train import loop
from fastkd.train.profile import SECTIONS, SHARES_FILE, TRACE_FILE, section
from tests import runs

DELAY = 0.05


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("profile")
    teacher, text = runs.bert_teacher(folder), runs.write_text(folder)
    return runs.settings(folder, method="kd", teacher_model_name_or_path=teacher, text=text, max_steps=4, profile_steps=2)


def shares(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Milliseconds of an optimizer step, by section."""
    fastkd.distill({**settings, "output_dir": str(folder)})
    profile = folder / "distill" / "profile"
    assert json.loads((profile / TRACE_FILE).read_text())["traceEvents"]
    found = json.loads((profile / SHARES_FILE).read_text())
    assert found["steps"] == 2 and tuple(found["sections"]) == SECTIONS
    assert sum(entry["share"] for entry in found["sections"].values()) == pytest.approx(1)
    return {name: 1e3 * entry["seconds_per_step"] for name, entry in found["sections"].items()}


class _SlowForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(DELAY)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(DELAY)
        return gradient


@pytest.mark.parametrize(
    ("slow", "where"),
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
def test_time_is_found_where_it_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], slow: str, where: str
) -> None:
    from transformers.models.bert.modeling_bert import BertEncoder

    from fastkd.ops import chunked

    def slowed(owner: Any, name: str, applies: Any = lambda *_: True, then: Any = lambda x: time.sleep(DELAY) or x) -> None:
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

    if slow == "batches":
        slowed(loop.StageTrainer, "_micro_batch")
    elif slow == "student forward":
        slowed(BertEncoder, "forward", is_student, through(_SlowForward))
    elif slow == "student backward":
        slowed(BertEncoder, "forward", is_student, through(_SlowBackward))
    elif slow == "teacher":
        slowed(BertEncoder, "forward", lambda *x: not is_student(*x))
    elif slow == "clipping":
        slowed(loop, "gradient_norm")
    elif slow == "row kernel":
        slowed(chunked, "_loop")
    else:
        slowed(loop.StageTrainer, "_catch_up")
    found = shares(settings, tmp_path)
    assert found[where] > 0.9e3 * DELAY
    assert max(found, key=lambda name: found[name]) == where


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
