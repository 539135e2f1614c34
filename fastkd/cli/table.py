"""Plain tables on the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell, numbers as they are given.

    On a terminal too narrow for it the head takes several lines; where that is not enough, the columns that do not fit come below,
    behind the first one again.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    heads = [[title] for title in head]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    if _total(_widths(heads, cells)) > room:
        heads = [title.split() or [""] for title in head]
    widths = _widths(heads, cells)
    parts = [[0]]
    for column in range(1, len(head)):
        if len(parts[-1]) > 1 and _total([widths[other] for other in (*parts[-1], column)]) > room:
            parts.append([0])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        if number:
            print()
        rules = ["-" * widths[column] for column in part]
        rows_of_part = ([row[column] for column in part] for row in cells)
        for line in (*zip_longest(*(heads[column] for column in part), fillvalue=""), rules, *rows_of_part):
            print("  ".join(cell.ljust(widths[column]) for cell, column in zip(line, part, strict=True)).rstrip())


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _widths(heads: Sequence[Sequence[str]], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, [*lines, *(row[column] for row in cells)])) for column, lines in enumerate(heads)]
