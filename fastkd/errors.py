"""Parts of error sentences that are needed everywhere: what was being done when a library failed, and which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_NOTE = "While "


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Note on an exception that leaves the block what was being done, such as "reading the model FOLDER". The command line tells it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{_NOTE}{what}")
        raise


def what_was_done(error: BaseException) -> str | None:
    """The innermost note of `doing` on an exception."""
    notes = (note.removeprefix(_NOTE) for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE))
    return next(notes, None)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the one of the `known` names that a misspelled `name` most likely means; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
