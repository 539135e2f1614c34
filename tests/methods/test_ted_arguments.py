"""TED: its presets, and what is refused before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from fastkd.methods.ted import FilterTraining, TaskAwareDistillation, TEDOptions, check_filters
from fastkd.models.language_model import LanguageModel
from fastkd.models.task_model import TaskHead, build_task_model
from tests import tiny
from tests.methods.test_ted import HALF, IDS, banks, make_batch, model, models


def test_presets_and_the_backbones_dropout():
    strict, paper = TEDOptions().resolved(), TEDOptions(preset="paper").resolved()
    assert (strict.padding, strict.regression_kd, strict.filter_stage_dropout) == ("exclude", "mse", False)
    assert (paper.padding, paper.regression_kd, paper.filter_stage_dropout) == ("include", "batch_softmax", True)
    kept = TEDOptions(preset="paper", padding="exclude", filter_stage_dropout=False).resolved()
    assert (kept.padding, kept.regression_kd, kept.filter_stage_dropout) == ("exclude", "batch_softmax", False)
    batch = make_batch("classification")
    for preset, drops in (("strict", False), ("paper", True)):
        student = model("classification", 0, hidden_dropout_prob=0.5)
        objective = FilterTraining(student, TEDOptions(preset=preset, filter_output_dim=8), role="student", seed=0).train()
        assert objective.heads.training and student.training == drops
        objective.heads.eval()
        first, second = (objective(batch, objective.weight(batch)).item() for _ in range(2))
        assert (first != second) == drops
        assert not objective.eval().student.training


@pytest.mark.parametrize(
    "options",
    [
        {"kl_alpha": -1.0},
        {"kl_alpha": float("inf")},
        {"mse_alpha": float("nan")},
        {"temperature": 0.0},
        {"mask_probability": 1.0},
        {"filter_interval": 0},
        {"filter_output_dim": 0},
        {"layer_map": ()},
        {"layer_map": ((1, 2, 3),)},
        {"layer_map": ((0, 1),)},
        {"layer_map": ((1, 2), (1, 3))},
        {"layerwise": "lwd", "teacher_filters": "x"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TEDOptions(**options)


def test_what_cannot_be_compared_is_refused(tmp_path):
    student, teacher = models("classification")
    folders = banks(student, teacher, tmp_path)

    def refused(match: str, own: Any = student, other: Any = teacher, made: Any = folders, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            TaskAwareDistillation(own, other, TEDOptions(**{**HALF, **options}), filters=made, seed=0)

    refused("makes 2 filters .* makes 4", teacher_filter_interval=1)
    refused("student layer 3", layer_map=((3, 2),))
    refused("teacher layer 5", layer_map=((1, 5),))
    refused("The teacher has no filters", made={})
    refused("The student has no filters", made={"teacher_filters": folders["teacher_filters"]})
    refused(r"for layers \[1, 2\]", layer_map=((2, 2), (1, 4)))
    refused("for width 32, and width 48", made={**folders, "teacher_filters": folders["student_filters"]}, layer_map=((1, 1), (2, 2)))
    refused("would be 24 wide, the teacher's 48", filter_output_dim=24)
    refused("would be 24 wide, the teacher's 48", layerwise="lwd", filter_output_dim=24)
    banks(student, teacher, tmp_path / "narrow", width=20)
    refused("would be 48 wide, the teacher's 20", teacher_filters=str(tmp_path / "narrow" / "teacher"))
    other = build_task_model(tiny.bert(IDS).config, TaskHead("classification", 4), seed=0).eval().requires_grad_(False)
    refused("with 4 outputs, the student an encoder for classification with 3", other=other)
    refused("for regression with 1", other=models("regression")[1])
    refused("The teacher is a decoder for classification", other=models("decoder")[1])
    refused("The teacher is an encoder for text", other=models("masked")[1])
    short = LanguageModel(tiny.llama(IDS - 1, num_hidden_layers=4)).eval().requires_grad_(False)
    refused("59 vocabulary rows, the student 60", own=LanguageModel(tiny.llama(IDS)), other=short)
    for match, options in (("not known", {}), ("2 filters 48 wide", {"filter_output_dim": 24}), ("every 3th", {"filter_interval": 3})):
        with pytest.raises(ValueError, match=match):
            FilterTraining(student, TEDOptions(**options), role="student", seed=0, filters=folders if options else None)


def test_a_run_without_filters_is_refused_before_it_starts(tmp_path):
    made = banks(*models("classification"), tmp_path)
    check_filters(TEDOptions(), ["teacher_filters", "student_filters", "distill"])
    check_filters(TEDOptions(teacher_filters=str(made["teacher_filters"])), ["student_filters", "distill"])
    for options in (TEDOptions(layerwise="lwd"), TEDOptions(layerwise="none"), TEDOptions(mse_alpha=0.0)):
        check_filters(options, ["distill"])
    with pytest.raises(ValueError, match="The student has no filters"):
        check_filters(TEDOptions(), ["teacher_filters", "distill"])
    with pytest.raises(FileNotFoundError, match="no filters"):
        check_filters(TEDOptions(teacher_filters=str(tmp_path / "nowhere")), ["student_filters", "distill"])
