"""linear_cross_entropy against torch's own cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.ops.test_linear_kl import LABELS, NAMES, make_inputs
from tests.oracle import assert_close

FIELDS = dict(zip(NAMES, ("hidden", "weight", "bias"), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5}, {"chunk_size": 4}], ids=str)
def test_equals_the_oracle(options, reduction, dtype, tolerance):
    inputs = {new: make_inputs(dtype=dtype)[old].detach().requires_grad_() for old, new in FIELDS.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    value = fastkd.linear_cross_entropy(**inputs, labels=LABELS, reduction=reduction, **options)
    reference_options = {k: v for k, v in options.items() if k != "chunk_size"}
    truth = fastkd.reference.linear_cross_entropy(**exact, labels=LABELS, reduction=reduction, **reference_options)
    assert_close(value, truth, tolerance)
    gradients = torch.autograd.grad(value.square().sum(), list(inputs.values()))
    for gradient, exact_gradient in zip(gradients, torch.autograd.grad(truth.square().sum(), list(exact.values())), strict=True):
        assert_close(gradient, exact_gradient, tolerance * 4)


def test_denominator():
    inputs = {new: make_inputs()[old].detach() for old, new in FIELDS.items()}
    total = fastkd.linear_cross_entropy(**inputs, labels=LABELS, reduction="sum")
    assert_close(fastkd.linear_cross_entropy(**inputs, labels=LABELS, denominator=9.0), total / 9.0, 1e-14)


def test_no_labels_give_zero_with_the_graph():
    inputs = {new: make_inputs()[old].detach().requires_grad_() for old, new in FIELDS.items()}
    loss = fastkd.linear_cross_entropy(**inputs, labels=torch.full_like(LABELS, -100))
    loss.backward()
    assert loss.item() == 0.0 and all((x.grad == 0).all() for x in inputs.values())
