"""kl_div on logits that exist: against the float64 oracle, and against linear_kl_div."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd import Divergence
from fastkd.ops.checks import LARGEST_TEMPERATURE
from tests.ops.test_linear_kl import DIVERGENCES, INDEX, LABELS, MASK, STUDENT_VOCAB, TEACHER_VOCAB, TOKENS
from tests.oracle import assert_close


def make_logits(dtype=torch.float64, scale: float = 2.0):
    generator = torch.Generator().manual_seed(11)
    student = torch.randn(TOKENS, STUDENT_VOCAB, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
    teacher = torch.randn(TOKENS, TEACHER_VOCAB, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    return student, teacher


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_oracle(divergence, reduction, dtype, tolerance):
    student, teacher = make_logits(dtype)
    options = {
        "divergence": divergence,
        "temperature": 2.0,
        "mask": MASK,
        "vocab_index": INDEX,
        "labels": LABELS,
        "label_weight": 0.5,
        "student_softcap": 6.0,
        "reduction": reduction,
    }
    value = fastkd.kl_div(student, teacher, **options, chunk_size=5)
    exact = student.detach().double().requires_grad_()
    truth = fastkd.reference.kl_div(exact, teacher.double(), **options)
    assert_close(value, truth, min(tolerance, 2e-5))
    assert_close(torch.autograd.grad(value.sum(), student)[0], torch.autograd.grad(truth.sum(), exact)[0], tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_impossible_tokens_add_nothing(divergence):
    """-inf in both models' logits (a masked vocabulary) is the same as leaving those columns out."""
    student, teacher = make_logits()
    teacher = teacher[:, :STUDENT_VOCAB].clone()
    student = student.detach()
    banned = torch.arange(STUDENT_VOCAB) % 3 == 0
    holes, kept = [x.masked_fill(banned, -math.inf) for x in (student, teacher)], [x[:, ~banned].clone() for x in (student, teacher)]
    holes[0].requires_grad_()
    kept[0].requires_grad_()
    value, truth = (fastkd.kl_div(*x, divergence=divergence, temperature=2.0) for x in (holes, kept))
    assert_close(value, truth, 1e-12)
    gradient = torch.autograd.grad(value, holes[0])[0]
    assert (gradient[:, banned] == 0).all()
    assert_close(gradient[:, ~banned], torch.autograd.grad(truth, kept[0])[0], 1e-12)


@pytest.mark.parametrize("divergence", [each for each in DIVERGENCES if each != "nla"], ids=str)
def test_far_apart_models_stay_finite(divergence):
    """Both probabilities underflow somewhere: log p and log q near -400 in float32."""
    student, teacher = make_logits(torch.float32, scale=100.0)
    value = fastkd.kl_div(student, teacher, divergence=divergence)
    exact = student.detach().double().requires_grad_()
    truth = fastkd.reference.kl_div(exact, teacher.double(), divergence=divergence)
    assert value.isfinite()
    assert torch.autograd.grad(value, student)[0].isfinite().all()
    assert_close(value, truth, 2e-5)


def test_negative_log_acceptance_is_exact_down_to_where_nothing_is_accepted():
    """Of 1e-30 in float32, where one less tvd is zero; infinite where the models share no token at all."""
    apart = torch.tensor([[0.0, -69.0], [0.0, -1.0], [0.0, -1e4]]), torch.tensor([[-69.0, 0.0], [0.0, -1.001], [-1e4, 0.0]])
    student, teacher = apart[0].requires_grad_(), apart[1]
    values = fastkd.kl_div(student, teacher, divergence="nla", reduction="none")
    exact = student.detach().double().requires_grad_()
    truth = -torch.minimum(exact.softmax(-1), teacher.double().softmax(-1)).sum(-1).log()
    assert_close(values[:1], truth[:1].detach(), 2e-5)
    assert_close(values[1:2], truth[1:2].detach(), 2e-3)  # 2e-4, of probabilities that hold seven digits
    assert values[2].isinf()
    gradient, true_gradient = (torch.autograd.grad(x[0], y)[0][0] for x, y in ((values, student), (truth, exact)))
    assert_close(gradient, true_gradient, 2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_gradient_of_a_row_sums_to_zero_and_a_shift_changes_nothing(divergence):
    student, teacher = make_logits()
    value = fastkd.kl_div(student, teacher, divergence=divergence)
    shifted = fastkd.kl_div(student + 40.0, teacher - 30.0, divergence=divergence)
    assert_close(shifted, value, 1e-12)
    assert torch.autograd.grad(value, student)[0].sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", Divergence.jsd(0.5)], ids=str)
def test_the_largest_temperature_still_holds_float32s_value(divergence):
    student, teacher = make_logits(torch.float32)
    truth, value = (
        function(student.detach().to(dtype), teacher.to(dtype), divergence=divergence, temperature=LARGEST_TEMPERATURE)
        for function, dtype in ((fastkd.reference.kl_div, torch.float64), (fastkd.kl_div, torch.float32))
    )
    assert_close(value, truth, 1e-4)


def test_large_temperature_is_centred_logit_regression():
    """T^2 KL -> ||centred(z_s) - centred(z_t)||^2 / (2 V) as T grows."""
    student, teacher = make_logits()
    difference = student.detach() - teacher[:, :STUDENT_VOCAB]
    limit = (difference - difference.mean(-1, keepdim=True)).square().mean() / 2
    assert_close(fastkd.kl_div(student, teacher, temperature=LARGEST_TEMPERATURE), limit, 1e-2)


def test_nan_logits_are_never_hidden():
    student, teacher = make_logits()
    poisoned = student.detach().clone()
    poisoned[3, 4] = math.nan
    for divergence in DIVERGENCES:
        assert fastkd.kl_div(poisoned, teacher, divergence=divergence).isnan()
        poisoned_teacher = teacher.clone()
        poisoned_teacher[2, 1] = math.nan
        assert fastkd.kl_div(student, poisoned_teacher, divergence=divergence).isnan()


def test_forward_keeps_no_gradient_sized_buffer_and_backward_follows_the_upstream_gradient():
    """The gradient is made in backward, so that an upstream gradient of each token's own costs nothing."""
    student, teacher = make_logits()
    per_token = fastkd.kl_div(student, teacher, reduction="none", mask=MASK)
    upstream = torch.linspace(-2.0, 3.0, TOKENS, dtype=torch.float64)
    exact = student.detach().requires_grad_()
    truth = fastkd.reference.kl_div(exact, teacher, reduction="none", mask=MASK)
    assert_close(torch.autograd.grad(per_token, student, upstream)[0], torch.autograd.grad(truth, exact, upstream)[0], 1e-12)


def test_wrong_arguments_are_refused():
    student, teacher = make_logits()
    with pytest.raises(ValueError, match="teacher_logits requires a gradient"):
        fastkd.kl_div(student, teacher.requires_grad_())
    teacher = teacher.detach()
    with pytest.raises(ValueError, match="the same tokens"):
        fastkd.kl_div(student, teacher[:-1])
    with pytest.raises(ValueError, match="only 10"):
        fastkd.kl_div(student, teacher[:, :10])
