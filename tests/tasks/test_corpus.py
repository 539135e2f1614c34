"""Opening corpora: every kind gives the same rows, and every mistake a sentence before any work."""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from fastkd.tasks import corpus as corpus_module
from fastkd.tasks import stdlib
from fastkd.tasks.bad_rows import BadRowPolicy
from fastkd.tasks.corpus import Bookmark, Corpus, open_corpus

ROWS = ["first row", "", "third: ünïcode\nof two lines", "fourth"]


@pytest.fixture(autouse=True)
def _quiet_local_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, rows: list[Any] = ROWS, column: str = "text") -> Path:
    """Write rows as the kind of file that the suffix names."""
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"number": i, column: row}) + "\n" for i, row in enumerate(rows)))
    else:
        table = datasets.Dataset.from_dict({"number": list(range(len(rows))), column: rows})
        {".parquet": table.to_parquet, ".csv": table.to_csv}[path.suffix](path)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files_give_their_rows(tmp_path: Path, suffix: str, streaming: bool) -> None:
    rows = [row or "second" for row in ROWS]  # an empty CSV cell is a null
    corpus = open_corpus(write(tmp_path / f"rows{suffix}", rows), streaming=streaming)
    assert list(corpus.rows()) == list(corpus.rows()) == rows
    assert [list(corpus.rows(start)) for start in (1, 3, 4, 9)] == [rows[1:], rows[3:], [], []]


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
def test_lines_of_a_text_file_are_rows_where_they_are_not_blank(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "lines.txt").write_text("one\n\n  two\n \t\nthree")
    corpus = open_corpus(tmp_path / "lines.txt", streaming=streaming, documents="line")
    assert list(corpus.rows()) == ["one", "  two", "three"]
    assert list(corpus.rows(start=2)) == ["three"]


def test_glob_reads_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, rows in (("b", ["3", "4"]), ("a", ["1", "2"]), ("c", [])):  # c is empty and harmless
        write(tmp_path / f"part-{name}.jsonl", rows)
    corpus = open_corpus(str(tmp_path / "part-*.jsonl"))
    assert list(corpus.rows()) == ["1", "2", "3", "4"]
    assert "3 files" in corpus.description


def test_file_whose_name_has_glob_characters(tmp_path: Path) -> None:
    write(tmp_path / "rows1.jsonl", ["wrong"])
    assert list(open_corpus(write(tmp_path / "rows[1].jsonl")).rows()) == ROWS


def test_max_rows_ends_the_corpus(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "rows.jsonl"), max_rows=3)
    assert list(corpus.rows()) == ROWS[:3]
    assert list(corpus.rows(start=2)) == ROWS[2:3]
    assert list(corpus.rows(start=4)) == []
    with pytest.raises(ValueError, match="max_rows=0"):
        open_corpus(tmp_path / "rows.jsonl", max_rows=0)


def test_saved_dataset_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ROWS}).with_format("arrow").save_to_disk(tmp_path / "saved")
    corpus = open_corpus(tmp_path / "saved", text_column="body")
    assert list(corpus.rows()) == ROWS
    assert list(corpus.rows(start=3)) == ROWS[3:]
    assert open_corpus(tmp_path / "saved", text_column="body").fingerprint == corpus.fingerprint
    with pytest.raises(ValueError, match=r"split='dev'.*'train'"):
        open_corpus(tmp_path / "saved", text_column="body", split="dev")


def test_saved_dataset_dict_folder(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_dict({"text": ["a"]}), "validation": datasets.Dataset.from_dict({"text": ["b"]})}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(open_corpus(tmp_path / "saved", split="validation").rows()) == ["b"]
    with pytest.raises(ValueError, match=r"split='test'.*'train', 'validation'"):
        open_corpus(tmp_path / "saved", split="test")


def test_standard_library() -> None:
    corpus = open_corpus("stdlib", split="dev", max_rows=5)
    rows = list(stdlib.stdlib_rows("dev"))
    assert list(corpus.rows()) == rows[:5]
    assert list(corpus.rows(start=3)) == rows[3:5]
    assert len({corpus.fingerprint, open_corpus("stdlib", split="test", max_rows=5).fingerprint}) == 2
    with pytest.raises(ValueError, match=r"split='validation'.*dev"):
        open_corpus("stdlib", split="validation")
    with pytest.raises(ValueError, match=r"text_column='body'.*'text'"):
        open_corpus("stdlib", text_column="body")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of three files, the last of which alone is in the dev split."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("os", "typing", "m103"):
        (tmp_path / f"{name}.py").write_text(f"import {name}\n")
    assert [path.name for path in stdlib.stdlib_files("dev")] == ["m103.py"]
    return tmp_path


def test_the_standard_library_is_known_by_its_content(library: Path) -> None:
    seen = {open_corpus("stdlib").fingerprint, open_corpus("stdlib", split="dev").fingerprint}
    os.utime(library / "os.py", ns=(0, 0))
    assert open_corpus("stdlib").fingerprint in seen
    (library / "os.py").write_text("import io\n")
    seen.add(open_corpus("stdlib").fingerprint)
    (library / "typing.py").rename(library / "inspect.py")  # in another order
    seen.add(open_corpus("stdlib").fingerprint)
    assert len(seen) == 4
    rows = open_corpus("stdlib").rows()
    assert next(rows) == "import typing\n"
    (library / "os.py").write_text("import re\n")
    with pytest.raises(ValueError, match=rf"{library}/os\.py was changed while it was read"):
        next(rows)


def test_fingerprint_follows_content_column_and_max_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["a", "b"])
    digest = open_corpus(path).fingerprint
    assert open_corpus(path, streaming=True).fingerprint == digest
    assert bytes.fromhex(digest)

    changed = [open_corpus(path, max_rows=1).fingerprint]
    path.write_text('{"text": "a", "body": "a"}\n')
    changed += [open_corpus(path).fingerprint, open_corpus(path, text_column="body").fingerprint]
    assert len({digest, *changed}) == 4


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
@pytest.mark.parametrize(("bad", "said"), [(None, "is null"), (7, "holds int 7")], ids=["null", "number"])
def test_row_that_is_not_a_string_is_named(tmp_path: Path, bad: Any, said: str, streaming: bool) -> None:
    corpus = open_corpus(write(tmp_path / "mixed.jsonl", ["a", "b", bad]), streaming=streaming)
    for start in (0, 2):
        with pytest.raises(TypeError, match=rf"Row 2 .*mixed\.jsonl.*{said}"):
            list(corpus.rows(start))


def test_column_of_numbers_is_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Row 0 .*holds int 0"):
        open_corpus(write(tmp_path / "rows.jsonl"), text_column="number")


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
def test_missing_column_lists_the_present_ones(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "rows.jsonl", column="body")
    with pytest.raises(ValueError, match=r"text_column='text'.*rows\.jsonl.*'number', 'body'"):
        open_corpus(path, streaming=streaming)


def test_unknown_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split='validation'.*'train'"):
        open_corpus(write(tmp_path / "rows.jsonl"), split="validation")


@pytest.mark.parametrize(("name", "content"), [("empty.jsonl", ""), ("blank.txt", "\n  \n")])
def test_empty_corpus_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"no rows in .*{name}"):
        open_corpus(tmp_path / name)


def test_csv_of_a_header_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text("text\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"header\.csv"):
            open_corpus(tmp_path / "header.csv", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
def test_broken_file_is_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text: 3}\n')
    with pytest.raises(ValueError, match=r"Cannot read .*broken\.jsonl.*row 1"):
        open_corpus(tmp_path / "broken.jsonl", streaming=streaming)


def test_paths_that_cannot_be_a_corpus(tmp_path: Path) -> None:
    for missing in ("no/such/file.jsonl", "missing.txt", "parts-*.parquet", "./folder"):
        with pytest.raises(FileNotFoundError, match="no file, no folder and no glob"):
            open_corpus(missing)
    with pytest.raises(ValueError, match=r"save_to_disk did not write.*\*\.jsonl"):
        open_corpus(tmp_path)
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"'\.xml'.*'\.jsonl'"):
        open_corpus(tmp_path / "rows.xml")
    write(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"several kinds \(\.jsonl, \.xml\)"):
        open_corpus(tmp_path / "rows.*")
    with pytest.raises(ValueError, match="name='en'"):
        open_corpus(tmp_path / "rows.jsonl", name="en")


class HubBuilder:
    """What ``datasets.load_dataset_builder`` gives for a hub dataset of one split, whose download fails if told to."""

    hash = "commit-1"

    def __init__(self, failure: Exception | None = None) -> None:
        self.info = SimpleNamespace(splits=None)
        self.config = SimpleNamespace(data_files={"train": ["hf://rows.parquet"]})
        self.failure = failure
        self.downloads = 0

    def download_and_prepare(self) -> None:
        self.downloads += 1
        if self.failure:
            raise self.failure

    def as_dataset(self, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": ROWS})

    def as_streaming_dataset(self, split: str) -> datasets.IterableDataset:
        def rows() -> Iterator[dict[str, str]]:
            yield from ({"text": row} for row in ROWS)
            if self.failure:
                yield from ({"text": "more"} for _ in range(2_000))
                raise self.failure

        return datasets.IterableDataset.from_generator(rows)


def serve(monkeypatch: pytest.MonkeyPatch, builder: HubBuilder) -> HubBuilder:
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name: builder)
    return builder


def test_hub_dataset_is_the_same_downloaded_or_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = serve(monkeypatch, HubBuilder())
    downloaded, streamed = open_corpus("org/name", name="en"), open_corpus("org/name", name="en", streaming=True)
    assert builder.downloads == 1
    assert list(downloaded.rows()) == list(streamed.rows()) == ROWS
    assert list(downloaded.rows(2)) == list(streamed.rows(2)) == ROWS[2:]
    assert downloaded.fingerprint == streamed.fingerprint != open_corpus("org/name", name="fr").fingerprint
    monkeypatch.setattr(builder, "hash", "commit-2")
    assert open_corpus("org/name", name="en").fingerprint != downloaded.fingerprint


def test_hub_split_is_checked_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = serve(monkeypatch, HubBuilder())
    with pytest.raises(ValueError, match=r"split='dev'.*org/name.*'train'"):
        open_corpus("org/name", split="dev")
    assert builder.downloads == 0


def test_interrupted_download_says_that_a_rerun_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, HubBuilder(TimeoutError("the read timed out")))
    with pytest.raises(ConnectionError, match=r"org/name.*the read timed out.*run the same command again: it resumes"):
        open_corpus("org/name")
    corpus = open_corpus("org/name", streaming=True)  # its first rows come through
    with pytest.raises(ConnectionError, match=r"the read timed out.*read again from its first row"):
        list(corpus.rows())


def test_hub_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset_builder(path: str, name: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(FileNotFoundError, match=r"no file or folder of that name.*'org/nome'.*doesn't exist on the Hub"):
        open_corpus("org/nome")


def test_rows_are_checked_for_every_reader() -> None:
    corpus = Corpus("a toy", "00", lambda start, _: iter([(None, ["a", b"b"][start:])]))
    with pytest.raises(TypeError, match=r"Row 1 .*a toy holds bytes b'b'"):
        list(corpus.rows())


MIXED: list[Any] = ["a", None, "b", 7, "c", ["d"], "e"]


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
def test_bad_rows_are_left_out_counted_and_said(tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "mixed.jsonl", [None, *(row if isinstance(row, str) else None for row in MIXED)])
    with pytest.raises(TypeError, match=r"Row 0 .*mixed\.jsonl.* is null.*on_bad_row: skip leaves such rows out"):
        open_corpus(path, streaming=streaming)
    skipping = open_corpus(path, streaming=streaming, max_rows=4, bad_rows=BadRowPolicy("skip"))
    assert "left out" not in caplog.text, "the first row alone was looked at"
    assert [list(skipping.rows(start)) for start in (0, 2, 3, 9)] == [["a", "b", "c", "e"], ["c", "e"], ["e"], []]
    assert "4 rows of " in caplog.text and "mixed.jsonl' cannot be used and were left out" in caplog.text
    assert "The first: Row 0 " in caplog.text


def test_more_bad_rows_than_may_be_are_refused() -> None:
    corpus = Corpus("a toy", "00", lambda start, _: iter([(None, MIXED[start:])]), bad_rows=BadRowPolicy("skip", 3))
    assert list(corpus.rows()) == ["a", "b", "c", "e"]
    with pytest.raises(ValueError, match=r"More than max_bad_rows=2 rows of a toy .*The first of them: Row 1 .* is null"):
        list(replace(corpus, bad_rows=BadRowPolicy("skip", 2)).rows())


def test_what_becomes_of_bad_rows_is_in_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    policies = (BadRowPolicy(), BadRowPolicy("error", 5), BadRowPolicy("skip"), BadRowPolicy("skip", 5))
    refused, also_refused, skipped, capped = (open_corpus(path, bad_rows=policy).fingerprint for policy in policies)
    assert refused == also_refused == open_corpus(path).fingerprint and len({refused, skipped, capped}) == 3


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
@pytest.mark.parametrize("policy", [BadRowPolicy(), BadRowPolicy("skip")], ids=["error", "skip"])
def test_a_bookmark_leads_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, policy: BadRowPolicy
) -> None:
    monkeypatch.setattr(corpus_module, "_READ_ROWS", 3)
    rows: list[Any] = [None if policy.skips and number % 4 == 1 else f"row {number}" for number in range(20)]
    expected = [row for row in rows if row is not None]
    corpus = open_corpus(write(tmp_path / "rows.jsonl", rows), streaming=streaming, bad_rows=policy)
    for taken in range(len(expected) + 1):
        bookmark = Bookmark()
        assert list(islice(corpus.rows(0, bookmark), taken)) == expected[:taken]
        assert bookmark.rows <= taken and bookmark.position == bookmark.rows + bookmark.bad_rows
        reopened = Bookmark(**json.loads(json.dumps(asdict(bookmark))))
        assert list(corpus.rows(taken, reopened)) == expected[taken:]


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
def test_csv_cells_are_words_and_only_empty_ones_null(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows.csv").write_text("text,n\nNA,1\nNone,2\nnan,3\nnull,4\n")
    corpus = open_corpus(tmp_path / "rows.csv", streaming=streaming)
    assert list(corpus.rows()) == ["NA", "None", "nan", "null"]
    (tmp_path / "gap.csv").write_text("text,n\na,1\n,2\n")
    with pytest.raises(TypeError, match=r"Row 1 .*gap\.csv.* is null"):
        list(open_corpus(tmp_path / "gap.csv", streaming=streaming).rows())
