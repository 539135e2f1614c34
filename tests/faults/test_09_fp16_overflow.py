"""Fault 9: a gradient overflows in fp16.

The loss scale halves, the step is skipped (weights and moments as they were), and the schedule does not advance: the steps that are
taken have the learning rates of an undisturbed run. A scale that is still being found is no reason to stop.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.train import run as driver
from fastkd.train.checkpoint import load_checkpoint
from fastkd.train.log import read_log
from tests import runs
from tests.runs import same_bits

STEPS = 4


def overflow(patch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """Make one gradient infinite in these micro-batches."""
    build = driver.build_stage

    def build_overflowing(spec: Any, inputs: Any) -> Any:
        stage, run = build(spec, inputs), -1

        def count(*_: Any) -> None:
            nonlocal run
            run += 1

        stage.objective.register_forward_pre_hook(count)
        weight = next(p for p in stage.objective.parameters() if p.requires_grad)
        weight.register_hook(lambda gradient: gradient * math.inf if run in batches else gradient)
        return stage

    patch.setattr(driver, "build_stage", build_overflowing)


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp16")
    teacher, text = runs.bert_teacher(folder), runs.write_text(folder)
    # A loss so small that no gradient overflows but those that are made to.
    options = {"temperature": 1.0, "label_weight": 0.01}
    more = {"options": options, "max_steps": STEPS, "save_steps": 1, "save_total_limit": STEPS, "warmup_steps": 1, "non_finite": "stop"}
    return runs.settings(folder, method="kd", teacher_model_name_or_path=teacher, text=text, fp16=True, **more)


def learning_rates(folder: Path) -> list[float]:
    return [line["learning_rate"] for line in read_log(folder / "log.jsonl") if "learning_rate" in line]


def scale(checkpoint: Path) -> float:
    return load_checkpoint(checkpoint)[1]["scaler"]["scale"]


def test_the_scale_halves_and_the_schedule_waits(tmp_path: Path, configuration: dict[str, Any]) -> None:
    folders = []
    for name, batches in (("whole", set()), ("overflowed", {1, 3})):
        with pytest.MonkeyPatch.context() as patch:
            overflow(patch, batches)
            fastkd.distill({**configuration, "output_dir": str(tmp_path / name)})
        folders.append(tmp_path / name / "distill")
    whole, overflowed = folders
    assert learning_rates(overflowed) == learning_rates(whole) and len(learning_rates(whole)) == STEPS
    skipped = [line for line in read_log(overflowed / "log.jsonl") if "skipped" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(2, 1), (3, 2)]
    assert all(line["grad_norm"] in ("inf", "nan") for line in skipped)
    scales = [scale(overflowed / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert scales == [scales[0], scales[0] / 2, scales[0] / 4, scales[0] / 4] and scale(whole / "checkpoint-4") == scales[0]
    first = [load_checkpoint(folder / "checkpoint-1")[0] for folder in folders]
    assert same_bits(first[0]["model"], first[1]["model"]) and same_bits(first[0]["optimizer"], first[1]["optimizer"])


def test_the_scale_goes_down_to_one_and_only_then_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: dict[str, Any]
) -> None:
    """Every batch from the second on overflows, far more often than `max_skipped_steps`."""
    overflow(monkeypatch, set(range(1, 100)))
    with pytest.raises(RuntimeError, match=r"Step 2 of stage distill has loss \d.* gradient norm (inf|nan)"):
        fastkd.distill({**configuration, "output_dir": str(tmp_path / "run"), "max_skipped_steps": 1})
    lines = read_log(tmp_path / "run" / "distill" / "log.jsonl")
    assert len([line for line in lines if "skipped" in line]) == int(math.log2(scale(tmp_path / "run" / "distill" / "checkpoint-1")))
    assert [path.name for path in (tmp_path / "run" / "distill").glob("checkpoint-*")] == ["checkpoint-1"]
