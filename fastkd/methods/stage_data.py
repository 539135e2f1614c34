"""What a stage trains on and how its student is judged: text by perplexity, cloze questions and labelled tasks by their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.language_model import LanguageModel
from ..models.task_model import TaskModel
from ..tasks.cloze import ClozeBatch, Example, collate
from ..tasks.cloze_task import ClozeTask
from ..tasks.encoded import EncodedTask
from ..tasks.labelled import TaskDataset
from ..tasks.metrics import accuracy, f1_macro
from ..tasks.text import Masking, collate_text
from ..tasks.token_rows import pad_id as pad_id_of
from ..tasks.tokenized import TokenRows
from .objective import Batch
from .perplexity import perplexity


@dataclass(frozen=True)
class TextRows:
    """Unlabeled text."""

    train: TokenRows
    eval: TokenRows | None

    @property
    def longest(self) -> int:
        return max(int(rows.lengths.max()) for rows in (self.train, self.eval) if rows is not None)


@dataclass(frozen=True)
class ClozeRows:
    """Cloze questions."""

    task: ClozeTask
    train: Sequence[Example]
    eval: Sequence[Example]

    @property
    def longest(self) -> int:
        return max(len(ids) for rows in (self.train, self.eval) for example in rows for ids in example.sequences)


@dataclass(frozen=True)
class DatasetRows:
    """A labelled task's examples; without `eval` the rows may have no labels."""

    dataset: TaskDataset
    train: EncodedTask
    eval_split: str | None
    eval: EncodedTask | None

    @property
    def longest(self) -> int:
        return max(int(rows.lengths.max()) for rows in (self.train, self.eval) if rows is not None)


Rows = TextRows | ClozeRows | DatasetRows
Evaluate = Callable[[Callable[[], None]], dict[str, float]]


@dataclass(frozen=True)
class StageData:
    """The data half of a `Stage`; its fields are those."""

    lengths: np.ndarray
    make_batch: Callable[[Sequence[int], torch.Generator], Batch]
    evaluate: Evaluate | None
    metric: str
    higher_is_better: bool


def text_data(
    rows: TextRows,
    student: LanguageModel | TaskModel,
    tokenizer: Any,
    mask_probability: float,
    eval_batch_size: int,
    slot_bias: Callable[[], Tensor | None],
) -> StageData:
    """Batches of text, judged by perplexity. slot_bias: what is added to the student's logits when it is judged.

    A task model reads text as it is and is not judged by it.
    """
    pad_id, masks = pad_id_of(tokenizer), isinstance(student, LanguageModel) and not student.causal
    masking = Masking.of(tokenizer, mask_probability) if masks else None
    # Perplexity needs masked positions even where the training inputs are not masked.
    eval_masking = Masking.of(tokenizer, mask_probability or 0.15) if masks else None
    judged = rows.eval

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> Batch:
        return collate_text([rows.train[int(i)] for i in indices], pad_id=pad_id, masking=masking, generator=generator)

    def evaluate(poll: Callable[[], None]) -> dict[str, float]:
        assert judged is not None and isinstance(student, LanguageModel)
        batches = (
            collate_text(
                [judged[i] for i in range(start, min(start + eval_batch_size, len(judged)))],
                pad_id=pad_id,
                masking=eval_masking,
                generator=torch.Generator().manual_seed(start),
            )
            for start in range(0, len(judged), eval_batch_size)
        )
        return {"perplexity": perplexity(student, batches, slot_bias=slot_bias(), poll=poll)}

    is_judged = judged is not None and isinstance(student, LanguageModel)
    return StageData(rows.train.lengths, make_batch, evaluate if is_judged else None, "perplexity", False)


def cloze_data(
    rows: ClozeRows, student: LanguageModel | TaskModel, tokenizer: Any, predict: Callable[[ClozeBatch], Tensor], eval_batch_size: int
) -> StageData:
    """Batches of cloze questions, judged by what `predict` answers."""
    pad_id = pad_id_of(tokenizer)

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> Batch:
        return collate([rows.train[int(i)] for i in indices], pad_id=pad_id)

    def evaluate(poll: Callable[[], None]) -> dict[str, float]:
        training = student.training
        student.eval()
        predictions: list[int] = []
        for start in range(0, len(rows.eval), eval_batch_size):
            poll()
            batch = collate(rows.eval[start : start + eval_batch_size], pad_id=pad_id)
            predictions += predict(batch.to(student.device)).tolist()
        student.train(training)
        labels = [example.label for example in rows.eval]
        scores = {"accuracy": accuracy(predictions, labels)}
        if rows.task.num_labels:
            scores["f1_macro"] = f1_macro(predictions, labels)
        return scores

    lengths = np.array([max(len(sequence) for sequence in example.sequences) for example in rows.train])
    return StageData(lengths, make_batch, evaluate, "accuracy", True)


def dataset_data(rows: DatasetRows, student: LanguageModel | TaskModel, eval_batch_size: int, *, judged: bool) -> StageData:
    """Batches of a labelled task, judged by its metrics, if at all."""

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> Batch:
        return rows.train.collate(indices)

    def evaluate(poll: Callable[[], None]) -> dict[str, float]:
        assert isinstance(student, TaskModel)
        return dataset_scores(student, rows, eval_batch_size, poll)

    metric = rows.dataset.metrics[0] if rows.eval is not None else "none"
    return StageData(rows.train.lengths, make_batch, evaluate if judged and rows.eval is not None else None, metric, True)


@torch.no_grad()
def dataset_scores(student: TaskModel, rows: DatasetRows, batch_size: int, poll: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Every metric of the task on the evaluation rows, in evaluation mode."""
    assert rows.eval is not None and rows.eval_split is not None
    training = student.training
    student.eval()
    scores: list[Tensor] = []
    for start in range(0, len(rows.eval), batch_size):
        poll()
        batch = rows.eval.collate(range(start, min(start + batch_size, len(rows.eval))))
        scores += student(batch.to(student.device)).float().cpu().unbind()
    student.train(training)
    return rows.dataset.score(rows.eval_split, rows.eval.predictions(scores))
