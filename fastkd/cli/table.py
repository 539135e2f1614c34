"""Plain tables on the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell, numbers as they are given. On a terminal too narrow for it the head takes several lines."""
    cells = [[str(cell) for cell in row] for row in rows]
    heads = [[title] for title in head]
    if sys.stdout.isatty() and sum(_widths(heads, cells)) + 2 * (len(head) - 1) > shutil.get_terminal_size().columns:
        heads = [title.split() or [""] for title in head]
    widths = _widths(heads, cells)
    for row in (*zip_longest(*heads, fillvalue=""), ["-" * width for width in widths], *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _widths(heads: Sequence[Sequence[str]], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, [*lines, *(row[column] for row in cells)])) for column, lines in enumerate(heads)]
