"""Token caches equal a plain in-memory reference, are written once, and are never half there."""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastkd.sealed import MANIFEST_FILE
from fastkd.store import lock
from fastkd.tasks import corpus as corpus_module
from fastkd.tasks import sources
from fastkd.tasks.bad_rows import BadRowPolicy
from fastkd.tasks.corpus import Corpus, StreamState, open_corpus
from fastkd.tasks.tokenized import Layout, TokenRows, tokenize_corpus

CLS, SEP, EOS, UNK = 0, 1, 2, 3
WORDS = [f"w{i}" for i in range(20)]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + length]) for i, length in enumerate([3, 12, 0, 5, 1, 13, 9, 2, 0, 8])]


def make_tokenizer(*more_words: str, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "</s>", "[UNK]", *WORDS, *more_words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def word_ids(text: str) -> list[int]:
    return [WORDS.index(word) + 4 for word in text.split()]


class Texts:
    """A corpus that counts how often it is read."""

    def __init__(self, texts: list[str] = TEXTS, fingerprint: str = "c0") -> None:
        self.texts = texts
        self.starts: list[int] = []
        self.corpus = Corpus("the toy corpus", fingerprint, self.read)

    @property
    def times_read(self) -> int:
        return len(self.starts)

    def read(self, start: int, stream: StreamState | None) -> Iterator[tuple[None, list[str]]]:
        self.starts.append(start)
        for text in self.texts[start:]:
            yield None, [text]


def as_lists(rows: TokenRows) -> list[list[int]]:
    return [rows[index].tolist() for index in range(len(rows))]


def test_rows_layout_cuts_long_texts_and_drops_empty_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastkd"):
        rows = tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=10, layout="rows", cache_dir=tmp_path, batch_size=3)
    assert as_lists(rows) == [[CLS, *word_ids(text)[:8], SEP] for text in TEXTS if text]
    assert (rows.truncated_rows, rows.dropped_rows, rows.vocab_size) == (3, 2, 24)
    assert "3 texts of more than 10 ids were cut, 2 empty texts dropped" in caplog.text


def test_rows_layout_splits_long_texts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = tokenize_corpus(Texts().corpus, tokenizer, max_length=6, layout="rows", split_long=True, cache_dir=tmp_path, batch_size=4)
    expected = []
    for ids in map(word_ids, TEXTS):
        expected += [[CLS, *ids[start : start + 4], SEP] for start in range(0, len(ids), 4)]
    assert as_lists(rows) == expected
    assert (rows.truncated_rows, rows.dropped_rows) == (sum(len(word_ids(text)) > 4 for text in TEXTS), 2)


def test_rows_layout_follows_the_truncation_side(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    rows = tokenize_corpus(Texts().corpus, tokenizer, max_length=10, layout="rows", cache_dir=tmp_path)
    assert as_lists(rows) == [[CLS, *word_ids(text)[-8:], SEP] for text in TEXTS if text]


@pytest.mark.parametrize(
    ("special", "ending"),
    [({"eos_token": "</s>", "sep_token": "[SEP]"}, [EOS]), ({"sep_token": "[SEP]"}, [SEP]), ({}, [])],
    ids=["eos", "sep", "neither"],
)
@pytest.mark.parametrize("max_length", [7, 10, 53, 61, 500])
def test_packed_layout_is_the_concatenation_in_blocks(
    tmp_path: Path, special: dict[str, str], ending: list[int], max_length: int
) -> None:
    rows = tokenize_corpus(
        Texts().corpus, make_tokenizer(**special), max_length=max_length, layout="packed", cache_dir=tmp_path, batch_size=3
    )
    flat = [i for text in TEXTS if text for i in [*word_ids(text), *ending]]
    blocks = [flat[start : start + max_length] for start in range(0, len(flat), max_length)]
    assert as_lists(rows) == [block for block in blocks if len(block) >= 2]
    assert (rows.truncated_rows, rows.dropped_rows) == (0, 2)


def test_packed_layout_drops_a_last_block_of_one_id(tmp_path: Path) -> None:
    for length, kept in ((9, [8]), (10, [8, 2])):
        text = Texts([" ".join(WORDS[:length])], fingerprint=f"{length}")
        rows = tokenize_corpus(text.corpus, make_tokenizer(), max_length=8, layout="packed", cache_dir=tmp_path)
        assert rows.lengths.tolist() == kept
        assert rows.num_tokens == len(rows.ids) == sum(kept)


def test_token_rows_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    rows = tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=10, layout="rows", cache_dir=tmp_path)
    assert type(rows[0]) is np.ndarray
    assert rows[0].dtype == np.int32
    assert np.shares_memory(rows[1], rows.ids)
    assert rows[-1].tolist() == rows[len(rows) - 1].tolist()
    assert rows.lengths.tolist() == [len(rows[index]) for index in range(len(rows))]
    assert rows.num_tokens == rows.lengths.sum()
    with pytest.raises(ValueError, match="read-only"):
        rows[0][0] = 1
    with pytest.raises(IndexError):
        rows[len(rows)]
    again = pickle.loads(pickle.dumps(rows))  # as a DataLoader worker gets it
    assert as_lists(again) == as_lists(rows)
    assert len(pickle.dumps(rows)) < 1_000


def test_second_call_does_not_read_the_corpus(tmp_path: Path) -> None:
    texts, tokenizer = Texts(), make_tokenizer()
    first = tokenize_corpus(texts.corpus, tokenizer, max_length=10, layout="rows", cache_dir=tmp_path)
    second = tokenize_corpus(texts.corpus, tokenizer, max_length=10, layout="rows", cache_dir=tmp_path, batch_size=1)
    assert texts.times_read == 1
    assert as_lists(first) == as_lists(second)
    assert first.fingerprint == second.fingerprint == first.folder.name


def test_other_corpus_tokenizer_or_option_is_another_cache(tmp_path: Path) -> None:
    def fingerprint(texts: Texts, tokenizer: PreTrainedTokenizerFast, **changed: Any) -> str:
        options: dict[str, Any] = {"max_length": 10, "layout": "rows", **changed}
        return tokenize_corpus(texts.corpus, tokenizer, cache_dir=tmp_path, **options).fingerprint

    left = make_tokenizer()
    left.truncation_side = "left"
    seen = [
        fingerprint(Texts(), make_tokenizer()),
        fingerprint(Texts(fingerprint="c1"), make_tokenizer()),
        fingerprint(Texts(), make_tokenizer("another")),
        fingerprint(Texts(), make_tokenizer(eos_token="</s>")),
        fingerprint(Texts(), left),
        fingerprint(Texts(), make_tokenizer(), max_length=11),
        fingerprint(Texts(), make_tokenizer(), split_long=True),
        fingerprint(Texts(), make_tokenizer(), layout="packed"),
    ]
    assert len(set(seen)) == len(seen)


class Stopped(BaseException):
    """A kill or a signal, at a moment that the test picks."""


LAYOUTS: list[dict[str, Any]] = [{"layout": "rows"}, {"layout": "rows", "split_long": True}, {"layout": "packed"}]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", LAYOUTS, ids=["rows", "split", "packed"])
@pytest.mark.parametrize("killed_at", range(11))
def test_killed_at_any_text_goes_on_behind_the_last_saved_one(tmp_path: Path, options: dict[str, Any], killed_at: int) -> None:
    """Batches of 2, saved every 2 of them: what was written beyond the saved place is written again, byte for byte the same."""

    class Killed(Texts):
        def read(self, start: int, stream: StreamState | None) -> Iterator[tuple[None, list[str]]]:
            yield from islice(super().read(start, stream), killed_at)
            raise Stopped

    tokenizer, sizes = make_tokenizer(), {"max_length": 6, "batch_size": 2, "save_every": 2}
    whole = tokenize_corpus(Texts().corpus, tokenizer, cache_dir=tmp_path / "whole", **sizes, **options)
    with pytest.raises(Stopped):
        tokenize_corpus(Killed().corpus, tokenizer, cache_dir=tmp_path / "cut", **sizes, **options)
    assert not any((path / MANIFEST_FILE).exists() for path in (tmp_path / "cut").iterdir())
    texts = Texts()
    rows = tokenize_corpus(texts.corpus, tokenizer, max_length=6, batch_size=3, cache_dir=tmp_path / "cut", **options)
    assert texts.starts == [killed_at // 4 * 4]
    assert content(rows.folder) == content(whole.folder)
    assert [path for path in (tmp_path / "cut").iterdir() if path.is_dir()] == [rows.folder]


@pytest.mark.parametrize("batch", range(5))
def test_a_poll_that_raises_stops_it_and_loses_nothing(tmp_path: Path, batch: int) -> None:
    polls: list[None] = []

    def poll() -> None:
        polls.append(None)
        if len(polls) == batch + 1:
            raise Stopped

    tokenizer = make_tokenizer()
    options: dict[str, Any] = {"max_length": 6, "layout": "rows", "batch_size": 2}
    whole = tokenize_corpus(Texts().corpus, tokenizer, cache_dir=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        tokenize_corpus(Texts().corpus, tokenizer, cache_dir=tmp_path / "cut", poll=poll, **options)
    texts = Texts()
    rows = tokenize_corpus(texts.corpus, tokenizer, cache_dir=tmp_path / "cut", poll=poll, **options)
    assert texts.starts == [2 * batch + 2] and len(polls) == 5
    assert content(rows.folder) == content(whole.folder)


def test_who_waits_for_another_process_can_be_stopped(tmp_path: Path) -> None:
    def poll() -> None:
        raise Stopped

    rows = tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=6, layout="rows", cache_dir=tmp_path)
    (rows.folder / MANIFEST_FILE).unlink()
    with lock(tmp_path / f"{rows.fingerprint}.lock"), pytest.raises(Stopped):
        tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=6, layout="rows", cache_dir=tmp_path, poll=poll)


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy"])
@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_an_unfinished_cache_that_lacks_what_it_says_is_begun_anew(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def poll() -> None:
        raise Stopped

    options: dict[str, Any] = {"max_length": 6, "layout": "rows", "cache_dir": tmp_path, "batch_size": 4}
    with pytest.raises(Stopped):
        tokenize_corpus(Texts().corpus, make_tokenizer(), poll=poll, **options)
    [file] = tmp_path.glob(f"*.unfinished/{name}")
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.unlink()
    texts = Texts()
    rows = tokenize_corpus(texts.corpus, make_tokenizer(), **options)
    assert texts.starts == [0] and "it is written anew" in caplog.text
    assert as_lists(rows) == [[CLS, *word_ids(text)[:4], SEP] for text in TEXTS if text]


def test_a_fault_of_the_data_leaves_nothing_behind(tmp_path: Path) -> None:
    corpus = Texts(["w1", "w2", cast(str, None)]).corpus
    with pytest.raises(TypeError, match=r"Row 2 .*the toy corpus is null"):
        tokenize_corpus(corpus, make_tokenizer(), max_length=6, layout="rows", cache_dir=tmp_path, batch_size=1, save_every=1)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_stream_goes_on_by_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards in front of the saved place are not opened again; bad rows that were left out there stay counted."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(corpus_module, "_READ_ROWS", 4)
    for shard in range(4):
        lines = [{"text": None if row == 3 else f"w{shard} w{row}"} for row in range(10)]
        (tmp_path / f"shard-{shard}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def corpus() -> Corpus:
        return open_corpus(str(tmp_path / "shard-*.jsonl"), streaming=True, bad_rows=BadRowPolicy("skip", 4))

    polls: list[None] = []

    def poll() -> None:
        polls.append(None)
        if len(polls) == 5:  # 25 rows of 36 are given: the place is in the third shard
            raise Stopped

    options: dict[str, Any] = {"max_length": 6, "layout": "rows", "batch_size": 5}
    whole = tokenize_corpus(corpus(), make_tokenizer(), cache_dir=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        tokenize_corpus(corpus(), make_tokenizer(), cache_dir=tmp_path / "cut", poll=poll, **options)
    again = corpus()
    monkeypatch.setattr(sources.HashedFile, "require_unchanged", lambda file: None)
    os.truncate(tmp_path / "shard-0.jsonl", 0)  # nobody reads it any more
    rows = tokenize_corpus(again, make_tokenizer(), cache_dir=tmp_path / "cut", **options)
    assert len(rows) == 36 and content(rows.folder) == content(whole.folder)
    with pytest.raises(ValueError, match="More than max_bad_rows=2 rows"):
        tokenize_corpus(replace(corpus(), bad_rows=BadRowPolicy("skip", 2)), make_tokenizer(), cache_dir=tmp_path / "few", **options)


def test_manifest_says_what_was_tokenised(tmp_path: Path) -> None:
    rows = tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=10, layout="packed", cache_dir=tmp_path)
    manifest = json.loads((rows.folder / MANIFEST_FILE).read_text())
    assert manifest["corpus"] == "the toy corpus"
    assert (manifest["layout"], manifest["max_length"], manifest["fingerprint"]) == ("packed", 10, rows.fingerprint)
    for name in ("ids.npy", "offsets.npy"):
        data = (rows.folder / name).read_bytes()
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_corpus_without_ids_is_refused(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(ValueError, match="None of the 2 texts of the toy corpus"):
        tokenize_corpus(Texts(["", " "]).corpus, make_tokenizer(), max_length=10, layout=layout, cache_dir=tmp_path)
    assert not any((path / MANIFEST_FILE).exists() for path in tmp_path.iterdir())


def test_ids_with_gaps_are_the_tokenizers_and_one_beyond_them_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"[UNK]": 0, "w1": 5}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows = tokenize_corpus(Texts(["w1"]).corpus, tokenizer, max_length=4, layout="rows", cache_dir=tmp_path)
    assert (as_lists(rows), rows.vocab_size) == ([[5]], 6)
    backend.post_processor = TemplateProcessing(single="$A [X]", special_tokens=[("[X]", 9)])
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="the id 9 for the toy corpus"):
        tokenize_corpus(Texts(["w1"]).corpus, other, max_length=4, layout="rows", cache_dir=tmp_path)


def test_arguments_are_checked_before_the_corpus_is_read(tmp_path: Path) -> None:
    texts = Texts()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layout": "padded"}, "layout='padded'.*'packed', 'rows'"),
        ({"layout": "packed", "split_long": True}, "split_long=True"),
        ({"layout": "packed", "max_length": 1}, "max_length=1 .*at least 2"),
        ({"layout": "rows", "max_length": 2}, "max_length=2 .*at least 3"),
    ]
    for wrong, said in cases:
        with pytest.raises(ValueError, match=said):
            tokenize_corpus(texts.corpus, make_tokenizer(), cache_dir=tmp_path, **{"max_length": 8, **wrong})
    slow = cast(PreTrainedTokenizerFast, SimpleNamespace(is_fast=False))
    with pytest.raises(TypeError, match=r"not a fast one.*AutoTokenizer"):
        tokenize_corpus(texts.corpus, slow, max_length=8, layout="rows", cache_dir=tmp_path)
    assert texts.times_read == 0
