"""Floor 1, rows of text: opens any corpus of the unlabeled stage as one re-iterable stream of strings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastkd.tasks import stdlib
from fastkd.tasks.sources import Source, is_saved_dataset, matching_files, open_source, require_one_of

_Reader = Callable[[int], Iterator[Any]]
_READ_ROWS = 1_000


@dataclass(frozen=True)
class Corpus:
    """Rows of text that can be read again and again, in one fixed order.

    Attributes:
        description: What the corpus is, as a part of a sentence.
        fingerprint: Hex digest; another one for another content, split, column or ``max_rows``.
        read: Yields the rows from a row number on.
        max_rows: The corpus ends after this many rows; ``None``: where ``read`` ends.
    """

    description: str
    fingerprint: str
    read: _Reader
    max_rows: int | None = None

    def rows(self, start: int = 0) -> Iterator[str]:
        """Yield the rows from number ``start`` (0 is the first) on.

        Raises:
            TypeError: A row is null or not a string; the message has the row's number.
        """
        for number, row in enumerate(islice(self.read(start), self._rows_left(start)), start):
            if not isinstance(row, str):
                held = "is null" if row is None else f"holds {type(row).__name__} {row!r:.80}"
                raise TypeError(
                    f"Row {number} (the first is 0) of {self.description} {held}, and every row must be a string: "
                    "remove or convert such rows, or name another text_column."
                )
            yield row

    def _rows_left(self, start: int) -> int | None:
        return None if self.max_rows is None else max(self.max_rows - start, 0)


def open_corpus(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    max_rows: int | None = None,
) -> Corpus:
    """Open a corpus, check what can be checked, and read its first row.

    Args:
        path: The word ``stdlib`` (the Python standard library; splits train, dev, test); a folder written by
            ``datasets``' ``save_to_disk``; a .jsonl, .json, .parquet, .csv or .txt file (the rows of a .txt file are
            its lines that are not blank) or a glob of files of one kind, read in the order of their names; or a
            dataset's name on the Hugging Face hub. What exists on disk goes before the hub.
        name: The configuration of a hub dataset; nothing else has one.
        split: The split to read. Files, and a folder of one unnamed dataset, have ``train`` only.
        text_column: The column that holds the text; it is ``text`` for ``stdlib`` and .txt files.
        streaming: Read files and hub datasets as they come instead of converting them to Arrow on disk first.
        max_rows: Use only this many rows, the first ones.

    Raises:
        FileNotFoundError: Nothing is at ``path``, here or on the hub.
        ValueError: Unknown split, missing column, empty corpus, an unreadable file, or an option that does not fit.
        TypeError: The first row is not a string.
        OSError: The hub cannot be reached, or a download was interrupted.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} leaves no rows: give a number of at least 1, or null for all of them.")
    path = os.fspath(path)
    place = Path(path).expanduser()
    files = matching_files(path)
    is_local = path == "stdlib" or place.is_dir() or bool(files)
    if name is not None and is_local:
        raise ValueError(f"name={name!r} chooses a configuration of a hub dataset, and {path!r} is not one: leave it out.")
    if path != "stdlib" and place.is_dir() and not is_saved_dataset(place):
        raise ValueError(
            f"path={path!r} is a folder that datasets' save_to_disk did not write: "
            f"name the files in it with a glob, such as {str(place / '*.jsonl')!r}."
        )

    read: _Reader
    if path == "stdlib":
        description = f"the Python standard library (split {split!r})"
        require_one_of("text_column", text_column, ["text"], description)
        content = stdlib.stdlib_fingerprint(split)
        read = _skipping(lambda: stdlib.stdlib_rows(split))
    else:
        source = open_source(path, files, name=name, split=split, streaming=streaming)
        description, content = source.description, source.content
        read = _column_reader(source, text_column)
        if files and files[0].suffix == ".txt":
            with_blank = read
            read = _skipping(lambda: filter(str.strip, with_blank(0)))

    identity = json.dumps([content, split, text_column, max_rows])
    corpus = Corpus(description, hashlib.sha256(identity.encode()).hexdigest(), read, max_rows)
    if next(corpus.rows(), None) is None:
        raise ValueError(f"There are no rows in {description}: check that this is the file and the split you mean.")
    return corpus


def _skipping(rows: Callable[[], Iterator[str]]) -> _Reader:
    return lambda start: islice(rows(), start, None)


def _column_reader(source: Source, text_column: str) -> _Reader:
    """Check that the column exists; return a reader of it that skips rows of an Arrow table without reading them."""
    import datasets

    dataset = source.dataset
    with source.errors():
        columns = dataset.column_names or list(next(iter(dataset), {}))
    if columns:  # a stream without rows has none, and is refused as empty
        require_one_of("text_column", text_column, columns, source.description)

    def read(start: int) -> Iterator[Any]:
        if isinstance(dataset, datasets.Dataset) and start >= len(dataset):
            return
        with source.errors():
            for batch in dataset.with_format(None).select_columns([text_column]).skip(start).iter(_READ_ROWS):
                yield from batch[text_column]

    return read
