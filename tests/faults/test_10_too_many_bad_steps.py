"""Fault 10: one bad step in a row more than `max_skipped_steps`.

The run stops with a sentence, the last good checkpoint is kept, and a run that has been mended goes on from it. Bad steps that are not
in a row are not too many.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.cli.main import main
from fastkd.train import run as driver
from fastkd.train.checkpoint import list_checkpoints, verify_checkpoint
from fastkd.train.config import read_config
from fastkd.train.log import read_log
from fastkd.train.schema import to_yaml
from tests import runs

STEPS, ALLOWED = 6, 2


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bad-steps")
    teacher, text = runs.bert_teacher(folder), runs.write_text(folder)
    more = {"max_steps": STEPS, "save_steps": 1, "non_finite": "skip", "max_skipped_steps": ALLOWED}
    return runs.settings(folder, method="kd", teacher_model_name_or_path=teacher, text=text, **more)


def spoil(patch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Multiply the loss of these calls by NaN."""
    build = driver.build_stage

    def build_spoiled(spec: Any, inputs: Any) -> Any:
        stage = build(spec, inputs)
        forward, made = stage.objective.forward, -1

        def spoiled(*arguments: Any) -> Any:
            nonlocal made
            made += 1
            return forward(*arguments) * (math.nan if made in calls else 1.0)

        stage.objective.forward = spoiled  # type: ignore[method-assign]
        return stage

    patch.setattr(driver, "build_stage", build_spoiled)


def test_one_too_many_in_a_row_stops_and_keeps_the_last_good(tmp_path: Path, configuration: dict[str, Any]) -> None:
    configuration = {**configuration, "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(to_yaml(read_config(configuration)))
    stage = tmp_path / "run" / "distill"
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, {2, *range(4, 4 + ALLOWED + 1)})  # one alone, and then one too many
        assert main(["train", str(tmp_path / "run.yaml")]) == 1
    skipped = [(line["step"], line["skipped"]) for line in read_log(stage / "log.jsonl") if "skipped" in line]
    assert skipped[:3] == [(3, 1), (4, 2), (4, 3)]
    assert [path.name for path in list_checkpoints(stage)] == ["checkpoint-3", "checkpoint-2"]
    verify_checkpoint(stage / "checkpoint-3")
    result = fastkd.distill(configuration)["distill"]
    assert result["steps"] == STEPS
    assert all(value.isfinite().all() for value in runs.weights(result).values())


def test_the_sentence_has_step_loss_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: dict[str, Any]) -> None:
    spoil(monkeypatch, {1, 2, 3})
    said = r"Step 2 of stage distill has loss nan .*weights were not updated, 3 times in a row\. Its training rows are \[\d+"
    with pytest.raises(RuntimeError, match=said):
        fastkd.distill({**configuration, "output_dir": str(tmp_path / "run")})
