"""GLUE, SuperGLUE and SQuAD: a table of what their columns mean, and the loader of them all.

Columns, class names and their order, and splits are those of the hub's data sets (nyu-mll/glue, aps/super_glue, rajpurkar/squad
and squad_v2); metrics are the benchmarks' own (Wang et al., arXiv:1804.07461 and arXiv:1905.00537; Rajpurkar et al.,
arXiv:1606.05250 and arXiv:1806.03822). SuperGLUE's ReCoRD and WSC are not here: they ask about marked spans of the text.
The hub's test splits have no labels, and are read only where they are asked for: of a copy that has some.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkd.tasks.bad_rows import REFUSE_BAD_ROWS, BadRowPolicy, BadRows, is_text
from fastkd.tasks.labelled import Answer, Kind, LabelledExample, TaskDataset, example_fault
from fastkd.tasks.split_rows import read_split


@dataclass(frozen=True)
class TaskSpec:
    """How the columns of a data set become the examples of a task."""

    kind: Kind
    text: str
    """The example's text, with a {column} in each place where a column's text goes."""
    second_text: str | None
    label_names: tuple[str, ...]
    """Class names in the order of their indices; nothing for numbers and answers."""
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)
    """The labelled splits besides `train`."""
    choices: tuple[str, ...] = ()
    """multiple_choice: the columns of the candidates."""
    wording: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What stands in the text for a column's value, where that is not the value itself: column -> value -> words."""
    group: str = ""
    """The text, with {column} fields, that the rows of a group share."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, each once; the last is the label's or the answers'."""
        target = "answers" if self.kind == "question_answering" else "label"
        fields = [name for _, name, _, _ in string.Formatter().parse(f"{self.text}{self.second_text or ''}") if name]
        return tuple(dict.fromkeys((*fields, *self.choices, target)))


def _classes(text: str, second_text: str | None, names: str, *metrics: str, **options: Any) -> TaskSpec:
    return TaskSpec("classification", text, second_text, tuple(names.split()), metrics, **options)


HUB_PATHS = {
    "glue": "nyu-mll/glue",
    "super_glue": "aps/super_glue",
    "squad": "rajpurkar/squad",
    "squad_v2": "rajpurkar/squad_v2",
}
"""The data set of each benchmark; all of them are English."""
_STSB_RANGE = (0.0, 5.0)
_SENTENCES = ("{sentence1}", "{sentence2}")
_INFERENCE = ("{premise}", "{hypothesis}")
_SQUAD = TaskSpec("question_answering", "{question}", "{context}", (), ("token_f1", "exact_match"))

TASKS: dict[str, TaskSpec] = {
    "glue/cola": _classes("{sentence}", None, "unacceptable acceptable", "matthews"),
    "glue/sst2": _classes("{sentence}", None, "negative positive", "accuracy"),
    "glue/mrpc": _classes(*_SENTENCES, "not_equivalent equivalent", "f1", "accuracy"),
    "glue/stsb": TaskSpec("regression", *_SENTENCES, (), ("spearman", "pearson")),
    "glue/qqp": _classes("{question1}", "{question2}", "not_duplicate duplicate", "f1", "accuracy"),
    "glue/mnli": _classes(
        *_INFERENCE, "entailment neutral contradiction", "accuracy", validation=("validation_matched", "validation_mismatched")
    ),
    "glue/qnli": _classes("{question}", "{sentence}", "entailment not_entailment", "accuracy"),
    "glue/rte": _classes(*_SENTENCES, "entailment not_entailment", "accuracy"),
    "glue/wnli": _classes(*_SENTENCES, "not_entailment entailment", "accuracy"),
    "super_glue/boolq": _classes("{question}", "{passage}", "False True", "accuracy"),
    "super_glue/cb": _classes(*_INFERENCE, "entailment contradiction neutral", "f1_macro", "accuracy"),
    "super_glue/copa": TaskSpec(
        "multiple_choice",
        "{premise} {question}",
        None,
        (),
        ("accuracy",),
        choices=("choice1", "choice2"),
        wording={"question": {"cause": "What was the cause of this?", "effect": "What happened as a result?"}},
    ),
    "super_glue/multirc": _classes(
        "{paragraph}", "{question} {answer}", "False True", "f1", "group_exact_match", group="{paragraph}\n{question}"
    ),
    "super_glue/wic": _classes("{word}: {sentence1}", "{sentence2}", "False True", "accuracy"),
    "super_glue/rte": _classes(*_INFERENCE, "entailment not_entailment", "accuracy"),
    "squad": _SQUAD,
    "squad_v2": _SQUAD,
}
"""The tasks by name: BENCHMARK/CONFIGURATION, or the name of a data set that has only one."""


def require_task(name: str, known: Collection[str]) -> None:
    """Raise ``ValueError`` unless `name` is that of a known task."""
    if name not in known:
        raise ValueError(
            f"{name!r} is not a task: use one of {', '.join(known)}. (SuperGLUE's ReCoRD and WSC need marked spans and are left out; "
            "labelled rows of your own are no task: leave it out and name their file by path.)"
        )


def load_task(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    splits: Sequence[str] | None = None,
    bad_rows: BadRowPolicy = REFUSE_BAD_ROWS,
) -> TaskDataset:
    """The task of that name in `TASKS`, with these splits, by default those for training and validation; no other is looked for.

    `path` is where a copy is, as `split_rows.read_split` describes; None is the hub. No code of a data set is ever run. A row is bad
    that has no text, an unknown label, or an answer that is not in its context. Raises what `read_split` raises, and ValueError,
    naming file or data set and row (counted from 0), for a bad one.
    """
    require_task(name, TASKS)
    spec = TASKS[name]
    benchmark, _, config = name.partition("/")
    place = HUB_PATHS[benchmark] if path is None else os.fspath(path)
    read: dict[str, list[LabelledExample]] = {}
    for split in splits or ("train", *spec.validation):
        rows, description = read_split(place, config or None, split, spec.columns)
        left_out = BadRows(description, bad_rows)
        read[split] = []
        for number, row in enumerate(rows):
            where = f"Row {number} (the first is 0) of {description}"
            try:
                example = _example(spec, row, where)
                fault = example_fault(example, spec.kind, len(spec.label_names), labelled=True)
                if fault is not None:
                    raise ValueError(f"{where} {fault}.")
                read[split].append(example)
            except ValueError as error:
                left_out.add(error)
        left_out.report()
    return TaskDataset(name, spec.kind, read, spec.metrics, spec.label_names)


def _example(spec: TaskSpec, row: Mapping[str, Any], where: str) -> LabelledExample:
    *columns, target = spec.columns
    words = {column: _words(row[column], spec.wording.get(column), f"{where}: column {column!r}") for column in columns}
    text, second_text = spec.text.format_map(words), spec.second_text and spec.second_text.format_map(words)
    at_target = f"{where}: column {target!r}"
    if spec.kind == "question_answering":
        return LabelledExample(text, second_text, answers=_answers(row[target], words["context"], at_target))
    group = hashlib.sha256(spec.group.format_map(words).encode()).hexdigest()[:16] if spec.group else ""
    if spec.kind == "regression":
        return LabelledExample(text, second_text, _similarity(row[target], at_target))
    label = _class_index(row[target], spec.label_names or spec.choices, at_target)
    return LabelledExample(text, second_text, label, tuple(words[column] for column in spec.choices), group=group)


def _words(value: Any, wording: Mapping[str, str] | None, where: str) -> str:
    if not is_text(value):
        raise ValueError(f"{where} holds {value!r}; it must hold text.")
    if wording is None:
        return str(value)
    if value not in wording:
        raise ValueError(f"{where} holds {value!r}; it must be one of {', '.join(map(repr, wording))}.")
    return wording[str(value)]


def _class_index(value: Any, names: tuple[str, ...], where: str) -> int:
    """The index of a class given by its name (False and True are names too) or by its index, as a number or its digits."""
    if str(value) in names:
        return names.index(str(value))
    index = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(names):
        return index
    raise ValueError(
        f"{where} holds the label {value!r}; it must be one of {', '.join(map(repr, names))} or an index below {len(names)} "
        "(-1 marks rows without a label, as in test splits)."
    )


def _similarity(value: Any, where: str) -> float:
    low, high = _STSB_RANGE
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"{where} holds the label {value!r}; it must be a number from {low:g} to {high:g} (-1 marks rows without one)."
        )
    return number


def _answers(value: Any, context: str, where: str) -> tuple[Answer, ...]:
    """SQuAD's answers, each once. A few stand some characters off their `answer_start`: the nearest place of the text is meant."""
    texts, starts = (value.get(key) if isinstance(value, Mapping) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(f"{where} holds {value!r}; it must hold lists 'text' and 'answer_start' of one length (.jsonl or .parquet).")
    answers = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or type(start) is not int or start < 0:
            raise ValueError(f"{where} holds the answer {text!r} at {start!r}; it must be text, and its place a number of characters.")
        if not context.startswith(text, start):
            places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
            if not places:
                raise ValueError(f"{where} holds the answer {text!r}, which is not in the context.")
            start = min(places, key=lambda place: abs(place - start))
        answers.append(Answer(text, start))
    return tuple(dict.fromkeys(answers))
