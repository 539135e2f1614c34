"""TED against the numbers of its authors' own code, and what their transformers makes of pads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastkd.methods.finetune import FineTuning
from fastkd.methods.registry import METHODS, StageInputs
from fastkd.methods.ted import FilterTraining, TaskAwareDistillation, TEDOptions
from fastkd.models.deberta import zero_context_at_pads
from fastkd.models.filters import FilterBank, FilterShape
from fastkd.models.task_model import TaskModel
from fastkd.tasks.encoded import TaskBatch
from tests import tiny
from tests.authors import FOLDER, Case, assert_authors, cases
from tests.oracle import assert_close, relative_error

LAYERS = {"student": (1, 2), "teacher": (2, 4)}
DISTILL = cases("ted", "distill")
PADDED = [case for case in DISTILL if case["zero_context_at_pads"]]


def task_model(case: Case, role: str) -> TaskModel:
    """The backbone in the folder, with the head of the case's kind."""
    from transformers import DebertaV2Config, DebertaV2ForQuestionAnswering, DebertaV2ForSequenceClassification

    kind = case["kind"]
    if kind == "classification":
        return TaskModel(DebertaV2ForSequenceClassification.from_pretrained(FOLDER / "ted" / role, dtype=torch.float64))
    config = DebertaV2Config.from_pretrained(FOLDER / "ted" / role, num_labels=1 if kind == "regression" else 2)
    architecture = DebertaV2ForSequenceClassification if kind == "regression" else DebertaV2ForQuestionAnswering
    model = architecture.from_pretrained(FOLDER / "ted" / role, config=config, dtype=torch.float64, ignore_mismatched_sizes=True)
    head = case.under(f"heads/{role}/{kind}/")
    assert not model.load_state_dict(head, strict=False).unexpected_keys and head
    return TaskModel(model, kind)


def rows(case: Case) -> TaskBatch:
    inputs = case.under(case["batch"])
    return TaskBatch(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], case.tensor(case["labels"]))


def fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Load the weights of a part whose names begin with `prefix`, and return its parameters by the authors' names."""
    module.load_state_dict({name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})
    return {prefix + name: p for name, p in module.named_parameters()}


def fill_bank(bank: FilterBank, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {}
    for k in range(len(bank.shape.layers)):
        trained |= fill(bank.last[k], tensors, f"filters.{k}.last.")
        if bank.shape.nonlinear:
            trained |= fill(bank.first[k][0], tensors, f"filters.{k}.first.")
    return trained


@pytest.mark.parametrize("case", cases("ted", "teacher_filters"), ids=lambda case: case.name)
def test_filter_training(case: Case) -> None:
    options = TEDOptions(preset=case["preset"], **case["options"])
    objective = FilterTraining(task_model(case, "teacher"), options, role="teacher", seed=0).double().train()
    tensors = case.under(case["prefix"])
    trained = fill_bank(objective.filters, tensors)
    for k, head in enumerate(objective.heads):
        trained |= fill(head.dense, tensors, f"heads.{k}.dense.") | fill(head.classifier, tensors, f"heads.{k}.classifier.")
    batch = rows(case)
    assert_authors(case, objective(batch, objective.weight(batch)), trained)


def distillation(case: Case, folder: Path, **changes: Any) -> tuple[TaskAwareDistillation, dict[str, Tensor]]:
    """The objective with the authors' weights, and what it trains by the authors' names."""
    options = TEDOptions(preset=case["preset"], **case["options"], **changes)
    models = {role: task_model(case, role) for role in LAYERS}
    filters = {}
    for role, layers in LAYERS.items() if options.needs_filters else ():
        bank = FilterBank(FilterShape(layers, models[role].model.config.hidden_size, 12), torch.float64)
        fill_bank(bank, case.under(f"{role}_filters/"))
        filters[f"{role}_filters"] = folder / role
        bank.save(folder / role)
    teacher = models["teacher"].eval().requires_grad_(False)
    objective = TaskAwareDistillation(models["student"], teacher, options, seed=0, filters=filters).train()
    trained = dict(models["student"].model.named_parameters()) | fill_bank(objective.filters, case.under("student_filters/"))
    return objective, trained


@pytest.mark.parametrize("case", DISTILL, ids=lambda case: case.name)
def test_distillation(case: Case, tmp_path: Path) -> None:
    objective, trained = distillation(case, tmp_path)
    batch = rows(case)
    assert_authors(case, objective(batch, objective.weight(batch)), trained)
    for name, truth in zip(("labels", "divergence", "states"), case.own("terms"), strict=True):
        assert_close(objective.terms[name], truth, case["tolerance"]["value"], name)


@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.name)
def test_without_zero_context_pads_make_another_loss(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.methods.ted.zero_context_at_pads", lambda *models: nullcontext())
    objective, _ = distillation(case, tmp_path)
    batch = rows(case)
    assert relative_error(objective(batch, objective.weight(batch)), case.own("loss")) > 1e-3


# ---- what pads are given, by itself


def questions(role: str = "student") -> tuple[TaskModel, TaskBatch, Tensor]:
    """A model for questions, rows with pads, and where their tokens are."""
    case = next(case for case in PADDED if case["kind"] == "question_answering")
    batch = rows(case)
    return task_model(case, role).eval(), batch, batch.attention_mask.bool()


def contexts(model: nn.Module, batch: TaskBatch) -> list[Tensor]:
    """What every layer's attention hands on, (B, S, H)."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        for name, module in model.named_modules()
        if name.endswith("attention.output")
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_pads_have_no_context_inside_the_block_alone_and_tokens_have_theirs() -> None:
    model, batch, tokens = questions()
    before = contexts(model, batch)
    with zero_context_at_pads(model):
        inside = contexts(model, batch)
    with pytest.raises(KeyError), zero_context_at_pads(model):
        raise KeyError
    assert len(before) == 2
    for plain, zeroed, after in zip(before, inside, contexts(model, batch), strict=True):
        assert bool(zeroed[~tokens].eq(0).all()) and bool(plain[~tokens].ne(0).any())
        assert_close(zeroed[tokens], plain[tokens], 1e-14)
        assert torch.equal(after, plain)


@pytest.mark.parametrize("kind", ["deberta", "bert"])
def test_the_first_deberta_is_one_of_them_and_bert_is_not(kind: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForQuestionAnswering

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2} if kind == "deberta" else {}
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(CONFIG_MAPPING[kind](**shape, **relative, initializer_range=0.3))
    wrapped, (_, batch, tokens) = TaskModel(model.eval(), "question_answering"), questions()
    with zero_context_at_pads(wrapped):
        found = contexts(wrapped, batch)
    assert len(found) == 2 and all(bool(context[~tokens].eq(0).all()) == (kind == "deberta") for context in found)


def questions_loss(model: TaskModel, batch: TaskBatch) -> Tensor:
    """The labels' loss, whose softmax is over pads too, in the authors' transformers."""
    with zero_context_at_pads(model), torch.no_grad():
        scores = model(batch)
    return functional.cross_entropy(scores.mT, batch.labels)


@pytest.mark.parametrize(("preset", "is_theirs"), [("paper", True), ("strict", False)])
def test_stages_on_labels_give_pads_the_same_states(preset: Any, is_theirs: bool) -> None:
    model, batch, _ = questions()
    for name in ("teacher", "student"):
        spec = next(stage for stage in METHODS["ted"].stages if stage.name == name)
        rows: Any = None
        inputs = StageInputs(model, None, tiny.wordpiece(), TEDOptions(preset=preset), rows, 1, 0)
        objective = spec.build(inputs).eval()
        assert isinstance(objective, FineTuning)
        error = relative_error(objective(batch, objective.weight(batch)), questions_loss(model, batch))
        assert error < 1e-12 if is_theirs else error > 1e-4


@pytest.mark.parametrize(("padding", "is_theirs"), [("include", True), ("exclude", False)])
def test_filters_for_questions_see_pads_with_those_states(padding: Any, is_theirs: bool) -> None:
    model, batch, _ = questions()
    states: list[Tensor] = []
    layer = model.model.deberta.encoder.layer[1]
    with layer.register_forward_hook(lambda module, inputs, output: states.append(output[0])), zero_context_at_pads(model):
        model(batch)
    objective = FilterTraining(model, TEDOptions(padding=padding, filter_interval=2, filter_output_dim=6), role="student", seed=0)
    with torch.no_grad():
        scores = objective.heads.scores(0, objective.filters.filtered(0, states[0]))
        truth = functional.cross_entropy(scores.mT, batch.labels)
        error = relative_error(objective.eval()(batch, objective.weight(batch)), truth)
    assert error < 1e-12 if is_theirs else error > 1e-6
