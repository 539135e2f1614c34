"""linear_kl_div on 16-bit models: what is kept in float32, and what is rounded."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.ops.test_linear_kl import make_inputs, value_and_gradients
from tests.oracle import assert_close


def test_float16_keeps_the_gradients_of_many_tokens_apart_from_their_mean():
    """The gradient of a logit, divided by the number of tokens, would be below what float16 holds."""
    generator = torch.Generator().manual_seed(3)
    hidden, near = (torch.randn(2048, 8, generator=generator).half() for _ in range(2))
    weight = (torch.randn(12000, 8, generator=generator) * 0.3).half()
    student, head = near.requires_grad_(), weight.clone().requires_grad_()
    gradients = torch.autograd.grad(fastkd.linear_kl_div(student, head, hidden, weight, reduction="none").mean(), [student, head])
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    truth = torch.autograd.grad(fastkd.reference.linear_kl_div(*exact, hidden.double(), weight.double()), exact)
    # The student's own gradient comes back in float16, where it is as small as its dtype has it.
    assert_close(gradients[1], truth[1], 5e-3)
    assert_close(gradients[0], truth[0].half(), 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [37, 9001])
def test_16_bit_inputs_keep_float32_logits(dtype, vocabulary):
    """At a KL of about 4e-4 nats rounding the logits to 16 bits would put the gradient off by more than 100 %."""
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(vocabulary, 64, generator=generator) * 0.3).to(dtype)
    hidden = torch.randn(16, 64, generator=generator).to(dtype)
    near = (hidden + 0.008 * torch.randn(16, 64, generator=generator)).to(dtype)
    student, head = near.requires_grad_(), weight.clone().requires_grad_()
    loss = fastkd.linear_kl_div(student, head, hidden, weight)
    exact_student, exact_head = student.detach().double().requires_grad_(), weight.double().requires_grad_()
    truth = fastkd.reference.linear_kl_div(exact_student, exact_head, hidden.double(), weight.double())
    assert loss.dtype == torch.float32
    assert_close(loss, truth, 1e-2)
    gradients = torch.autograd.grad(loss, [student, head])
    for gradient, exact in zip(gradients, torch.autograd.grad(truth, [exact_student, exact_head]), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, exact, 5e-3)


def test_autocast_gives_operands_its_dtype_and_gradients_their_own():
    inputs = make_inputs(dtype=torch.float32)
    rounded = {k: v.detach().bfloat16().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    for name in ("student_bias", "teacher_bias"):
        rounded[name] = inputs[name].detach().double().requires_grad_(inputs[name].requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = value_and_gradients(fastkd.linear_kl_div, inputs)
    truth, true_gradients = value_and_gradients(fastkd.reference.linear_kl_div, rounded)
    assert_close(value, truth, 1e-5)
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == torch.float32
        # The logits' gradient, and nothing else, may be rounded to the operands' 16 bits.
        assert_close(gradient, true_gradient, 5e-3)
