"""Fault 19: resuming with another learning rate, batch, method or vocabulary.

What would change the result is refused, with the keys that differ; what only changes what is shown or kept is allowed.
"""

from __future__ import annotations

import shutil

import pytest

import fastkd
from fastkd.train.checkpoint import list_checkpoints, verify_checkpoint
from tests.faults.disturbed import config, crashes
from tests.runs import same_bits, weights

REFUSED = {
    "learning rate": ({"learning_rate": 0.001}, r"learning_rate \(0.003 there, 0.001 here\)"),
    "batch": ({"per_device_train_batch_size": 8}, r"per_device_train_batch_size \(4 there, 8 here\)"),
    "accumulation": ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps \(2 there, 4 here\)"),
    "method": ({"method": "kd", "stages": {}, "task": None}, r"method \('glmd' there, 'kd' here\)"),
    "vocabulary": ({"vocabulary": {"keep": 0.25}}, r"vocabulary.keep \(0.5 there, 0.25 here\)"),
}
ALLOWED = {"logging_steps": 2, "save_steps": 3, "save_total_limit": 1}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at step 5 of its first stage."""
    folder = tmp_path_factory.mktemp("stopped")
    run = config("glmd", folder, max_steps=6, stages={"pretrain": {}})
    crashes(run, "pretrain", "begin_step", 5)
    return folder / "run", run


@pytest.fixture
def copied(stopped, tmp_path):
    output_dir, run = stopped
    shutil.copytree(output_dir, tmp_path / "run")
    return {**run, "output_dir": str(tmp_path / "run")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_result_is_refused(tmp_path, copied, case):
    changes, difference = REFUSED[case]
    with pytest.raises(ValueError, match=f"belongs to a run with other settings: .*{difference}"):
        fastkd.distill({**copied, **changes})
    checkpoints = list_checkpoints(tmp_path / "run" / "pretrain")
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-2"]
    for checkpoint in checkpoints:
        verify_checkpoint(checkpoint)


def test_what_does_not_is_allowed(tmp_path, copied):
    whole = fastkd.distill({**copied, "output_dir": str(tmp_path / "whole")})["pretrain"]
    resumed = fastkd.distill({**copied, **ALLOWED})["pretrain"]
    assert same_bits(weights(whole), weights(resumed)) and whole["scores"] == resumed["scores"]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "pretrain")] == ["checkpoint-6"]
