"""Whole runs on bad input: a sentence, and not one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.tasks.corpus import open_corpus
from fastkd.train.loop import StageTrainer
from fastkd.vocab.count import count_tokens
from tests import runs, tiny
from tests.runs import LLAMA, glmd, same_bits, settings, trained, weights, write_text


@pytest.fixture
def no_step(monkeypatch):
    """Any training step fails the test."""
    monkeypatch.setattr(StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))


def change(*keys: str, to: Any) -> Any:
    def apply(config: dict[str, Any], folder: Path) -> None:
        place = config
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(folder) if callable(to) else to

    return apply


def blank(name: str) -> Any:
    return lambda config, folder: (folder / name).write_text("\n \n")


def spoil_label(config: dict[str, Any], folder: Path) -> None:
    with (folder / "task-dev.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a", "label": 7}) + "\n")


def unlabel(config: dict[str, Any], folder: Path) -> None:
    with (folder / "task-dev.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a"}) + "\n")


def long_rows(config: dict[str, Any], folder: Path) -> None:
    config["text"].update(max_length=200, layout="packed")


def other_counts(config: dict[str, Any], folder: Path) -> None:
    count_tokens(open_corpus(folder / "train.txt", documents="line"), tiny.wordpiece(500), folder / "counts")
    config["vocabulary"]["counts"] = str(folder / "counts")


def small_teacher(folder: Path) -> str:
    return tiny.save(folder / "small", tiny.bert(500), tiny.wordpiece())


BAD = {
    "no-stage": (change("stages", to={"pretrian": {}}), "stages.pretrian: method glmd has no such stage; it has pretrain, task_words"),
    "no-option": (
        change("options", to={"temprature": 1}),
        r"options.temprature is not a known key; did you mean .*options.temperature\?",
    ),
    "temperature": (change("options", to={"temperature": 0.0}), "options.temperature=0.0 must be"),
    "temperature-text": (
        change("options", to={"temperature": "2e-1"}),
        "options.temperature is the text '2e-1'; it must be float: write a number",
    ),
    "divergence": (change("options", to={"divergence": "kl"}), "options.*divergence.*forward_kl"),
    "no-teacher": (change("teacher_model_name_or_path", to=None), "teacher_model_name_or_path is not set, and stage pretrain needs"),
    "teacher-path": (change("teacher_model_name_or_path", to="/no/where"), "/no/where does not exist; give a folder"),
    "teacher-rows": (change("teacher_model_name_or_path", to=small_teacher), r"Id \d+ was counted .* has no row in the model"),
    "no-text": (change("text", to=None), "stages.pretrain.text is not set, and stage pretrain of glmd needs it"),
    "no-task": (change("task", to=None), "stages.task_words.task is not set"),
    "tokenizers": (change("stages", "task_scores", "teacher_model_name_or_path", to=runs.llama_teacher), "tokenizers differ"),
    "no-corpus": (change("text", "path", to="/no/where.txt"), "path='/no/where.txt' is no file"),
    "empty-corpus": (blank("train.txt"), "no rows in .*train.txt"),
    "empty-dev": (blank("dev.txt"), "no rows in .*dev.txt"),
    "text-split": (change("text", "train_split", to="training"), "split='training' is not in .*'train'"),
    "task-path": (change("task", "path", to="/no/where.jsonl"), "path='/no/where.jsonl' is no file"),
    "one-task-file": (change("task", "eval_path", to=None), "one file.*task.eval_path"),
    "long-word": (change("task", "cloze", "label_words", to=["if", "xylophone"]), "label_words holds 'xylophone', .*one known token"),
    "column": (change("task", "cloze", "template", to="{txt} {mask}"), r"no column 'txt' in .*task\.jsonl.*it has 'text', 'label'"),
    "label": (spoil_label, "Row 16 .*: column 'label' holds 7"),
    "unlabelled": (unlabel, "no label; labels are needed there"),
    "long-rows": (long_rows, "takes 200 positions and the student has 128; lower the max_length"),
    "protected": (change("vocabulary", to={"keep": 2, "multiple_of": 1}), "protected tokens need"),
    "counts": (other_counts, "counts.* holds the counts of another tokenizer"),
    "student-key": (change("student", to={"num_layers": 1}), "student.num_layers is not a setting of BertConfig"),
    "student-type": (change("student", to={"model_type": "bertt"}), "student.model_type.*bertt"),
    "student-kind": (change("student", to=LLAMA), "The teacher is an encoder and the student a decoder"),
    "unwritable": (change("output_dir", to=lambda f: str(f / "dev.txt" / "run")), "output_dir=.* cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence_before_any_step(tmp_path, no_step, case):
    spoil, sentence = BAD[case]
    config = glmd(tmp_path, runs.bert_teacher(tmp_path))
    spoil(config, tmp_path)
    with pytest.raises((ValueError, OSError), match=sentence):
        fastkd.distill(config)
    assert not trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        ({"max_position_embeddings": 8}, "The longest row takes 32 positions and the student has 8; lower the max_length"),
        ({"attention_dropout": 2.0}, "student.attention_dropout is 2.0; it is a probability"),
    ],
)
def test_settings_of_a_rotary_student_that_cannot_be_are_refused(tmp_path, no_step, student, sentence):
    config = glmd(tmp_path, runs.llama_teacher(tmp_path), stages={"pretrain": {}}, student=student)
    config["text"].update(layout="packed")
    with pytest.raises(ValueError, match=sentence):
        fastkd.distill(config)
    assert not trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "tokenizer_name_or_path is not set, and there is no teacher"),
        ({"tokenizer_name_or_path": "tokenizer"}, "student.model_type is 'None'; without a teacher it must name an architecture"),
        (
            {"tokenizer_name_or_path": "tokenizer", "student": {"model_type": "bert"}, "vocabulary": {"keep": 0.5}},
            "vocabulary is set, and there is neither a teacher nor a named student",
        ),
    ],
    ids=["tokenizer", "model-type", "stand-ins"],
)
def test_a_student_from_nothing_says_what_it_lacks(tmp_path, no_step, changes, sentence):
    config = settings(tmp_path, **{"method": "lm", "text": write_text(tmp_path), **changes})
    if "tokenizer_name_or_path" in changes:
        tiny.wordpiece().save_pretrained(tmp_path / "tokenizer")
        config["tokenizer_name_or_path"] = str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=sentence):
        fastkd.distill(config)


def test_task_words_needs_words(tmp_path, no_step):
    stages = {"pretrain": {}, "task_words": {}, "task_scores": {}}
    with pytest.raises(ValueError, match=r"task_words compares words.*leave task_words out"):
        fastkd.distill(glmd(tmp_path, runs.bert_teacher(tmp_path), "classification", stages=stages))


def test_a_small_classification_teacher_is_refused(tmp_path, no_step):
    small = runs.bert_classifier(tmp_path, vocabulary=500)
    stages = {"task_scores": {"teacher_model_name_or_path": small}}
    config = glmd(
        tmp_path, runs.bert_teacher(tmp_path), "classification", stages=stages, model_name_or_path=runs.bert_teacher(tmp_path, 2)
    )
    with pytest.raises(ValueError, match=r"The teacher has 500 vocabulary rows and its tokenizer 600 ids, and the id \d+ occurs"):
        fastkd.distill({**config, "vocabulary": None})


def test_a_teacher_without_a_trained_head_is_refused(tmp_path):
    stages = {"task_scores": {"teacher_model_name_or_path": runs.bert_teacher(tmp_path)}}
    with pytest.raises(ValueError, match=r"has no trained head for classification.*Fine-tune it first"):
        fastkd.distill(glmd(tmp_path, runs.bert_teacher(tmp_path), "classification", stages=stages))
    assert not trained(tmp_path / "run")


def test_a_stage_waits_for_the_one_before_it(tmp_path, no_step):
    config = glmd(tmp_path, runs.bert_teacher(tmp_path))
    with pytest.raises(ValueError, match="stage task_scores starts from the student of task_words, which is not finished"):
        fastkd.distill(config, only_stage="task_scores")


def test_a_stage_that_is_not_there(tmp_path, no_step):
    config = glmd(tmp_path, runs.bert_teacher(tmp_path), stages={"pretrain": {}})
    with pytest.raises(ValueError, match="stage task_words is not configured; the file has pretrain"):
        fastkd.distill(config, only_stage="task_words")
    with pytest.raises(ValueError, match="method glmd has no such stage"):
        fastkd.distill(config, only_stage="distill")


def test_the_folder_of_another_run_is_left_alone(tmp_path):
    config = settings(
        tmp_path, teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=write_text(tmp_path), vocabulary={"keep": 0.5}
    )
    first = weights(fastkd.distill(config)["pretrain"])
    other = {**config, "seed": 1}
    with pytest.raises(ValueError, match=r"belongs to a run with other settings: seed \(0 there, 1 here\).*overwrite_output_dir"):
        fastkd.distill(other)
    assert same_bits(weights(tmp_path / "run" / "pretrain" / "student"), first)
    assert same_bits(weights(fastkd.distill({**config, "logging_steps": 3, "overwrite_output_dir": True})["pretrain"]), first)
    assert not same_bits(weights(fastkd.distill({**other, "overwrite_output_dir": True})["pretrain"]), first)


def test_a_longer_run_is_told_how_to_train_on(tmp_path):
    teacher, text = runs.bert_teacher(tmp_path), write_text(tmp_path)
    config = settings(tmp_path, teacher_model_name_or_path=teacher, text=text, vocabulary={"keep": 0.5, "multiple_of": 8})
    first = weights(fastkd.distill(config)["pretrain"])
    with pytest.raises(ValueError, match=r"max_steps \(4 there, 8 here\) in pretrain\. Put back .*") as caught:
        fastkd.distill({**config, "max_steps": 8})
    student = tmp_path / "run" / "pretrain" / "student"
    assert str(caught.value).endswith(f" To train its student on, set model_name_or_path to {student} in a run of another output_dir.")
    longer = {**config, "max_steps": 1, "learning_rate": 1e-9, "model_name_or_path": str(student), "output_dir": str(tmp_path / "on")}
    for key in ("student", "vocabulary"):
        del longer[key]
    again = weights(fastkd.distill(longer)["pretrain"])
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in first.items())


def test_a_run_that_was_stopped_is_told_to_end_first(tmp_path, monkeypatch):
    config = settings(tmp_path, teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=write_text(tmp_path), save_steps=1)
    step = StageTrainer._step
    monkeypatch.setattr(StageTrainer, "_step", lambda self, *rest: step(self, *rest) if self.at.step < 2 else pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        fastkd.distill(config)
    with pytest.raises(ValueError, match=r"To train on, let it end as it was set, then start another run from its student\.$"):
        fastkd.distill({**config, "max_steps": 8})


def test_a_corrected_run_may_have_the_folder(tmp_path):
    config = glmd(tmp_path, runs.bert_teacher(tmp_path), stages={"pretrain": {}})
    with pytest.raises(ValueError, match="not a setting"):
        fastkd.distill({**config, "student": {"num_layers": 1}})
    assert fastkd.distill(config)["pretrain"]["steps"] == 4
