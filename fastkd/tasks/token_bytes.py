"""Count the bytes of text behind every id of a tokenised corpus, the unit in which tokenizers compare."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from fastkd.tasks.token_rows import encodings

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

    from fastkd.tasks.tokenized import Layout

_TEXTS = 64


def token_bytes(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, *, layout: Layout, max_length: int) -> np.ndarray:
    """Count the UTF-8 bytes that every id of `tokenize_corpus`, with long rows split, covers: (num_tokens,) int64, in its order.

    A token covers what lies between the end of the token before it in its row and its own end, white space between words included.
    Special tokens and the ids between packed texts cover nothing. A last packed row too short to be kept is counted all the same.
    """
    texts = iter(texts)
    counts: list[np.ndarray] = []
    while block := list(islice(texts, _TEXTS)):
        if layout == "packed":
            pairs = zip(block, encodings(tokenizer, block, add_special_tokens=False), strict=True)
            ending = np.zeros(int(tokenizer.eos_token_id is not None or tokenizer.sep_token_id is not None), np.int64)
            counts += [np.append(_covered(piece, _byte_ends(text)), ending) for text, piece in pairs if piece.ids]
        else:
            cut = encodings(tokenizer, block, truncation=True, max_length=max_length)
            for text, first in zip(block, cut, strict=True):
                ends = _byte_ends(text)
                counts += [_covered(piece, ends) for piece in (first, *first.overflowing) if not all(piece.special_tokens_mask)]
    return np.concatenate(counts)


def _covered(piece: Encoding, byte_ends: np.ndarray) -> np.ndarray:
    """(ids,) bytes that each id of a text's piece covers. byte_ends: see `_byte_ends`."""
    begin = min((start for start, end in piece.offsets if end > start), default=0)
    ends = np.maximum.accumulate([max(begin, end) for _, end in piece.offsets])
    return np.diff(byte_ends[ends], prepend=byte_ends[begin])


def _byte_ends(text: str) -> np.ndarray:
    """(characters + 1,) int64: the bytes before each character, and of the whole text."""
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
