"""Fault 22: teacher and student are one object, the teacher requires gradients, is in training mode, or has dropout.

Refused, or corrected by the driver; the teacher's tensors hash the same before and after training, in memory and on the disk, and it
says the same of a batch whenever it is asked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastkd
from fastkd.methods.kd import KDOptions, KnowledgeDistillation
from fastkd.models.language_model import LanguageModel
from fastkd.sealed import file_sha256
from fastkd.train import run as driver
from tests import runs, tiny


def test_one_object_a_gradient_and_training_mode_are_refused() -> None:
    student, teacher = LanguageModel(tiny.bert()), LanguageModel(tiny.bert(seed=1)).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="teacher and the student are one object; load them separately"):
        KnowledgeDistillation(teacher, teacher, KDOptions(), 600)
    with pytest.raises(ValueError, match=r"teacher must be frozen: call \.eval\(\)\.requires_grad_\(False\)"):
        KnowledgeDistillation(student, teacher.train(), KDOptions(), 600)
    teacher.eval()
    next(teacher.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="teacher must be frozen"):
        KnowledgeDistillation(student, teacher, KDOptions(), 600)
    shared = LanguageModel(student.model)  # another wrapper of the same model, whose weights are to be trained
    with pytest.raises(ValueError, match="teacher must be frozen"):
        KnowledgeDistillation(student, shared.eval(), KDOptions(), 600)


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        found.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


METHODS: dict[str, Any] = {
    "kd": lambda folder, teacher: {"text": runs.write_text(folder)},
    "crild": lambda folder, teacher: {"dataset": runs.write_dataset(folder), "stages": {"ild": {}}},
    "glmd": lambda folder, teacher: {"task": runs.write_task(folder), "stages": {"task_words": {}}},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_the_same_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """It has dropout of one half, and the student starts from its very folder."""
    make = runs.bert_classifier if method == "crild" else runs.bert_teacher
    teacher_dir = make(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    before = {file.name: file_sha256(file) for file in Path(teacher_dir).iterdir()}
    held: list[Any] = []
    modes: list[bool] = []
    build = driver.build_stage

    def build_watched(spec: Any, inputs: Any) -> Any:
        stage = build(spec, inputs)
        teacher = stage.objective.teacher
        held.append((teacher, digest(teacher)))
        teacher.register_forward_pre_hook(lambda module, given: modes.extend(part.training for part in module.modules()))
        return stage

    monkeypatch.setattr(driver, "build_stage", build_watched)
    fastkd.distill(
        runs.settings(
            tmp_path,
            **{
                "method": method,
                "teacher_model_name_or_path": teacher_dir,
                "model_name_or_path": teacher_dir,
                "student": {},
                "learning_rate": 0.1,
                "warmup_steps": 0,
                **METHODS[method](tmp_path, teacher_dir),
            },
        )
    )
    teacher, digest_before = held[0]
    assert modes and not any(modes), "dropout was on in some forward of the teacher"
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert digest(teacher) == digest_before
    assert {file.name: file_sha256(file) for file in Path(teacher_dir).iterdir()} == before
