"""Unlabelled pairs: from files and folders, and from Python's library without the files that are held out."""

from __future__ import annotations

import json
import logging
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fastkd.tasks import stdlib
from fastkd.tasks.bad_rows import BadRowPolicy
from fastkd.tasks.labelled import LabelledExample
from fastkd.tasks.pairs import load_pairs, stdlib_pairs, unlabelled
from fastkd.tasks.stdlib_tasks import docstring_matches, which_docstring

ROWS: list[dict[str, Any]] = [{"text": f"text {n}", "other": f"other {n}", "n": n} for n in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_column_or_two_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    single = load_pairs(path)
    assert (single.kind, single.metrics, single.num_outputs, list(single.splits)) == ("unlabelled", (), 0, ["train"])
    assert list(single.split("train")) == [LabelledExample(f"text {n}") for n in range(5)]
    assert not single.is_labelled("train")
    swapped = load_pairs(path, text_column="other", second_text_column="text", max_rows=3)
    assert list(swapped.split("train")) == [LabelledExample(f"other {n}", f"text {n}") for n in range(3)]
    assert len({single.fingerprint, swapped.fingerprint, load_pairs(path).fingerprint}) == 2


def test_folders(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2]), "more": datasets.Dataset.from_list(ROWS[2:])}).save_to_disk(
        tmp_path / "saved"
    )
    assert [row.text for row in load_pairs(tmp_path / "saved", split="more").split("train")] == ["text 2", "text 3", "text 4"]
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", ROWS)
    assert len(load_pairs(tmp_path / "files").split("train")) == 5


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, {"text": "", "other": "x", "n": 5}, {"text": "y", "other": " \n", "n": 6}]
    path = write(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert [row.text for row in load_pairs(path).split("train")] == [*(f"text {n}" for n in range(5)), "y"]
        assert len(load_pairs(path, second_text_column="other").split("train")) == 5
    assert [record.getMessage()[:15] for record in caplog.records] == ["1 of 7 rows of ", "2 of 7 rows of "]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"text_column is 'words', which is not a column of .*: use one of 'text', 'other', 'n'"):
        load_pairs(path, text_column="words")
    with pytest.raises(ValueError, match="second_text_column is 'words'"):
        load_pairs(path, second_text_column="words")
    with pytest.raises(TypeError, match=r"Row 0 \(the first is 0\) of .* holds 0 in column 'n'; it must hold text"):
        load_pairs(path, second_text_column="n")
    with pytest.raises(TypeError, match=r"Row 1 .* holds None in column 'text'"):
        load_pairs(write(tmp_path / "null.jsonl", [ROWS[0], {"text": None}]))
    with pytest.raises(ValueError, match="has 1 examples; at least two"):
        load_pairs(path, max_rows=1)


def test_pairs_of_the_library_are_the_training_files_own() -> None:
    dataset = stdlib_pairs()
    rows, root = dataset.split("train"), Path(sysconfig.get_path("stdlib"))
    assert dataset.kind == "unlabelled" and len(rows) > 2_000
    assert all(row.second_text and row.label is None for row in rows)
    assert len({row.text for row in rows}) == len(rows)
    held_out = {path.relative_to(root).as_posix() for split in ("dev", "test") for path in stdlib.stdlib_files(split)}
    assert not held_out & {row.group for row in rows}
    assert all(row.second_text not in row.text for row in rows[:200])
    for task in (docstring_matches(), which_docstring()):
        for split in ("validation", "test"):
            assert {row.group for row in rows}.isdisjoint(row.group for row in task.split(split))
        assert {row.text for row in task.split("train")} <= {row.text for row in rows}
    own = {row.text: row.second_text for row in rows}
    assert all(own[row.text] == row.second_text for row in docstring_matches().split("train") if row.label == 1)
    assert stdlib_pairs().fingerprint == dataset.fingerprint


def test_unlabelled_rows_have_no_labels() -> None:
    with pytest.raises(ValueError, match=r"Row 1 .* has the label 0; kind 'unlabelled' has none"):
        unlabelled("toy", [LabelledExample("a"), LabelledExample("b", label=0)])
    with pytest.raises(ValueError, match=r"Row 1 .* has no text"):
        unlabelled("toy", [LabelledExample("a"), LabelledExample(" ")])


def test_rows_without_a_string_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"text": None, "other": "o", "n": 5}, {"text": "t", "other": None, "n": 6}])
    both = load_pairs(path, second_text_column="other", bad_rows=BadRowPolicy("skip"))
    assert [row.text for row in both.split("train")] == [f"text {n}" for n in range(5)]
    assert "2 rows of " in caplog.text
    assert [row.text for row in load_pairs(path, bad_rows=BadRowPolicy("skip", 1)).split("train")] == [
        *(f"text {n}" for n in range(5)),
        "t",
    ]
    with pytest.raises(ValueError, match="More than max_bad_rows=1 rows"):
        load_pairs(path, second_text_column="other", bad_rows=BadRowPolicy("skip", 1))
