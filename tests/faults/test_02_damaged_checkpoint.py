"""Fault 2: a file of a checkpoint is truncated, or one of its bytes is flipped.

That checkpoint is skipped by name and the one before is used, bit for bit to the end; where it is named explicitly, the error names
the file.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

import fastkd
from fastkd.train.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from tests.faults.disturbed import config, crashes, differences


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_every_damaged_file_costs_one_checkpoint_and_nothing_else(tmp_path, caplog):
    run = config("ted", tmp_path, stages={"student": {}}, max_steps=6)
    stage = tmp_path / "run" / "student"
    fastkd.distill({**run, "output_dir": str(tmp_path / "whole")})
    crashes(run, "student", "begin_step", 5)
    assert [path.name for path in list_checkpoints(stage)] == ["checkpoint-4", "checkpoint-2"]
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    files = sorted(file.name for file in (stage / "checkpoint-4").iterdir())
    assert {"MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors", "best.safetensors"} <= {*files}
    for name in files:
        for damage in (flip, truncate):
            shutil.rmtree(tmp_path / "run")
            shutil.copytree(tmp_path / "stopped", tmp_path / "run")
            damage(stage / "checkpoint-4" / name)
            with pytest.raises(CheckpointError, match=name):
                load_checkpoint(stage / "checkpoint-4")
            caplog.clear()
            with caplog.at_level(logging.INFO):
                fastkd.distill(run)
            assert f"skipping checkpoint-4: {stage / 'checkpoint-4' / name}" in caplog.text
            assert f"goes on from {stage / 'checkpoint-2'}" in caplog.text
            assert differences(tmp_path / "whole", tmp_path / "run", ["student"]) == []
