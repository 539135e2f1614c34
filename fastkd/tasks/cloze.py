"""Rows of a `ClozeTask` -> token ids and the positions to score -> padded batches.

Used by the task stages of GLMD, which need inputs and scores but no labels. A text is tokenized as a whole, and character
offsets then tell which tokens are the answer's and which a column's: the ids are the tokenizer's own for that text, whatever
its rule for spaces.
"""

from __future__ import annotations

import logging
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastkd.tasks.bad_rows import REFUSE_BAD_ROWS, BadRowPolicy, BadRows, is_text
from fastkd.tasks.cloze_task import ClozeTask, Rendered, Span
from fastkd.tasks.token_rows import held, padded

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_PER_TOKENIZER_CALL = 256


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded row: C sequences (one per candidate; otherwise 1) and what is scored in each."""

    sequences: tuple[np.ndarray, ...]
    """C int32 arrays of token ids, special tokens included."""
    score_positions: tuple[tuple[int, ...], ...]
    """Per sequence, the positions whose LM logits are read; empty for classification."""
    score_targets: tuple[tuple[int, ...], ...]
    """Per sequence, the answer token scored at each of those positions; empty unless the kind is choices."""
    label: int
    """Index of the right class or candidate; -1 for an unlabeled row."""


@dataclass(frozen=True, eq=False)
class ClozeBatch:
    """B examples of C sequences as R = B*C rows of S tokens, A of them scored; example b owns rows b*C .. b*C + C-1."""

    input_ids: torch.Tensor
    """(R, S) int64, right padded."""
    attention_mask: torch.Tensor
    """(R, S) int64, 1 on tokens and 0 on padding."""
    score_positions: torch.Tensor
    """(R, A) int64, padded with 0."""
    score_targets: torch.Tensor
    """(R, A) int64, padded with -100; all -100 unless the kind is choices."""
    score_mask: torch.Tensor
    """(R, A) bool, True on scored positions."""
    choice_mask: torch.Tensor
    """(B, C) bool, True on real candidates, False on the copies of candidate 0 that fill short lists."""
    labels: torch.Tensor
    """(B,) int64, -1 where unlabeled."""

    @property
    def num_examples(self) -> int:
        """B."""
        return self.choice_mask.shape[0]

    @property
    def num_choices(self) -> int:
        """C."""
        return self.choice_mask.shape[1]

    def to(self, device: torch.device | str) -> ClozeBatch:
        """The same batch on `device`."""
        return ClozeBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def label_word_ids(task: ClozeTask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token id of each label word, in class order, as the tokenizer writes the word in the mask's place in the template.

    After a space, a byte-level tokenizer thus gives the token that includes the space, and elsewhere the one without.
    Raises ValueError for a word that is not one known token there, and for two words that are the same token.
    """
    ids: list[int] = []
    for word in task.label_words:
        # A column stands as ".", which keeps the space before the mask what it is and merges with no word.
        text, spans = task.render({**dict.fromkeys(task.columns, "."), "mask": word})
        (encoding,) = _tokenize(tokenizer, [text])
        (span,) = (span for span in spans if span[0] == "mask")
        found = np.flatnonzero(_overlaps(encoding, span)).tolist()
        covered = [text[slice(*encoding.offsets[index])].strip() for index in found]
        if covered != [word.strip()] or encoding.ids[found[0]] == tokenizer.unk_token_id:
            raise ValueError(
                f"label_words holds {word!r}, which the tokenizer writes as {[encoding.tokens[index] for index in found]}; it "
                f"must be one known token. Use another word, or kind 'choices' with choices {list(task.label_words)}."
            )
        ids.append(encoding.ids[found[0]])
    if len(set(ids)) != len(ids):
        raise ValueError(f"label_words {task.label_words!r} are token ids {ids}; give each class a token of its own.")
    return ids


def encode_examples(
    task: ClozeTask,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    causal: bool,
    bad_rows: BadRowPolicy = REFUSE_BAD_ROWS,
    description: str = "the examples",
) -> list[Example]:
    """Token ids, scored positions and label of every row.

    Encoders (`causal=False`) read mask tokens in the answer's place, and the position of each scores its token. Decoders
    (`causal=True`) read the answer, and the position before a token scores it; the text of a verbalizer ends before it. Text
    over `max_length` loses tokens, one by one, from the end of whichever column is longest then, never from the answer; how
    many rows were cut is logged.

    A row is bad that has a missing text, an empty candidate, an unknown label, or a text that cannot be cut enough: `bad_rows` says
    what becomes of it. Raises ValueError with the row (counted from 0) of `description`, the column and the value, for a column
    that is in no row, and where no row is left.
    """
    _check_tokenizer(task, tokenizer, causal)
    for column in (*task.columns, *task.choice_columns):
        if examples and not any(column in row for row in examples):
            raise ValueError(f"There is no column {column!r} in {description}: it has {', '.join(map(repr, examples[0]))}.")
    encoded: list[Example] = []
    left_out, num_cut = BadRows(description, bad_rows), 0
    for first in range(0, len(examples), _ROWS_PER_TOKENIZER_CALL):
        block: list[tuple[int, int, list[Rendered]]] = []
        for number, row in enumerate(examples[first : first + _ROWS_PER_TOKENIZER_CALL], start=first):
            with left_out.row(number):
                block.append((number, *_read_row(task, row, tokenizer, causal)))
        encodings = iter(_tokenize(tokenizer, [text for _, _, rendered in block for text, _ in rendered]))
        for number, label, rendered in block:
            of_row = list(islice(encodings, len(rendered)))
            with left_out.row(number):
                parts = [_encode(task, found, spans, tokenizer, causal) for found, (_, spans) in zip(of_row, rendered, strict=True)]
                sequences, positions, targets, was_cut = zip(*parts, strict=True)
                encoded.append(Example(sequences, positions, targets, label))
                num_cut += any(was_cut)
    left_out.report()
    if examples and not encoded:
        raise ValueError(f"None of the {len(examples)} rows of {description} can be used. {left_out.first}")
    if num_cut:
        logger.warning("%d of %d rows were cut to max_length=%d tokens.", num_cut, len(encoded), task.max_length)
    return encoded


def collate(examples: Sequence[Example], *, pad_id: int, pad_to_multiple_of: int = 8) -> ClozeBatch:
    """Stacks examples, right padded. C is the most candidates of any; copies of candidate 0 fill shorter lists."""
    if not examples:
        raise ValueError("examples is empty; a batch needs at least one.")
    counts = [len(example.sequences) for example in examples]
    # The example and the candidate behind every row of the batch.
    rows = [
        (example, choice if choice < count else 0)
        for example, count in zip(examples, counts, strict=True)
        for choice in range(max(counts))
    ]
    sequences = [example.sequences[choice] for example, choice in rows]
    positions = [example.score_positions[choice] for example, choice in rows]
    targets = [example.score_targets[choice] for example, choice in rows]
    length = math.ceil(max(map(len, sequences)) / pad_to_multiple_of) * pad_to_multiple_of
    num_scored = max(map(len, positions))
    return ClozeBatch(
        input_ids=padded(sequences, length, pad_id),
        attention_mask=held(sequences, length).long(),
        score_positions=padded(positions, num_scored, 0),
        score_targets=padded(targets, num_scored, -100),
        score_mask=held(positions, num_scored),
        choice_mask=held([example.sequences for example in examples], max(counts)),
        labels=torch.tensor([example.label for example in examples]),
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoding]:
    if not texts:
        return []
    encodings = tokenizer(texts, padding=False, truncation=False, verbose=False).encodings
    if encodings is None:
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}, which gives no character offsets; use a fast one.")
    return encodings


def _overlaps(encoding: Encoding, span: Span) -> np.ndarray:
    """Bool per token: is it of the span's text? Special tokens around the text, at characters (0, 0), never are."""
    _, start, end = span
    offsets = np.array(encoding.offsets).reshape(-1, 2)
    return (offsets[:, 0] < end) & (offsets[:, 1] > start)


def _check_tokenizer(task: ClozeTask, tokenizer: PreTrainedTokenizerBase, causal: bool) -> None:
    if not causal and task.slot is not None and tokenizer.mask_token is None:
        raise ValueError(f"tokenizer has no mask token, which kind {task.kind!r} needs unless the model is causal.")
    if causal and task.kind == "verbalizer" and not task.template.endswith("{mask}"):
        raise ValueError(f"template {task.template!r} must end with {{mask}}: a decoder answers after what it has read.")
    label_word_ids(task, tokenizer)


def _read_row(task: ClozeTask, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, causal: bool) -> tuple[int, list[Rendered]]:
    """The row's label and its rendered sequences, one per candidate."""
    values = {column: _text(task, row.get(column), column) for column in task.columns}
    if task.kind == "choices":
        candidates = _candidates(task, row)
        label = _class_index(task, row, max(candidates) + 1)
        if label >= 0 and label not in candidates:
            raise ValueError(f"column {task.label_column!r} names candidate {label}, which is absent.")
        index = list(candidates).index(label) if label >= 0 else -1
        return index, [task.render({**values, "choice": candidate}) for candidate in candidates.values()]
    text, spans = task.render({**values, "mask": "" if causal else str(tokenizer.mask_token)})
    if causal and task.kind == "verbalizer":
        text = text.rstrip(" ")  # the space belongs to the label word's token
    return _class_index(task, row, task.num_labels), [(text, spans)]


def _candidates(task: ClozeTask, row: Mapping[str, Any]) -> dict[int, str]:
    """The row's candidate answers by their place in the list or columns, without the absent ones."""
    if task.choices:
        return dict(enumerate(task.choices))
    named = [(column, row.get(column)) for column in task.choice_columns]
    if task.choices_column:
        listed = row.get(task.choices_column)
        if not isinstance(listed, list | tuple):
            raise ValueError(f"column {task.choices_column!r} holds {listed!r}, not a list of candidates.")
        named = [(task.choices_column, candidate) for candidate in listed]
    candidates = {}
    for place, (column, value) in enumerate(named):
        if value is not None:
            candidates[place] = _text(task, value, column)
            if not candidates[place].strip():
                raise ValueError(f"column {column!r} holds the empty candidate {value!r}.")
    if not candidates:
        source = task.choices_column or list(task.choice_columns)
        raise ValueError(f"column {source!r} gives no candidate.")
    return candidates


def _text(task: ClozeTask, value: Any, column: str) -> str:
    if not is_text(value):
        raise ValueError(f"column {column!r} holds {value!r}; it must hold text or a number.")
    return str(value).rstrip().rstrip(string.punctuation) if column in task.strip else str(value)


def _class_index(task: ClozeTask, row: Mapping[str, Any], num_classes: int) -> int:
    """Index of the row's label among `num_classes`; -1 for an unlabeled row."""
    value = row.get(task.label_column)
    if value in task.labels:
        return task.labels.index(value)
    if value is None or value == -1:
        return -1
    holds_indices = not any(isinstance(label, int) for label in task.labels)
    if holds_indices and isinstance(value, int) and 0 <= value < num_classes:
        return value
    known = f"one of labels {list(task.labels)}" if task.labels else f"an index below {num_classes} (or set labels)"
    raise ValueError(f"column {task.label_column!r} holds {value!r}; it must be {known}.")


def _encode(
    task: ClozeTask, encoding: Encoding, spans: list[Span], tokenizer: PreTrainedTokenizerBase, causal: bool
) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...], bool]:
    """Ids, scored positions and targets of one sequence cut to `max_length`, and whether it was cut."""
    ids = np.array(encoding.ids, dtype=np.int32)
    answer = np.zeros(ids.size, dtype=bool)
    owner = np.full(ids.size, -1)  # index in `spans` of the column a token belongs to; -1 is never cut
    for index, span in enumerate(spans):
        if span[0] == task.slot:
            answer = _overlaps(encoding, span)
        else:
            owner[_overlaps(encoding, span)] = index
    if not causal and task.kind == "verbalizer":
        answer &= ids == tokenizer.mask_token_id  # without a lone space token before the mask
    if causal and task.kind == "verbalizer":
        text = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
        if text.size == 0:
            raise ValueError(f"template {task.template!r} leaves no text before {{mask}}.")
        # The last token of the text is asked for the next one, so a closing special token must not follow it.
        ids, owner, answer = ids[: text[-1] + 1], owner[: text[-1] + 1], answer[: text[-1] + 1]
        answer[-1] = True
    owner[answer] = -1
    num_fixed = np.count_nonzero(owner < 0)
    if num_fixed > task.max_length:
        raise ValueError(
            f"the template and the answer alone take {num_fixed} tokens, more than max_length="
            f"{task.max_length}; raise max_length or shorten the template."
        )
    kept = _kept_tokens(owner, task.max_length)
    ids, positions = ids[kept], np.flatnonzero(answer[kept])
    targets: list[int] = []
    if task.kind == "choices":
        if positions.size == 0 or (causal and positions[0] == 0):
            problem = "has no token" if positions.size == 0 else "starts the sequence, where a decoder has no prediction"
            raise ValueError(f"a candidate {problem}; its sequence is {encoding.tokens}.")
        targets = ids[positions].tolist()
        if causal:
            positions = positions - 1
        else:
            ids[positions] = tokenizer.mask_token_id
    return ids, tuple(positions.tolist()), tuple(targets), not kept.all()


def _kept_tokens(owner: np.ndarray, max_length: int) -> np.ndarray:
    """Bool per token: the excess over `max_length` goes, one by one, from the end of whichever column is longest then."""
    kept = np.ones(owner.size, dtype=bool)
    if owner.size > max_length:
        lengths = np.bincount(owner[owner >= 0])
        for _ in range(owner.size - max_length):
            lengths[lengths.argmax()] -= 1
        for index, length in enumerate(lengths):
            kept[np.flatnonzero(owner == index)[length:]] = False
    return kept
