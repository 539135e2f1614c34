"""Floor 1, labelled tasks: texts and pairs of texts without labels, for a stage that only compares what two models make of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

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
) -> TaskDataset:
    """The texts of a data set's column, or the pairs of two columns. Rows where one of them is blank are left out.

    Args:
        path: What `load_examples` opens: a file or a glob, a folder, or a data set on the hub.
        text_column: The column of the texts, or of the first of every pair.
        second_text_column: The column of the second of every pair.
        name: The configuration of a hub data set.
        split: The split to read, where there are several.
        max_rows: Read only so many rows, the first ones.

    Raises:
        ValueError: A column that is missing, or fewer than two rows with text; and what `load_examples` raises.
        TypeError: A row without a string in one of the columns.
    """
    path = os.fspath(path)
    rows = load_examples(path, name=name, split=split, max_rows=max_rows)
    texts = _texts(rows, "text_column", text_column, path)
    second_texts = [None] * len(rows)
    if second_text_column is not None:
        second_texts = _texts(rows, "second_text_column", second_text_column, path)
    pairs = zip(texts, second_texts, strict=True)
    kept = [LabelledExample(text, second) for text, second in pairs if text.strip() and (second is None or second.strip())]
    if len(kept) < len(rows):
        logger.warning("%d of %d rows of %s have no text and were left out.", len(rows) - len(kept), len(rows), path)
    return unlabelled(path, kept)


def stdlib_pairs() -> TaskDataset:
    """Every documented function of Python's library with its docstring, without those of the docstring tasks' held-out files.

    Some of these functions are in the held-out splits of `which_module`, which are made of other files.
    """
    return unlabelled("stdlib/pairs", training_pairs())


def _texts(rows: Sequence[Mapping[str, Any]], argument: str, column: str, path: str) -> list[Any]:
    if column not in rows[0]:
        raise ValueError(f"{argument} is {column!r}, which is not a column of {path!r}: use one of {', '.join(map(repr, rows[0]))}.")
    texts = [row[column] for row in rows]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Row {number} (the first is 0) of {path!r} holds {text!r} in column {column!r}; it must hold text.")
    return texts
