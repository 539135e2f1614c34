"""Open any corpus of the unlabeled stage as one re-iterable stream of strings."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fastkd.tasks import stdlib
from fastkd.tasks.bad_rows import REFUSE_BAD_ROWS, BadRowPolicy, BadRows
from fastkd.tasks.sources import (
    HashedFile,
    Source,
    content_of,
    describe_files,
    is_saved_dataset,
    loader_of,
    matching_files,
    open_source,
    require_one_of,
)
from fastkd.tasks.text_files import LONGEST, Documents, text_documents

StreamState = dict[str, Any]
Reader = Callable[[int, StreamState | None], Iterator[tuple[StreamState | None, Sequence[Any]]]]
_READ_ROWS = 1_000
_BATCH_CHARS = 2**22


@dataclass
class Bookmark:
    """A place in a corpus that another process can go on from, as numbers and JSON-able data.

    Attributes:
        rows: Rows that were given before it.
        position: Rows that were read before it: those, and the bad ones that were left out.
        bad_rows: How many were left out.
        stream: The state of a streamed dataset there; a stream at its beginning has none.
    """

    rows: int = 0
    position: int = 0
    bad_rows: int = 0
    stream: StreamState | None = None


@dataclass(frozen=True)
class Corpus:
    """Rows of text that can be read again and again, in one fixed order.

    Attributes:
        description: What the corpus is, as a part of a sentence.
        fingerprint: Hex digest of the content, the column, ``max_rows`` and the treatment of bad rows. The content is that of the
            files, in their order: what they are called, where they are and when they were written is not in it.
        read: Yields batches of rows from a position on, each with the state that a stream has before it.
        max_rows: The corpus ends after this many rows; ``None``: where ``read`` ends.
        bad_rows: What becomes of rows that are null or not strings. A row that is left out has no number.
        is_stream: ``read`` finds a position by the stream's state alone, without one only the beginning.
    """

    description: str
    fingerprint: str
    read: Reader
    max_rows: int | None = None
    bad_rows: BadRowPolicy = REFUSE_BAD_ROWS
    is_stream: bool = False

    def rows(self, start: int = 0, bookmark: Bookmark | None = None) -> Iterator[str]:
        """Yield the rows from number ``start`` (0 is the first) on.

        Args:
            start: How many rows are passed over.
            bookmark: A place at or before ``start`` to begin reading at; it is moved along, never beyond the latest row.

        Raises:
            TypeError: A row is null or not a string, and such rows are not skipped; the message has the row's number.
            ValueError: More rows than may be were skipped.
        """
        place = Bookmark() if bookmark is None else bookmark
        if not (self.is_stream or self.bad_rows.skips):  # every row read is a row given, so the number is the position
            place.rows = place.position = start
        yield from islice(self._rows_from(place), start - place.rows, None)

    def _rows_from(self, place: Bookmark) -> Iterator[str]:
        limit = math.inf if self.max_rows is None else self.max_rows
        left_out = BadRows(self.description, self.bad_rows, place.bad_rows)
        rows, position = place.rows, place.position
        for stream, batch in self.read(position, place.stream):
            place.rows, place.position, place.bad_rows, place.stream = rows, position, left_out.count, stream
            for row in batch:
                if rows >= limit:
                    break
                if isinstance(row, str):
                    rows += 1
                    yield row
                else:
                    left_out.add(self._fault(position, row))
                position += 1
            if rows >= limit:
                break
        left_out.report()

    def _fault(self, position: int, row: Any) -> TypeError:
        held = "is null" if row is None else f"holds {type(row).__name__} {row!r:.80}"
        return TypeError(
            f"Row {position} (the first is 0) of {self.description} {held}, and every row must be a string: "
            "remove or convert such rows, or name another text_column."
        )


def open_corpus(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    max_rows: int | None = None,
    bad_rows: BadRowPolicy = REFUSE_BAD_ROWS,
    documents: Documents = "file",
) -> Corpus:
    """Open a corpus, check what can be checked, and read its first row.

    Args:
        path: The word ``stdlib`` (the Python standard library; splits train, dev, test); a folder written by
            ``datasets``' ``save_to_disk``; a .jsonl, .json, .parquet, .csv or .txt file or a glob of files of one kind, read in the
            order of their names; or a dataset's name on the Hugging Face hub. What exists on disk goes before the hub.
        name: The configuration of a hub dataset; nothing else has one.
        split: The split to read. Files, and a folder of one unnamed dataset, have ``train`` only.
        text_column: The column that holds the text; it is ``text`` for ``stdlib`` and .txt files.
        streaming: Read files and hub datasets as they come instead of converting them to Arrow on disk first.
        max_rows: Use only this many rows, the first ones.
        bad_rows: What becomes of rows that are null or not strings.
        documents: What a row of .txt files is: see ``text_documents``. Nothing else is cut.

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

    read: Reader
    is_stream = False
    if path == "stdlib":
        description = f"the Python standard library (split {split!r})"
        require_one_of("text_column", text_column, ["text"], description)
        hashed = [HashedFile.of(file) for file in stdlib.stdlib_files(split)]
        content = content_of("stdlib", hashed, str(stdlib.CHUNK_CHARS), str(stdlib.MAX_CHUNK_CHARS))
        read = _passing_over(lambda: _library_rows(hashed))
    elif files and loader_of(path, files) == "text":
        description = describe_files(path, files)
        require_one_of("split", split, ["train"], description)
        require_one_of("text_column", text_column, ["text"], description)
        hashed = [HashedFile.of(file) for file in files]
        content = content_of("text", hashed, documents, str(LONGEST))
        read = _passing_over(lambda: chain.from_iterable(text_documents(file, documents) for file in hashed))
    else:
        source = open_source(path, files, name=name, split=split, streaming=streaming)
        description, content = source.description, source.content
        if not is_local and documents != "line" and source.dataset.info.builder_name == "text":
            raise ValueError(
                f"There are .txt files in {description}, of which `datasets` gives the lines: set documents to line if these are what "
                "you want, or download the files and name them by a glob."
            )
        read, is_stream = _column_reader(source, text_column), streaming

    identity = json.dumps([content, text_column, max_rows, *([bad_rows.max_bad_rows] if bad_rows.skips else [])])
    corpus = Corpus(description, hashlib.sha256(identity.encode()).hexdigest(), read, max_rows, bad_rows, is_stream)
    if next(corpus.rows(), None) is None:
        raise ValueError(f"There are no rows in {description}: check that this is the file and the split you mean.")
    return corpus


def text_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of at most ``size`` texts, which together have at most 4 million characters unless one alone has more."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and chars + len(text) > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
        if len(batch) == size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _library_rows(files: Sequence[HashedFile]) -> Iterator[str]:
    for file in files:
        pieces = stdlib.source_pieces(file.path)
        file.require_unchanged()
        yield from pieces


def _passing_over(rows: Callable[[], Iterator[str]]) -> Reader:
    return lambda start, _: ((None, [row]) for row in islice(rows(), start, None))


def _column_reader(source: Source, text_column: str) -> Reader:
    """Check that the column exists; return a reader of it that passes over rows of an Arrow table without reading them."""
    import datasets

    dataset = source.dataset
    with source.errors():
        columns = dataset.column_names or list(next(iter(dataset), {}))
    if columns:  # a stream without rows has none, and is refused as empty
        require_one_of("text_column", text_column, columns, source.description)

    def read(start: int, stream: StreamState | None) -> Iterator[tuple[StreamState | None, Sequence[Any]]]:
        if isinstance(dataset, datasets.Dataset) and start >= len(dataset):
            return
        with source.errors():
            column: Any = dataset.with_format(None).select_columns([text_column])
            if isinstance(column, datasets.Dataset):
                column = column.skip(start)
            elif stream is not None:
                column.load_state_dict(stream)
            batches = column.iter(_READ_ROWS)
        while True:
            with source.errors():  # for each batch, so that none of a changed file is given
                batch = next(batches, None)
                following = None if batch is None or isinstance(column, datasets.Dataset) else column.state_dict()
            if batch is None:
                return
            yield stream, batch[text_column]
            stream = following

    return read
