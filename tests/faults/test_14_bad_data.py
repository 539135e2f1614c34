"""Fault 14: a corrupted Arrow, Parquet or JSON shard, a missing column, a wrong type, a null.

An error that names the file and the row. With `on_bad_row: skip` null and non-string rows are left out, counted, said in the log, and
refused above `max_bad_rows`; a file that cannot be read is refused all the same.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

import fastkd
from fastkd.train.config import TextData
from fastkd.train.data import text_rows, train_corpus
from fastkd.train.loop import StageTrainer
from tests import runs, tiny

LINES = tiny.lines()[:12]


@pytest.fixture(autouse=True)
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def write(path: Path, rows: list[Any], column: str = "text") -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({column: rows}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


def corrupt(path: Path) -> None:
    """Cut the file in the middle of its data."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("streaming", [False, True], ids=["converted", "streamed"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_corrupted_shard_is_named(tmp_path: Path, suffix: str, streaming: bool, on_bad_row: Any) -> None:
    for shard in range(3):
        write(tmp_path / f"shard-{shard}{suffix}", [*LINES])
    corrupt(tmp_path / f"shard-1{suffix}")
    text = TextData(path=str(tmp_path / f"shard-*{suffix}"), streaming=streaming, on_bad_row=on_bad_row)
    with pytest.raises(ValueError, match=rf"Cannot read (?s:.*)shard-1\{suffix}"):
        list(train_corpus(text).rows())


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_corrupted_arrow_file_is_named(tmp_path: Path, on_bad_row: Any) -> None:
    datasets.Dataset.from_dict({"text": LINES}).save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"not arrow" + arrow.read_bytes()[9:])
    with pytest.raises(ValueError, match=r"Cannot read the folder .*saved"):
        list(train_corpus(TextData(path=str(tmp_path / "saved"), on_bad_row=on_bad_row)).rows())


def test_a_missing_column_and_a_wrong_type(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [*LINES], column="body")
    with pytest.raises(ValueError, match=r"text_column='text' is not in .*rows\.parquet.*'body'"):
        train_corpus(TextData(path=str(path)))
    with pytest.raises(TypeError, match=r"Row 0 .*numbers\.parquet.* holds int 0, and every row must be a string"):
        train_corpus(TextData(path=str(write(tmp_path / "numbers.parquet", list(range(5))))))
    with pytest.raises(ValueError, match="More than max_bad_rows=3 rows"):
        train_corpus(TextData(path=str(tmp_path / "numbers.parquet"), on_bad_row="skip", max_bad_rows=3))


def test_a_null_is_refused_or_left_out_of_a_whole_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = runs.write_text(tmp_path)
    clean = write(tmp_path / "clean.jsonl", [*LINES])
    holed = write(tmp_path / "holed.jsonl", [None, *LINES[:7], None, *LINES[7:]])
    teacher = runs.bert_teacher(tmp_path)
    weights = {}
    for path in (clean, holed):
        settings = runs.settings(
            tmp_path / path.stem,
            method="kd",
            teacher_model_name_or_path=teacher,
            text={**text, "path": str(path), "on_bad_row": "skip", "max_bad_rows": 2},
            max_steps=2,
        )
        weights[path] = runs.weights(fastkd.distill(settings)["distill"])
    assert runs.same_bits(weights[clean], weights[holed])
    assert "2 rows of " in caplog.text and "holed.jsonl' cannot be used and were left out (on_bad_row: skip)" in caplog.text
    refusing = {**settings, "output_dir": str(tmp_path / "other"), "text": {**settings["text"], "on_bad_row": "error"}}
    with pytest.raises(TypeError, match=r"Row 0 .*holed\.jsonl.* is null.*on_bad_row: skip"):
        fastkd.distill(refusing)
    capped = {**refusing, "text": {**settings["text"], "max_bad_rows": 1}}
    with pytest.raises(ValueError, match=r"More than max_bad_rows=1 rows of .*holed\.jsonl.*first of them: Row 0 "):
        fastkd.distill(capped)


def test_what_becomes_of_bad_rows_decides_the_cache(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [*LINES]))
    made = [
        text_rows(TextData(path=path, on_bad_row=policy, max_bad_rows=most), tiny.wordpiece(), tmp_path / "cache", causal=False).train
        for policy, most in (("error", 1), ("skip", 1), ("skip", 2))
    ]
    assert len({rows.fingerprint for rows in made}) == 3


@pytest.mark.parametrize("kind", ["task", "dataset"])
def test_null_in_the_examples_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    class Ready(Exception):
        pass

    def ready(trainer: Any, stage: Any, *arguments: Any, **options: Any) -> None:
        raise Ready(len(stage.lengths))

    monkeypatch.setattr(StageTrainer, "__init__", ready)
    if kind == "task":
        data, column, size = runs.write_task(tmp_path), "text", 24
        teacher = runs.bert_teacher(tmp_path)
        file, models = tmp_path / "task.jsonl", {"stages": {"task_words": {}}, "teacher_model_name_or_path": teacher}
    else:
        data, column, size = runs.write_dataset(tmp_path), "sentence2", 16
        model = runs.bert_classifier(tmp_path)
        file, models = Path(data["path"]) / "train.jsonl", {"model_name_or_path": model, "tokenizer_name_or_path": model, "student": {}}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3][column] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = runs.settings(tmp_path, method={"task": "glmd", "dataset": "finetune"}[kind], **models)
    with pytest.raises(ValueError, match=rf"Row 3 .*{file.name}.*column '{column}' holds None"):
        fastkd.distill({**settings, kind: data})
    with caplog.at_level(logging.WARNING), pytest.raises(Ready, match=f"^{size - 1}$"):
        fastkd.distill({**settings, kind: {**data, "on_bad_row": "skip"}})
    assert "1 rows of " in caplog.text and "The first: Row 3 " in caplog.text
