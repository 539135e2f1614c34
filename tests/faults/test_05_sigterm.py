"""Fault 5: SIGTERM in a step, an evaluation, the vocabulary count, the tokenising, between two stages, while models are compiled.

The run ends with exit code 143 and says so; started again, it goes on and ends bit for bit as one that was left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import fastkd
from fastkd.train import data, vocabulary
from fastkd.train import run as driver
from tests.faults.disturbed import config, differences, disturb, terminate, train_apart

STAGES = ["pretrain", "task_words"]


def before(module: Any, name: str) -> None:
    """Terminate this process when it calls the function."""
    original: Callable[..., Any] = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        setattr(module, name, original)
        terminate()
        return original(*arguments, **options)

    setattr(module, name, call)


def compile_at_first_call(act: Callable[[], None]) -> None:
    """Let `act` stand for the compiler, which works when the first model is called for the first time."""

    handles: list[Any] = []

    def compile_module(module: nn.Module, **_: Any) -> None:
        def first_call(*_: Any) -> None:
            for handle in handles:
                handle.remove()
            act()

        handles.append(module.register_forward_pre_hook(first_call))

    nn.Module.compile = compile_module  # type: ignore[assignment]


def strike(moment: str) -> None:
    """In the process that is to be terminated."""
    patch = pytest.MonkeyPatch()
    if moment == "step":
        disturb(patch, "pretrain", "forward", 6, terminate)  # the first micro-batch of step 4
    elif moment == "evaluation":
        disturb(patch, "task_words", "evaluate", 1, terminate)
    elif moment == "vocabulary count":
        before(vocabulary, "count_tokens")
    elif moment == "tokenising":
        before(data, "tokenize_corpus")
    elif moment == "stage switch":
        before(driver, "save_model")
    elif moment == "compile":
        compile_at_first_call(terminate)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = config("glmd", folder, max_steps=6, stages={name: {} for name in STAGES})
    fastkd.distill({**run, "output_dir": str(folder / "whole")})
    return folder / "whole", run


@pytest.mark.parametrize("moment", ["step", "evaluation", "vocabulary count", "tokenising", "stage switch", "compile"])
def test_terminated_run_says_so_and_goes_on(tmp_path, monkeypatch, whole, moment):
    undisturbed, run = whole
    run = {**run, "output_dir": str(tmp_path / "run"), "torch_compile": moment == "compile"}
    process = train_apart(run, tmp_path, strike, moment)
    process.join()
    message = (tmp_path / "errors.txt").read_text()
    assert process.exitcode == 143 and "stopped by SIGTERM; run the same command again to go on" in message, message
    assert not list((tmp_path / "run").rglob("*.tmp-*"))
    if moment == "step":
        assert (tmp_path / "run" / "pretrain" / "checkpoint-3").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **_: None)
        fastkd.distill(run)
    assert differences(undisturbed, tmp_path / "run", STAGES) == []
