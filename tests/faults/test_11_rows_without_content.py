"""Fault 11: an empty text, a row that is all pads, labels that are all -100, a row of one token, a row that is too long.

What holds nothing contributes exactly zero: the loss and every gradient are those of the batch without it, to the bit of its own terms.
The graph stays connected, and 0/0 is nowhere NaN. What is too long is cut, or refused before the first step.
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.methods.glmd import GLMDOptions, WordPrediction
from fastkd.methods.kd import KDOptions, KnowledgeDistillation
from fastkd.methods.language_modeling import LanguageModeling
from fastkd.models.language_model import LanguageModel
from fastkd.tasks.text import IGNORE_INDEX, TextBatch
from fastkd.train.log import read_log
from tests import runs, tiny

WIDTH = 8


def models(causal: bool) -> tuple[LanguageModel, LanguageModel]:
    make = tiny.llama if causal else tiny.bert
    return LanguageModel(make(100, 0)), LanguageModel(make(100, 1)).eval().requires_grad_(False)


def objective(method: str, causal: bool) -> Any:
    student, teacher = models(causal)
    if method == "lm":
        return LanguageModeling(student)
    if method == "kd":
        return KnowledgeDistillation(student, teacher, KDOptions(), tokens=100)
    return WordPrediction(student, teacher, GLMDOptions(temperature=2.0))


def batch(*lengths: int) -> TextBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (len(lengths), WIDTH), generator=generator)
    mask = (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.bool(), ids.roll(-1, 1), IGNORE_INDEX)
    labels[:, -1] = IGNORE_INDEX
    return TextBatch(ids * mask, mask, labels)


def part(of: TextBatch, rows: list[int]) -> TextBatch:
    return TextBatch(*(getattr(of, field.name)[rows] for field in fields(of)))


def result(asked: Any, given: TextBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Divided by this number, whatever it is that the objective counts."""
    asked.zero_grad()
    counted = asked.weight(given)
    loss = asked(given, np.full_like(counted, denominator) if isinstance(counted, np.ndarray) else denominator)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in asked.named_parameters() if p.requires_grad and p.grad is not None}


METHODS = ["lm", "kd", "glmd"]


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_gives_exactly_zero_with_the_graph(method: str, causal: bool) -> None:
    asked = objective(method, causal)
    empty = batch(0, 0)
    if method != "lm":
        assert not np.any(asked.weight(empty))
    loss, gradients = result(asked, empty, 1.0)
    assert loss == 0 and gradients
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_pads_adds_nothing_to_the_others(method: str, causal: bool) -> None:
    asked = objective(method, causal)
    mixed = batch(5, 0, WIDTH)
    assert np.array_equal(asked.weight(mixed), asked.weight(part(mixed, [0, 2])))
    loss, gradients = result(asked, mixed, 7.0)
    expected, expected_gradients = result(asked, part(mixed, [0, 2]), 7.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_no_label_at_all_adds_nothing(causal: bool) -> None:
    unlabelled = batch(5, WIDTH)
    unlabelled = replace(unlabelled, labels=torch.full_like(unlabelled.labels, IGNORE_INDEX))
    hard = objective("lm", causal)
    assert hard.weight(unlabelled) == 0
    loss, gradients = result(hard, unlabelled, 1.0)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    with_labels, without = (KnowledgeDistillation(*models(causal), KDOptions(label_weight=weight), tokens=100) for weight in (1.0, 0.0))
    assert result(with_labels, unlabelled, 3.0)[0] == result(without, unlabelled, 3.0)[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_one_token(method: str) -> None:
    """A decoder predicts nothing from it with hard labels; a teacher still says what comes next."""
    asked, single = objective(method, True), batch(1)
    single = replace(single, labels=torch.full_like(single.labels, IGNORE_INDEX))
    loss, gradients = result(asked, single, 1.0)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    assert (loss == 0) == (method == "lm")


@pytest.mark.parametrize(("make", "empty"), [(runs.bert_teacher, 2), (runs.llama_teacher, 1)], ids=["encoder", "decoder"])
def test_whole_runs_on_such_rows(tmp_path: Path, make: Any, empty: int, caplog: pytest.LogCaptureFixture) -> None:
    """Empty texts (a space is a token to a decoder) are dropped and counted, long ones cut into rows; no number is NaN."""
    lines = ["", "if", " ", "x " * 60, *tiny.lines()[:8]]
    text = runs.write_text(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text.update(path=str(tmp_path / "rows.jsonl"), layout="rows")
    with caplog.at_level(logging.INFO, logger="fastkd"):
        configuration = runs.settings(tmp_path, method="kd", teacher_model_name_or_path=make(tmp_path), text=text, max_steps=6)
        fastkd.distill(configuration)
    assert f"cut into several rows, {empty} empty texts dropped" in caplog.text
    logged = [line["loss"] for line in read_log(tmp_path / "run" / "distill" / "log.jsonl") if "loss" in line]
    assert len(logged) == 6 and all(isinstance(loss, float) and loss > 0 for loss in logged)


def test_rows_longer_than_the_models_are_refused(tmp_path: Path) -> None:
    text = {**runs.write_text(tmp_path), "max_length": 200, "layout": "packed"}
    configuration = runs.settings(tmp_path, method="kd", teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=text)
    with pytest.raises(ValueError, match="takes 200 positions and the student has 128; lower the max_length"):
        fastkd.distill(configuration)
