"""Fault 20: resuming with another torch, or on another device.

A warning that the end will not be the same bit for bit, and the checkpoint is loaded all the same.
"""

from __future__ import annotations

import logging

import torch

import fastkd
from tests.faults.disturbed import config, crashes


def test_a_warning_and_on_it_goes(tmp_path, monkeypatch, caplog):
    run = config("ted", tmp_path, stages={"student": {}}, max_steps=6)
    crashes(run, "student", "begin_step", 3)
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        crashes(run, "student", "begin_step", 2)  # from step 2, and beyond the save at step 4
        assert "bit for bit" not in caplog.text
        here = torch.__version__
        monkeypatch.setattr(torch, "__version__", "2.0.0")
        assert fastkd.distill(run)["student"]["steps"] == 6
    (warning,) = [record.getMessage() for record in caplog.records if "bit for bit" in record.getMessage()]
    assert "checkpoint-4" in warning and f"torch {here} there, 2.0.0 here" in warning
