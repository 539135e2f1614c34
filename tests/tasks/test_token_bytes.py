"""How much text every id of a tokenised corpus covers."""

from __future__ import annotations

import numpy as np
import pytest

from fastkd.tasks.corpus import open_corpus
from fastkd.tasks.token_bytes import token_bytes
from fastkd.tasks.tokenized import tokenize_corpus
from tests import tiny

TEXTS = ["if self is None:", "  for  key in keys: return", "größe = '😀' * 3", "x" * 70, " ", "def a(b): pass  # " + "c d " * 40]


@pytest.mark.parametrize("max_length", [8, 32])
@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("kind", ["byte_level", "wordpiece"])
def test_counts_stand_in_the_order_of_the_rows(tmp_path, kind, layout, max_length):
    tokenizer = getattr(tiny, kind)()
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    corpus = open_corpus(tmp_path / "text.jsonl")
    rows = tokenize_corpus(
        corpus, tokenizer, max_length=max_length, layout=layout, cache_dir=tmp_path / "cache", split_long=layout == "rows"
    )
    counts = token_bytes(corpus.rows(), tokenizer, layout=layout, max_length=max_length)
    assert 0 <= len(counts) - rows.num_tokens <= (layout == "packed")
    words = {i: tokenizer.convert_ids_to_tokens(i) for i in set(rows.ids.tolist())}
    for row_id, count in zip(rows.ids.tolist(), counts, strict=False):
        if row_id in tokenizer.all_special_ids and words[row_id] != "[UNK]":
            assert count == 0
        elif kind == "byte_level" and words[row_id].isascii():  # one character a byte; others of that alphabet stand for parts of one
            assert count == len(words[row_id])
    whole = sum(len(text.encode()) for text in TEXTS)
    if layout == "packed" and kind == "byte_level":
        assert counts.sum() == whole
    assert 0.8 * whole < counts.sum() <= whole


def test_a_byte_level_token_covers_its_own_bytes():
    tokenizer = tiny.byte_level()
    counts = token_bytes(["aß😀", "b"], tokenizer, layout="packed", max_length=8)
    assert counts.sum() == 1 + 2 + 4 + 1 and counts[0] == 1 and counts[-2:].tolist() == [1, 0]


def test_white_space_belongs_to_the_word_behind_it():
    counts = token_bytes(["if  self"], tiny.wordpiece(), layout="rows", max_length=16)
    assert counts.tolist() == [0, 2, 6, 0]
    assert np.issubdtype(counts.dtype, np.int64)
