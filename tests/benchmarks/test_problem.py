"""What errors are measured against: exact gradients by formula, pairs at the divergence asked for; peaks in a process of their own."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd.benchmarks import linear_kl
from fastkd.benchmarks.checks import compare
from fastkd.benchmarks.memory import peak_bytes
from fastkd.benchmarks.problem import Shape, close_pair, exact, exact_loss, make_inputs, relative_error
from tests.oracle import assert_close, wrong_gradients

CPU = torch.device("cpu")


def test_the_exact_gradients_are_those_of_the_reference():
    inputs = make_inputs(Shape(5, 37, 8, 12), torch.float64, CPU)
    loss = fastkd.reference.linear_kl_div(*inputs)
    student, head = torch.autograd.grad(loss, (inputs.student, inputs.head))
    truth = exact(inputs)
    assert truth.loss is not None
    assert_close(truth.loss, loss, 1e-12)
    assert_close(truth.student_gradient, student, 1e-12)
    assert_close(truth.head_gradient, head, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [1e-4, 3e-2, 10.0])
def test_a_pair_has_the_divergence_asked_for(target, dtype):
    pair = close_pair(target, Shape(16, 400, 32, 32), dtype, CPU)
    assert float(exact_loss(pair).mean()) == pytest.approx(target, rel=0.05)
    assert pair.student.is_leaf and pair.head.is_leaf and pair.student.requires_grad and pair.head.requires_grad
    assert pair.student.dtype == pair.teacher_head.dtype == dtype and not pair.teacher_head.requires_grad


def test_wrong_gradients_are_seen():
    truth = exact(close_pair(1e-2, Shape(8, 50, 16, 16), torch.float32, CPU)).student_gradient
    assert relative_error(truth.float(), truth) < 1e-6
    assert compare([truth], [truth], 1e-6).startswith("relative error")
    for wrong in wrong_gradients(truth).values():
        assert relative_error(wrong, truth) > 9e-3
        with pytest.raises(AssertionError, match="at most"):
            compare([wrong], [truth], 5e-3)
    with pytest.raises(AssertionError, match="nan"):
        compare([truth * float("nan")], [truth], 5e-3)


def test_peaks_are_those_of_the_step_alone():
    """All logits at once take about five arrays of tokens x vocabulary; what this process holds counts for nothing."""
    shape = Shape(4096, 4096, 16, 16)
    array = shape.tokens * shape.vocabulary * 4
    held = torch.ones(4 * shape.tokens * shape.vocabulary)
    assert 3 * array < peak_bytes(CPU, linear_kl.build, "eager", shape, torch.float32, CPU) < 7 * array
    assert held[0] == 1
