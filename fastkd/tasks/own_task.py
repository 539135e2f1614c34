"""Own labelled rows, a class or a value for each text or pair of texts.

Labels are values (regression) where that is asked for, or where all of them are numbers and one is written as a float: 4.5, or 4.0 in a
column of floats. All other labels are names of classes, whole numbers too. Classes are sorted, by value where all of their names are
numbers, so that their indices follow from the names alone, whatever the order of the rows.
"""

from __future__ import annotations

import ast
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastkd.tasks.bad_rows import REFUSE_BAD_ROWS, BadRowPolicy, BadRows, is_text
from fastkd.tasks.labelled import LabelledExample, TaskDataset, example_fault
from fastkd.tasks.sources import matching_files
from fastkd.tasks.split_rows import read_one_split, read_split

logger = logging.getLogger("fastkd")

OwnKind = Literal["classification", "regression"]
EVAL_SPLIT = "validation"
"""The split to evaluate on where none is named."""
_METRICS: dict[OwnKind, tuple[str, ...]] = {"classification": ("accuracy", "f1_macro"), "regression": ("pearson", "spearman")}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHOWN = 20

Label = str | int | float


@dataclass(frozen=True)
class _Rows:
    """The rows of one split as they were read."""

    description: str
    texts: list[list[Any]]
    labels: list[Label | None]


@dataclass(frozen=True)
class OwnRows:
    """How own rows are read: the columns of one text or two, that of the label, and what becomes of rows that lack one."""

    text_columns: Sequence[str]
    label_column: str
    bad_rows: BadRowPolicy = REFUSE_BAD_ROWS

    def load(
        self, path: str, *, eval_path: str | None = None, eval_split: str | None = None, kind: OwnKind | None = None
    ) -> TaskDataset:
        """Load the rows to train on and those to evaluate on.

        Args:
            path: A file or a glob (.csv .tsv .jsonl .json .parquet), or what `split_rows.read_split` reads, of which the split `train`.
            eval_path: Where the evaluation rows are, if not there.
            eval_split: Their split, in what has several; None: `EVAL_SPLIT`.
            kind: None: as the training labels are, see above.

        Raises what `read_split` raises. ValueError, too, for one split alone, fewer than two classes, several labels in a row, and,
        naming file, row and value, for a row without text or label, or with a label that no training row has.
        """
        if eval_path is None and is_one_split(path):
            raise ValueError(
                f"path {path!r} is one split, so training and evaluation would share its rows; name the evaluation rows by eval_path, "
                "or by path a folder that has a file of each split."
            )
        train = self._read(path, None, "train")
        kind, names = _classes(train, kind)
        splits = {"train": self._examples(train, kind, names)}
        judged = (eval_split or EVAL_SPLIT) if eval_path is None else EVAL_SPLIT
        if judged not in splits:
            splits[judged] = self._examples(self._read(eval_path or path, eval_split, EVAL_SPLIT), kind, names)
        return _task(path, kind, splits, names)

    def load_split(self, path: str, split: str | None, kind: OwnKind, label_names: tuple[str, ...]) -> TaskDataset:
        """Load one split alone, for a model whose classes are known.

        Args:
            path: As in `load`.
            split: None: `EVAL_SPLIT`.
            kind: What the model predicts.
            label_names: Its classes in the order of their indices; none for values.
        """
        examples = self._examples(self._read(path, split, EVAL_SPLIT), kind, label_names)
        return _task(path, kind, {split or EVAL_SPLIT: examples}, label_names)

    def _read(self, path: str, split: str | None, default: str) -> _Rows:
        columns, whose = [*self.text_columns, self.label_column], "that text_columns and label_column name"
        if not is_one_split(path):
            rows, description = read_split(path, None, split or default, columns, whose=whose)
        elif split is None:
            rows, description = read_one_split(path, columns, whose=whose)
        else:
            raise ValueError(
                f"The split {split!r} is asked for, and {path!r} is one split by itself; name none, or a folder with a file of each."
            )
        column = self.label_column
        labels = [_label(row[column], f"{_row(number, description)}: column {column!r}") for number, row in enumerate(rows)]
        if any(isinstance(label, str) for label in labels):  # the number among names is a ClassLabel's -1, of a row without a label
            labels = [label if isinstance(label, str) else None for label in labels]
        return _Rows(description, [[row[column] for column in self.text_columns] for row in rows], labels)

    def _examples(self, rows: _Rows, kind: OwnKind, names: tuple[str, ...]) -> list[LabelledExample]:
        left_out, examples = BadRows(rows.description, self.bad_rows), []
        indices = {name: index for index, name in enumerate(names)}
        for number, (texts, label) in enumerate(zip(rows.texts, rows.labels, strict=True)):
            where = _row(number, rows.description)
            try:
                text, second_text = self._texts(texts, where)
                at_label = f"{where}: column {self.label_column!r}"
                read = _value(label, at_label) if kind == "regression" else _class_index(label, indices, at_label)
                example = LabelledExample(text, second_text, read)
                if (fault := example_fault(example, kind, len(names), labelled=True)) is not None:
                    raise ValueError(f"{where} {fault}.")
                examples.append(example)
            except ValueError as error:
                left_out.add(error)
        left_out.report()
        logger.info("%s: %s.", rows.description, _summary(examples, names))
        return examples

    def _texts(self, cells: Sequence[Any], where: str) -> tuple[str, str | None]:
        for cell, column in zip(cells, self.text_columns, strict=True):
            if not is_text(cell):
                raise ValueError(f"{where}: column {column!r} holds {cell!r}; it must hold text.")
        first, *second = map(str, cells)
        return first, next(iter(second), None)


def _task(path: str, kind: OwnKind, splits: Mapping[str, Sequence[LabelledExample]], names: tuple[str, ...]) -> TaskDataset:
    return TaskDataset(path, kind, splits, _METRICS[kind], names, own_classes=kind == "classification")


def _row(number: int, description: str) -> str:
    return f"Row {number} (the first is 0) of {description}"


def is_one_split(path: str) -> bool:
    """Whether a path has one split alone: files, or what `datasets.Dataset.save_to_disk` wrote."""
    return bool(matching_files(path)) or (Path(path).expanduser() / "state.json").is_file()


def _classes(rows: _Rows, kind: OwnKind | None) -> tuple[OwnKind, tuple[str, ...]]:
    """The kind of task that the training labels make, and its classes in the order of their indices; none for values."""
    labels = [label for label in rows.labels if label is not None]
    if kind is None:
        kind = "regression" if all(map(_is_number, labels)) and not all(map(_is_whole, labels)) else "classification"
    if kind == "regression":
        return kind, ()
    names = {str(label) for label in labels}
    if len(names) < 2:
        raise ValueError(
            f"{rows.description} has {f'the class {names.pop()!r} alone' if names else 'no label at all'}, and a classification needs "
            "two classes or more; name another label_column, or set kind to regression for values."
        )
    by_value = all(map(_is_number, names))
    return kind, tuple(sorted(names, key=lambda name: (float(name) if by_value else 0.0, name)))


def _label(cell: Any, where: str) -> Label | None:
    """A cell's label; None where it has none. A list is refused whatever becomes of bad rows: it is no fault of one row."""
    if isinstance(cell, str):
        cell, listed = cell.strip(), None
        if cell.startswith("[") and cell.endswith("]"):
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                listed = ast.literal_eval(cell)
        if not isinstance(listed, list):
            return cell or None
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, int | float):
        return cell
    raise ValueError(
        f"{where} holds {cell!r}, and a label is one name or number. Several labels of a text (multi-label classification) and a label "
        "of each word (token classification) cannot be learned here."
    )


def _is_number(label: Label) -> bool:
    return not isinstance(label, bool) and (not isinstance(label, str) or _NUMBER.fullmatch(label) is not None)


def _is_whole(label: Label) -> bool:
    return isinstance(label, int) or (isinstance(label, str) and _INTEGER.fullmatch(label) is not None)


def _value(label: Label | None, where: str) -> float:
    if label is None or not _is_number(label) or not math.isfinite(float(label)):
        raise ValueError(f"{where} holds {'no label' if label is None else repr(label)}; a finite number is needed to predict values.")
    return float(label)


def _class_index(label: Label | None, indices: Mapping[str, int], where: str) -> int:
    if label is None or str(label) not in indices:
        raise ValueError(f"{where} holds {'no label' if label is None else repr(label)}; the classes are {_listed([*indices])}.")
    return indices[str(label)]


def _summary(examples: Sequence[LabelledExample], names: tuple[str, ...]) -> str:
    """How many rows there are, and of which classes, or with which values."""
    labels = [example.label for example in examples if example.label is not None]
    if names:
        counts = Counter(labels)
        return f"{len(labels)} rows of the classes {_listed([f'{name} ({counts[index]})' for index, name in enumerate(names)])}"
    return f"{len(labels)} rows" + (f" with values from {min(labels):g} to {max(labels):g}" if labels else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
