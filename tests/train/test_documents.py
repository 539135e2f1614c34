"""Keys that say what a row is, from the configuration and the flags to the rows: documents of .txt files, bad rows of cloze tasks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

import fastkd
from fastkd.cli.main import main
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.tasks.corpus import open_corpus
from fastkd.train.config import TaskData, TextData
from fastkd.train.data import cloze_rows, eval_corpus, text_rows, train_corpus
from fastkd.train.schema import ConfigError
from fastkd.vocab.count import TokenCounts
from fastkd.vocab.map import VocabMap
from tests import runs, tiny

PROSE = "return self\n\nfor key in keys:\n    pass\n"
COUNTS = {"file": 1, "paragraph": 2, "line": 3}


def test_a_text_file_is_one_document_unless_another_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    assert list(open_corpus(tmp_path / "a.txt").rows()) == [PROSE]
    path = str(tmp_path / "a.txt")
    assert list(train_corpus(TextData(path=path)).rows()) == [PROSE]
    for documents, count in COUNTS.items():
        text = TextData(path=path, eval_path=path, documents=documents)  # type: ignore[arg-type]
        judged = eval_corpus(text)
        assert judged is not None and len(list(train_corpus(text).rows())) == len(list(judged.rows())) == count


def test_a_decoder_trains_on_newlines_and_one_end_a_file(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level()
    (tmp_path / "a.txt").write_text(PROSE)
    rows = text_rows(TextData(path=str(tmp_path / "a.txt")), tokenizer, tmp_path / "cache", causal=True).train
    assert tokenizer.decode(rows[0]) == PROSE + tokenizer.eos_token


@pytest.mark.parametrize("documents", COUNTS)
def test_the_flag_of_vocab_count(tmp_path: Path, documents: str) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    tiny.byte_level().save_pretrained(tmp_path / "tokenizer")
    flags = [] if documents == "file" else ["--documents", documents]
    command = ["vocab", "count", "--model", str(tmp_path / "tokenizer"), "--data", str(tmp_path / "a.txt"), *flags]
    assert main([*command, "--output_dir", str(tmp_path / "counts")]) == 0
    assert TokenCounts.load(tmp_path / "counts").rows == COUNTS[documents]


def test_the_flag_of_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TextData] = []

    def evaluate_on_text(models: Any, text: TextData, **options: Any) -> Any:
        seen.append(text)
        raise ConfigError("seen")

    monkeypatch.setattr("fastkd.train.evaluate.evaluate_on_text", evaluate_on_text)
    for flags in ([], ["--documents", "line"]):
        assert main(["eval", "model", "--text", "a.txt", *flags]) != 0
    assert [text.documents for text in seen] == ["file", "line"]
    assert main(["eval", "model", "--task", "glue/rte", "--documents", "line"]) == 2 and len(seen) == 2


@pytest.mark.parametrize("path", ["rows.jsonl", "stdlib", "folder/*.parquet"])
def test_documents_of_what_has_rows_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=rf"documents is 'line', which says how \.txt files are cut, and '{path[:4]}.*have rows of"):
        TextData(path=path, documents="line")
    TextData(path=path, eval_path="dev.txt", documents="line")


def test_text_files_of_the_hub_are_lines_and_refused_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        hash = "1"
        info = datasets.DatasetInfo()
        config = type("Config", (), {"data_files": {"train": ["hf://a.txt"]}})()

        def download_and_prepare(self) -> None: ...

        def as_dataset(self, split: str) -> datasets.Dataset:
            dataset = datasets.Dataset.from_dict({"text": PROSE.split("\n")})
            dataset.info.builder_name = "text"
            return dataset

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name: Builder())
    with pytest.raises(ValueError, match=r"There are \.txt files in .*'org/name'.*gives the lines: set documents to line"):
        open_corpus("org/name")
    assert len(list(open_corpus("org/name", documents="line").rows())) == 5


def test_bad_rows_of_a_cloze_task_are_numbered_as_in_the_file_and_counted_together(tmp_path: Path, caplog: Any) -> None:
    data = runs.write_task(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    rows[3]["text"], rows[7]["label"] = None, 5
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def encoded(**policy: Any) -> int:
        task = TaskData(**{**data, **policy, "cloze": ClozeTask(**data["cloze"])})
        return len(cloze_rows(task, tiny.wordpiece(), causal=False).train)

    with pytest.raises(ValueError, match=r"Row 3 \(the first is 0\) of split 'train' of '.*task\.jsonl': column 'text' holds None"):
        encoded()
    with caplog.at_level(logging.WARNING):
        assert encoded(on_bad_row="skip") == len(rows) - 2
    assert "2 rows of split 'train' of " in caplog.text
    with pytest.raises(ValueError, match="More than max_bad_rows=1 rows"):
        encoded(on_bad_row="skip", max_bad_rows=1)
    rows[3]["text"] = "return"
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"Row 7 .*column 'label' holds 5"):
        encoded()


def test_choices_that_the_students_vocabulary_makes_one_are_refused_before_the_first_step(tmp_path: Path) -> None:
    teacher = runs.bert_teacher(tmp_path)
    vocabulary = {"keep": 0.3, "multiple_of": 8}
    made = fastkd.distill(runs.glmd(tmp_path, teacher, task=None, stages={"pretrain": {}}, max_steps=1, vocabulary=vocabulary))
    student = made["pretrain"]["student_dir"]
    vocab_map, tokenizer = VocabMap.load(Path(student) / "vocab_map"), tiny.wordpiece()
    words: dict[int, list[str]] = {}
    for token, id in sorted(tokenizer.get_vocab().items()):
        if token.isalpha() and not vocab_map.is_kept[id]:
            words.setdefault(int(vocab_map.id_to_slot[id]), []).append(token)
    twins = next(found[:2] for found in words.values() if len(found) > 1)
    task = runs.write_task(tmp_path, "choices")
    task["cloze"]["choices"] = twins
    config = runs.glmd(tmp_path, teacher, task=task, text=None, stages={"task_scores": {}}, vocabulary=None)
    with pytest.raises(ValueError, match=rf"pruned without tokens by which choices \['{twins[0]}', '{twins[1]}'\] differ"):
        fastkd.distill({**config, "model_name_or_path": student, "student": {}, "output_dir": str(tmp_path / "tasks")})
    assert not runs.trained(tmp_path / "tasks")
