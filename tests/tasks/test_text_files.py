"""Plain text files as documents: what of a file is one, its line ends, its bytes, and files that are too long for one."""

from __future__ import annotations

import codecs
import random
import re
from pathlib import Path

import pytest

from fastkd.tasks import corpus as corpus_module
from fastkd.tasks import text_files
from fastkd.tasks.bad_rows import BadRowPolicy
from fastkd.tasks.corpus import open_corpus, text_batches
from fastkd.tasks.text_files import Documents
from fastkd.tasks.tokenized import tokenize_corpus
from tests import tiny

PROSE = "\n  A heading\n\nof two lines,\nthe second\n \t\n\nthe end\n"
KINDS: dict[Documents, list[str]] = {
    "file": [PROSE],
    "paragraph": ["  A heading", "of two lines,\nthe second", "the end"],
    "line": ["  A heading", "of two lines,", "the second", "the end"],
}


def expected(text: str, documents: Documents) -> list[str]:
    """The same by the whole text at once."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    pieces = {"file": [text], "paragraph": re.split(r"(?:^|\n)[^\S\n]*(?=\n|$)", text), "line": text.split("\n")}[documents]
    if documents == "paragraph":
        pieces = [piece.removeprefix("\n") for piece in pieces]
    return [piece for piece in pieces if piece.strip()]


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "mark"])
def test_what_a_document_is(tmp_path: Path, documents: Documents, end: str, mark: bytes) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_bytes(mark + PROSE.replace("\n", end).encode())
    (tmp_path / "c.txt").write_bytes(mark + b" \n\n")  # blank: no document
    corpus = open_corpus(str(tmp_path / "*.txt"), documents=documents)
    assert list(corpus.rows()) == 2 * KINDS[documents]
    assert list(corpus.rows(1)) == (2 * KINDS[documents])[1:]
    assert corpus.fingerprint != open_corpus(str(tmp_path / "a.txt"), documents=documents).fingerprint


def test_another_kind_of_document_is_another_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    assert len({open_corpus(tmp_path / "a.txt", documents=documents).fingerprint for documents in KINDS}) == 3


@pytest.mark.parametrize("documents", KINDS)
def test_blocks_of_a_file_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Documents) -> None:
    """Characters, line ends and the mark are cut in all places, as a file is read a few bytes at a time."""
    chance = random.Random(0)
    for trial in range(60):
        text = "".join(chance.choices(["a", "é", "𝄞", " ", "\n", "\n", "\r\n", "\r", "\u2028"], k=chance.randint(1, 30)))
        file = tmp_path / f"{trial}.txt"
        file.write_bytes((codecs.BOM_UTF8 if trial % 2 else b"") + f"{text}.".encode())
        monkeypatch.setattr(text_files, "_BLOCK_BYTES", chance.randint(3, 9))  # a mark is read at once
        assert list(open_corpus(file, documents=documents).rows()) == expected(f"{text}.", documents)


@pytest.mark.parametrize("block", [4, 1000])
def test_a_long_document_becomes_several_that_end_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_files, "LONGEST", 10)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    text = "one\ntwo\nthree\n\n" + 23 * "x" + "\nfour\n"
    (tmp_path / "a.txt").write_text(text)
    pieces = list(open_corpus(tmp_path / "a.txt", documents="file").rows())
    assert pieces == ["one\ntwo\n", "three\n\n", 10 * "x", 10 * "x", "xxx\nfour\n"] and "".join(pieces) == text
    assert list(open_corpus(tmp_path / "a.txt", documents="line").rows())[3:] == [10 * "x", 10 * "x", "xxx", "four"]


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize(
    ("content", "place", "byte"),
    [(b"fine\n\ncaf\xe9\n", 9, "0xe9"), (b"a" * 7 + b"\xc3(\n", 7, "0xc3"), (b"a\0\xff", 1, "0x00"), (b"cut: \xc3", 5, "0xc3")],
    ids=["latin-1", "across-blocks", "nul", "cut"],
)
def test_a_byte_that_is_no_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Documents, content: bytes, place: int, byte: str
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 8)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt is not text in UTF-8: its byte {place} \(the first is 0\) is {byte}"):
        list(open_corpus(tmp_path / "a.txt", documents=documents).rows())


def test_a_decoder_reads_newlines_and_one_end_a_file(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(PROSE)
    corpus = open_corpus(str(tmp_path / "*.txt"), documents="file")
    rows = tokenize_corpus(corpus, tokenizer, max_length=1000, layout="packed", cache_dir=tmp_path / "cache")
    assert tokenizer.decode(rows[0]) == 2 * f"{PROSE}{tokenizer.eos_token}"


def test_batches_are_bounded_by_their_characters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH_CHARS", 5)
    texts = ["aa", "bbb", "c", "", "dddddddd", "e", "f", "g", "h"]
    assert list(text_batches(texts, 3)) == [["aa", "bbb"], ["c", ""], ["dddddddd"], ["e", "f", "g"], ["h"]]
    assert list(text_batches(iter([]), 3)) == []


def test_every_document_counts_as_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    corpus = open_corpus(tmp_path / "a.txt", documents="paragraph", max_rows=2, bad_rows=BadRowPolicy("skip"))
    assert list(corpus.rows()) == KINDS["paragraph"][:2]
