"""CR-ILD against the numbers of its authors' own code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.methods.crild import CRILDOptions, IntermediateLayerDistillation, LogitDistillation, Settings
from fastkd.methods.mixup import MixedBatch
from fastkd.methods.objective import Position
from fastkd.models.task_model import TaskModel
from fastkd.ops.projected_mse import projected_mse
from fastkd.ops.relation_kl import RelationTarget, relation_kl
from fastkd.tasks.encoded import TaskBatch
from tests.authors import FOLDER, Case, assert_authors, assert_gradients, cases
from tests.oracle import assert_close, wrong_gradients

ILD = cases("crild", "ild")


def rows(case: Case) -> TaskBatch:
    inputs = case.under("batch/")
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
    return TaskBatch(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], labels)


def task_model(role: str) -> TaskModel:
    from transformers import BertForSequenceClassification

    return TaskModel(BertForSequenceClassification.from_pretrained(FOLDER / "crild" / role, dtype=torch.float64))


def intermediate(case: Case) -> tuple[IntermediateLayerDistillation, dict[str, Tensor]]:
    """The objective with the authors' weights, and what it trains by the authors' names."""
    options = CRILDOptions(preset=case["preset"], **case["options"])
    student, teacher = task_model("student"), task_model("teacher").eval().requires_grad_(False)
    objective = IntermediateLayerDistillation(student, teacher, options, seed=0).train()
    trained: dict[str, Tensor] = dict(student.model.named_parameters())
    if objective.fit_dense is not None:
        objective.fit_dense.load_state_dict(case.under("fit_dense/"))
        trained |= {f"fit_dense.{name}": p for name, p in objective.fit_dense.named_parameters()}
    return objective, trained


def follow_steps(case: Case, objective: IntermediateLayerDistillation, trained: dict[str, Tensor]) -> None:
    """The authors' optimizer steps, each of which the running average follows from where the student began."""
    assert objective.average is not None
    for name, average in objective.average.items():
        average.load_state_dict(getattr(objective, name).state_dict())
    for step in range(case["ema_steps"]):
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(case.own(f"after_step/{step}/{name}"))
        objective.end_step()


@pytest.mark.parametrize("case", ILD, ids=lambda case: case.name)
def test_intermediate_layers(case: Case) -> None:
    objective, trained = intermediate(case)
    if case["ema_steps"]:
        follow_steps(case, objective, trained)
        assert objective.average is not None
        averages = {name.replace("student.model.", ""): p for name, p in objective.average.named_parameters()}
        for name, truth in case.under(case["prefix"] + "average/").items():
            assert_close(averages[name], truth, case["tolerance"]["value"], name)
    objective.begin_step(Position(step=0, total_steps=10, epoch=case["epoch"], total_epochs=case["total_epochs"]))
    batch = MixedBatch(rows(case), case["mix"])
    assert_authors(case, objective(batch, objective.weight(batch)), trained)


@pytest.mark.parametrize("case", [case for case in ILD if case.gradients("states/grad/")], ids=lambda case: case.name)
def test_the_ops_from_the_authors_states(case: Case) -> None:
    settings = CRILDOptions(preset=case["preset"], **case["options"]).resolved()
    student = {name: nn.Parameter(state.clone()) for name, state in case.under(case["prefix"] + "states/student/").items()}
    terms = [
        _hidden(case, settings, student) if letter == "H" else _relation(case, settings, letter, student) for letter in settings.objects
    ]
    assert_authors(case, torch.stack(terms).sum(), student, "states/grad/")


def _consistency(case: Case, settings: Settings) -> list[tuple[dict[str, Tensor], float, Tensor]]:
    """States of the clean rows and of their partners, each with its weight and its tokens."""
    clean, own, mix = case.under(case["prefix"] + "states/clean/"), case.tensor("batch/attention_mask").bool(), case["mix"]
    share = settings.consistency_weight * case["epoch"] / case["total_epochs"]
    partner = {name: state.flip(0) for name, state in clean.items()}
    return [(clean, share * mix, own), (partner, share * (1 - mix), own.flip(0))] if clean else []


def _relation(case: Case, settings: Settings, letter: str, student: dict[str, Tensor]) -> Tensor:
    """Mean over heads and all positions; pads are no keys in A alone."""
    own, teacher = case.tensor("batch/attention_mask").bool(), case.under(case["prefix"] + "states/teacher/")
    drawn_to = [(teacher, 1.0, own), *(_consistency(case, settings) if letter in settings.consistency_objects else [])]
    q, k = ("q", "k") if letter == "A" else (letter.lower(), letter.lower())
    targets = [RelationTarget(x[q], x[k], weight=weight, key_mask=own if letter == "A" else None) for x, weight, own in drawn_to]
    loss = relation_kl(student[q], student[k], None, None, targets=targets, form="cross_entropy", reduction="sum")
    return loss / (student[q].shape[1] * own.numel())


def _hidden(case: Case, settings: Settings, student: dict[str, Tensor]) -> Tensor:
    """Squared distance through fit_dense, mean over width and all positions."""
    dense = case.tensor("fit_dense/weight"), case.tensor("fit_dense/bias")
    teacher = case.under(case["prefix"] + "states/teacher/")
    drawn_to: list[tuple[Any, float, Any]] = [(teacher, 1.0, (None, None))]
    drawn_to += [(states, weight, dense) for states, weight, _ in _consistency(case, settings)]
    distances = [
        weight
        * projected_mse(student["hidden"], dense[0], x["hidden"], own[0], student_bias=dense[1], teacher_bias=own[1], reduction="sum")
        for x, weight, own in drawn_to
    ]
    return torch.stack(distances).sum() / case.tensor("batch/attention_mask").numel()


class Scores(nn.Module):
    """A model that says the same whatever it reads."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores.clone())
        self.config = SimpleNamespace(num_labels=scores.shape[-1])

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.scores)


@pytest.mark.parametrize("case", cases("crild", "kd"), ids=lambda case: case.name)
def test_logits(case: Case) -> None:
    models: list[Any] = [Scores(case.own(f"{role}_logits")) for role in ("student", "teacher")]
    student, teacher = (TaskModel(model, case["kind"]) for model in models)
    options = CRILDOptions(preset=case["preset"], **case["options"])
    objective = LogitDistillation(student, teacher.eval().requires_grad_(False), options)
    batch = rows(case)
    assert_authors(case, objective(batch, objective.weight(batch)), {"student_logits": student.model.scores})


def test_the_comparison_refuses_wrong_gradients() -> None:
    case = ILD[0]
    expected, tolerance = case.gradients(), case["tolerance"]["gradient"]
    assert_gradients(expected, expected, tolerance)
    name = max(expected, key=lambda name: float(expected[name].norm()))
    for wrong in wrong_gradients(expected[name]).values():
        with pytest.raises(AssertionError, match=name):
            assert_gradients({**expected, name: wrong}, expected, tolerance)
    with pytest.raises(AssertionError, match="unexpected"):
        assert_gradients({**expected, "unexpected": expected[name]}, expected, tolerance)
