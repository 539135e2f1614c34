"""Fault 4: output_dir cannot be written, or vanishes during the run.

An error that names the path: before the first step where that can be known, else at the next save.
"""

from __future__ import annotations

import shutil
import sys

import pytest

from fastkd.cli.main import main
from fastkd.train.config import read_config
from fastkd.train.loop import StageTrainer
from fastkd.train.schema import to_yaml
from tests.faults.disturbed import config, disturb


def train(folder, run):
    (folder / "run.yaml").write_text(to_yaml(read_config(run)))
    return main(["train", str(folder / "run.yaml")])


@pytest.mark.parametrize("place", ["a file", "below a file", "a stage is a file", "read-only"])
def test_refused_before_the_first_step(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))
    run = config("ted", tmp_path, stages={"student": {}})
    (tmp_path / "file").write_text("")
    if place == "read-only":
        if sys.platform != "linux":
            pytest.skip("needs a file system that not even root may write to")
        run["output_dir"] = "/proc/run"
    elif place == "a stage is a file":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "student").write_text("")
        run["output_dir"] = str(tmp_path / "run")
    else:
        run["output_dir"] = str(tmp_path / "file" / "run") if place == "below a file" else str(tmp_path / "file")
    assert train(tmp_path, run) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fastkd train: ") and run["output_dir"] in message


def test_vanished_during_the_run(tmp_path, monkeypatch, capsys):
    run = config("ted", tmp_path, stages={"student": {}})
    disturb(monkeypatch, "student", "begin_step", 2, lambda: shutil.rmtree(tmp_path / "run"))
    assert train(tmp_path, run) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fastkd train: ") and str(tmp_path / "run" / "student" / "checkpoint-4") in message
