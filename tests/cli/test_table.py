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


def test_columns_that_do_not_fit_come_below_behind_the_first(monkeypatch):
    """A table as `fastkd eval` shows it, on 80 columns and on far fewer."""
    scores = ["perplexity", "bits per byte", "calibration error", "agreement with teacher", "KL from teacher, nats"]
    head = ["", *scores, "parameters", "vocabulary"]
    rows = [[name, *("0.1234" for _ in scores), 123456789, 50257] for name in ("teacher", "student", "plain KD")]
    for columns in (80, 30):
        monkeypatch.setattr(sys, "stdout", stream := Terminal(True))
        monkeypatch.setattr("shutil.get_terminal_size", lambda columns=columns: os.terminal_size((columns, 25)))
        print_table(head, rows)
        parts = [part.splitlines() for part in stream.getvalue().split("\n\n")]
        assert max(len(line) for part in parts for line in part) <= columns and len(parts) == {80: 2, 30: 5}[columns]
        assert all([line[:8].strip() for line in part[-3:]] == ["teacher", "student", "plain KD"] for part in parts)
        assert sum(part[-1].split().count("0.1234") for part in parts) == 5
        assert parts[-1][-1].split()[-1] == "50257" and "123456789" in stream.getvalue()
