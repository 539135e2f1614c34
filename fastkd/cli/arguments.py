"""What the flags of all commands share: how wrong ones are told, and the kinds of value they have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from ..train.paths import expand_home, is_path


class Parser(argparse.ArgumentParser):
    """Raises `ValueError` for a wrong command line, which is told as every other bad input is."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse's, but for `--flag=--`, of which that makes a flag with a list."""
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "-- is no value")
        return super()._get_values(action, arg_strings)


def source(text: str) -> str:
    """A folder, a file or a hub name, with a home folder in place of a leading `~`."""
    if not is_path(text):
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give a path or name")
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path(text: str) -> Path:
    """A file or a folder, as `source` reads it."""
    return Path(source(text))


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or not 1 <= int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {2**31 - 1}")
    return int(text)
