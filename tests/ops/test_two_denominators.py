"""`label_denominator` and `temperature_squared`: each term's own mean, and losses as libraries have them that leave T^2 out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from tests.ops.test_linear_kl import LABELS, MASK, check, make_inputs, value_and_gradients
from tests.oracle import assert_close

PRECISIONS = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]


def focal(losses: Tensor, told: fastkd.LossStats) -> Tensor:
    return (-losses).exp()


BOTH = {"labels": LABELS, "label_weight": 0.7, "temperature": 3.0, "mask": MASK, "chunk_size": 5}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"label_denominator": 4.0},
        {"denominator": 11.0, "label_denominator": torch.tensor(4)},
        {"temperature_squared": False},
        {"temperature_squared": False, "reduction": "sum"},
        {
            "temperature_squared": False,
            "denominator": 11.0,
            "label_denominator": 4.0,
            "token_weight": focal,
        },
    ],
    ids=["labels' own", "two", "without T^2", "sum without T^2", "everything"],
)
def test_equals_the_definition(options, dtype, tolerance):
    check({**BOTH, **options}, dtype, tolerance)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_values_and_statistics_without_the_square_are_those_with_it_over_the_square(reduction):
    inputs = make_inputs()
    with_it, told = fastkd.linear_kl_div(**inputs, temperature=3.0, reduction=reduction, return_stats=True)
    without, stats = fastkd.linear_kl_div(**inputs, temperature=3.0, reduction=reduction, return_stats=True, temperature_squared=False)
    assert_close(without.detach(), with_it.detach() / 9.0, 1e-12)
    assert_close(stats.divergence, told.divergence / 9.0, 1e-12)
    assert stats.student_entropy.equal(told.student_entropy)


def test_each_term_is_divided_by_its_own():
    inputs, seen = make_inputs(), MASK & (LABELS != -100)
    loss, stats = fastkd.linear_kl_div(**inputs, **BOTH, denominator=11.0, label_denominator=4.0, return_stats=True)
    assert_close(loss.detach(), stats.divergence.sum() / 11.0 + 0.7 * stats.cross_entropy[seen].sum() / 4.0, 1e-12)
    alone, _ = fastkd.linear_kl_div(**inputs, **BOTH, label_denominator=4.0, return_stats=True)
    assert_close(alone.detach(), stats.divergence.sum() / MASK.sum() + 0.7 * stats.cross_entropy[seen].sum() / 4.0, 1e-12)


def test_one_denominator_for_both_is_that_denominator_alone():
    inputs = make_inputs(dtype=torch.float32)
    one = value_and_gradients(fastkd.linear_kl_div, inputs, **BOTH, denominator=11.0)
    two = value_and_gradients(fastkd.linear_kl_div, inputs, **BOTH, denominator=11.0, label_denominator=11.0)
    for a, b in zip([one[0], *one[1]], [two[0], *two[1]], strict=True):
        assert_close(a, b, 1e-6)


def given_lists() -> dict[str, Tensor]:
    inputs = make_inputs()
    log_p = ((inputs["teacher_hidden"] @ inputs["teacher_weight"].T + inputs["teacher_bias"]) / 3.0)[..., :37].log_softmax(-1)
    log_p, ids = log_p.detach().topk(6)
    student = {name: inputs[name] for name in ("student_hidden", "student_weight", "student_bias")}
    return {**student, "topk_ids": ids, "topk_logprobs": log_p, "tail_logprob": torch.log1p(-log_p.exp().sum(-1))}


@pytest.mark.parametrize("support", ["full", "listed"])
def test_of_lists(support):
    lists = given_lists()
    options = {**BOTH, "denominator": 11.0, "label_denominator": 4.0, "temperature_squared": False, "student_support": support}
    options["tail"] = "bucket" if support == "full" else "renormalize"
    found, truth = (
        (*torch.autograd.grad(loss, [lists["student_hidden"], lists["student_weight"]]), loss.detach())
        for loss in (fastkd.topk_kl_div(**lists, **options), fastkd.reference.topk_kl_div(**lists, **options))
    )
    for ours, exact in zip(found, truth, strict=True):
        assert_close(ours, exact, 1e-9)


def test_logits_that_exist():
    student, teacher = torch.randn(23, 37, dtype=torch.float64, requires_grad=True), torch.randn(23, 37, dtype=torch.float64)
    options = {**BOTH, "label_denominator": 4.0, "temperature_squared": False}
    ours, truth = fastkd.kl_div(student, teacher, **options), fastkd.reference.kl_div(student, teacher, **options)
    assert_close(ours.detach(), truth.detach(), 1e-12)
    assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, truth)), 1e-9)
