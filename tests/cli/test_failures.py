"""Every kind of exception becomes a sentence: which one, with which exit code, and how to see the rest."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkd
from fastkd.cli import process, table
from fastkd.cli.failures import explained
from fastkd.cli.main import main
from fastkd.errors import doing
from fastkd.train.paths import expand_home
from fastkd.train.ranks import RankError
from fastkd.train.signals import SignalFlag


def caught(act: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011 (of any kind)
        act()
    assert isinstance(error.value, Exception)
    return error.value


def preempted() -> None:
    flag = SignalFlag()
    flag.received = 15
    flag.poll_alone()


def deeply() -> None:
    deeply()


SHOWS = "FASTKD_TRACEBACK=1 in the environment shows where."


@pytest.mark.parametrize(
    ("act", "sentence", "code"),
    [
        (lambda: expand_home("~no-one/x"), "'~no-one/x' begins with ~, and there is no such home", 2),
        (lambda: fastkd.VocabMap.from_counts(torch.ones(3, dtype=torch.int64), 0), "keep=0 must be a ratio between 0 and 1", 2),
        (preempted, "stopped by SIGTERM; run the same command again to go on.", 143),
        (lambda: Path("/no/such/file").read_bytes(), "/no/such/file: No such file or directory.", 2),
        (lambda: os.rename("/no/a", "/no/b"), "/no/a -> /no/b: No such file or directory.", 2),
    ],
)
def test_sentences_of_fastkd_and_errors_of_the_system(act: Callable[[], Any], sentence: str, code: int) -> None:
    said, exit_code = explained(caught(act))
    assert said.startswith(sentence) and exit_code == code and "bug" not in said and "FASTKD_TRACEBACK" not in said


def test_an_error_of_the_system_without_a_file_is_told_with_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(process.select, "poll", full)

    def full_disk() -> None:
        with doing("writing the cache /somewhere"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert explained(caught(full_disk)) == ("writing the cache /somewhere: No space left on device.", 2)
    said, code = explained(caught(lambda: process.stdout_is_closed()))
    assert said.startswith("in fastkd.cli.process, line ") and said.endswith(": No space left on device.") and code == 2


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: {}["a"], "KeyError: 'a'"),
        (lambda: torch.ones(2) + torch.ones(3), "RuntimeError: The size of tensor a (2) must match"),
        (lambda: torch.nothing, "AttributeError: module 'torch' has no attribute 'nothing'"),
        (lambda: int("a"), "ValueError: invalid literal"),
        (lambda: int(math.inf), "OverflowError: cannot convert float infinity to integer"),
        (deeply, "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_what_others_raise_is_told_with_what_was_being_done(act: Callable[[], Any], said: str) -> None:
    def work() -> None:
        with doing("reading the model m"):
            act()

    sentence, code = explained(caught(work))
    assert sentence.startswith(f"reading the model m failed: {said}") and sentence.endswith(SHOWS) and code == 1
    assert "\n" not in sentence and len(sentence) < 700


@pytest.mark.parametrize("broken", ["'str' object is not a mapping", "unsupported operand"])
def test_a_fault_of_fastkd_is_called_that(broken: str) -> None:
    """A TypeError that no `raise` has made is no sentence for people."""

    def work() -> None:
        table.print_table(["a"], [[1]] if "mapping" in broken else 3)  # type: ignore[arg-type]

    if "mapping" in broken:
        error = caught(lambda: fastkd.train.schema.apply_flags(3, [], int))  # type: ignore[arg-type]
    else:
        error = caught(work)
    sentence, code = explained(error)
    assert sentence.startswith("This is a bug in fastkd, or input that nobody has tried: TypeError: ") and code == 1
    assert ", in fastkd." in sentence and sentence.endswith(f"{SHOWS} Please report it.")


def test_too_little_memory_and_a_missing_package() -> None:
    def allocate() -> None:
        with doing("building the model m"):
            np.empty(2**50, dtype=np.int64)

    sentence, code = explained(caught(allocate))
    assert sentence.startswith("There is not enough memory for building the model m (") and code == 1
    sentence, code = explained(caught(lambda: torch.empty(2**50)))
    assert sentence.startswith("There is not enough memory (RuntimeError: ") and code == 1
    missing = caught(lambda: __import__("no_such_package"))
    assert explained(missing) == (
        "The package no_such_package is missing (ModuleNotFoundError: No module named 'no_such_package'); install it.",
        1,
    )


def test_errors_of_a_run_end_with_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastkd.train.ranks import Ranks

    ranks = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "gather", lambda *_, **__: ["it broke"])
    error = caught(lambda: ranks.main_first(lambda: 1 / 0))
    assert isinstance(error, ZeroDivisionError) and explained(error)[1] == 1
    error = caught(lambda: Ranks(1, 2).main_first(lambda: None))
    assert isinstance(error, RankError) and explained(error) == ("rank 0 stopped: it broke", 1)


# ---- through the command


def broken_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.train.curves.plot_logs", lambda *_: {}["loss"])


@pytest.mark.parametrize("value", [None, "0", ""])
def test_the_rest_is_shown_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str | None
) -> None:
    broken_command(monkeypatch)
    monkeypatch.delenv("FASTKD_TRACEBACK", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTKD_TRACEBACK", value)
    assert main(["plot", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"fastkd plot: drawing loss of {tmp_path} failed: KeyError: 'loss'. {SHOWS}\n"
    monkeypatch.setenv("FASTKD_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["plot", str(tmp_path)])
    assert main(["--help"]) == 0 and "FASTKD_TRACEBACK=1" in capsys.readouterr().out


def test_help_and_wrong_flags_return_their_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert main(["eval"]) == 2 and main(["vocab", "cont"]) == 2 and main(["export", "x", "--output_dir", ""]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "fastkd eval: the following arguments are required: MODEL; see fastkd eval --help",
        "fastkd vocab: argument command: invalid choice: 'cont' (choose from 'count', 'prune'); see fastkd vocab --help",
        "fastkd export: argument --output_dir: '' names nothing; give a path or name; see fastkd export --help",
    ]
