"""What was being done when something failed: the part of a sentence that the exception of a library lacks."""

from __future__ import annotations

from collections.abc import Iterator
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
