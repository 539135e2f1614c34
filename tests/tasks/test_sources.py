"""What is on disk is known by its content: rows and fingerprints follow it, and nothing else does; what is no text is refused."""

from __future__ import annotations

import codecs
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastkd.tasks import corpus
from fastkd.tasks.corpus import Corpus
from fastkd.tasks.examples import load_examples
from fastkd.tasks.sources import open_source

open_corpus = partial(corpus.open_corpus, documents="line")  # of .txt files
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
WORDS = ["alpha", "bravo", "carol", "delta", "embers", "foxglove"]


@pytest.fixture(autouse=True)
def _quiet_local_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, rows: list[str]) -> Path:
    """Write rows, all of the same length, as the kind of file that the suffix names; the sizes are those of other such rows."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        path.write_text("\n".join((["text"] if path.suffix == ".csv" else []) + rows) + "\n")
    return path


def replace_behind_its_times(path: Path, change: Callable[[Path], Any]) -> None:
    """Change a file in place so that its name, its size, its inode and its time of change are what they were."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


# ---- identity is content


def renamed(path: Path, number: int) -> Path:
    return path.rename(path.with_name(f"renamed-{number}{path.suffix}"))


def copied(path: Path, number: int) -> Path:
    copy = shutil.copytree if path.is_dir() else shutil.copy
    return Path(copy(path, path.with_name(f"copy-{number}{path.suffix}")))


def touched(path: Path, number: int) -> Path:
    for file in (path, *path.rglob("*")):
        os.utime(file, ns=(0, number * 10**9))
    return path


def moved(path: Path, number: int) -> Path:
    folder = path.with_name(f"folder-{number}")
    folder.mkdir()
    return path.rename(folder / path.name)


def linked(path: Path, number: int) -> Path:
    if path.is_dir():
        return path
    os.link(path, path.with_name(f"link-{number}{path.suffix}"))
    return path.with_name(f"link-{number}{path.suffix}")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ""])
@pytest.mark.parametrize("seed", range(3))
def test_a_fingerprint_depends_on_the_content_alone(tmp_path: Path, suffix: str, seed: int) -> None:
    generator = random.Random(seed)
    rows = generator.sample(WORDS, 4)
    path = tmp_path / f"rows{suffix}"
    if suffix:
        write(path, rows)
    else:
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(path)
    first = open_corpus(path)
    for number in range(6):
        path = generator.choice([renamed, copied, touched, moved, linked])(path, number)
        corpus = open_corpus(path)
        assert list(corpus.rows()) == rows and corpus.fingerprint == first.fingerprint
        assert str(tmp_path) not in corpus.fingerprint
    if suffix in (".txt", ".jsonl", ".csv"):
        data = bytearray(path.read_bytes())
        place = data.index(generator.choice(rows).encode()) + generator.randrange(5)
        data[place] ^= 1 << generator.randrange(3)
        path.write_bytes(data)
    elif suffix:
        write(path, [*rows[1:], rows[0]])
    else:
        [file] = path.glob("*.arrow")
        data = file.read_bytes()
        file.write_bytes(data.replace(rows[0].encode(), rows[0].upper().encode()))
    changed = open_corpus(path)
    assert list(changed.rows()) != rows and changed.fingerprint != first.fingerprint


def test_the_order_of_the_files_is_content_and_their_number_too(tmp_path: Path) -> None:
    def fingerprint(*contents: str) -> str:
        folder = tmp_path / "-".join(contents)
        folder.mkdir()
        for number, content in enumerate(contents):
            write(folder / f"{number}.txt", [content])
        return open_corpus(str(folder / "*.txt")).fingerprint

    assert len({fingerprint("a", "b"), fingerprint("b", "a"), fingerprint("a"), fingerprint("a", "b", "b")}) == 4


@STREAMING
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_file_replaced_behind_its_times_gives_its_own_rows(tmp_path: Path, suffix: str, streaming: bool) -> None:
    path = write(tmp_path / f"rows{suffix}", ["alpha", "bravo"])
    before = open_corpus(path, streaming=streaming)
    replace_behind_its_times(path, lambda path: write(path, ["carol", "delta"]))
    after = open_corpus(path, streaming=streaming)
    assert list(after.rows()) == ["carol", "delta"] and after.fingerprint != before.fingerprint
    assert open_corpus(path, streaming=not streaming).fingerprint == after.fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_examples_of_a_file_or_a_folder_replaced_behind_its_times_are_its_own(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "folder").mkdir()
    train, test = (write(tmp_path / "folder" / f"{split}{suffix}", ["alpha", split]) for split in ("train", "test"))
    source = open_source(str(tmp_path / "folder"), [], split="test")
    for split in ("train", "test"):
        assert [row["text"] for row in load_examples(tmp_path / "folder", split=split)] == ["alpha", split]
    replace_behind_its_times(test, lambda path: write(path, ["bravo", "test"]))
    assert [row["text"] for row in load_examples(tmp_path / "folder", split="test")] == ["bravo", "test"]
    assert [row["text"] for row in load_examples(test)] == ["bravo", "test"]
    changed = open_source(str(tmp_path / "folder"), [], split="test").content
    assert source.content != changed == open_source(str(tmp_path / "folder"), [], split="test").content
    write(train, ["other", "train"])
    assert open_source(str(tmp_path / "folder"), [], split="test").content == changed
    assert open_source(str(tmp_path / "folder"), [], split="test[:1]").content != changed


# ---- rows come from what was hashed


def opened(path: Path, kind: str) -> Corpus:
    if kind == "saved":
        datasets.Dataset.from_dict({"text": WORDS * 500}).save_to_disk(path)
        return open_corpus(path)
    return open_corpus(write(path.with_suffix(kind), WORDS * 500), streaming=True)


@pytest.mark.parametrize("kind", [".txt", ".jsonl", "saved"])
@pytest.mark.parametrize("change", ["in-place", "replaced", "deleted"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, kind: str, change: str) -> None:
    rows = opened(tmp_path / "rows", kind).rows()
    assert next(rows) == WORDS[0]
    file = next((tmp_path / "rows").glob("*.arrow")) if kind == "saved" else (tmp_path / "rows").with_suffix(kind)
    if change == "in-place":
        replace_behind_its_times(file, lambda path: path.write_bytes(path.read_bytes().replace(b"bravo", b"other")))
    elif change == "replaced":
        file.with_name("new").write_bytes(file.read_bytes())
        file.with_name("new").rename(file)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=rf"{file} was changed while it was read"):
        list(rows)


def test_what_is_converted_of_a_changing_file_is_refused_and_never_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", ["alpha", "bravo"])
    prepare = datasets.DatasetBuilder.download_and_prepare

    def changed_first(builder: datasets.DatasetBuilder) -> None:
        replace_behind_its_times(path, lambda path: write(path, ["carol", "delta"]))
        prepare(builder)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetBuilder, "download_and_prepare", changed_first)
        with pytest.raises(ValueError, match=rf"{path} was changed while it was read"):
            open_corpus(path)
    replace_behind_its_times(path, lambda path: write(path, ["alpha", "bravo"]))
    assert list(open_corpus(path).rows()) == ["alpha", "bravo"]


# ---- what is no text


@STREAMING
@pytest.mark.parametrize("row", [1, 2, 7])
def test_a_row_of_more_cells_than_the_header_is_refused_with_its_line(tmp_path: Path, row: int, streaming: bool) -> None:
    lines = ["id,text", *(f"{number},word {number}" for number in range(1, 8))]
    lines[row] = f"{row},well, well"
    (tmp_path / "a.csv").write_text("id,text\n0,fine\n")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    for name in ("rows.csv", "*.csv"):
        with pytest.raises(ValueError, match=rf"Cannot read .*rows\.csv'.*Expected 2 fields in line {row + 1}, saw 3"):
            list(open_corpus(str(tmp_path / name), streaming=streaming).rows())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text("\n".join(lines))
    for path in (tmp_path / "folder" / "train.csv", tmp_path / "folder"):
        with pytest.raises(ValueError, match=rf"Expected 2 fields in line {row + 1}, saw 3"):
            load_examples(path)


@STREAMING
def test_a_column_that_is_there_twice_is_refused_by_its_name(tmp_path: Path, streaming: bool) -> None:
    """Else the first of them would be read, whichever is meant."""
    (tmp_path / "train.csv").write_text("text,text,,\nfirst,second,,\n")
    with pytest.raises(ValueError, match=r"train\.csv' has several columns called 'text'; give each a name of its own"):
        list(open_corpus(tmp_path / "train.csv", streaming=streaming).rows())


def test_a_comma_in_quotes_is_a_part_of_its_cell(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('id,text\n0,"well, well"\n1,"two\nlines, one cell"\n')
    assert list(open_corpus(tmp_path / "rows.csv").rows()) == ["well, well", "two\nlines, one cell"]


@STREAMING
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str, streaming: bool) -> None:
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}{suffix}", [f"first of {name}", "second"])
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    rows = list(open_corpus(str(tmp_path / f"*{suffix}"), streaming=streaming).rows())
    assert rows == ["first of a", "second", "first of b", "second"]
    if suffix != ".txt":
        assert load_examples(tmp_path / f"a{suffix}")[0]["text"] == "first of a"


@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"fine\ncaf\xe9\n", 8, "0xe9"),
        (codecs.BOM_UTF8 + b"caf\xe9\n", 6, "0xe9"),
        ("wide".encode("utf-16-le"), 1, "0x00"),
        ("wide".encode("utf-16"), 0, "0xff"),
        (b"fine\n" * 2000 + b"torn\0\0\0\0", 10_004, "0x00"),
        (b"cut in a character: \xc3", 20, "0xc3"),
    ],
    ids=["latin-1", "after-mark", "utf-16", "utf-16-mark", "zeros", "cut"],
)
def test_a_text_file_that_is_not_utf8_is_refused_with_the_place(tmp_path: Path, content: bytes, offset: int, byte: str) -> None:
    (tmp_path / "rows.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/rows\.txt is not text in UTF-8: its byte {offset} \(the first is 0\) is {byte}"):
        list(open_corpus(tmp_path / "rows.txt").rows())


@STREAMING
def test_a_line_ends_at_any_of_the_three_line_ends(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows.txt").write_bytes("one\r\n\r\ntwo\rthree\r\r\nfour\u2028five\x0c\nsix\r".encode())
    assert list(open_corpus(tmp_path / "rows.txt", streaming=streaming).rows()) == ["one", "two", "three", "four\u2028five\x0c", "six"]
    for suffix in (".jsonl", ".csv"):
        path = write(tmp_path / f"rows{suffix}", ["one", "two"])
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert list(open_corpus(path, streaming=streaming).rows()) == ["one", "two"]


def test_a_nul_that_a_format_can_hold_is_a_character(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ["a\0b"])
    (tmp_path / "rows.csv").write_bytes(b"id,text\n0,a\0b\n")
    assert [list(open_corpus(tmp_path / name).rows()) for name in ("rows.jsonl", "rows.csv")] == [["a\0b"], ["a\0b"]]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.txt")
    with pytest.raises(FileNotFoundError, match="is no file, no folder and no glob"):
        open_corpus(tmp_path / "rows.txt")
