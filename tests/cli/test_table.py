"""Tables on the terminal: as they are where they fit, with a head of several lines where that makes them fit."""

from __future__ import annotations

import io
import os
import sys

import pytest

from fastkd.cli.table import print_table

HEAD, ROWS = ["", "kept tokens only", "train seconds"], [["student, plain KD", "150.1", 61], ["teacher", "98.2", 1200]]
WIDE = ["                   kept tokens only  train seconds", "-----------------  ----------------  -------------"]
NARROW = [
    "                   kept    train",
    "                   tokens  seconds",
    "                   only",
    "-----------------  ------  -------",
    "student, plain KD  150.1   61",
]


class Terminal(io.StringIO):
    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self.is_one = is_one

    def isatty(self) -> bool:
        return self.is_one


@pytest.mark.parametrize(("columns", "is_terminal", "shown"), [(60, True, WIDE), (40, True, NARROW), (40, False, WIDE)])
def test_the_head_takes_several_lines_on_a_narrow_terminal(monkeypatch, columns, is_terminal, shown):
    monkeypatch.setattr(sys, "stdout", stream := Terminal(is_terminal))
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 25)))
    print_table(HEAD, ROWS)
    assert stream.getvalue().splitlines()[: len(shown)] == shown
