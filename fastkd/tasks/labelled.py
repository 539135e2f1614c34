"""Examples of one labelled task in their splits, as plain text, with what the answers are scored by.

Nothing here knows where the rows come from (`glue.py`, `own_task.py` and `stdlib_tasks.py` do) nor how a tokenizer will read them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

from fastkd.tasks.metrics import (
    accuracy,
    exact_match,
    f1,
    f1_macro,
    group_exact_match,
    matthews,
    pearson,
    spearman,
    token_f1,
)
from fastkd.tasks.seeded import draw, shuffled

Kind = Literal["classification", "regression", "multiple_choice", "question_answering", "unlabelled"]

_LABEL_METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
_ANSWER_METRICS: dict[str, Callable[..., float]] = {"exact_match": exact_match, "token_f1": token_f1}
_METRICS_OF_KIND: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "f1_macro", "matthews", "group_exact_match"),
    "regression": ("pearson", "spearman"),
    "multiple_choice": ("accuracy",),
    "question_answering": ("exact_match", "token_f1"),
    "unlabelled": (),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A right answer of question answering: the characters `start` .. `start + len(text) - 1` of the context."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """One row of a task. What `label` is, and which fields are filled, depends on the task's kind."""

    text: str
    """The sentence, the first of a pair, what the choices belong to, or the question."""
    second_text: str | None = None
    """The second of a pair; the context of a question."""
    label: int | float | None = None
    """Class index, value (regression) or index of the right choice; None in a split without labels, and for questions."""
    choices: tuple[str, ...] = ()
    """multiple_choice: the candidates."""
    answers: tuple[Answer, ...] = ()
    """question_answering: the right answers; none if the context has no answer."""
    group: str = ""
    """Rows of one group belong together: the answers to one question, the functions of one file."""


@dataclass(frozen=True, eq=False)
class TaskDataset:
    """The splits of one task that were read: `train`, those to evaluate on, or both. Of kind "unlabelled", texts and nothing to
    predict from them: there are no metrics.

    Raises ValueError, naming split and row (counted from 0), for a split of fewer than two examples, a label outside the
    names, choices or numbers, a split only part of which has labels, one to evaluate on whose values are all equal, and a metric
    that the kind has not.
    """

    name: str
    kind: Kind
    splits: Mapping[str, Sequence[LabelledExample]]
    metrics: tuple[str, ...]
    """What the task is judged by; the first is the one that selects a model. None if it is unlabelled."""
    label_names: tuple[str, ...] = ()
    """classification: the classes in the order of their indices."""
    own_classes: bool = False
    """classification: whether the order of the classes follows from the rows, and is not that of a benchmark."""
    has_unanswerable: bool = False
    """question_answering: whether a context may lack the answer; so it is where one does, and stays where rows are left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", {split: tuple(examples) for split, examples in self.splits.items()})
        if self.kind == "question_answering" and any(not example.answers for example in chain(*self.splits.values())):
            object.__setattr__(self, "has_unanswerable", True)
        self._check()
        for split, examples in self.splits.items():
            if len(examples) < 2:
                raise ValueError(f"Split {split!r} of {self.name} has {len(examples)} examples; at least two are needed.")
            for number, example in enumerate(examples):
                fault = example_fault(example, self.kind, len(self.label_names), labelled=self.is_labelled(split))
                if fault:
                    raise ValueError(f"Row {number} (the first is 0) of split {split!r} of {self.name} {fault}.")
            values = {example.label for example in examples}
            if self.kind == "regression" and split != "train" and len(values) == 1 and None not in values:
                raise ValueError(
                    f"Split {split!r} of {self.name} has the value {values.pop()} in all of its {len(examples)} examples, and nothing "
                    "correlates with a constant; evaluate on other rows, or on more of them."
                )

    @property
    def num_outputs(self) -> int:
        """Rows of a model's head: one a class, two for questions (an answer's first and last token), none if unlabelled, or one."""
        return {"classification": len(self.label_names), "question_answering": 2, "unlabelled": 0}.get(self.kind, 1)

    def split(self, name: str) -> Sequence[LabelledExample]:
        """The examples of one split; ValueError, with the splits there are, if there is none of that name."""
        if name not in self.splits:
            raise ValueError(f"split={name!r} is not a split of {self.name}: use one of {', '.join(map(repr, self.splits))}.")
        return self.splits[name]

    def is_labelled(self, split: str) -> bool:
        """Whether the split's rows have labels, which all of them have or none."""
        return self.kind == "question_answering" or self.split(split)[0].label is not None

    def score(self, split: str, predictions: Sequence[Any]) -> dict[str, float]:
        """Every metric of the task on one split, by name.

        Args:
            split: Name of a split that has labels.
            predictions: One an example, in order: class indices, values, indices of choices, or answer texts ("": no answer).
        """
        examples = self.split(split)
        if not self.is_labelled(split):
            raise ValueError(f"Split {split!r} of {self.name} has no labels to score predictions by; use a labelled one.")
        if len(predictions) != len(examples):
            raise ValueError(f"{len(predictions)} predictions for the {len(examples)} examples of split {split!r}; give one for each.")
        if self.kind == "question_answering":
            answers = [[answer.text for answer in example.answers] for example in examples]
            return {metric: _ANSWER_METRICS[metric](predictions, answers) for metric in self.metrics}
        labels: list[Any] = [example.label for example in examples]
        scores = {metric: _LABEL_METRICS[metric](predictions, labels) for metric in self.metrics if metric in _LABEL_METRICS}
        if "group_exact_match" in self.metrics:
            scores["group_exact_match"] = group_exact_match(predictions, labels, [example.group for example in examples])
        return scores

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the kind, the label names and every example of every split: the same content, the same digest."""
        parts = ([json.dumps([split, len(self.splits[split])]), *self._lines(split)] for split in sorted(self.splits))
        return self._digest(chain.from_iterable(parts))

    def split_fingerprint(self, split: str) -> str:
        """Hex SHA-256 of the kind, the label names and one split's examples, labels included; the split's name is not in it."""
        return self._digest(self._lines(split))

    def _digest(self, lines: Iterable[str]) -> str:
        digest = hashlib.sha256(json.dumps([self.kind, self.label_names]).encode())
        for line in lines:
            digest.update(f"\n{line}".encode())
        return digest.hexdigest()

    def _lines(self, split: str) -> Iterator[str]:
        for example in self.split(split):
            answers = [(answer.text, answer.start) for answer in example.answers]
            yield json.dumps([example.text, example.second_text, example.label, example.choices, answers, example.group])

    def limited(self, split: str, n: int) -> TaskDataset:
        """The task with only the first `n` examples of one split, or all of them if there are fewer. Other splits stay whole."""
        if n < 2:
            raise ValueError(f"n is {n}; split {split!r} of {self.name} must keep at least 2 examples.")
        return replace(self, splits={**self.splits, split: self.split(split)[:n]})

    def few_sample(self, n: int, seed: int) -> TaskDataset:
        """The task with only `n` training examples, drawn without replacement by `seed` alone, in their order.

        What a smaller `n` draws is among what a larger one draws with the same seed. The other splits stay whole.
        """
        train = self.split("train")
        if not 2 <= n <= len(train):
            raise ValueError(f"n is {n}; it must be from 2 to the {len(train)} training examples of {self.name}.")
        drawn = sorted(shuffled(range(len(train)), "few_sample", seed)[:n])
        return replace(self, splits={**self.splits, "train": [train[index] for index in drawn]})

    def label_noise(self, rate: float, seed: int) -> TaskDataset:
        """The task with each training label replaced, with probability `rate`, by one drawn uniformly from the others.

        What is replaced, and by what, follows from `seed` and the row's number alone; a higher rate replaces the same labels
        in the same way and more. The other splits stay as they are.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}; it must be a probability, from 0 to 1.")
        if self.kind not in ("classification", "multiple_choice") or not self.is_labelled("train"):
            missing = f"its kind is {self.kind!r}" if self.is_labelled("train") else "its training split has no labels"
            raise ValueError(f"{self.name} has no classes among which another label could be drawn: {missing}.")
        noisy = [
            replace(example, label=self._other_label(example, seed, number)) if draw("noisy", seed, number) < rate else example
            for number, example in enumerate(self.split("train"))
        ]
        return replace(self, splits={**self.splits, "train": noisy})

    def _other_label(self, example: LabelledExample, seed: int, number: int) -> int:
        assert isinstance(example.label, int)
        others = [label for label in range(self._num_labels(example)) if label != example.label]
        return others[int(draw("other_label", seed, number) * len(others))]

    def _num_labels(self, example: LabelledExample) -> int:
        return len(example.choices if self.kind == "multiple_choice" else self.label_names)

    def _check(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}.")
        if not self.splits:
            raise ValueError(f"{self.name} has no split; it needs 'train', or one to evaluate on.")
        named = len(set(self.label_names))
        if named != len(self.label_names) or (named >= 2) != (self.kind == "classification") or named == 1:
            raise ValueError(f"label_names is {self.label_names!r}; 'classification' needs two or more, each once, other kinds none.")
        known = _METRICS_OF_KIND[self.kind]
        if bool(self.metrics) != bool(known) or not set(self.metrics) <= set(known):
            raise ValueError(f"metrics is {self.metrics!r}; kind {self.kind!r} can be judged by {', '.join(known) or 'none'}.")
        if "f1" in self.metrics and named != 2:
            raise ValueError(f"metrics is {self.metrics!r}, but 'f1' is for two classes and {self.name} has {named}; use 'f1_macro'.")


def example_fault(example: LabelledExample, kind: Kind, num_classes: int, *, labelled: bool) -> str | None:
    """What is wrong with an example of a split with or without labels, as the end of a sentence; None if nothing is."""
    if not (example.text.strip() or (example.second_text or "").strip()):
        return "has no text"
    if kind == "question_answering":
        return _answer_fault(example)
    if kind == "multiple_choice" and (len(example.choices) < 2 or not all(map(str.strip, example.choices))):
        return f"has the choices {list(example.choices)}; two or more are needed, none empty"
    label = example.label
    if kind == "unlabelled" and label is not None:
        return f"has the label {label!r}; kind 'unlabelled' has none"
    if (label is not None) != labelled:
        return "has a label and the first row has none" if label is not None else "has no label, which the first row has"
    if label is None:
        return None
    if kind == "regression":
        return None if type(label) is float and math.isfinite(label) else f"has the label {label!r}, which is no finite float"
    count = len(example.choices) if kind == "multiple_choice" else num_classes
    return None if type(label) is int and 0 <= label < count else f"has the label {label!r}; it must be an integer below {count}"


def _answer_fault(example: LabelledExample) -> str | None:
    context = example.second_text or ""
    if not (example.text.strip() and context.strip()):
        return "needs both a question (text) and its context (second_text)"
    for answer in example.answers:
        if answer.start < 0 or not answer.text or context[answer.start : answer.start + len(answer.text)] != answer.text:
            return f"has the answer {answer.text!r}, which does not stand at character {answer.start} of its context"
    return None
