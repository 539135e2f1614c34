"""What is measured against: exact gradients, pairs at the divergence asked for, floors with all products; peaks of the step alone."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import fastkd
from fastkd.benchmarks import linear_kl, projected_mse, relation_kl
from fastkd.benchmarks.checks import compare
from fastkd.benchmarks.eager import worst_errors
from fastkd.benchmarks.memory import peak_bytes
from fastkd.benchmarks.problem import Shape, close_pair, exact, exact_loss, make_inputs, relative_error
from fastkd.ops.plan import plan_chunks
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


def test_an_error_under_a_name_is_the_worst_of_its_gradients():
    truth = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]

    def errors(*made):
        return worst_errors(["value", "x", "x"], None, truth, lambda inputs: made)

    assert errors(*truth) == {"value": 0.0, "x": 0.0}
    assert errors(truth[0], truth[1], truth[2] * 1.01) == {"value": 0.0, "x": pytest.approx(0.01)}
    assert math.isnan(errors(truth[0], truth[1] * math.nan, truth[2])["x"])


@pytest.mark.parametrize("tile_bytes", [1 << 20, 600, 200], ids=["all pairs", "one pair", "some rows"])
def test_the_relations_floor_makes_every_product(tile_bytes, monkeypatch):
    monkeypatch.setattr(relation_kl, "TILE_BYTES", tile_bytes)
    inputs = relation_kl.make_inputs(relation_kl.Shape(2, 3, 8, 4), (1.0, 0.5), CPU)
    _, grad_q, grad_k = relation_kl.gemms_alone(inputs)
    q, k = (x.detach().double().flatten(0, 1) for x in (inputs.q, inputs.k))
    scores = q @ k.mT
    assert_close(grad_q, scores @ k, 1e-6)
    assert_close(grad_k, scores.mT @ q, 1e-6)


def test_the_filters_floor_makes_every_product(monkeypatch):
    monkeypatch.setattr(projected_mse, "plan_chunks", partial(plan_chunks, chunk_size=3))
    layers = projected_mse.make_inputs(projected_mse.Shape(2, 8, 5, 6, 7), torch.float32, CPU)
    _, *made = projected_mse.gemms_alone(layers)
    for layer, (grad_states, grad_weight) in zip(layers, zip(made[::2], made[1::2], strict=True), strict=True):
        residual = layer.teacher_states.double() @ layer.teacher_weight.double().T
        assert_close(grad_states, residual @ layer.student_weight.double(), 1e-6)
        assert_close(grad_weight, residual.T @ layer.student_states.double(), 1e-6)


def test_peaks_are_those_of_the_step_alone():
    """All logits at once take about five arrays of tokens x vocabulary; what this process holds counts for nothing."""
    shape = Shape(4096, 4096, 16, 16)
    array = shape.tokens * shape.vocabulary * 4
    held = torch.ones(4 * shape.tokens * shape.vocabulary)
    assert 3 * array < peak_bytes(CPU, linear_kl.build, "eager", shape, torch.float32, CPU) < 7 * array
    assert held[0] == 1
