"""Fault 25: memory runs out in the first step, or in the first evaluation.

A message with what was expected to be needed and which keys make it smaller, and an exit code that is not zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.cli.main import main
from fastkd.train import preflight
from fastkd.train import run as driver
from fastkd.train.config import read_config
from fastkd.train.loop import StageTrainer
from fastkd.train.schema import to_yaml
from tests import runs

KNOBS = {"training": "per_device_train_batch_size", "evaluation": "per_device_eval_batch_size"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    teacher, text = runs.bert_teacher(tmp_path), runs.write_text(tmp_path)
    return runs.settings(tmp_path, method="kd", teacher_model_name_or_path=teacher, text=text, max_steps=2)


def short_of_memory(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nProcess 1 has ...")


def run_out(patch: pytest.MonkeyPatch, doing: str, fail: Callable[..., Any] = short_of_memory) -> None:
    """Let `fail` stand where a step or an evaluation is."""
    build = driver.build_stage

    def build_short(spec: Any, inputs: Any) -> Any:
        stage = build(spec, inputs)
        if doing == "evaluation":
            return dataclasses.replace(stage, evaluate=fail)
        stage.objective.forward = fail  # type: ignore[method-assign]
        return stage

    patch.setattr(driver, "build_stage", build_short)


@pytest.mark.parametrize("doing", KNOBS)
def test_a_shortage_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], doing: str) -> None:
    run_out(monkeypatch, doing)
    with pytest.raises(MemoryError) as error:
        fastkd.distill(settings)
    message = str(error.value)
    assert f"Stage distill ran out of memory in {doing}: CUDA out of memory. Tried to allocate 9.00 GiB." in message
    assert KNOBS[doing] in message and "moments of AdamW" in message and "together" in message


def test_the_command_ends_with_one_message_and_not_with_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_out(monkeypatch, "training")
    (tmp_path / "run.yaml").write_text(to_yaml(read_config(settings)))
    assert main(["train", str(tmp_path / "run.yaml")]) not in (0, None)
    assert "ran out of memory in training" in capsys.readouterr().err


def test_what_cannot_fit_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(StageTrainer, "_step", lambda *arguments: pytest.fail("a step was taken"))
    monkeypatch.setattr(preflight, "device_memory", lambda device: 1 << 16)
    with pytest.raises(ValueError, match=r"Stage distill needs more for the weights .* than the 0\.1 MiB that cpu has"):
        fastkd.distill(settings)


@needs_gpu
@pytest.mark.parametrize("doing", KNOBS)
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], doing: str) -> None:
    """A buffer larger than the GPU, asked for where the step or the evaluation is."""
    run_out(monkeypatch, doing, lambda *arguments: torch.empty(1 << 45, dtype=torch.uint8, device="cuda"))
    with pytest.raises(MemoryError, match=rf"ran out of memory in {doing}"):
        fastkd.distill({**settings, "use_cpu": False})
