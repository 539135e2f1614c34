"""Rows padded to max_length, as the published command of CR-ILD has them: their width everywhere, and what pads do to its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.methods.crild import CRILDOptions, IntermediateLayerDistillation
from fastkd.methods.mixup import MixedBatch
from fastkd.models.task_model import TaskModel
from fastkd.tasks.encoded import EncodedTask, TaskBatch, encode_task
from fastkd.tasks.labelled import LabelledExample, TaskDataset
from fastkd.train.config import DatasetArguments
from fastkd.train.data import dataset_rows, load_dataset
from fastkd.train.evaluate import evaluate_on_task
from tests import runs, tiny
from tests.oracle import assert_close, relative_error

LENGTH = 21


def encode(*, choices: tuple[str, ...] = (), **options: Any) -> EncodedTask:
    """Two rows of a few tokens; of a multiple choice two rows each."""
    examples = [LabelledExample(text, None, 1, choices) for text in ("return self", "the value of each key")]
    kind: Any = "multiple_choice" if choices else "classification"
    dataset = TaskDataset("toy", kind, {"train": examples, "validation": examples}, ("accuracy",), () if choices else ("no", "yes"))
    return encode_task(dataset, "train", tiny.wordpiece(), max_length=LENGTH, **options)


@pytest.mark.parametrize("choices", [(), ("a", "the first line")])
def test_batches_are_as_wide_as_max_length(choices: tuple[str, ...]) -> None:
    padded, plain = encode(choices=choices, pad_to_max_length=True), encode(choices=choices)
    for indices in ([0], [0, 1]):
        wide, narrow = padded.collate(indices), plain.collate(indices)
        width = narrow.input_ids.shape[1]
        assert wide.input_ids.shape == (narrow.input_ids.shape[0], LENGTH) and width < LENGTH
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(getattr(wide, name)[:, :width], getattr(narrow, name))
            assert not getattr(wide, name)[:, width:].any()  # the pad's id is 0
    assert padded.lengths.tolist() == [LENGTH, LENGTH] and max(plain.lengths) < LENGTH


def test_training_and_evaluation_rows_have_it_from_the_configuration(tmp_path: Path) -> None:
    for pad_to_max_length in (True, False):
        arguments = DatasetArguments(**runs.write_dataset(tmp_path) | {"max_length": 60}, pad_to_max_length=pad_to_max_length)
        rows = dataset_rows(arguments, load_dataset(arguments), tiny.wordpiece())
        assert rows.eval is not None
        assert {(part.collate([0]).input_ids.shape[1] == 60, part.lengths[0] == 60) for part in (rows.train, rows.eval)} == {
            (pad_to_max_length, pad_to_max_length)
        }


def test_the_evaluation_of_finished_models_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, forward = set(), TaskModel.forward

    def seen(self: TaskModel, batch: TaskBatch) -> Tensor:
        widths.add(batch.input_ids.shape[1])
        return forward(self, batch)

    monkeypatch.setattr(TaskModel, "forward", seen)
    arguments = DatasetArguments(**runs.write_dataset(tmp_path) | {"max_length": 60}, pad_to_max_length=True)
    made = evaluate_on_task({"student": runs.bert_classifier(tmp_path)}, arguments, use_cpu=True)
    assert widths == {60} and made["settings"]["pad_to_max_length"] is True


def relation(x: Tensor, y: Tensor) -> Tensor:
    """Mean over heads and query rows of the cross-entropy of softmaxes of x x^T and y y^T over all keys, pads among them."""
    own, other = (z @ z.mT / z.shape[-1] ** 0.5 for z in (x, y))
    return -(other.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()


def values(model: TaskModel, batch: TaskBatch, name: str) -> Tensor:
    """Q, K or V of the last layer, (B, heads, S, d)."""
    bert = model.model.bert
    with torch.no_grad():
        states = bert(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states[-2]
        projected = getattr(bert.encoder.layer[-1].attention.self, name)(states)
    return projected.unflatten(-1, (bert.config.num_attention_heads, -1)).transpose(1, 2)


def test_queries_keys_and_values_see_pads_as_keys() -> None:
    """So the published loss depends on how far rows are padded."""
    student, teacher = (TaskModel(classifier(seed)) for seed in (0, 1))
    objective = IntermediateLayerDistillation(
        student, teacher.eval().requires_grad_(False), CRILDOptions(preset="paper_script", mixup=False), seed=0
    ).eval()
    losses = []
    for task in (encode(pad_to_max_length=True), encode()):
        batch = task.collate([0, 1])
        mixed = MixedBatch(batch, None)
        loss = objective(mixed, objective.weight(mixed))
        truth = [relation(values(student, batch, name), values(teacher, batch, name)) for name in ("query", "key", "value")]
        assert_close(loss, torch.stack(truth).sum(), 1e-10)
        losses.append(loss)
    assert relative_error(losses[1], losses[0]) > 0.05


def classifier(seed: int) -> Any:
    from transformers import BertForSequenceClassification

    config = tiny.bert(seed=seed, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).config
    torch.manual_seed(seed)
    return BertForSequenceClassification(config).double()
