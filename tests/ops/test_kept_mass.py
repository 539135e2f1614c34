"""`LossStats.kept_mass` and `.teacher_top1_kept`: what a student without some of the teacher's tokens cannot follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LossStats, reference
from tests.ops.test_teacher_mass import STUDENT, TEACHER, TOKENS, index_of, make, options_of, slots_of
from tests.oracle import assert_close

CASES = {
    "renormalize": {"vocab_index": index_of()},
    "full": options_of("full"),
    "slots": options_of("slots"),
    "full without an index": {"teacher_mass": "full"},
}
KEPT = {
    "renormalize": torch.isin(torch.arange(TEACHER), index_of()),
    "full": torch.isin(torch.arange(TEACHER), index_of()),
    "slots": slots_of() >= 0,
    "full without an index": torch.arange(TEACHER) < STUDENT,
}
PRECISIONS = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]


def told(inputs: dict[str, Tensor], function=fastkd.linear_kl_div, **options) -> LossStats:
    return function(**inputs, return_stats=True, **options)[1]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("learns", [False, True], ids=["value alone", "with gradients"])
def test_equals_the_definition(case, dtype, tolerance, learns):
    inputs = make(dtype)
    inputs["student_hidden"].requires_grad_(learns)
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)) < 0.7
    stats = told(inputs, mask=mask, temperature=2.0, teacher_softcap=9.0, teacher_logit_scale=1.5, chunk_size=7, **CASES[case])
    z = 9.0 * torch.tanh(1.5 * (inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().T) / 9.0)
    mass = (z / 2.0).softmax(-1)[:, KEPT[case]].sum(-1)
    assert_close(stats.kept_mass, mass * mask, tolerance)
    assert stats.teacher_top1_kept.equal((KEPT[case][z.argmax(-1)] & mask).to(dtype))
    assert 0 < float(stats.teacher_top1_kept.sum()) < int(mask.sum()) or case == "slots"  # of which few tokens have none


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_that_exist_and_the_reference_say_the_same(case, dtype):
    inputs = make()
    logits = {side: (inputs[f"{side}_hidden"] @ inputs[f"{side}_weight"].T).to(dtype) for side in ("student", "teacher")}
    exact = reference.kl_div(logits["student"].double(), logits["teacher"].double(), return_stats=True, **CASES[case])[1]
    given = fastkd.kl_div(logits["student"], logits["teacher"], return_stats=True, **CASES[case])[1]
    states = told({**inputs, "teacher_hidden": logits["teacher"], "teacher_weight": None}, **CASES[case])
    for stats in (given, states):
        assert_close(stats.kept_mass, exact.kept_mass, 1e-9 if dtype == torch.float64 else 2e-5)
        assert stats.teacher_top1_kept.double().equal(exact.teacher_top1_kept)


@pytest.mark.parametrize("case", CASES)
def test_of_equal_largest_logits_the_first_counts(case):
    """Logits of whole numbers, of which many are the largest in their row; in some rows all are."""
    teacher = torch.randint(3, (TOKENS, TEACHER), generator=torch.Generator().manual_seed(4)).float()
    teacher[:3] = 1.0
    student = torch.randn(TOKENS, STUDENT, generator=torch.Generator().manual_seed(5))
    stats = fastkd.kl_div(student, teacher, return_stats=True, **CASES[case])[1]
    assert stats.teacher_top1_kept.equal(KEPT[case][teacher.argmax(-1)].float())


def test_where_the_dropped_rows_take_several_tiles():
    inputs, index = make(torch.float32, tokens=30, teacher=12000, student=3000), index_of(12000, 3000)
    stats = told(inputs, vocab_index=index, teacher_mass="full", chunk_size=8)
    z = inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().T
    assert_close(stats.kept_mass, z.softmax(-1)[:, index].sum(-1), 2e-5)
    assert stats.teacher_top1_kept.bool().equal(torch.isin(z.argmax(-1), index))


def test_a_teacher_without_other_tokens_is_kept_whole():
    stats = told(make(teacher=STUDENT), vocab_index=torch.arange(STUDENT).flip(0), teacher_mass="full")
    assert_close(stats.kept_mass, torch.ones(TOKENS, dtype=torch.float64), 1e-12)
    assert stats.teacher_top1_kept.eq(1).all()


def test_they_are_unknown_where_nothing_is_dropped_and_to_the_losses_alone():
    inputs = make(teacher=STUDENT)
    assert told(inputs).kept_mass is None and told(inputs).teacher_top1_kept is None
    only_losses = fastkd.linear_kl_div(**make(), **CASES["full"], return_stats="losses")[1]
    assert only_losses.kept_mass is None and only_losses.teacher_top1_kept is None


def test_the_loss_and_its_gradient_are_the_same_with_and_without_them():
    for case in CASES:
        inputs = make(torch.float32)
        leaf = inputs["student_hidden"].requires_grad_()
        plain = fastkd.linear_kl_div(**inputs, **CASES[case], chunk_size=7)
        counted, _ = fastkd.linear_kl_div(**inputs, **CASES[case], chunk_size=7, return_stats=True)
        assert_close(counted.detach(), plain.detach(), 1e-6)
        assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (counted, plain)), 1e-6)


def test_the_position_mask_of_draft_trainers():
    """A draft is trained where the target's first choice is in its vocabulary: by t2d, as speculators and SpecForge do it."""
    inputs, index = make(), index_of().sort().values
    t2d = torch.isin(torch.arange(TEACHER), index)
    target = (inputs["teacher_hidden"] @ inputs["teacher_weight"].T).softmax(-1)
    position_mask = t2d[target.argmax(-1)]
    stats = told(inputs, vocab_index=index, teacher_mass="full")
    assert stats.teacher_top1_kept.bool().equal(position_mask)
    loss = fastkd.linear_kl_div(**inputs, vocab_index=index, teacher_mass="full", mask=stats.teacher_top1_kept.bool())
    log_q = (inputs["student_hidden"] @ inputs["student_weight"].T).log_softmax(-1)
    p = target[:, t2d]
    assert_close(loss, (p * (p.log() - log_q)).sum(-1)[position_mask].mean(), 1e-9)
