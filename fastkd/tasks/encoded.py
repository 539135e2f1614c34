"""A split of a `TaskDataset` -> rows of token ids -> padded batches, and scores -> predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastkd.tasks.answers import AnswerSearch, check_windows, question_windows
from fastkd.tasks.labelled import Kind, LabelledExample, TaskDataset
from fastkd.tasks.token_rows import encodings, held, pad_id, padded, require_fast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MIN_LENGTH = 8
_PAD_TO_MULTIPLE_OF = 8


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """B examples of C choices as R = B*C rows of S tokens; example b owns rows b*C .. b*C + C-1. C is 1 but for multiple choice."""

    input_ids: Tensor
    """(R, S) int64, right padded."""
    attention_mask: Tensor
    """(R, S) int64, 1 on tokens and 0 on padding."""
    token_type_ids: Tensor | None
    """(R, S) int64, the segment of each token; None where the tokenizer makes none."""
    labels: Tensor
    """(B,) int64 classes or choices, -1 where unlabelled; (B,) float32 values, NaN where unlabelled; or (B, 2) int64, the first and
    the last token of the answer, both 0 (the classification token) where the row has none."""
    num_choices: int = 1

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch on `device`."""
        token_types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        tensors = (self.input_ids.to(device), self.attention_mask.to(device), token_types, self.labels.to(device))
        return TaskBatch(*tensors, num_choices=self.num_choices)


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """N examples of one split as a model reads them. In question answering each is a window of a context, else one of the split's."""

    kind: Kind
    num_outputs: int
    """The rows of the head: see `TaskDataset.num_outputs`."""
    num_choices: int
    """C; 1 but for multiple choice."""
    pad_id: int
    ids: Sequence[np.ndarray]
    """N*C rows of int32 token ids."""
    token_types: Sequence[np.ndarray] | None
    """Their segments, int8."""
    labels: Tensor
    """(N,) or (N, 2), as in `TaskBatch`."""
    search: AnswerSearch | None = None
    """question_answering: how windows become answers."""
    width: int | None = None
    """S of every batch; None: a batch's longest row, rounded up to a multiple of 8."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int64 positions that every example takes: the tokens of its longest choice, or the width that all batches have."""
        if self.width is not None:
            return np.full(len(self), self.width)
        return np.array([len(row) for row in self.ids]).reshape(len(self), self.num_choices).max(axis=1)

    @cached_property
    def largest_id(self) -> int:
        """The highest id of a token."""
        return max(int(row.max()) for row in self.ids)

    def collate(self, indices: Sequence[int] | np.ndarray) -> TaskBatch:
        """The batch of the examples with these numbers, padded to `width`, or to a multiple of 8."""
        if len(indices) == 0:
            raise ValueError("indices is empty; a batch needs at least one example.")
        rows = [int(index) * self.num_choices + choice for index in indices for choice in range(self.num_choices)]
        ids = [self.ids[row] for row in rows]
        width = self.width or math.ceil(max(map(len, ids)) / _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
        token_types = None if self.token_types is None else padded([self.token_types[row] for row in rows], width, 0)
        labels = self.labels[torch.as_tensor([int(index) for index in indices])]
        return TaskBatch(padded(ids, width, self.pad_id), held(ids, width).long(), token_types, labels, self.num_choices)

    def predictions(self, scores: Sequence[Tensor]) -> list[Any]:
        """One prediction for each example of the split, as `TaskDataset.score` takes them.

        scores: those of every example here, in order: (C,) classes or choices, () values, or (2, S) logits of the first and last token.
        """
        if self.kind == "unlabelled":
            raise ValueError("These rows are unlabelled: there is nothing to predict from them.")
        if len(scores) != len(self):
            raise ValueError(f"scores has those of {len(scores)} rows, and there are {len(self)}; give one for each.")
        if self.search is not None:
            return self.search.answers(scores)
        values = torch.stack(list(scores)).float().cpu().numpy()
        expected = () if self.kind == "regression" else (max(self.num_outputs, self.num_choices),)
        if values.shape[1:] != expected:
            raise ValueError(f"scores are {values.shape[1:]} a row; kind {self.kind!r} with these outputs has {expected}.")
        return values.tolist() if self.kind == "regression" else values.argmax(-1).tolist()


def encode_task(
    dataset: TaskDataset,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    pad_to_max_length: bool = False,
    doc_stride: int = 128,
    max_answer_length: int = 30,
    n_best: int = 20,
) -> EncodedTask:
    """The rows of one split, of at most `max_length` tokens.

    Of longer texts and pairs the tokenizer cuts the longest text first; how many is logged. Each choice of an example is a row of its
    own, the pair of the example's text (or texts, with a space between them) and the choice. A question's context is read in windows.

    Args:
        max_length: The most tokens of a row, special ones included; at least 8.
        pad_to_max_length: Pad every batch to `max_length`, and not to its longest row.
        doc_stride: question_answering: the tokens that two neighbouring windows of one context share.
        max_answer_length: question_answering: the most tokens of a predicted answer.
        n_best: question_answering: how many first and how many last tokens of each window are tried in pairs.

    Raises:
        ValueError: No such split, an option out of range, a tokenizer without a classification token for questions, or examples that
            are not alike in how many choices and texts they have. All before the first text is read.
        TypeError: The tokenizer is not a fast one.
    """
    examples = dataset.split(split)
    require_fast(tokenizer)
    if max_length < _MIN_LENGTH:
        raise ValueError(f"max_length is {max_length}; a row needs at least {_MIN_LENGTH} tokens.")
    num_choices = len(examples[0].choices) if dataset.kind == "multiple_choice" else 1
    search = None
    if dataset.kind == "question_answering":
        for name, value in (("max_answer_length", max_answer_length), ("n_best", n_best)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        check_windows(tokenizer, max_length, doc_stride)
        windows, num_cut = question_windows(examples, tokenizer, max_length=max_length, doc_stride=doc_stride)
        ids, token_types = [window.ids for window in windows], [window.token_types for window in windows]
        labels = torch.tensor([window.answer_tokens(examples[window.question].answers) for window in windows])
        contexts = [example.second_text or "" for example in examples]
        search = AnswerSearch(contexts, windows, n_best, max_answer_length, dataset.has_unanswerable)
    else:
        _check_alike(dataset, split)
        ids, token_types, num_cut = _text_rows(examples, tokenizer, max_length, num_choices)
        labels = _labels(dataset.kind, examples)
    if num_cut:
        logger.warning("%d of %d rows of split %r were cut to max_length=%d tokens.", num_cut, len(examples), split, max_length)
    return EncodedTask(
        kind=dataset.kind,
        num_outputs=dataset.num_outputs,
        num_choices=num_choices,
        pad_id=pad_id(tokenizer),
        ids=ids,
        token_types=token_types if "token_type_ids" in tokenizer.model_input_names else None,
        labels=labels,
        search=search,
        width=max_length if pad_to_max_length else None,
    )


def _check_alike(dataset: TaskDataset, split: str) -> None:
    """Refuse a split some of whose examples are pairs, or have more choices, and others not."""
    first, *others = dataset.split(split)
    for number, example in enumerate(others, start=1):
        where = f"Row {number} (the first is 0) of split {split!r} of {dataset.name}"
        if len(example.choices) != len(first.choices):
            raise ValueError(
                f"{where} has {len(example.choices)} choices and row 0 has {len(first.choices)}; all rows must have the same number. "
                "Drop the rows that have another, or some of their choices."
            )
        if dataset.kind != "multiple_choice" and (example.second_text is None) != (first.second_text is None):
            raise ValueError(f"{where} and row 0 are not both a text or both a pair; give every row a second_text, or none.")


def _text_rows(
    examples: Sequence[LabelledExample], tokenizer: PreTrainedTokenizerBase, max_length: int, num_choices: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Ids and segments of every example, or of every choice of every example, and how many examples were cut."""
    texts, second_texts = [example.text for example in examples], [example.second_text for example in examples]
    if num_choices > 1:
        joined = [text if second is None else f"{text} {second}" for text, second in zip(texts, second_texts, strict=True)]
        texts = [text for text in joined for _ in range(num_choices)]
        second_texts = [choice for example in examples for choice in example.choices]
    ids, token_types, cut = [], [], set()
    pairs = None if second_texts[0] is None else [second or "" for second in second_texts]
    for number, row in enumerate(encodings(tokenizer, texts, pairs, truncation="longest_first", max_length=max_length)):
        ids.append(np.array(row.ids, dtype=np.int32))
        token_types.append(np.array(row.type_ids, dtype=np.int8))
        if row.overflowing:
            cut.add(number // num_choices)
    return ids, token_types, len(cut)


def _labels(kind: Kind, examples: Sequence[LabelledExample]) -> Tensor:
    if kind == "regression":
        return torch.tensor([math.nan if example.label is None else example.label for example in examples], dtype=torch.float32)
    return torch.tensor([-1 if example.label is None else int(example.label) for example in examples])
