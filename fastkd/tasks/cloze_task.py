"""`ClozeTask`: how the rows of a task become cloze questions, and the template they are put into.

Three kinds of task:

* verbalizer: one word stands for each class, and its logit at the mask is the class's score;
* choices: each candidate answer is its own sequence, scored by the log-probabilities of its tokens;
* classification: the model's own classification head scores the sequence.

Help pages import this file, so it imports nothing but the standard library.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["verbalizer", "choices", "classification"]
Span = tuple[str, int, int]
"""A field of the template, and the characters start..end-1 it takes in the rendered text."""
Rendered = tuple[str, list[Span]]
"""The template with its fields put in, and where they are."""

_SLOTS = {"verbalizer": "mask", "choices": "choice"}


@dataclass(frozen=True)
class ClozeTask:
    """How the rows of a task become model inputs, answers and labels."""

    kind: Kind
    """How classes are scored: "verbalizer", "choices" or "classification"."""
    template: str
    """Text with {column} fields and, exactly once, {mask} (verbalizer; at the end for decoders) or {choice} (choices)."""
    label_column: str = "label"
    """Column of the label; a row without it (or with null or -1) is unlabeled."""
    label_words: tuple[str, ...] = ()
    """verbalizer: one word a class, each one token where {mask} stands in the template."""
    labels: tuple[str | int, ...] = ()
    """Label values in class order; without it the label column holds class indices (choices: candidate indices)."""
    choices: tuple[str, ...] = ()
    """choices: the same candidate answers for every row."""
    choices_column: str | None = None
    """choices: the column that holds a list of candidate answers."""
    choice_columns: tuple[str, ...] = ()
    """choices: the columns that hold one candidate answer each; a missing or null one is no candidate of that row."""
    strip: tuple[str, ...] = ()
    """Columns, of texts or candidates, whose punctuation at the end is left out, as GLM's patterns have it."""
    length_penalty: float = 0.0
    """choices: a candidate's score is divided by its token count to this power."""
    max_length: int = 256
    """Most tokens of a sequence, special tokens included; the longest column text is cut to fit."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}.")
        for name in ("label_words", "labels", "choices", "choice_columns", "strip"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise TypeError(f"{name} is {value!r}; it must be a list, even for one entry.")
            object.__setattr__(self, name, tuple(value))
        self._check_template()
        self._check_answers()
        columns = [*self.columns, *self.choice_columns, *filter(None, [self.choices_column])]
        if unknown := [name for name in self.strip if name not in columns]:
            raise ValueError(f"strip names {', '.join(map(repr, unknown))}; it must name columns of the task: {', '.join(columns)}.")
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be a finite number of at least 0.")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 1 token.")

    def _check_template(self) -> None:
        names = [name for _, name in _parse(self.template)]
        for slot in _SLOTS.values():
            wanted = int(slot == self.slot)
            if names.count(slot) != wanted:
                need = "exactly once" if wanted else "not at all"
                raise ValueError(
                    f"template {self.template!r} has {{{slot}}} {names.count(slot)} times; kind {self.kind!r} needs it {need}."
                )
        if not self.columns and self.kind != "choices":
            raise ValueError(f"template {self.template!r} makes every input the same; add a {{column}} field.")

    def _check_answers(self) -> None:
        if (self.kind == "verbalizer") != bool(self.label_words):
            raise ValueError(f"label_words is {self.label_words!r}; kind 'verbalizer' needs one word a class, other kinds take none.")
        sources = [name for name in ("choices", "choices_column", "choice_columns") if getattr(self, name)]
        if len(sources) != (self.kind == "choices"):
            raise ValueError(
                f"kind {self.kind!r} got {' and '.join(sources) or 'no candidates'}; kind 'choices' needs exactly one of "
                "choices, choices_column and choice_columns, other kinds take none."
            )
        for name in ("label_words", "choices"):
            words = getattr(self, name)
            if words and (len(words) < 2 or not all(isinstance(word, str) and word.strip() for word in words)):
                raise ValueError(
                    f"{name} is {words!r}; it must hold two or more texts, none empty (in YAML, put yes, no and numbers in quotes)."
                )
        if self.kind == "classification" and len(self.labels) < 2:
            raise ValueError(
                f"labels is {self.labels!r}; kind 'classification' needs the label values in class order, as in [0, 1, 2]."
            )
        if self.label_words and self.labels and len(self.labels) != len(self.label_words):
            raise ValueError(f"labels {self.labels!r} and label_words {self.label_words!r} must have one entry each a class.")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels is {self.labels!r}; no value may stand there twice.")

    @property
    def slot(self) -> str | None:
        """The field where the answer stands: "mask" (verbalizer), "choice" (choices) or None (classification)."""
        return _SLOTS.get(self.kind)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns the template names, each once."""
        return tuple(dict.fromkeys(name for _, name in _parse(self.template) if name and name not in _SLOTS.values()))

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 for choices, where each row has its own candidates."""
        return 0 if self.kind == "choices" else len(self.label_words or self.labels)

    def render(self, values: Mapping[str, str]) -> Rendered:
        """The template with `values`, one per column and one for the slot, put in."""
        text, spans = "", []
        for literal, name in _parse(self.template):
            text += literal
            if name is not None:
                # The space before an answer is part of it: subword tokenizers put it into, or right before, the first token.
                start = len(text) - (name in _SLOTS.values() and text.endswith(" "))
                text += values[name]
                spans.append((name, start, len(text)))
        return text, spans


def _parse(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, name of the field after it); the name is None after the last literal."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r} cannot be read: {error}; write a literal brace twice.") from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise ValueError(f"template {template!r} has a field that is no {{column}} name; write a literal brace twice.")
    return [(literal, name) for literal, name, _, _ in parts]
