"""The runs that the fault tests disturb, how they are disturbed, and what has to be the same when they have gone on to their end.

Every stage of a method runs on tiny models, with dropout and an accumulation of 2 over several epochs.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.cli.main import main
from fastkd.sealed import file_sha256
from fastkd.train import run as driver
from fastkd.train.config import read_config
from fastkd.train.run import RESULT_FILE
from fastkd.train.schema import to_yaml
from tests import runs
from tests.runs import log_lines, timeless

EPOCHS = {
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "gradient_accumulation_steps": 2,
    "eval_steps": 3,
    "save_steps": 2,
    "warmup_steps": 2,
    "cache_dir": None,  # below output_dir: a run that starts over tokenises and counts again
}
OPTIONS = {
    "ted": {"mse_alpha": 5.0, "kl_alpha": 1.0, "teacher_filter_interval": 2},
    "crild": {"ema_decay": 0.9, "consistency_weight": 1.0},  # with the preset's MixUp and ramp
}
STAGES = {
    "ted": ("teacher", "student", "teacher_filters", "student_filters", "distill"),
    "crild": ("teacher", "ild", "kd"),
}


def config(method: str, folder: Path, **more: Any) -> dict[str, Any]:
    """All stages of `method`; `more` goes over it."""
    if method == "glmd":
        return runs.glmd(folder, runs.bert_teacher(folder), **{**EPOCHS, **more})
    teacher = runs.bert_classifier(folder, num_hidden_layers=4)
    return runs.settings(
        folder,
        **{
            "method": method,
            "teacher_model_name_or_path": teacher,
            "model_name_or_path": teacher,
            "student_layers": "first:2",
            "student": {},
            "dataset": runs.write_dataset(folder, rows=32),
            "options": OPTIONS[method],
            "stages": {stage: {} for stage in STAGES[method]},
            **EPOCHS,
            **more,
        },
    )


class Crash(BaseException):
    """SIGKILL for a test in one process: nothing catches it."""


def crash() -> None:
    raise Crash


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crashes(configuration: Mapping[str, Any], stage: str, moment: str, number: int) -> None:
    """Run until a crash at that moment; see `disturb`."""
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, stage, moment, number, crash)
        with pytest.raises(Crash):
            fastkd.distill(configuration)


def disturb(patch: pytest.MonkeyPatch, stage: str, moment: str, number: int, act: Callable[[], Any]) -> None:
    """Call `act` just before the call, of this number from 0, of `moment` in `stage`: "evaluate", or a method of the objective."""
    build = driver.build_stage

    def disturbed(original: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number + 1:
                act()
            return original(*arguments, **options)

        return call

    def build_disturbed(spec: Any, inputs: Any) -> Any:
        built = build(spec, inputs)
        if spec.name == stage:
            if hasattr(built, moment):
                return dataclasses.replace(built, **{moment: disturbed(getattr(built, moment))})
            setattr(built.objective, moment, disturbed(getattr(built.objective, moment)))
        return built

    patch.setattr(driver, "build_stage", build_disturbed)


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "datasets", "fastkd.train.run", "tests.faults.kills"])


def train_apart(configuration: Mapping[str, Any], folder: Path, prepare: Callable[..., Any], *arguments: Any) -> Any:
    """`fastkd train` in a process of its own, which calls `prepare(*arguments)` first; its errors go to folder/errors.txt.

    The process is forked from one that has imported everything and done nothing else, so it starts at once.
    """
    path = folder / "run.yaml"
    path.write_text(to_yaml(read_config(configuration)))
    process = SERVER.Process(target=_train, args=(str(path), folder / "errors.txt", prepare, *arguments))
    process.start()
    return process


def _train(config: str, errors: Path, prepare: Callable[..., Any], *arguments: Any) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    leave_out_drawing(pytest.MonkeyPatch())
    prepare(*arguments)
    sys.exit(main(["train", config]))


def leave_out_drawing(patch: pytest.MonkeyPatch) -> None:
    """Drawing its curves takes longer than training a tiny stage."""
    for name in ("matplotlib", "matplotlib.figure"):
        patch.setitem(sys.modules, name, None)


def differences(whole: Path, other: Path, stages: list[str]) -> list[str]:
    """What is not the same in the ends of two runs: final tensors, byte for byte; logs and results, without what the clock gave."""
    found = []
    for stage in stages:
        left, right = (_final_tensors(run / stage) for run in (whole, other))
        if not left:
            found.append(f"{stage} left no tensors")
        found += [f"{stage}/{name} is not the same" for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
        if log_lines(whole / stage) != log_lines(other / stage):
            found.append(f"the log of {stage} is not the same")
        if _result(whole / stage) != _result(other / stage):
            found.append(f"the result of {stage} is not the same")
    return found


def _final_tensors(stage: Path) -> dict[str, str]:
    """Every file of tensors in what the stage made, and its hash."""
    files = [file for made in ("student", "teacher", "filters") for file in (stage / made).rglob("*.safetensors")]
    return {str(file.relative_to(stage)): file_sha256(file) for file in files}


def _result(stage: Path) -> dict[str, Any]:
    result = timeless(json.loads((stage / RESULT_FILE).read_bytes()))
    return {key: value for key, value in result.items() if key != "identity"}
