"""Fault 8: NaN, +inf or 1e30 in student logits, teacher logits, hidden states, a label or a cached log-probability.

The weights are bit-unchanged, the counter goes up by one, and the log has the true loss and the ids of the rows. Where 1e30 gives a
finite loss and gradient there is nothing to refuse: the step is taken, clipped, and the weights stay finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.methods.teaching import TopKWords
from fastkd.train import run as driver
from fastkd.train.log import read_log
from tests import runs
from tests.runs import same_bits

BAD_STEP = 1  # the second of three
NUMBERS = {"nan": math.nan, "inf": math.inf, "1e30": 1e30}


def spoiled(tensor: Tensor, number: float) -> Tensor:
    """A copy with the number in one place."""
    copy = tensor.detach().clone() if not tensor.requires_grad else tensor.clone()
    copy.view(-1)[7 % copy.numel()] = number
    return copy


def at_student_head(objective: Any, change: Callable[..., tuple[Any, ...]]) -> None:
    """Change what the student's head is given: (hidden, weight, bias)."""
    forward = objective.student.forward

    def changed(ids: Tensor, mask: Tensor, at_head: Any) -> Any:
        return forward(ids, mask, lambda *arguments: at_head(*change(*arguments)))

    objective.student.forward = changed


def of_teacher(objective: Any, change: Callable[[Any], Any]) -> None:
    """Change what the teacher says of words."""
    teach = objective.teach
    objective.teach = lambda batch: dataclasses.replace(taught := teach(batch), words=change(taught.words))


def top_k(words: Any, number: float) -> TopKWords:
    """The same words as a cache of the largest has them, with the number among its log-probabilities."""
    logprobs = (torch.nn.functional.linear(words.hidden, words.weight, words.bias) / 2).log_softmax(-1)
    values, ids = logprobs.topk(8)
    return TopKWords(ids, spoiled(values, number), torch.log1p(-values.exp().sum(-1)), "bucket")


PLACES: dict[str, Callable[[Any, float], None]] = {
    "student logits": lambda objective, number: at_student_head(objective, lambda h, w, b: (h, w, spoiled(b, number))),
    "student hidden": lambda objective, number: at_student_head(objective, lambda h, w, b: (spoiled(h, number), w, b)),
    "teacher logits": lambda objective, number: of_teacher(
        objective, lambda words: dataclasses.replace(words, bias=spoiled(words.bias, number))
    ),
    "teacher hidden": lambda objective, number: of_teacher(
        objective, lambda words: dataclasses.replace(words, hidden=spoiled(words.hidden, number))
    ),
    "cached log-probability": lambda objective, number: of_teacher(objective, lambda words: top_k(words, number)),
}
TAKEN = {("student logits", "1e30"), ("teacher logits", "1e30"), ("teacher hidden", "1e30")}
"""Large, and no larger than float32 can hold: a step like any other."""
REFUSED = {("cached log-probability", "inf"), ("cached log-probability", "1e30")}
"""The logarithm of no probability: the loss refuses it."""


class Watch:
    """The objective of the stage, its weights before each step, and the rows of each batch; `spoil` acts on the bad step alone."""

    def __init__(self, patch: pytest.MonkeyPatch, spoil: Callable[[Any], None]) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rows: list[list[int]] = []
        build = driver.build_stage

        def build_watched(spec: Any, inputs: Any) -> Any:
            stage = build(spec, inputs)
            objective: Any = stage.objective
            begin_step, student, teach = objective.begin_step, objective.student.forward, objective.teach

            def watched(at: Any) -> None:
                begin_step(at)
                objective.student.forward, objective.teach = student, teach
                if len(self.weights) == BAD_STEP:
                    spoil(objective)
                self.weights.append({name: value.detach().clone() for name, value in objective.student.named_parameters()})

            def make_batch(rows: Any, generator: Any) -> Any:
                self.rows.append([int(row) for row in rows])
                return stage.make_batch(rows, generator)

            objective.begin_step = watched
            return dataclasses.replace(stage, make_batch=make_batch)

        patch.setattr(driver, "build_stage", build_watched)


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bad-numbers")
    teacher, text = runs.bert_teacher(folder), {**runs.write_text(folder), "eval_path": None}
    return runs.settings(
        folder, method="kd", teacher_model_name_or_path=teacher, text=text, non_finite="skip", max_steps=3, warmup_steps=0
    )


def is_skipped_once(folder: Path, watch: Watch) -> None:
    """Four batches for three steps; the bad one changed nothing and is in the log with its rows."""
    assert len(watch.weights) == 4
    assert same_bits(watch.weights[BAD_STEP], watch.weights[BAD_STEP + 1])
    assert not same_bits(watch.weights[BAD_STEP + 1], watch.weights[BAD_STEP + 2]), "and the next one is a step again"
    skipped = [line for line in read_log(folder / "log.jsonl") if "skipped" in line]
    assert [(line["step"], line["skipped"], line["rows"]) for line in skipped] == [(BAD_STEP + 1, 1, watch.rows[BAD_STEP])]
    assert not (math.isfinite(float(skipped[0]["loss"])) and math.isfinite(float(skipped[0]["grad_norm"])))
    assert [line["step"] for line in read_log(folder / "log.jsonl") if "learning_rate" in line] == [1, 2, 3]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_number_between_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: dict[str, Any], place: str, number: str
) -> None:
    watch = Watch(monkeypatch, lambda objective: PLACES[place](objective, NUMBERS[number]))
    if (place, number) in REFUSED:
        with pytest.raises(ValueError, match=r"topk_logprobs holds .*; give logarithms of probabilities"):
            fastkd.distill({**configuration, "output_dir": str(tmp_path / "run")})
        assert len(watch.weights) == BAD_STEP + 1 and not list(tmp_path.rglob("student"))
        return
    result = fastkd.distill({**configuration, "output_dir": str(tmp_path / "run")})
    assert all(value.isfinite().all() for value in runs.weights(result["distill"]).values())
    if (place, number) in TAKEN:
        assert len(watch.weights) == 3 and not same_bits(watch.weights[1], watch.weights[2])
    else:
        is_skipped_once(tmp_path / "run" / "distill", watch)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_bad_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    def spoil(objective: Any) -> None:
        forward = objective.student.forward

        def spoiling(batch: Any) -> Any:
            batch.labels[0] = NUMBERS[number]
            return forward(batch)

        objective.student.forward = spoiling

    watch = Watch(monkeypatch, spoil)
    settings = runs.settings(
        tmp_path,
        method="finetune",
        model_name_or_path=runs.bert_classifier(tmp_path, num_labels=1),
        tokenizer_name_or_path=runs.bert_classifier(tmp_path, num_labels=1),
        student={},
        dataset=runs.write_dataset(tmp_path, "glue/stsb"),
        non_finite="skip",
        max_steps=3,
        warmup_steps=0,
    )
    fastkd.distill(settings)
    is_skipped_once(tmp_path / "run" / "train", watch)
