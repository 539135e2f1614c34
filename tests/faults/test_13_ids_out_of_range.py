"""Fault 13: a token id or a label that is negative, or not below the size of the vocabulary.

An error with the row's index, raised on the host where the data are read and where the ops are called: never a device's assertion as
the first symptom.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkd
from fastkd.ops.linear_cross_entropy import linear_cross_entropy
from fastkd.train.loop import StageTrainer
from tests import runs

TOKENS, WIDTH, VOCABULARY = 4, 3, 11


@pytest.mark.parametrize("bad", [-1, 600, 2**31 - 1])
def test_a_token_id_in_a_cache_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """It came there after the files were verified, so only the ids themselves can tell."""
    settings = runs.settings(
        tmp_path, method="kd", teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=runs.write_text(tmp_path), max_steps=1
    )
    run = StageTrainer.run

    def run_on_spoiled_rows(trainer: StageTrainer) -> Any:
        for file in (tmp_path / "cache" / "tokens").glob("*/ids.npy"):
            np.lib.format.open_memmap(file, mode="r+")[:] = bad
        return run(trainer)

    monkeypatch.setattr(StageTrainer, "run", run_on_spoiled_rows)
    with pytest.raises(ValueError, match=rf"Row \d+ of .*cache.tokens.* holds ids from {bad} to {bad}, and the tokenizer has 600"):
        fastkd.distill(settings)


class Stopped(Exception):
    """A run that has prepared everything and taken no step."""


def stop() -> None:
    raise Stopped


@pytest.mark.parametrize("label", [-1, 2, 7])
def test_a_label_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: int) -> None:
    monkeypatch.setattr(StageTrainer, "__init__", lambda *arguments, **options: stop())
    dataset = runs.write_dataset(tmp_path)
    file = Path(dataset["path"]) / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[5]["label"] = label
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = runs.bert_classifier(tmp_path)
    settings = runs.settings(
        tmp_path, method="finetune", model_name_or_path=teacher, tokenizer_name_or_path=teacher, student={}, dataset=dataset
    )
    with pytest.raises(ValueError, match=rf"Row 5 .*train\.jsonl.*column 'label' holds the label {label}"):
        fastkd.distill(settings)


def head(*leading: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*leading, WIDTH, generator=generator), torch.randn(VOCABULARY, WIDTH, generator=generator)


@pytest.mark.parametrize("bad", [-1, -101, VOCABULARY, 2**40])
def test_a_label_in_a_loss(bad: int) -> None:
    labels = torch.tensor([0, -100, bad, VOCABULARY - 1])
    said = rf"labels holds {bad} at row 2, outside the vocabulary of {VOCABULARY}"
    hidden, weight = head(TOKENS)
    logits = hidden @ weight.T
    with pytest.raises(ValueError, match=said):
        fastkd.linear_kl_div(hidden, weight, hidden, weight, labels=labels, label_weight=1.0)
    with pytest.raises(ValueError, match=said):
        fastkd.kl_div(logits, logits, labels=labels, label_weight=1.0)
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("bad", [-2, VOCABULARY])
def test_an_id_of_a_sparse_teacher(bad: int) -> None:
    hidden, weight = head(TOKENS)
    ids = torch.tensor([[0, 1], [2, 3], [4, bad], [5, -1]])
    with pytest.raises(ValueError, match=rf"topk_ids .*student's {VOCABULARY} rows"):
        fastkd.topk_kl_div(hidden, weight, ids, torch.full((TOKENS, 2), -1.0), torch.full((TOKENS,), -1.0))


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_a_row_of_the_teachers_head(bad: int) -> None:
    hidden, weight = head(TOKENS)
    rows: Any = torch.arange(VOCABULARY)
    rows[3] = bad
    with pytest.raises(ValueError, match=rf"vocab_index names row .* at place \d+, outside the teacher's {VOCABULARY} rows"):
        fastkd.linear_kl_div(hidden, weight, hidden, weight, vocab_index=rows)
