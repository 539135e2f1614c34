"""What made a model is kept beside it: every stage so far, and no path of the machine."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import fastkd
from fastkd.cli.main import main
from fastkd.train import provenance
from fastkd.train.provenance import PROVENANCE_FILE, read_provenance, source, versions
from tests import runs


def test_a_finished_stage_leaves_what_made_its_student(tmp_path):
    config = runs.glmd(tmp_path, runs.bert_teacher(tmp_path))
    results = fastkd.distill(config)
    folder = results["task_scores"]["student_dir"]
    found = read_provenance(folder)
    assert found is not None and found["method"] == "glmd" and found["seed"] == 0
    assert found["student"]["settings"] == {"num_hidden_layers": 1} and found["student"]["vocabulary"]["keep"] == 0.5
    assert [stage["stage"] for stage in found["stages"]] == list(results)
    for stage, result in zip(found["stages"], results.values(), strict=True):
        measured = ("steps", "kept_step", "scores", "seconds", "tokens", "peak_memory_mb")
        assert {key: stage[key] for key in measured} == {key: result[key] for key in measured}
        assert stage["teacher"] == {"name": "bert-1", "hub": False} and stage["trains"] == "student"
        assert stage["options"]["temperature"] == 2.0 and stage["training"]["learning_rate"] == 0.003
        assert stage["versions"]["fastkd"] == fastkd.__version__ and stage["device"] == "CPU"
    first, *_, last = found["stages"]
    assert first["data"]["kind"] == "text" and first["data"]["path"] == {"name": "train.txt", "hub": False}
    assert last["data"]["eval_path"] == {"name": "task-dev.jsonl", "hub": False}
    assert first == read_provenance(results["pretrain"]["student_dir"])["stages"][0]
    assert str(tmp_path) not in json.dumps(found)
    (tmp_path / "run" / "task_scores" / "student" / PROVENANCE_FILE).unlink()
    assert read_provenance(folder) is None


def test_a_stage_run_alone_knows_those_before_it(tmp_path):
    config = runs.glmd(tmp_path, runs.bert_teacher(tmp_path))
    for stage in ("pretrain", "task_words"):
        results = fastkd.distill(config, only_stage=stage)
    assert [stage["stage"] for stage in read_provenance(results["task_words"]["student_dir"])["stages"]] == ["pretrain", "task_words"]
    shutil.rmtree(tmp_path / "run" / "task_words")
    fastkd.distill(config, only_stage="task_words")
    assert len(read_provenance(results["task_words"]["student_dir"])["stages"]) == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bert-base-uncased", {"name": "bert-base-uncased", "hub": True}),
        ("org/model-2.b", {"name": "org/model-2.b", "hub": True}),
        ("/home/me/teacher", {"name": "teacher", "hub": False}),
        ("../teacher", {"name": "teacher", "hub": False}),
        ("runs/a/teacher", {"name": "teacher", "hub": False}),
        ("data/*.jsonl", {"name": "*.jsonl", "hub": False}),
        ("stdlib", {"name": "stdlib", "hub": False}),
        ("here/teacher", {"name": "teacher", "hub": False}),
        (None, None),
    ],
)
def test_places_here_are_told_by_their_last_part(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "teacher").mkdir(parents=True)
    assert source(name) == told


def test_a_model_that_a_run_made_is_told_by_its_run(tmp_path, monkeypatch):
    """All of them are called student."""
    student = tmp_path / "large" / "train" / "student"
    student.mkdir(parents=True)
    (student / PROVENANCE_FILE).write_text("{}")
    monkeypatch.chdir(student.parent)
    assert source(str(student)) == source("./student/") == {"name": "student", "hub": False}
    (student.parent / "result.json").write_text("{}")
    assert source(str(student)) == source("./student/") == source("student") == {"name": "large/train/student", "hub": False}


NO_RECORDS = {
    "empty": "",
    "no keys": "{}",
    "no JSON": "nonsense",
    "half": '{"method": "kd", "stages": [{"st',
    "a list": "[1]",
    "no stages": '{"method": "kd", "stages": []}',
    "stages of another kind": '{"method": "kd", "stages": {"stage": 1}}',
    "an unknown method": '{"method": ["kd"], "stages": [{"stage": "distill"}]}',
    "nested too deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", NO_RECORDS.values(), ids=NO_RECORDS)
def test_a_file_that_is_no_record_is_told_once_and_counts_as_none(tmp_path, caplog, content):
    (tmp_path / PROVENANCE_FILE).write_text(content)
    for _ in range(3):
        assert read_provenance(tmp_path) is None
    assert len(caplog.records) == 1 and str(tmp_path / PROVENANCE_FILE) in caplog.text


@pytest.mark.parametrize("content", ["", "{}", '{"method": "glmd", "stages": [{"stage": "pretrain"}]}'])
def test_neither_a_later_stage_nor_an_export_needs_the_record(tmp_path, content):
    config = runs.glmd(tmp_path, runs.bert_teacher(tmp_path))
    results = fastkd.distill(config, only_stage="pretrain")
    (tmp_path / "run" / "pretrain" / "student" / PROVENANCE_FILE).write_text(content)
    results = fastkd.distill(config, only_stage="task_words")
    student = results["task_words"]["student_dir"]
    assert read_provenance(student)["stages"][-1]["stage"] == "task_words"
    for name, folder in (("first", tmp_path / "run" / "pretrain" / "student"), ("second", student)):
        assert main(["export", str(folder), "--output_dir", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("broken", [SimpleNamespace(), None], ids=["without a version", "that cannot be imported"])
def test_a_package_without_a_version_is_told_once(monkeypatch, caplog, broken):
    monkeypatch.setitem(sys.modules, "transformers", broken)
    provenance._warn_once.cache_clear()
    for _ in range(2):
        assert versions()["transformers"] == "unknown" and versions()["fastkd"] == fastkd.__version__
    assert len(caplog.records) == 1 and "The version of transformers is not known" in caplog.text
