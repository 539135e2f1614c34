"""The check of a row kernel: a right one passes for every kind of call, and no fault does. A kernel is any callable here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastkd.ops import row_check
from fastkd.ops.backend_torch import run
from fastkd.ops.row_call import RowCall, TopK
from fastkd.ops.row_check import CallKind, check
from tests.row_kinds import ALIGNED, CPU, DENSE, FULL, KINDS, SPARSE, make_call


@pytest.fixture(autouse=True)
def backend() -> None:
    """Override the common fixture: which kernel runs is said here."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller of the vocabularies alone."""
    monkeypatch.setattr(row_check, "_SIZES", {aligned: sizes[:1] for aligned, sizes in row_check._SIZES.items()})


@pytest.mark.parametrize("name", KINDS)
def test_a_right_kernel_passes(name: str) -> None:
    assert check(run, KINDS[name], CPU) is None


@pytest.mark.parametrize("name", KINDS)
def test_the_call_that_is_checked_is_of_the_kind_that_is_asked(name: str, small: None) -> None:
    calls = []
    check(calls.append, KINDS[name], CPU)
    assert [CallKind.of(call) for call in calls] == [KINDS[name]]


def test_what_is_checked_has_infinities_and_offsets(small: None) -> None:
    calls: list[RowCall] = []
    check(calls.append, DENSE, CPU)
    student = calls[0].student
    assert calls[0].options.temperature == 2.0
    assert student[:3].isinf().any(-1).all() and float(student[1].median()) > 88 and float(student[2].median()) < -88


def after(change: Callable[[RowCall], object]) -> Callable[[RowCall], None]:
    """A kernel that makes something wrong of what is right."""

    def wrong(call: RowCall) -> None:
        run(call)
        change(call)

    return wrong


def times(tensor: str, factor: float, columns: slice = slice(None)) -> Callable[[RowCall], None]:
    def change(call: RowCall) -> None:
        found = call.gradient if tensor == "gradient" else getattr(call.outputs, tensor)
        found[..., columns].mul_(factor)

    return after(change)


def around(call: RowCall) -> torch.Tensor:
    """All of the memory that the gradient lies in."""
    assert call.gradient is not None
    return call.gradient.as_strided((call.gradient.untyped_storage().nbytes() // call.gradient.element_size(),), (1,), 0)


def write_at(place: Callable[[torch.Tensor], int]) -> Callable[[RowCall], None]:
    """Write one number where `place` says, counted in elements of the gradient's memory."""
    return after(lambda call: around(call)[place(call.gradient)].fill_(0.5))


def nothing(_: RowCall) -> None:
    pass


def raises(_: RowCall) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


FAULTS: dict[str, tuple[Callable[[RowCall], Any], str]] = {
    "raises": (raises, r"^it raised RuntimeError: CUDA error: an illegal memory access was encountered \(V = 4113\)\.$"),
    "does nothing": (nothing, r"its divergence is off by nan"),
    "zeros": (times("gradient", 0.0), r"its gradient is off by 1\.0e\+00 .* row 0, and 0\.005 is allowed"),
    "x 1.01": (times("gradient", 1.01), r"its gradient is off by (1\.\de-02|[89]\.\de-03)"),
    "sign-flipped": (times("gradient", -1.0), r"its gradient is off by 2\.0e\+00"),
    "row-shuffled": (after(lambda call: call.gradient.copy_(call.gradient.roll(1, 0))), r"its gradient is off by"),
    "NaN": (times("gradient", float("nan"), slice(77, 78)), r"its gradient is off by nan"),
    "value x 1.01": (times("divergence", 1.01), r"its divergence is off by 1\.0e-02 .*, and 0\.0001 is allowed"),
    "last column": (times("gradient", 0.0, slice(-1, None)), r"its gradient is off by .* in the last 32 columns of row 0"),
    "tail": (times("gradient", 0.0, slice(4096, None)), r"its gradient is off by .* in the last 32 columns|its gradient .* row 0"),
    "past a row": (write_at(lambda g: g.storage_offset() + g.shape[1]), r"it wrote outside of the gradient's memory"),
    "before the rows": (write_at(lambda g: g.storage_offset() - 1), r"it wrote outside of the gradient's memory"),
    "behind the rows": (write_at(lambda g: g.storage_offset() + 4 * g.stride(0)), r"it wrote outside of the gradient's memory"),
    "behind an output": (
        after(lambda call: call.outputs.divergence.as_strided((5,), (1,))[4].fill_(0.0)),
        r"it wrote outside of the divergence's memory",
    ),
    "changes logits": (after(lambda call: call.teacher[2, 1].add_(1.0)), r"it changed the logits of the teacher"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_fails(name: str, small: None) -> None:
    wrong, sentence = FAULTS[name]
    problem = check(wrong, DENSE, CPU)
    assert problem is not None and re.search(sentence, problem), problem


@pytest.mark.parametrize("name", ["divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement"])
def test_every_output_is_compared(name: str, small: None) -> None:
    problem = check(times(name, 1.001), FULL, CPU)
    assert problem is not None and f"its {name} is off by" in problem


def test_what_is_wrong_in_a_vocabulary_that_16_does_not_divide_is_found_there_alone(small: None) -> None:
    wrong = after(lambda call: call.gradient.mul_(1.0 + 0.01 * (call.student.shape[1] % 16 > 0)))
    assert check(wrong, DENSE, CPU) is not None
    assert check(wrong, ALIGNED, CPU) is None


def test_what_is_wrong_in_a_large_vocabulary_alone_is_found() -> None:
    wrong = after(lambda call: call.gradient.mul_(1.0 + 0.01 * (call.student.shape[1] > 1 << 16)))
    problem = check(wrong, DENSE, CPU)
    assert problem is not None and "(V = 128257)" in problem


def test_a_gradient_that_cancels_where_the_student_is_nearly_certain_is_found(small: None) -> None:
    def plain(call: RowCall) -> None:
        """Forward KL with q - p in float32 at every column."""
        run(call)
        log_q, log_p = (x.float().div(2).log_softmax(-1) for x in (call.student, call.teacher))
        call.gradient.copy_((log_q.exp() - log_p.exp()) * 2 * call.row_weight[:, None])

    problem = check(plain, replace(ALIGNED, gradient="float32"), CPU)
    assert problem is not None and "in row 3" in problem


def test_other_settings_of_torch_change_nothing(small: None) -> None:
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert check(run, DENSE, CPU) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_list_counts_by_the_power_of_two_above_its_length(small: None) -> None:
    call = make_call(SPARSE)
    assert isinstance(call.teacher, TopK)
    for entries, rounded in ((8, 8), (5, 8), (4, 4), (1, 1)):
        shorter = replace(call, teacher=TopK(call.teacher.ids[:, :entries], call.teacher.log_probabilities[:, :entries]))
        assert CallKind.of(shorter).entries == rounded


@pytest.mark.parametrize("name", ["tvd", "soft-caps"])
def test_no_rounding_decides_which_of_two_probabilities_is_the_larger(name: str) -> None:
    """It decides the sign of tvd's gradient."""
    distances = []

    def measure(call: RowCall) -> None:
        run(call)
        sides = (call.student, call.student_bias, call.options.student), (call.teacher, call.teacher_bias, call.options.teacher)
        log_q, log_p = ((transform.apply(logits.double() + bias.double()) / 2).log_softmax(-1) for logits, bias, transform in sides)
        distances.append(float((log_p - log_q).abs().nan_to_num(1.0).min()))

    check(measure, KINDS[name], CPU)
    assert len(distances) == 2 and min(distances) > 5e-4
