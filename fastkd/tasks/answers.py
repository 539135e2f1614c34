"""Extractive question answering, from contexts to windows and from the windows' scores to answers.

As in transformers' run_qa example, after BERT's (Devlin et al., arXiv:1810.04805): a context that does not fit into a row is read in
windows that overlap, and the classification token stands for "no answer here".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastkd.tasks.labelled import Answer, LabelledExample
from fastkd.tasks.token_rows import encodings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ANSWER = (0, 0)
"""Where a window without an answer has its first and last token: at the classification token."""


@dataclass(frozen=True, eq=False)
class Window:
    """One row: a question and a part of its context."""

    question: int
    """The question's number."""
    ids: np.ndarray
    """int32 token ids of the whole row, special tokens included."""
    token_types: np.ndarray
    """int8, the segment of each of them."""
    first: int
    """The place in the row of the first token of the context."""
    offsets: np.ndarray
    """(n, 2) int32: where each of the n context tokens begins and ends in the context, in characters."""

    def answer_tokens(self, answers: Sequence[Answer]) -> tuple[int, int]:
        """The places in the row of the first answer's first and last token; `NO_ANSWER` unless the window holds all of it."""
        starts, ends = self.offsets.T
        for answer in answers[:1]:
            start, end = answer.start, answer.start + len(answer.text)
            inside = np.flatnonzero((starts < end) & (ends > start))
            if inside.size and starts[0] <= start and end <= ends[-1]:
                return self.first + int(inside[0]), self.first + int(inside[-1])
        return NO_ANSWER


def check_windows(tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int) -> None:
    """Refuse a tokenizer whose rows do not begin with a classification token, and windows that might not advance."""
    if tokenizer("a", "b")["input_ids"][0] != tokenizer.cls_token_id:
        raise ValueError(
            f"The {type(tokenizer).__name__} begins no row with a classification token (CLS), which question answering points to "
            "where a window holds no answer; use the model and the tokenizer of an encoder that has one."
        )
    half = _room(tokenizer, max_length) // 2
    if not 0 <= doc_stride < half:
        raise ValueError(
            f"doc_stride is {doc_stride}; it is the number of tokens that two neighbouring windows share and must be from 0 to "
            f"{half - 1} where max_length is {max_length}, so that windows advance beside any question."
        )


def question_windows(
    examples: Sequence[LabelledExample], tokenizer: PreTrainedTokenizerBase, *, max_length: int, doc_stride: int
) -> tuple[list[Window], int]:
    """The windows of every question, in order, and how many questions were cut.

    A window takes as much of the context as fits, and begins `doc_stride` tokens before the end of the one before it. Where question
    and context do not fit into one row, a question that would take more than half of it is cut to that.
    """
    # Each by itself, put together here: the tokenizer's own windows panic where a long question leaves them no room to advance.
    texts, contexts = [example.text for example in examples], [example.second_text or "" for example in examples]
    apart: dict[str, Any] = {"add_special_tokens": False, "truncation": False}
    pairs = zip(encodings(tokenizer, texts, **apart), encodings(tokenizer, contexts, **apart), strict=True)
    room = _room(tokenizer, max_length)
    windows: list[Window] = []
    num_cut = 0
    for number, (question, context) in enumerate(pairs):
        if len(question) + len(context) > room:
            num_cut += len(question) > room // 2
            question.truncate(room // 2)
            context.truncate(room - len(question), stride=doc_stride)
        for part in (context, *context.overflowing):
            row = tokenizer.backend_tokenizer.post_process(question, part)
            ids, token_types = np.array(row.ids, dtype=np.int32), np.array(row.type_ids, dtype=np.int8)
            # `part` has the offsets: byte-level tokenizers trim the spaces off them in every post_process, so in `row` twice.
            offsets = np.array(part.offsets, dtype=np.int32).reshape(-1, 2)
            windows.append(Window(number, ids, token_types, row.sequence_ids.index(1) if len(part) else 0, offsets))
    return windows, num_cut


@dataclass(frozen=True, eq=False)
class AnswerSearch:
    """How the scores of windows become answers."""

    contexts: Sequence[str]
    windows: Sequence[Window]
    """The windows of one question after another."""
    n_best: int
    max_answer_length: int
    has_unanswerable: bool
    """Whether "" is an answer."""

    def answers(self, scores: Sequence[Tensor]) -> list[str]:
        """The answer to every question, from one (2, S) tensor a window: each token's logits of being the first and the last.

        Of each window the pairs of its `n_best` first and `n_best` last tokens in the context are looked at, in order and of at most
        `max_answer_length` tokens, and the best sum of two logits of any window is the answer. It is "" if there is no such pair or,
        where some questions have no answer, if the least sum of a window's logits at its classification token is higher.
        """
        found = [(-math.inf, "")] * len(self.contexts)
        null = [math.inf] * len(self.contexts)
        for window, logits in zip(self.windows, scores, strict=True):
            values = logits.detach().double().cpu().numpy()
            if values.ndim != 2 or len(values) != 2 or values.shape[1] < len(window.ids):
                raise ValueError(f"A window of {len(window.ids)} tokens has scores {values.shape}; they must be (2, tokens or more).")
            score, first, last = self._best_span(values[:, window.first : window.first + len(window.offsets)])
            if score > found[window.question][0]:
                start, end = window.offsets[first, 0], window.offsets[last, 1]
                found[window.question] = (score, self.contexts[window.question][start:end].strip())
            null[window.question] = min(null[window.question], float(values[:, 0].sum()))
        return [
            "" if self.has_unanswerable and null_score > score else answer
            for (score, answer), null_score in zip(found, null, strict=True)
        ]

    def _best_span(self, logits: np.ndarray) -> tuple[float, int, int]:
        """The best sum in (2, n) logits of a context's tokens, -inf if no pair is allowed, and its first and last token."""
        firsts, lasts = np.argsort(-logits, axis=1, kind="stable")[:, : self.n_best]
        lengths = lasts - firsts[:, None] + 1
        allowed = (lengths >= 1) & (lengths <= self.max_answer_length)
        sums = np.where(allowed, logits[0, firsts][:, None] + logits[1, lasts], -math.inf)
        if sums.size == 0:
            return -math.inf, 0, 0
        first, last = np.unravel_index(sums.argmax(), sums.shape)
        return float(sums[first, last]), int(firsts[first]), int(lasts[last])


def _room(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """What a row of `max_length` tokens holds besides the special ones."""
    return max_length - tokenizer.num_special_tokens_to_add(pair=True)
