"""What a stage trains on and how its student is judged: text by perplexity, cloze questions and labelled tasks by their scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.language_model import LanguageModel
from ..models.task_model import TaskModel
from ..tasks.cloze import ClozeBatch, Example, collate, label_word_ids
from ..tasks.cloze_task import ClozeTask
from ..tasks.encoded import EncodedTask
from ..tasks.labelled import TaskDataset
from ..tasks.metrics import accuracy, f1_macro
from ..tasks.text import IGNORE_INDEX, Masking, TextBatch, collate_text
from ..tasks.token_rows import num_ids
from ..tasks.token_rows import pad_id as pad_id_of
from ..tasks.tokenized import TokenRows
from .objective import Batch, Share
from .perplexity import events, perplexity_of, summed_loss


@dataclass(frozen=True)
class TextRows:
    """Unlabeled text."""

    train: TokenRows
    eval: TokenRows | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(rows.lengths.max()) for rows in (self.train, self.eval) if rows is not None)

    @property
    def largest_id(self) -> int:
        """The highest id of a token."""
        return max(rows.largest_id for rows in (self.train, self.eval) if rows is not None)


@dataclass(frozen=True)
class ClozeRows:
    """Cloze questions."""

    task: ClozeTask
    train: Sequence[Example]
    eval: Sequence[Example]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(ids) for rows in (self.train, self.eval) for example in rows for ids in example.sequences)

    @property
    def largest_id(self) -> int:
        """The highest id of a token, or of one that is predicted in the answer's place."""
        examples = [*self.train, *self.eval]
        read = max(int(ids.max()) for example in examples for ids in example.sequences)
        return max([read, *(id for example in examples for targets in example.score_targets for id in targets)])


@dataclass(frozen=True)
class DatasetRows:
    """A labelled task's examples; without `eval` the rows may have no labels."""

    dataset: TaskDataset
    train: EncodedTask
    eval_split: str | None
    eval: EncodedTask | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(rows.lengths.max()) for rows in (self.train, self.eval) if rows is not None)

    @property
    def largest_id(self) -> int:
        """The highest id of a token."""
        return max(rows.largest_id for rows in (self.train, self.eval) if rows is not None)


Rows = TextRows | ClozeRows | DatasetRows
Evaluate = Callable[[Share], dict[str, float]]
MakeBatch = Callable[[Sequence[int], torch.Generator], Batch]
RowGenerator = Callable[[int], torch.Generator]


@dataclass(frozen=True, eq=False)
class Sequences:
    """The token sequences of the N training rows, candidate by candidate: row i has those from first[i] to first[i + 1]."""

    lengths: np.ndarray
    """Tokens of each."""
    first: np.ndarray
    """(N + 1,)."""

    def of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, all sequences of these rows, row after row."""
        rows = np.asarray(rows)
        counts = self.first[rows + 1] - self.first[rows]
        return np.repeat(self.first[rows + 1] - counts.cumsum(), counts) + np.arange(counts.sum())

    def behind(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The sequences behind a batch of these rows: one with fewer than another is filled up with its first, as batches are."""
        rows = np.asarray(rows)
        counts = self.first[rows + 1] - self.first[rows]
        choice = np.arange(counts.max())
        return (self.first[rows, None] + np.where(choice < counts[:, None], choice, 0)).ravel()


def train_sequences(rows: Rows) -> Sequences:
    """What is run of the training rows, without padding."""
    if isinstance(rows, TextRows):
        return Sequences(rows.train.lengths, np.arange(len(rows.train) + 1))
    if isinstance(rows, ClozeRows):
        lengths = np.array([len(sequence) for example in rows.train for sequence in example.sequences])
        return Sequences(lengths, np.array([0, *accumulate(len(example.sequences) for example in rows.train)]))
    ids = rows.train.ids
    return Sequences(np.array([len(sequence) for sequence in ids]), np.arange(0, len(ids) + 1, rows.train.num_choices))


def row_lengths(rows: Rows) -> np.ndarray:
    """(N,) int64, the positions that each training row takes in a batch: the tokens of its longest sequence, or a fixed width."""
    if isinstance(rows, ClozeRows):
        return np.array([max(len(sequence) for sequence in example.sequences) for example in rows.train])
    return rows.train.lengths


def largest_id(rows: Rows, model: LanguageModel | TaskModel, tokenizer: Any) -> int:
    """The highest id that `model` reads or predicts in these rows, pads and label words included."""
    if isinstance(rows, TextRows) and is_masked(model):
        return num_ids(tokenizer) - 1  # masking draws some from all that there are
    words = label_word_ids(rows.task, tokenizer) if isinstance(rows, ClozeRows) else ()
    return max(rows.largest_id, pad_id_of(tokenizer), *words)


def train_fingerprint(rows: Rows) -> str:
    """Equal for the same training inputs in the same order; labels are not in it."""
    if isinstance(rows, TextRows):
        return rows.train.fingerprint
    digest = hashlib.sha256()
    if isinstance(rows, ClozeRows):
        return _cloze_digest(rows.train).hexdigest()
    train = rows.train
    digest.update(f"{train.kind} {train.num_choices}\n".encode())
    for number, sequence in enumerate(train.ids):
        types = b"" if train.token_types is None else train.token_types[number].tobytes()
        digest.update(f"{len(sequence)} ".encode() + sequence.tobytes() + types)
    return digest.hexdigest()


def split_fingerprints(rows: ClozeRows | DatasetRows) -> dict[str, str | None]:
    """Hex digests of the training and the evaluation examples, labels included; None without any."""
    if isinstance(rows, DatasetRows):
        judged = None if rows.eval_split is None else rows.dataset.split_fingerprint(rows.eval_split)
        return {"train": rows.dataset.split_fingerprint("train"), "eval": judged}
    found: dict[str, str | None] = {}
    for split, examples in (("train", rows.train), ("eval", rows.eval)):
        digest = _cloze_digest(examples)
        digest.update(f"{[example.label for example in examples]}".encode())
        found[split] = digest.hexdigest()
    return found


def _cloze_digest(examples: Sequence[Example]) -> hashlib._Hash:
    """SHA-256 over the inputs of cloze questions; labels are not in it."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.score_positions} {example.score_targets} {len(example.sequences)}\n".encode())
        for sequence in example.sequences:
            digest.update(f"{len(sequence)} ".encode() + sequence.tobytes())
    return digest


@dataclass(frozen=True)
class StageData:
    """The data half of a `Stage`; its fields are those."""

    make_batch: MakeBatch
    evaluate: Evaluate | None
    metric: str
    higher_is_better: bool
    events: str | None = None


def batch_maker(
    rows: Rows,
    model: LanguageModel | TaskModel,
    tokenizer: Any,
    mask_probability: float,
    row_generator: RowGenerator | None = None,
) -> MakeBatch:
    """Training batches as `model`, or another of its kind, reads them.

    row_generator: what a row's masks are drawn from, so that they are the same whenever the row is read; None: from the batch's.
    """
    if isinstance(rows, DatasetRows):
        encoded = rows.train
        return lambda indices, generator: encoded.collate(indices)
    pad_id = pad_id_of(tokenizer)
    if isinstance(rows, ClozeRows):
        examples = rows.train
        return lambda indices, generator: collate([examples[int(i)] for i in indices], pad_id=pad_id)
    text, masking = rows.train, Masking.of(tokenizer, mask_probability) if is_masked(model) else None

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> Batch:
        if masking is None or row_generator is None:
            return collate_text([text[int(i)] for i in indices], pad_id=pad_id, masking=masking, generator=generator)
        single = [collate_text([text[int(i)]], pad_id=pad_id, masking=masking, generator=row_generator(int(i))) for i in indices]
        return _joined(single, pad_id)

    return make_batch


def is_masked(model: LanguageModel | TaskModel) -> bool:
    """Whether the model's text has masked tokens, which it predicts."""
    return isinstance(model, LanguageModel) and not model.causal


def _joined(batches: Sequence[TextBatch], pad_id: int) -> TextBatch:
    """One batch of all their rows."""
    width = max(batch.input_ids.shape[1] for batch in batches)

    def filled(name: str, value: int) -> Tensor:
        tensors = (getattr(batch, name) for batch in batches)
        return torch.cat([pad(tensor, (0, width - tensor.shape[1]), value=value) for tensor in tensors])

    return TextBatch(filled("input_ids", pad_id), filled("attention_mask", 0), filled("labels", IGNORE_INDEX))


def text_data(
    rows: TextRows,
    student: LanguageModel | TaskModel,
    tokenizer: Any,
    make_batch: MakeBatch,
    mask_probability: float,
    eval_batch_size: int,
) -> StageData:
    """Text, judged by perplexity. A task model reads text as it is and is not judged by it."""
    pad_id = pad_id_of(tokenizer)
    # Perplexity needs masked positions even where the training inputs are not masked.
    eval_masking = Masking.of(tokenizer, mask_probability or 0.15) if is_masked(student) else None
    judged = rows.eval

    def evaluate(share: Share) -> dict[str, float]:
        assert judged is not None and isinstance(student, LanguageModel)

        def loss(start: int) -> tuple[float, int]:
            rows = [judged[i] for i in range(start, min(start + eval_batch_size, len(judged)))]
            generator = torch.Generator().manual_seed(start)
            return summed_loss(student, collate_text(rows, pad_id=pad_id, masking=eval_masking, generator=generator))

        with evaluating(student):
            return {"perplexity": perplexity_of(share.map(loss, range(0, len(judged), eval_batch_size)))}

    is_judged = judged is not None and isinstance(student, LanguageModel)
    if not is_judged:
        return StageData(make_batch, None, "perplexity", False)
    over = events(student.vocab_map, num_ids(tokenizer))
    return StageData(make_batch, evaluate, "perplexity", False, over)


def cloze_data(
    rows: ClozeRows,
    student: LanguageModel | TaskModel,
    tokenizer: Any,
    make_batch: MakeBatch,
    predict: Callable[[ClozeBatch], Tensor],
    eval_batch_size: int,
) -> StageData:
    """Cloze questions, judged by what `predict` answers."""
    pad_id = pad_id_of(tokenizer)

    def evaluate(share: Share) -> dict[str, float]:
        def predicted(start: int) -> list[int]:
            batch = collate(rows.eval[start : start + eval_batch_size], pad_id=pad_id)
            return predict(batch.to(student.device)).tolist()

        with evaluating(student):
            predictions = [label for batch in share.map(predicted, range(0, len(rows.eval), eval_batch_size)) for label in batch]
        labels = [example.label for example in rows.eval]
        scores = {"accuracy": accuracy(predictions, labels)}
        if rows.task.num_labels:
            scores["f1_macro"] = f1_macro(predictions, labels)
        return scores

    return StageData(make_batch, evaluate, "accuracy", True)


def dataset_data(
    rows: DatasetRows, student: LanguageModel | TaskModel, make_batch: MakeBatch, eval_batch_size: int, *, judged: bool
) -> StageData:
    """A labelled task, judged by its metrics, if at all."""

    def evaluate(share: Share) -> dict[str, float]:
        assert isinstance(student, TaskModel)
        return dataset_scores(student, rows, eval_batch_size, share)

    metric = rows.dataset.metrics[0] if rows.eval is not None else "none"
    return StageData(make_batch, evaluate if judged and rows.eval is not None else None, metric, True)


def dataset_scores(student: TaskModel, rows: DatasetRows, batch_size: int, share: Share | None = None) -> dict[str, float]:
    """Every metric of the task on the evaluation rows, in evaluation mode."""
    encoded, split = rows.eval, rows.eval_split
    assert encoded is not None and split is not None
    return rows.dataset.score(split, encoded.predictions(task_outputs(student, encoded, batch_size, share)))


@torch.no_grad()
def task_outputs(
    model: TaskModel,
    rows: EncodedTask,
    batch_size: int,
    share: Share | None = None,
    tell: Callable[[int], Any] = lambda count: None,
) -> list[Tensor]:
    """The model's scores of every row, in evaluation mode, as `EncodedTask.predictions` takes them; `tell` is called with the rows of
    every batch that is done."""

    def scores(start: int) -> list[Any]:
        chosen = range(start, min(start + batch_size, len(rows)))
        made = [row.tolist() for row in model(rows.collate(chosen).to(model.device)).float().cpu()]
        tell(len(chosen))
        return made

    with evaluating(model):
        batches = (share or Share()).map(scores, range(0, len(rows), batch_size))
    return [torch.tensor(row) for batch in batches for row in batch]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and the mode of before behind it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
