"""topk_kl_div against the float64 oracle, and against the dense loss where the list holds everything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastkd
from tests.ops.test_linear_kl import LABELS, MASK, NAMES, STUDENT_VOCAB, TOKENS, make_inputs
from tests.oracle import assert_close, relative_error

TAILS = ["bucket", "renormalize", "zero"]


def make_teacher(entries: int, temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs()
    logits = torch.nn.functional.linear(inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"])[:, :STUDENT_VOCAB]
    log_p = (logits / temperature).log_softmax(-1)
    values, ids = log_p.topk(entries)
    tail = log_p.scatter(1, ids, -math.inf).logsumexp(-1)
    return ids, values.to(dtype), tail.to(dtype)


def make_student(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {k: v for k, v in make_inputs(dtype=dtype).items() if k.startswith("student")}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_equals_the_oracle(tail, reduction, dtype, tolerance):
    student, exact = make_student(dtype), make_student()
    options = {"tail": tail, "temperature": 2.0, "mask": MASK, "reduction": reduction}
    value = fastkd.topk_kl_div(
        **student,
        **dict(zip(("topk_ids", "topk_logprobs", "tail_logprob"), make_teacher(5, 2.0, dtype), strict=True)),
        **options,
        chunk_size=4,
    )
    ids, log_p, log_tail = make_teacher(5, 2.0)
    truth = fastkd.reference.topk_kl_div(
        exact["student_hidden"], exact["student_weight"], ids, log_p, log_tail, student_bias=exact["student_bias"], **options
    )
    assert_close(value, truth, tolerance)
    gradients = torch.autograd.grad(value.sum(), [student[n] for n in NAMES])
    for name, gradient, true_gradient in zip(
        NAMES, gradients, torch.autograd.grad(truth.sum(), [exact[n] for n in NAMES]), strict=True
    ):
        assert_close(gradient, true_gradient, 5 * tolerance, name)


@pytest.mark.parametrize("tail", TAILS)
def test_a_list_of_everything_is_the_dense_loss(tail):
    inputs = make_inputs()
    options = {"labels": LABELS, "label_weight": 0.5, "student_softcap": 4.0, "student_logit_scale": 0.8, "temperature": 2.0}
    dense = fastkd.linear_kl_div(**inputs, **options)
    sparse, stats = fastkd.topk_kl_div(
        **make_student(),
        **dict(zip(("topk_ids", "topk_logprobs", "tail_logprob"), make_teacher(STUDENT_VOCAB, 2.0), strict=True)),
        tail=tail,
        **options,
        return_stats=True,
    )
    assert_close(sparse, dense, 1e-11)
    assert stats.divergence is not None and stats.cross_entropy is not None and stats.student_entropy is None


def test_the_bucket_never_exceeds_the_full_divergence_and_grows_with_the_list():
    full = fastkd.linear_kl_div(**make_inputs())
    values = [
        fastkd.topk_kl_div(
            make_student()["student_hidden"],
            make_student()["student_weight"],
            *make_teacher(k),
            student_bias=make_student()["student_bias"],
        )
        for k in (1, 3, 10, 30)
    ]
    assert all(a < b for a, b in zip(values, [*values[1:], full], strict=True))


def test_leading_dims_and_16_bit_student():
    student = {k: v.bfloat16() for k, v in make_student().items()}
    hidden = student.pop("student_hidden")[:22].view(2, 11, -1).detach().requires_grad_()
    ids, log_p, log_tail = (x[:22].view(2, 11, *x.shape[1:]) for x in make_teacher(4, dtype=torch.float32))
    loss = fastkd.topk_kl_div(
        hidden, student["student_weight"], ids, log_p, log_tail, student_bias=student["student_bias"], reduction="none"
    )
    assert loss.shape == (2, 11)
    exact = hidden.detach().double().requires_grad_()
    truth = fastkd.reference.topk_kl_div(
        exact,
        student["student_weight"].double(),
        ids,
        log_p.double(),
        log_tail.double(),
        student_bias=student["student_bias"].double(),
        reduction="none",
    )
    assert_close(loss, truth, 1e-5)
    assert relative_error(torch.autograd.grad(loss.sum(), hidden)[0], torch.autograd.grad(truth.sum(), exact)[0]) < 5e-3


IDS, LOG_P, LOG_TAIL = make_teacher(4)
BAD = {
    "tail": ({"tail": "all"}, ValueError, "tail='all'"),
    "no tail": ({"tail_logprob": None}, ValueError, "needs tail_logprob"),
    "ids dtype": ({"topk_ids": IDS.int()}, ValueError, "torch.int64"),
    "ids leading": ({"topk_ids": IDS[:-1]}, ValueError, "leading dims"),
    "ids range": ({"topk_ids": IDS + STUDENT_VOCAB}, ValueError, "outside the student's 37 rows"),
    "ids twice": ({"topk_ids": IDS[:, :1].expand(-1, 4)}, ValueError, "twice at row 0"),
    "shape": ({"topk_logprobs": LOG_P[:, :3]}, ValueError, "topk_logprobs has shape"),
    "tail shape": ({"tail_logprob": LOG_TAIL[:3]}, ValueError, "tail_logprob has shape"),
    "requires grad": ({"topk_logprobs": LOG_P.clone().requires_grad_()}, ValueError, "requires a gradient"),
    "device": ({"topk_logprobs": LOG_P.to("meta")}, ValueError, "on meta"),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD.values(), ids=BAD.keys())
def test_wrong_arguments_are_refused_with_a_sentence(options, error, text):
    given = {"topk_ids": IDS, "topk_logprobs": LOG_P, "tail_logprob": LOG_TAIL, **options}
    with pytest.raises(error, match=text):
        fastkd.topk_kl_div(**make_student(), **given)


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_no_distribution_is_refused(tail):
    """Logits, probabilities, and a tail that counts the list again; ids that are not there and masked tokens may hold anything."""
    ids, log_p, log_tail = make_teacher(4)

    def loss(ids=ids, log_p=log_p, log_tail=log_tail, **options):
        return fastkd.topk_kl_div(**make_student(), topk_ids=ids, topk_logprobs=log_p, tail_logprob=log_tail, tail=tail, **options)

    high = log_p.clone()
    high[3, 2] = 0.5
    with pytest.raises(ValueError, match=r"topk_logprobs holds 0.5 at row 3"):
        loss(log_p=high)
    with pytest.raises(ValueError, match=r"topk_logprobs holds .* at row 0"):
        loss(log_p=log_p.exp())
    with pytest.raises(ValueError, match=r"tail_logprob holds .* at row 0"):
        loss(log_tail=log_tail + 40.0)
    with pytest.raises(ValueError, match=r"topk_logprobs and tail_logprob hold probabilities that sum to .* at row 0"):
        loss(log_tail=torch.zeros_like(log_tail))
    with pytest.raises(ValueError, match=r"topk_logprobs.* hold probabilities that sum to 1.47152 at row 0"):
        loss(log_p=torch.full_like(log_p, -1.0), log_tail=torch.full_like(log_tail, -math.inf))
    is_high = torch.arange(TOKENS) == 3
    assert torch.equal(loss(log_p=high, mask=~is_high), loss(mask=~is_high))
    missing = is_high[:, None] & (torch.arange(4) == 2)
    assert torch.equal(loss(ids=ids.masked_fill(missing, -1), log_p=high), loss(ids=ids.masked_fill(missing, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounded_distributions_are_no_mistake(dtype):
    """Even where every logarithm was rounded up: of a bfloat16 by up to one 256th of it."""
    ids = torch.arange(37).expand(TOKENS, 37)
    log_p = torch.full((TOKENS, 37), -math.log(37)).mul(1 - torch.finfo(dtype).eps / 2).to(dtype)
    loss = fastkd.topk_kl_div(**make_student(), topk_ids=ids, topk_logprobs=log_p, tail="renormalize")
    assert loss.isfinite()
    sure = torch.full((TOKENS, 1), 1e-3).to(dtype)
    assert fastkd.topk_kl_div(**make_student(), topk_ids=ids[:, :1], topk_logprobs=sure, tail="renormalize").isfinite()


def test_missing_entries_add_nothing():
    ids, log_p, log_tail = make_teacher(4)
    missing = torch.arange(TOKENS)[:, None] % 4 > torch.arange(4)
    tail = torch.cat((log_p.masked_fill(~missing, -math.inf), log_tail[:, None]), -1).logsumexp(-1)
    padded = fastkd.topk_kl_div(
        **make_student(), topk_ids=ids.masked_fill(missing, -1), topk_logprobs=log_p, tail_logprob=tail, reduction="none"
    )
    full = fastkd.topk_kl_div(**make_student(), topk_ids=ids, topk_logprobs=log_p, tail_logprob=log_tail, reduction="none")
    assert_close(padded[::4], full[::4], 1e-12)
    assert (padded < full + 1e-12).all() and relative_error(padded, full) > 1e-3
