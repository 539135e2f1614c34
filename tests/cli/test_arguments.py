"""Values that flags share: places with a home folder, whole numbers, and how a wrong command line is told."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fastkd.cli.arguments import Parser, path, positive, source
from fastkd.cli.main import main


def test_a_home_folder_stands_for_its_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (source("~/a"), source("~"), source("./~"), source("a~b")) == (f"{tmp_path}/a", str(tmp_path), "./~", "a~b")
    assert path("~/a") == tmp_path / "a"


@pytest.mark.parametrize("text", ["", " ", "a\0b", "\ud800", "~no-such-user/x"])
def test_what_names_nothing(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        path(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.0", "1e3", "nan", "2147483648", "9" * 50, " 1", "1_0"])
def test_what_is_no_whole_number(text: str) -> None:
    assert positive("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="is no whole number from 1 to 2147483647"):
        positive(text)


def test_a_wrong_command_line_is_bad_input() -> None:
    parser = Parser(prog="fastkd test")
    parser.add_argument("--number", type=positive)
    with pytest.raises(ValueError, match=r"^argument --number: '0' is no whole number from 1 to 2147483647; see fastkd test --help$"):
        parser.parse_args(["--number", "0"])
    with pytest.raises(ValueError, match=r"^argument --number: -- is no value; see"):
        parser.parse_args(["--number=--"])


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "m", "--text", "t", "--output_dir"],
        ["export", "m", "--output_dir"],
        ["cache", "ted/rte", "--stage", "s", "--output"],
        ["vocab", "count", "--model", "m", "--data", "d", "--output_dir"],
        ["vocab", "prune", "--model", "m", "--counts", "c", "--keep", "1", "--output_dir"],
        ["plot", "r", "--output"],
        ["doctor", "--json"],
        ["quickstart", "--output_dir"],
        ["train", "ted/rte", "--output_dir"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_refuses_a_place_without_a_name(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert main([*command, ""]) == 2
    assert "names nothing" in capsys.readouterr().err
    assert main([*command, "~no-such-user/x"]) == 2
    assert "begins with ~, and there is no such home" in capsys.readouterr().err
