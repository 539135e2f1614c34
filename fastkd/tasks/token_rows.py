"""Encode texts as rows of ids and pad rows to tensors; what the encoders of tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_TEXTS_PER_CALL = 256


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``TypeError`` unless the tokenizer is a fast one."""
    if not tokenizer.is_fast:
        raise TypeError(
            f"The tokenizer is a {type(tokenizer).__name__}, which is not a fast one: load it with "
            "AutoTokenizer.from_pretrained, or convert it to a tokenizer.json first."
        )


def encodings(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], second_texts: Sequence[str] | None = None, **options: Any
) -> Iterator[Encoding]:
    """The fast tokenizer's encoding of every text, or pair of texts, without padding; `options` are those of its call."""
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        block = slice(start, start + _TEXTS_PER_CALL)
        seconds = None if second_texts is None else second_texts[block]
        yield from tokenizer(texts[block], seconds, padding=False, verbose=False, **options).encodings


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad id. Decoders often have none: their end-of-sequence id, or 0, serves too, because padding is masked."""
    return next((found for found in (tokenizer.pad_token_id, tokenizer.eos_token_id) if found is not None), 0)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's highest id: the rows that a model needs for all of its tokens. Ids may have gaps, so that
    `len(tokenizer)`, which counts tokens, is not it."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def padded(rows: Sequence[Sequence[int] | np.ndarray], width: int, value: int) -> torch.Tensor:
    """(rows, width) int64, each row filled up with `value` on the right."""
    filled = np.full((len(rows), width), value, dtype=np.int64)
    for line, row in zip(filled, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(filled)


def held(rows: Sequence[Sequence[Any] | np.ndarray], width: int) -> torch.Tensor:
    """(rows, width) bool, True on what each row holds before it is filled up."""
    return torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
