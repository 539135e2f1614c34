"""grad_filter: exact where nothing is dropped, its stated approximation where something is, and an honest report of how much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from tests.ops.test_linear_kl import LABELS, MASK, NAMES, STUDENT_VOCAB, make_inputs, value_and_gradients
from tests.oracle import assert_close, relative_error

CHUNK = 6


@pytest.mark.parametrize(
    "options", [{}, {"mask": MASK, "labels": LABELS, "label_weight": 0.5, "temperature": 2.0}], ids=["plain", "all"]
)
def test_a_threshold_that_drops_nothing_is_exact(options):
    value, gradients = value_and_gradients(fastkd.linear_kl_div, make_inputs(), **options, grad_filter=1e-30, chunk_size=CHUNK)
    truth, true_gradients = value_and_gradients(fastkd.reference.linear_kl_div, make_inputs(), **options)
    assert_close(value, truth, 1e-12)
    for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
        assert_close(gradient, true_gradient, 1e-11, name)


def filtered_logit_gradient(inputs: dict[str, Tensor], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the option stands for, in plain torch: (gradient of the sum over tokens, columns kept, mass dropped) a token."""
    logits = torch.nn.functional.linear(inputs["student_hidden"], inputs["student_weight"], inputs["student_bias"]).detach()
    teacher = torch.nn.functional.linear(inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"])[:, :STUDENT_VOCAB]
    gradient = logits.softmax(-1) - teacher.softmax(-1)
    columns_kept, dropped_mass = [], []
    for chunk in gradient.split(CHUNK):
        dropped = (chunk.abs() <= threshold).all(0)
        columns_kept += [1 - dropped.double().mean()] * len(chunk)
        dropped_mass += list((chunk.abs() * dropped).sum(1) / chunk.abs().sum(1))
        chunk[:, dropped] = chunk[:, dropped].mean(1, keepdim=True)
    return gradient, torch.stack(columns_kept), torch.stack(dropped_mass)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("threshold", [3e-2, 0.2, 0.9])
def test_dropped_columns_become_their_mean(threshold, dtype, tolerance):
    inputs = make_inputs(dtype=dtype)
    inputs["student_weight"].data *= 3.0  # peaked distributions, so that columns differ
    exact = {k: x.detach().double() for k, x in inputs.items()}
    gradient, columns_kept, dropped_mass = filtered_logit_gradient(exact, threshold)
    assert threshold == 0.9 or 0 < columns_kept.mean() < 1
    options = {"grad_filter": threshold, "chunk_size": CHUNK, "reduction": "sum", "return_stats": True}
    loss, stats = fastkd.linear_kl_div(**inputs, **options)
    assert_close(loss, fastkd.reference.linear_kl_div(**exact, reduction="sum"), tolerance)
    hidden, weight, bias = torch.autograd.grad(loss, [inputs[n] for n in NAMES])
    assert_close(hidden, gradient @ exact["student_weight"], tolerance)
    assert_close(weight, gradient.T @ exact["student_hidden"], tolerance)
    assert_close(bias, gradient.sum(0), 10 * tolerance)
    assert_close(stats.columns_kept, columns_kept, 1e-6)
    assert_close(stats.dropped_mass, dropped_mass, 1e-4)


def test_nothing_kept_still_sums_to_zero():
    inputs = make_inputs()
    loss, stats = fastkd.linear_kl_div(**inputs, grad_filter=10.0, return_stats=True)
    _, weight, bias = torch.autograd.grad(loss, [inputs[n] for n in NAMES])
    assert (stats.columns_kept == 0).all()
    assert_close(stats.dropped_mass, torch.ones_like(stats.dropped_mass), 1e-12)
    assert weight.sum(0).abs().max() < 1e-12
    assert bias.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_heads(dtype):
    generator = torch.Generator().manual_seed(2)
    head = (torch.randn(5000, 64, generator=generator) * 0.3).to(dtype).requires_grad_()
    teacher = torch.randn(16, 64, generator=generator).to(dtype)
    student = (teacher + 0.3 * torch.randn(16, 64, generator=generator)).to(dtype).requires_grad_()
    loss, stats = fastkd.linear_kl_div(student, head, teacher, head.detach(), grad_filter=2.0**-12, return_stats=True)
    assert 0 < stats.columns_kept.mean() < 0.9
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    truth = fastkd.reference.linear_kl_div(*exact, teacher.double(), head.detach().double())
    for gradient, true_gradient in zip(torch.autograd.grad(loss, [student, head]), torch.autograd.grad(truth, exact), strict=True):
        assert relative_error(gradient, true_gradient) < 0.05


def test_nan_is_never_filtered_away():
    inputs = make_inputs()
    inputs["student_bias"].data[7] = torch.nan
    loss = fastkd.linear_kl_div(**inputs, grad_filter=0.1)
    assert loss.isnan()
    assert torch.autograd.grad(loss, inputs["student_weight"])[0].isnan().any()


@pytest.mark.parametrize("trained", NAMES)
def test_only_what_needs_a_gradient_gets_one(trained):
    inputs = {k: v.detach() for k, v in make_inputs().items()}
    _, truth = value_and_gradients(fastkd.reference.linear_kl_div, make_inputs())
    inputs[trained].requires_grad_()
    gradient = torch.autograd.grad(fastkd.linear_kl_div(**inputs, grad_filter=1e-30), inputs[trained])[0]
    assert_close(gradient, truth[NAMES.index(trained)], 1e-11)
