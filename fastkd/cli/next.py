"""What a person may run after a command: whole command lines with the places that it wrote."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..train.config import DatasetArguments, RunConfig, TextData

Command = Sequence[object]
PROMPT = "Once upon a time"
EVAL_LIMITS = {"max_rows": "max_eval_rows", "max_length": "max_length", "split": "eval_split"}
EVAL_ROWS = {"path": "path", "text_columns": "text_columns", "label_column": "label_column"}
EVAL_TEXT = {"name": "name", "text_column": "text_column", "documents": "documents"}
"""The flags of `fastkd eval`, and the keys of a run's data that they set."""


def say_next(commands: Iterable[Command]) -> None:
    """Print commands of fastkd, one a line, as a shell takes them."""
    lines = [f"  fastkd {shlex.join(map(str, words))}" for words in commands]
    print("\n".join(["Next:", *lines]))


def for_model(folder: object) -> list[Command]:
    """Commands that use a model which plain transformers opens."""
    judged = ["eval", folder, *(["--text", "TEXT"] if _has_words(folder) else ["--task", "TASK"])]
    return [["generate", folder, PROMPT], judged] if _continues(folder) else [judged]


def after_training(config: RunConfig, results: Mapping[str, Mapping[str, Any]]) -> list[Command]:
    """Commands that judge, export and use the last student of a run; none without a student."""
    from ..models.folder import RELU_HEAD_MODEL_TYPE, closed_by
    from ..train.run import plan_stages

    made = [planned for planned in plan_stages(config, None) if "student_dir" in results.get(planned.spec.name, {})]
    if not made:
        return []
    last = made[-1]
    arguments, student = last.arguments, results[last.spec.name]["student_dir"]
    teachers = [result["teacher_dir"] for result in results.values() if "teacher_dir" in result]
    teacher = next(iter(teachers), arguments.teacher_model_name_or_path) if last.spec.needs_teacher else None
    beside = [] if teacher is None else ["--teacher", teacher]
    judged_on: list[object] = []
    if last.data == "dataset" and last.spec.needs_labels and arguments.dataset is not None:
        judged_on = _of_dataset(arguments.dataset)
    elif arguments.text is not None and _has_words(student):
        judged_on = _of_text(arguments.text)
    return [
        *([["eval", student, *beside, *judged_on]] if judged_on else []),
        *([["export", student, "--output_dir", f"{student}-exported"]] if closed_by(Path(student)) != RELU_HEAD_MODEL_TYPE else []),
        *([["generate", student, PROMPT]] if _continues(student) else []),
    ]


def _of_dataset(given: DatasetArguments) -> list[object]:
    """The flags by which `fastkd eval` reads the rows that a run is judged on."""
    return _flags(replace(given, path=given.eval_path or given.path, eval_path=None), {"task": "task", **EVAL_ROWS, **EVAL_LIMITS})


def _of_text(given: TextData) -> list[object]:
    """The same for text; without any of its own, a word that stands for one."""
    if given.eval_path is None and given.eval_split is None:
        return ["--text", "TEXT"]
    place, name = given.eval_path or given.path, None if given.eval_path else given.name
    return ["--text", place, *_flags(replace(given, name=name), {**EVAL_TEXT, **EVAL_LIMITS})]


def _flags(given: DatasetArguments | TextData, keys: Mapping[str, str]) -> list[object]:
    """The flags for what differs from the defaults."""
    defaults = {field.name: field.default for field in fields(given)}
    values = {flag: getattr(given, key) for flag, key in keys.items() if getattr(given, key) != defaults[key]}
    return [word for flag, value in values.items() for word in (f"--{flag}", ",".join(value) if isinstance(value, tuple) else value)]


def _continues(folder: object) -> bool:
    return _saved_as(folder, "CAUSAL_LM")


def _has_words(folder: object) -> bool:
    return _saved_as(folder, "CAUSAL_LM", "MASKED_LM", "PRETRAINING")


def _saved_as(folder: object, *tasks: str) -> bool:
    """Whether a model was saved with a head for one of these tasks."""
    from ..models.load import class_names, load_config

    return not class_names(*tasks).isdisjoint(load_config(str(folder)).architectures or ())
