"""teacher_precision="fp8": the teacher's logits within float8's error, everything else as exact as ever for those logits."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd.ops.fp8_logits import Fp8Logits
from tests.oracle import assert_close, relative_error


def make_teacher(tokens: int = 24, vocabulary: int = 101, width: int = 40):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, width, generator=generator) * torch.logspace(-2, 2, tokens)[:, None]
    weight = torch.randn(vocabulary, width, generator=generator) * torch.logspace(-1, 1, vocabulary)[:, None]
    return hidden, weight, torch.randn(vocabulary, generator=generator)


@pytest.mark.parametrize(("vocabulary", "width"), [(101, 40), (16, 16), (33, 31), (1, 5)])
def test_logits_are_within_the_error_of_the_format(vocabulary, width):
    """Rows and columns of very different size: a scale for each, so that each is as good as the others."""
    hidden, weight, bias = make_teacher(vocabulary=vocabulary, width=width)
    valid = torch.arange(1, 24, 2)
    source = Fp8Logits(hidden, [weight, bias], valid, 5, torch.float32)
    logits = torch.cat([source.logits(slice(at, min(at + 5, 12))).clone() for at in range(0, 12, 5)])
    truth = hidden[valid].double() @ weight.double().T
    size = hidden[valid].double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    error = (logits - bias - truth).abs() / size
    assert 1e-4 < error.max() < 0.04


def test_rows_of_zeros():
    hidden, weight, _ = make_teacher()
    hidden[3] = 0
    weight[5] = 0
    logits = Fp8Logits(hidden, [weight], None, 24, torch.float32).logits(slice(0, 24))
    assert logits.isfinite().all() and (logits[3] == 0).all() and (logits[:, 5] == 0).all()


def test_the_loss_is_that_of_the_rounded_teacher():
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(24, 40, generator=generator), torch.randn(101, 40, generator=generator) * 0.3
    student = torch.randn(24, 16, generator=generator).requires_grad_()
    head = (torch.randn(101, 16, generator=generator) * 0.3).requires_grad_()
    loss = fastkd.linear_kl_div(student, head, hidden, weight, teacher_precision="fp8", chunk_size=7)
    rounded = Fp8Logits(hidden, [weight], None, 24, torch.float32).logits(slice(0, 24)).double()
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    truth = fastkd.reference.kl_div(torch.nn.functional.linear(*exact), rounded)
    assert_close(loss, truth, 2e-5)
    for gradient, true_gradient in zip(torch.autograd.grad(loss, [student, head]), torch.autograd.grad(truth, exact), strict=True):
        assert_close(gradient, true_gradient, 2e-5)
    full = fastkd.linear_kl_div(student, head, hidden, weight)
    assert 1e-6 < relative_error(loss, full) < 0.05
