"""Fault 3: the disk is full (ENOSPC) at the k-th write of a checkpoint.

The run stops, or goes on, as `save_failure` says; older checkpoints are intact, nothing half-written is left, and the run that goes on,
or is started again when there is space, ends bit for bit as one that always had space.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import fastkd
from fastkd import store
from fastkd.train.checkpoint import list_checkpoints, verify_checkpoint
from tests.faults.disturbed import config, differences, train_apart

STAGE = "student"  # of ted: a fine-tuning with a best state, so that a checkpoint has three files of tensors


def fill_disk(patch: pytest.MonkeyPatch, name: str, write: int, *, for_good: bool = False) -> None:
    """Fail the write of this number, from 0, counted from the first one to a path with `name` in it; or all from there on."""
    made = -1

    def failing(original: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            if made >= 0 or any(name in str(argument) for argument in arguments):
                made += 1
            if made == write + 1 or (for_good and made > write):
                raise error
            return original(*arguments, **options)

        return call

    full = OSError(errno.ENOSPC, "No space left on device")
    full_for_tensors = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    patch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file, full_for_tensors))
    for module, function in ((store, "open_own"), (os, "fsync"), (os, "rename")):
        patch.setattr(module, function, failing(getattr(module, function), full))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = config("ted", folder, stages={STAGE: {}}, max_steps=6)
    fastkd.distill({**run, "output_dir": str(folder / "whole")})
    return folder / "whole", run


def nothing_is_half_written(output_dir: Path) -> None:
    assert not list(output_dir.rglob(".*.tmp-*"))
    for checkpoint in list_checkpoints(output_dir / STAGE):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize(
    ("policy", "name", "write"),
    [
        # Three files of tensors, two writes of the state and of the manifest, the syncs of the five and of their folder, the rename.
        *[("stop", "checkpoint-4.tmp", write) for write in (0, 4, 8, 12)],
        *[("continue", "checkpoint-4.tmp", write) for write in (1, 11)],
        ("continue", "student.tmp", 0),  # what the stage has made must be saved
        ("continue", "result.json.tmp", 0),
    ],
)
def test_one_write_fails(tmp_path, monkeypatch, caplog, whole, policy, name, write, async_save):
    undisturbed, run = whole
    run = {**run, "output_dir": str(tmp_path / "run"), "save_failure": policy, "async_save": async_save}
    goes_on = policy == "continue" and "checkpoint" in name
    with monkeypatch.context() as patch:
        fill_disk(patch, name, write)
        if goes_on:
            with caplog.at_level(logging.WARNING, logger="fastkd"):
                fastkd.distill(run)
            assert "Training goes on" in caplog.text and "No space left" in caplog.text
        else:
            with pytest.raises(Exception, match="No space left"):
                fastkd.distill(run)
    nothing_is_half_written(tmp_path / "run")
    if not goes_on:
        assert list_checkpoints(tmp_path / "run" / STAGE)[-1].name in ("checkpoint-2", "checkpoint-4")
        fastkd.distill(run)
    assert differences(undisturbed, tmp_path / "run", [STAGE]) == []


def test_a_disk_that_stays_full_ends_the_run_when_its_last_save_fails(tmp_path, monkeypatch, whole):
    undisturbed, run = whole
    run = {**run, "output_dir": str(tmp_path / "run"), "save_failure": "continue"}
    with monkeypatch.context() as patch:
        fill_disk(patch, "checkpoint-4.tmp", 0, for_good=True)
        with pytest.raises(Exception, match="No space left"):
            fastkd.distill(run)
    nothing_is_half_written(tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / STAGE)] == ["checkpoint-2"]
    fastkd.distill(run)
    assert differences(undisturbed, tmp_path / "run", [STAGE]) == []


def limit_files() -> None:
    """From here on the operating system refuses to let a file of this process grow beyond 64 KiB, in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


def test_the_operating_system_refuses_a_write(tmp_path, whole):
    undisturbed, run = whole
    run = {**run, "output_dir": str(tmp_path / "run")}
    process = train_apart(run, tmp_path, limit_files)
    process.join()
    *_, message = (tmp_path / "errors.txt").read_text().splitlines()
    assert process.exitcode == 2 and message.startswith("fastkd train: ")
    assert "File too large" in message and str(tmp_path / "run" / STAGE / "checkpoint-2") in message
    nothing_is_half_written(tmp_path / "run")
    fastkd.distill(run)
    assert differences(undisturbed, tmp_path / "run", [STAGE]) == []
