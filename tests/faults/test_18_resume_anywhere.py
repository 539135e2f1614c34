"""Fault 18: a crash in mid-accumulation, in mid-epoch, at the edge of an epoch or a stage, at MixUp, at the update of averaged weights,
and while the weights of a loss are ramped up.

The resumed run ends bit for bit as an undisturbed one.
"""

from __future__ import annotations

import pytest

import fastkd
from tests.faults.disturbed import config, crashes, differences

# CR-ILD: MixUp, averaged weights, and a consistency loss whose weight grows with every step. An epoch has 6 micro-batches, a step 2,
# and every second step is saved.
CRASHES = {
    "mid-accumulation": ("teacher", "forward", 9),
    "mid-epoch": ("teacher", "forward", 10),
    "epoch edge, not saved": ("ild", "forward", 6),
    "epoch edge, saved": ("ild", "forward", 12),
    "stage edge": ("kd", "begin_step", 0),
    "mixup": ("ild", "prepare", 7),
    "averaged weights": ("ild", "end_step", 4),
    "ramp": ("ild", "begin_step", 5),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = config("crild", folder)
    fastkd.distill({**run, "output_dir": str(folder / "whole")})
    return folder / "whole", run


@pytest.mark.parametrize("crash", CRASHES)
def test_ends_bit_for_bit(tmp_path, whole, crash):
    undisturbed, run = whole
    run = {**run, "output_dir": str(tmp_path / "run")}
    crashes(run, *CRASHES[crash])
    fastkd.distill(run)
    assert differences(undisturbed, tmp_path / "run", ["teacher", "ild", "kd"]) == []
