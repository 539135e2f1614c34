"""Fault 33: between a stop and the resume, or after the end, something changes.

If it decides the result, a setting, a byte of a model, a row, a label, what the run itself has made, the run is refused by what
changed, before a step and before anything is written. If not, a path, a time, a name, what is shown or kept, it goes on to the same
bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.methods.registry import METHODS
from fastkd.train.loop import StageTrainer
from tests.faults.decisive import (
    CLOZE,
    DATASET,
    DECISIVE,
    GOES_ON,
    HOLDERS,
    NOT_ALONE,
    OPTIONS,
    PLACES,
    RUN,
    STAGE,
    TASK,
    TEACHER,
    TEXT,
    VOCABULARY,
)
from tests.faults.disturbed import crashes, differences
from tests.faults.stopped import MAKERS, Made, cache, count
from tests.faults.trees import Look, look


def test_every_setting_is_known_to_decide_or_not():
    assert OPTIONS.keys() == METHODS.keys()
    for config, decisive in DECISIVE:
        names = {field.name for field in dataclasses.fields(config)}
        assert names <= {*decisive, *GOES_ON, *NOT_ALONE, *PLACES, *HOLDERS}, config
        assert decisive.keys() <= names and not decisive.keys() & GOES_ON.keys(), config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Makes each run once."""
    found: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "work"
            folder.mkdir()
            configuration = MAKERS[name](folder)
            found[name] = Made(folder, folder.with_name("pristine"), configuration)
            fastkd.distill({**configuration, "output_dir": str(folder / "finished")})
            crashes({**configuration, "output_dir": str(folder / "stopped")}, found[name].stages[-1], "begin_step", 1)
            shutil.copytree(folder, found[name].pristine, symlinks=True)
        return found[name]

    return make


class Went(Exception):
    """Training would have begun."""


def refuse(configuration: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is refused with something said, and nothing in its folder is another."""
    monkeypatch.setattr(StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))
    output_dir = Path(configuration["output_dir"])
    before = looks(output_dir)
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        fastkd.distill(configuration)
    assert looks(output_dir) == before


def looks(folder: Path) -> dict[Path, Look]:
    """Look at all that lies there, but for the lock, which says who was the last to hold it."""
    return {path: look(path) for path in folder.rglob("*") if not path.name.endswith(".lock")}


def overlay(configuration: dict[str, Any], *keys: str, **changes: Any) -> dict[str, Any]:
    """With changes at a key, below keys."""
    if not keys:
        return {**configuration, **changes}
    key, *below = keys
    return {**configuration, key: overlay(configuration.get(key) or {}, *below, **changes)}


# ---- settings that decide

SETTINGS: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    *(("glmd", (), {name: value}, name) for name, value in STAGE.items()),
    *(("crild", (), {name: value}, name) for name, value in RUN.items()),
    *(("glmd", ("text",), {name: value}, name) for name, value in TEXT.items()),
    *(("glmd", ("task",), {name: value}, name) for name, value in TASK.items()),
    *(("glmd", ("task", "cloze"), {name: value}, name) for name, value in CLOZE.items()),
    *(("finetune", ("dataset",), {name: value}, name) for name, value in DATASET.items()),
    *(("glmd", ("vocabulary",), {name: value}, name) for name, value in VOCABULARY.items()),
    *(("cached", ("teacher",), {name: value}, name) for name, value in TEACHER.items()),
    *((method, ("options",), {name: value}, name) for method, changes in OPTIONS.items() for name, value in changes.items()),
    ("glmd", (), {"dropout": {"hidden_dropout_prob": 0.3}}, "hidden_dropout_prob"),
    ("glmd", (), {"student": {"num_hidden_layers": 1, "intermediate_size": 32}}, "student.intermediate_size"),
    ("glmd", (), {"vocabulary": None}, "vocabulary"),
    ("glmd", (), {"method": "kd", "stages": {"distill": {}}, "task": None, "options": {}}, "method"),
]
SAID = {"train_split": "split", "eval_split": "split", "label_column": "have no other|label_column"}
"""Where the sentence does not have the setting's name."""


@pytest.mark.parametrize(
    ("name", "keys", "change", "said"), SETTINGS, ids=["-".join((name, *keys, *change)) for name, keys, change, _ in SETTINGS]
)
def test_a_setting_that_decides_is_refused(monkeypatch, made, name, keys, change, said):
    configuration = made(name).restored()
    refuse(overlay(configuration, *keys, **change), SAID.get(said, said), monkeypatch)


# ---- contents that decide


def flip(path: Path) -> None:
    """The last byte's lowest bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights(model: str) -> Callable[[Path], None]:
    return lambda folder: flip(next(folder.glob(f"{model}/model.safetensors")))


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    """The first such text in a file."""

    def change(folder: Path) -> None:
        path = next(folder.glob(file))
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def label(file: str) -> Callable[[Path], None]:
    """Change the label of the last row of a .jsonl file."""

    def change(folder: Path) -> None:
        path = folder / file
        *lines, last = path.read_text().splitlines()
        row = json.loads(last)
        path.write_text("\n".join([*lines, json.dumps({**row, "label": 1 - row["label"]})]) + "\n")

    return change


def tokenizers(folder: Path) -> None:
    """Change how the tokenizers of all models treat the case of words."""
    for path in folder.glob("*/tokenizer.json"):
        definition = json.loads(path.read_text())
        if definition["normalizer"] is None:
            definition["normalizer"] = {"type": "Lowercase"}
        else:
            definition["normalizer"]["lowercase"] = not definition["normalizer"]["lowercase"]
        path.write_text(json.dumps(definition))


def recount(folder: Path) -> None:
    shutil.rmtree(folder / "counts")
    count(str(next(folder.glob("llama-*"))), str(folder / "dev.txt"), folder / "counts")


def other_answers(folder: Path) -> None:
    """A cache of the same rows, in another precision."""
    configuration = json.loads((folder / "configuration.json").read_text())
    shutil.rmtree(folder / "answers")
    cache({**configuration, "teacher": {}}, folder / "answers", dtype="bfloat16")


TEACHER_FILES = "bert-classifier-2-*"
CONTENTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "glmd: the teacher's weights": ("glmd", weights("bert-*"), "models.teacher"),
    "glmd: the teacher's configuration": ("glmd", edit("bert-*/config.json", "1e-12", "1e-06"), "models.teacher"),
    "glmd: the tokenizer": ("glmd", tokenizers, "tokenizer"),
    "glmd: a row of text": ("glmd", edit("train.txt", "import", "export"), "rows.train"),
    "glmd: an evaluation row of text": ("glmd", edit("dev.txt", "e", "a"), "rows.eval"),
    "glmd: a row of the task": ("glmd", edit("task.jsonl", '"text": "', '"text": "if '), "rows.train"),
    "glmd: a label": ("glmd", label("task.jsonl"), "rows.train"),
    "glmd: an evaluation row": ("glmd", edit("task-dev.jsonl", '"text": "', '"text": "if '), "rows.eval"),
    "glmd: an evaluation label": ("glmd", label("task-dev.jsonl"), "rows.eval"),
    "kd: the teacher's weights": ("kd", weights("llama-*"), "models.teacher"),
    "kd: the tokenizer": ("kd", tokenizers, "tokenizer"),
    "kd: a row": ("kd", edit("train.txt", "import", "export"), "rows.train"),
    "kd: the counts": ("kd", recount, "counts_sha256"),
    "cached: the answers": ("cached", other_answers, "teacher_cache"),
    "cached: the teacher's weights": ("cached", weights("llama-*"), "teacher"),
    "lm: the starting weights": ("lm", weights("bert-*"), "models.start"),
    "lm: an evaluation row": ("lm", edit("dev.txt", "e", "a"), "rows.eval"),
    "finetune: the starting weights": ("finetune", weights("bert-classifier-1-*"), "models.start"),
    "finetune: a row": ("finetune", edit("glue-rte/train.jsonl", '"sentence1": "', '"sentence1": "if '), "rows.train"),
    "finetune: a label": ("finetune", label("glue-rte/train.jsonl"), "rows.train"),
    "finetune: an evaluation row": ("finetune", edit("glue-rte/validation.jsonl", '1": "', '1": "if '), "rows.eval"),
    "finetune: an evaluation label": ("finetune", label("glue-rte/validation.jsonl"), "rows.eval"),
    "finetune: the tokenizer": ("finetune", tokenizers, "tokenizer"),
    "crild: the teacher that is trained": ("crild", weights(TEACHER_FILES), "models.start"),
    "crild: the starting weights": ("crild", weights("bert-classifier-1-*"), "models.start"),
    "crild: a label": ("crild", label("glue-rte/train.jsonl"), "rows.train"),
    "ted: the teacher's weights": ("ted", weights(TEACHER_FILES), "models.teacher"),
    "ted: the student's weights": ("ted", weights("bert-classifier-1-*"), "models.start"),
    "ted: an evaluation label": ("ted", label("glue-rte/validation.jsonl"), "rows.eval"),
}


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize("case", CONTENTS)
def test_a_content_that_decides_is_refused(monkeypatch, made, case, state):
    name, change, said = CONTENTS[case]
    configuration, folder = made(name).restored(state), made(name).folder
    (folder / "configuration.json").write_text(json.dumps(configuration))
    change(folder)
    refuse(configuration, said, monkeypatch)


def test_a_damaged_teacher_cache_is_refused_while_it_is_read(monkeypatch, made):
    configuration = made("cached").restored()
    flip(next((made("cached").folder / "answers").glob("shard-*")))
    refuse(configuration, "shard.*sha256", monkeypatch)


@pytest.mark.parametrize("case", ["learning_rate", "max_steps", "seed"])
@pytest.mark.parametrize("name", ["glmd", "kd", "finetune", "ted"])
def test_a_setting_of_a_finished_run_is_refused(monkeypatch, made, name, case):
    configuration = made(name).restored("finished")
    refuse({**configuration, case: {**STAGE, **RUN}[case]}, case, monkeypatch)


# ---- what the run has made


@pytest.fixture(scope="module")
def other(made, tmp_path_factory) -> Path:
    """The output_dir of a finished glmd run of another seed."""
    folder = tmp_path_factory.mktemp("other")
    fastkd.distill({**made("glmd").configuration, "seed": 9, "output_dir": str(folder)})
    return folder


def copy_in(run: Path, other: Path, *names: str) -> None:
    """Into the stage that was stopped."""
    for name in names:
        source, target = other / "task_scores" / name, run / "task_scores" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def replace_student(stage: Path, other: Path) -> None:
    shutil.rmtree(stage / "student")
    shutil.copytree(other / stage.name / "student", stage / "student")


RECORDS: dict[str, tuple[str, Callable[[Path, Path], Any], str]] = {
    "no record": ("stopped", lambda run, other: (run / "run.json").unlink(), "run.json"),
    "another run's record": ("stopped", lambda run, other: shutil.copy(other / "run.json", run), "other settings"),
    "another run's result": ("stopped", lambda run, other: copy_in(run, other, "result.json"), "result.json"),
    "another run's result and student": ("stopped", lambda run, other: copy_in(run, other, "result.json", "student"), "task_scores"),
    "another run's checkpoint": ("stopped", lambda run, other: copy_in(run, other, "checkpoint-2"), "checkpoint-2"),
    "another run's student": ("stopped", lambda run, other: replace_student(run / "pretrain", other), "pretrain|models.start"),
    "another byte": ("stopped", lambda run, other: flip(run / "pretrain/student/model.safetensors"), "pretrain|models.start"),
    "no student": ("stopped", lambda run, other: shutil.rmtree(run / "pretrain/student"), "pretrain.student"),
    "no record at the end": ("finished", lambda run, other: (run / "run.json").unlink(), "run.json"),
    "another run's result at the end": (
        "finished",
        lambda run, other: shutil.copy(other / "task_scores/result.json", run / "task_scores"),
        "result.json",
    ),
    "another run's student at the end": ("finished", lambda run, other: replace_student(run / "task_scores", other), "student"),
    "another byte at the end": ("finished", lambda run, other: flip(run / "task_scores/student/model.safetensors"), "student"),
    "no student at the end": ("finished", lambda run, other: shutil.rmtree(run / "task_scores/student"), "student"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_what_this_run_has_not_made_is_refused(monkeypatch, made, other, case):
    state, change, said = RECORDS[case]
    configuration = made("glmd").restored(state)
    change(Path(configuration["output_dir"]), other)
    refuse(configuration, said, monkeypatch)


@pytest.mark.parametrize("filters", ["teacher_filters", "student_filters"])
def test_filters_of_a_finished_stage_that_changed_are_refused(monkeypatch, made, filters):
    configuration = made("ted").restored()
    flip(next((Path(configuration["output_dir"]) / filters / "filters").glob("*.safetensors")))
    refuse(configuration, "filters", monkeypatch)


# ---- what decides nothing


def going_on(monkeypatch: pytest.MonkeyPatch, configuration: dict[str, Any]) -> None:
    """The run goes on with its training."""

    def run(*_: Any) -> None:
        raise Went

    monkeypatch.setattr(StageTrainer, "run", run)
    with pytest.raises(Went):
        fastkd.distill(configuration)


@pytest.mark.parametrize("name", GOES_ON)
def test_a_setting_that_decides_nothing_is_accepted(tmp_path, monkeypatch, made, name):
    monkeypatch.chdir(tmp_path)
    going_on(monkeypatch, {**made("glmd").restored(), name: GOES_ON[name]})


def rename(folder: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """Give every model, text, task and count another name, and every file another time."""
    text = json.dumps(configuration)
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.name in ("stopped", "finished", "cache") or str(path) not in text:
            continue
        renamed = path.with_name(f"renamed-{number}{path.suffix}")
        path.rename(renamed)
        text = text.replace(f'"{path}"', f'"{renamed}"')
    now = time.time()
    for path in folder.rglob("*"):
        os.utime(path, (now + 5, now + 5))
    return json.loads(text)


@pytest.mark.parametrize("name", MAKERS)
def test_what_decides_nothing_changes_no_bit(tmp_path, made, name):
    """All of it at once: the copy of everything elsewhere, other names, times, caches, and what is shown and kept."""
    run = made(name)
    configuration = rename(tmp_path / "copy", run.moved(tmp_path / "copy"))
    logs_as_before = {key: value for key, value in GOES_ON.items() if key not in ("logging_steps", "cache_dir")}
    fastkd.distill({**configuration, **logs_as_before, "cache_dir": str(tmp_path / "new")})
    assert differences(run.pristine / "finished", tmp_path / "copy" / "stopped", run.stages) == []


def test_a_copy_of_the_output_dir_goes_on_beside_the_original(tmp_path, made):
    run = made("glmd")
    configuration = run.restored()
    shutil.copytree(run.folder / "stopped", tmp_path / "run", symlinks=True)
    fastkd.distill({**configuration, "output_dir": str(tmp_path / "run")})
    assert differences(run.pristine / "finished", tmp_path / "run", run.stages) == []


def test_a_finished_run_says_again_what_it_said(monkeypatch, made):
    configuration = made("glmd").restored("finished")
    monkeypatch.setattr(StageTrainer, "run", lambda *_: pytest.fail("a stage was trained"))
    first = fastkd.distill(configuration)
    shutil.rmtree(made("glmd").folder / "cache")
    assert fastkd.distill({**configuration, **{key: GOES_ON[key] for key in ("save_total_limit", "logging_steps")}}) == first


def test_a_stage_is_added_to_a_finished_run_and_the_earlier_ones_stand(tmp_path, made):
    configuration = {**made("glmd").restored(), "output_dir": str(tmp_path / "run")}
    fastkd.distill({**configuration, "stages": {"pretrain": {}}})
    before = looks(tmp_path / "run" / "pretrain")
    results = fastkd.distill(configuration)
    assert results.keys() == {"pretrain", "task_scores"} and results["task_scores"]["steps"] == 2
    assert looks(tmp_path / "run" / "pretrain") == before
