"""Refuse or skip a row that cannot be used, because its text is null, say."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger("fastkd")

OnBadRow = Literal["error", "skip"]
MAX_BAD_ROWS = 1_000


@dataclass(frozen=True)
class BadRowPolicy:
    """`error`: the first bad row is refused. `skip`: bad rows are left out, and refused once they are more than `max_bad_rows`."""

    on_bad_row: OnBadRow = "error"
    max_bad_rows: int = MAX_BAD_ROWS

    @property
    def skips(self) -> bool:
        return self.on_bad_row == "skip"


REFUSE_BAD_ROWS = BadRowPolicy()


def is_text(value: Any) -> bool:
    """Tell whether a cell can be read as text: text, or a number, but no NaN, which stands where a table has nothing."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and not (isinstance(value, float) and math.isnan(value))


class BadRows:
    """Counts what is left out of one data set.

    Args:
        description: What the data set is, as a part of a sentence.
        count: How many rows of it were left out before.

    Attributes:
        count: How many rows were left out by now.
        first: The fault of the first of them that was met here.
    """

    def __init__(self, description: str, policy: BadRowPolicy, count: int = 0) -> None:
        self.count = count
        self.first: Exception | None = None
        self._description, self._policy = description, policy

    def add(self, fault: ValueError | TypeError) -> None:
        """Leave out the row that has this fault; raises the fault if rows are not skipped, and ValueError for one row too many."""
        if not self._policy.skips:
            raise type(fault)(f"{fault} (on_bad_row: skip leaves such rows out.)") from fault
        self.count += 1
        self.first = self.first or fault
        if self.count > self._policy.max_bad_rows:
            raise ValueError(
                f"More than max_bad_rows={self._policy.max_bad_rows} rows of {self._description} cannot be used. The first of them: "
                f"{self.first} Mend the data, or raise max_bad_rows."
            ) from fault

    @contextmanager
    def row(self, number: int) -> Iterator[None]:
        """Inside, a ValueError is the fault of row `number`, which is left out or refused."""
        try:
            yield
        except ValueError as error:
            self.add(ValueError(f"Row {number} (the first is 0) of {self._description}: {error}"))

    def report(self) -> None:
        """Say in the log how many rows were left out, if any were."""
        if self.count:
            first = f" The first: {self.first}" if self.first else ""
            logger.warning("%d rows of %s cannot be used and were left out (on_bad_row: skip).%s", self.count, self._description, first)
