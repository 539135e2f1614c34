"""Texts and pairs of texts without labels, for a stage that only compares what two models make of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.tasks.bad_rows import REFUSE_BAD_ROWS, BadRowPolicy, BadRows
from fastkd.tasks.examples import load_examples
from fastkd.tasks.labelled import LabelledExample, TaskDataset
from fastkd.tasks.stdlib_tasks import training_pairs

logger = logging.getLogger(__name__)


def unlabelled(name: str, examples: list[LabelledExample]) -> TaskDataset:
    """The examples as the only split, `train`, of a dataset of kind "unlabelled"."""
    return TaskDataset(name, "unlabelled", {"train": examples}, metrics=())


def load_pairs(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    second_text_column: str | None = None,
    name: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
    bad_rows: BadRowPolicy = REFUSE_BAD_ROWS,
) -> TaskDataset:
    """The texts of a data set's column, or the pairs of two columns. Rows where one of them is blank are left out.

    Args:
        path: What `load_examples` opens: a file or a glob, a folder, or a data set on the hub.
        text_column: The column of the texts, or of the first of every pair.
        second_text_column: The column of the second of every pair.
        name: The configuration of a hub data set.
        split: The split to read, where there are several.
        max_rows: Read only so many rows, the first ones.
        bad_rows: What becomes of rows without a string in one of the columns.

    Raises:
        ValueError: A column that is missing, or fewer than two rows with text; and what `load_examples` raises.
        TypeError: A row without a string in one of the columns.
    """
    path = os.fspath(path)
    rows = load_examples(path, name=name, split=split, max_rows=max_rows)
    columns = {"text_column": text_column, "second_text_column": second_text_column}
    pairs = _texts(rows, {argument: column for argument, column in columns.items() if column is not None}, path, bad_rows)
    kept = [LabelledExample(texts[0], next(iter(texts[1:]), None)) for texts in pairs if all(map(str.strip, texts))]
    if len(kept) < len(pairs):
        logger.warning("%d of %d rows of %s have no text and were left out.", len(pairs) - len(kept), len(rows), path)
    return unlabelled(path, kept)


def stdlib_pairs() -> TaskDataset:
    """Every documented function of Python's library with its docstring, without those of the docstring tasks' held-out files.

    Some of these functions are in the held-out splits of `which_module`, which are made of other files.
    """
    return unlabelled("stdlib/pairs", training_pairs())


def _texts(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], path: str, bad_rows: BadRowPolicy) -> list[list[str]]:
    """Take every row's texts in `columns`, which maps the names of arguments to those of columns."""
    for argument, column in columns.items():
        if column not in rows[0]:
            raise ValueError(
                f"{argument} is {column!r}, which is not a column of {path!r}: use one of {', '.join(map(repr, rows[0]))}."
            )
    left_out = BadRows(repr(path), bad_rows)
    kept = []
    for number, row in enumerate(rows):
        bad = next((column for column in columns.values() if not isinstance(row[column], str)), None)
        if bad is None:
            kept.append([row[column] for column in columns.values()])
        else:
            where = f"Row {number} (the first is 0) of {path!r}"
            left_out.add(TypeError(f"{where} holds {row[bad]!r} in column {bad!r}; it must hold text."))
    left_out.report()
    return kept
