"""Tasks of a student whose vocabulary was pruned before: known label words are kept for them, and others are refused early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.models.load import load_tokenizer
from fastkd.recipes import label_words, recipe_titles
from fastkd.tasks.cloze import label_word_ids
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.train.config import read_config
from fastkd.train.run_models import RunModels
from fastkd.vocab.map import VocabMap
from tests import runs, tiny

KNOWN = ("maybe", "no", "yes")
TEMPLATE = '"{text}" ? {mask}.'


def tokenizer_of_rare_words() -> Any:
    """A WordPiece tokenizer that has the label words of GLM's patterns, and two others, as tokens that its corpus lacks."""
    tokenizer = tiny.wordpiece()
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        **tokenizer.special_tokens_map,
    )
    model = tokenizer.backend_tokenizer.model
    vocabulary = dict(tokenizer.get_vocab())
    for word in (*KNOWN, "never", "always"):
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer.backend_tokenizer.model = type(model)(vocabulary, unk_token="[UNK]")
    return tokenizer


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """The student of a run of stage pretrain alone, as the recipes have it, on half of the vocabulary."""
    tokenizer = tokenizer_of_rare_words()
    teacher = tiny.save(tmp_path / "teacher", tiny.bert(len(tokenizer)), tokenizer)
    result = fastkd.distill(runs.glmd(tmp_path, teacher, task=None, stages={"pretrain": {}}, max_steps=1))
    return Path(result["pretrain"]["student_dir"])


def task_run(folder: Path, student: Path, words: list[str], **more: Any) -> dict[str, Any]:
    """A run of the tasks' stages from that student."""
    task = runs.write_task(folder)
    task["cloze"].update(template=TEMPLATE, label_words=words)
    settings = {"model_name_or_path": str(student), "student": {}, "vocabulary": None, "output_dir": str(folder / "tasks"), **more}
    stages = {"task_words": {}, "task_scores": {}}
    return runs.glmd(folder, str(folder / "teacher"), task=task, text=None, stages=stages, max_steps=2, **settings)


def test_pretraining_keeps_the_label_words_of_the_recipes(tmp_path: Path, pretrained: Path) -> None:
    task = ClozeTask(kind="verbalizer", template=TEMPLATE.replace("text", "hypothesis"), label_words=KNOWN)
    kept = VocabMap.load(pretrained / "vocab_map").is_kept[label_word_ids(task, load_tokenizer(str(tmp_path / "teacher")))]
    assert kept.tolist() == [True] * 3
    fastkd.distill(task_run(tmp_path, pretrained, ["no", "yes"]))
    losses = [line["loss"] for line in runs.log_lines(tmp_path / "tasks" / "task_scores") if "loss" in line]
    assert len(losses) == 2 and all(abs(loss - 0.693147) > 1e-5 for loss in losses), "not the loss of one word for both"


@pytest.mark.parametrize("stages", [("task_words", "task_scores"), ("pretrain", "task_scores")], ids=["at once", "before pretrain"])
def test_label_words_that_the_student_has_not_are_refused_before_anything_is_read(
    tmp_path: Path, pretrained: Path, stages: tuple[str, ...]
) -> None:
    config = task_run(tmp_path, pretrained, ["never", "always"])
    config["stages"] = {name: {"text": runs.write_text(tmp_path), "task": None} if name == "pretrain" else {} for name in stages}
    with pytest.raises(
        ValueError, match=r"pruned without 'never', 'always' of label_words.*vocabulary\.protected: \['never', 'always'\]"
    ):
        fastkd.distill(config)
    assert not runs.trained(tmp_path / "tasks") and not list((tmp_path / "tasks").rglob("*.jsonl"))


def test_the_words_come_from_the_recipes(tmp_path: Path) -> None:
    words = {word for name in recipe_titles() if name.startswith("glmd/") for word in label_words_of(name)}
    assert label_words("glmd") == tuple(sorted(words)) == KNOWN and label_words("kd") == ()
    for method, protected in (("glmd", ("mine", *KNOWN)), ("kd", ("mine",))):
        config = read_config(runs.settings(tmp_path, method=method, vocabulary={"keep": 0.5, "protected": ["mine"]}))
        vocabulary = RunModels(config, tmp_path, tmp_path, None).vocabulary
        assert vocabulary is not None and vocabulary.protected == protected


def label_words_of(recipe: str) -> tuple[str, ...]:
    from fastkd.recipes import config_path
    from fastkd.train.schema import load_yaml

    task = read_config(load_yaml(config_path(recipe))).task
    return () if task is None else task.cloze.label_words
