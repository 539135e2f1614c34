"""What projected_mse refuses, and the sentences it does it with."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import fastkd
from tests.ops.test_projected_mse import STUDENT_WIDTH, TEACHER, TEACHER_WIDTH, TOKENS, WIDTH, make_inputs


@pytest.fixture(autouse=True)
def backend():
    """No row kernel is involved: once is enough."""


def zeros(*shape: int, **kind) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **kind})


BAD = {
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction='batchmean'"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    "budget": ({"memory_budget": -5}, ValueError, "memory_budget=-5"),
    "mask shape": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape (3,)"),
    "mask dtype": ({"mask": torch.ones(TOKENS, dtype=torch.int64)}, TypeError, "torch.bool"),
    "mask device": ({"mask": torch.ones(TOKENS, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
    "negative mask": ({"mask": -torch.ones(TOKENS)}, ValueError, "negative"),
    "infinite mask": ({"mask": torch.full((TOKENS,), torch.inf)}, ValueError, "non-finite"),
    "not a tensor": ({"student_states": [[1.0]]}, TypeError, "student_states is a list"),
    "weight not a tensor": ({"teacher_weight": 1.0}, TypeError, "teacher_weight is a float"),
    "one dim": ({"student_states": zeros(STUDENT_WIDTH)}, ValueError, "leading dim"),
    "integer states": ({"teacher_states": torch.zeros(TOKENS, TEACHER_WIDTH, dtype=torch.int64)}, TypeError, "floating"),
    "leading dims": ({"teacher_states": zeros(4, TEACHER_WIDTH)}, ValueError, "the same tokens"),
    "student weight": ({"student_weight": zeros(WIDTH, 3)}, ValueError, "student_weight has shape (10, 3)"),
    "weight dims": ({"teacher_weight": zeros(TEACHER_WIDTH)}, ValueError, "(d_f, 12)"),
    "filtered widths": ({"student_weight": zeros(11, STUDENT_WIDTH), "student_bias": None}, ValueError, "11 wide and the teacher's 10"),
    "identity width": ({"student_weight": None, "student_bias": None}, ValueError, "8 wide and the teacher's 10"),
    "no width": ({"student_weight": zeros(0, STUDENT_WIDTH), "student_bias": None}, ValueError, "0 wide"),
    "bias": ({"teacher_bias": zeros(2)}, ValueError, "teacher_bias has shape (2,)"),
    "integer bias": ({"student_bias": torch.zeros(WIDTH, dtype=torch.int64)}, TypeError, "floating"),
    "dtypes": ({"student_weight": torch.zeros(WIDTH, STUDENT_WIDTH)}, TypeError, "autocast"),
    "device": ({"student_bias": zeros(WIDTH, device="meta")}, ValueError, "student_bias is on meta"),
    "teacher device": (
        {
            "teacher_states": zeros(TOKENS, TEACHER_WIDTH, device="meta"),
            "teacher_weight": zeros(WIDTH, TEACHER_WIDTH, device="meta"),
            "teacher_bias": None,
        },
        ValueError,
        "teacher_states is on meta and student_states on cpu",
    ),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD.values(), ids=BAD.keys())
def test_wrong_arguments_are_refused_with_a_sentence(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fastkd.projected_mse(**{**make_inputs(), **options})


@pytest.mark.parametrize("name", TEACHER)
def test_a_teacher_that_requires_a_gradient_is_refused(name):
    inputs = make_inputs()
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        fastkd.projected_mse(**inputs)
    with torch.no_grad():
        fastkd.projected_mse(**inputs)


def test_dtensors_are_refused():
    class Sharded(torch.Tensor):
        device_mesh = placements = "somewhere"

    inputs = make_inputs()
    inputs["student_weight"] = inputs["student_weight"].detach().as_subclass(Sharded)
    with pytest.raises(TypeError, match="DTensor"):
        fastkd.projected_mse(**inputs)
