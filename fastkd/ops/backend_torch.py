"""The row kernel in plain torch: exact on every device and dtype, and what the compiled backends are compared with.

It works on a few rows at a time, so that its temporaries stay in a CPU's cache and small beside a chunk on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .divergence import acceptance, balance_, value_and_coefficient, weighted
from .row_call import LogitTransform, RowCall, TopK
from .topk_events import divergence_of_events, listed_of, others_of, spread_, teacher_events

_CPU_BLOCK_ELEMENTS = 1 << 18
GPU_BLOCK_ELEMENTS = 1 << 23
_LOG_HALF = -math.log(2.0)


def why_not(call: RowCall) -> str | None:
    """None: torch serves every call."""
    return None


def run(call: RowCall) -> None:
    """Do what `RowCall` says; the logits stay what they are, but where the gradient lies over them."""
    dtype, options, out = call.row_weight.dtype, call.options, call.outputs
    for block in blocks(call.student):
        student = transformed(call.student[block], call.student_bias, options.student, dtype)
        terms = []
        if isinstance(call.teacher, TopK):
            terms.append(_topk_block(call, block, student))
        elif call.teacher is not None:
            teacher = transformed(call.teacher[block], call.teacher_bias, options.teacher, dtype)
            terms.append(_divergence_block(call, block, student, teacher))
        if call.labels is not None:
            assert out.cross_entropy is not None
            weight = None if call.label_weight is None else call.label_weight[block]
            terms.append(_cross_entropy_block(student, call.labels[block], out.cross_entropy[block], weight, call.gradient is not None))
        if call.gradient is not None:
            total, *others = [term for term in terms if term is not None]
            for other in others:
                total.add_(other)
            # `total` has memory of its own and a row of the gradient lies over none but its own row of logits: all of those were read.
            call.gradient[block] = chain_(total, student, options.student)


def blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of `logits` (C, V)."""
    rows, vocabulary = logits.shape
    step = max(1, (GPU_BLOCK_ELEMENTS if logits.is_cuda else _CPU_BLOCK_ELEMENTS) // max(1, vocabulary))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def transformed(raw: Tensor, bias: Tensor | None, transform: LogitTransform, dtype: torch.dtype) -> Tensor:
    """The model's logits in `dtype` from what its head's GEMM wrote (C, V); perhaps the same memory."""
    logits = raw.to(dtype)
    return transform.apply(logits if bias is None else logits + bias)


def chain_(gradient: Tensor, logits: Tensor, transform: LogitTransform) -> Tensor:
    """Turn `gradient` (C, V) with respect to the model's `logits`, in place, into one with respect to the head's output."""
    if transform.softcap is not None:
        gradient.mul_(1.0 - (logits / transform.softcap) ** 2)
    return gradient if transform.scale == 1.0 else gradient.mul_(transform.scale)


def _divergence_block(call: RowCall, block: slice, student: Tensor, teacher: Tensor) -> Tensor | None:
    """Write the block's T^2 D and statistics; return its part of the gradient (C, V), None if that is not wanted."""
    out, divergence, temperature = call.outputs, call.options.divergence, call.options.temperature
    assert divergence is not None and out.divergence is not None
    log_q = torch.log_softmax(student if temperature == 1.0 else student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher if temperature == 1.0 else teacher / temperature, dim=-1)
    rest = None
    if call.teacher_rest is not None:
        # From the log-sum over the columns, log p of column j is short by log(1 + odds of the rest).
        odds = call.teacher_rest[block] - (teacher / temperature).logsumexp(-1)
        log_p = log_p - odds.logaddexp(torch.zeros_like(odds))[:, None]
        rest = odds.sigmoid()
    q, p = log_q.exp(), log_p.exp()
    value, coefficient = value_and_coefficient(divergence, p, q, log_p, log_q, rest=rest)
    out.divergence[block] = value * temperature**2
    if call.wants_statistics:
        assert out.student_entropy is not None and out.teacher_entropy is not None
        assert out.top1_agreement is not None and out.acceptance is not None
        out.student_entropy[block] = -weighted(q, log_q).sum(-1)
        out.teacher_entropy[block] = -weighted(p, log_p).sum(-1) - (0.0 if rest is None else weighted(rest, rest.log()))
        out.top1_agreement[block] = (log_q.argmax(-1) == log_p.argmax(-1)).to(student.dtype)
        out.acceptance[block] = acceptance(p, q)
    if call.gradient is None:
        return None
    is_certain = log_q.amax(-1) > _LOG_HALF
    # T^2 from the loss, 1/T from z/T: the gradient of T^2 D carries T once.
    coefficient.sub_(q.mul_(coefficient.sum(-1, keepdim=True))).mul_(temperature)
    return balance_(coefficient.mul_(call.row_weight[block, None]), student, is_certain)


def _cross_entropy_block(student: Tensor, labels: Tensor, out: Tensor, weight: Tensor | None, wants_gradient: bool) -> Tensor | None:
    """Write CE at T = 1 into `out`, zero where the label is negative; return its part of the gradient as `_divergence_block` does."""
    log_q = torch.log_softmax(student, dim=-1)
    labelled = labels >= 0
    # On a GPU nobody has checked the labels; one outside of the vocabulary gives NaN.
    unknown = labels >= student.shape[-1]
    index = labels.clamp(0, max(student.shape[-1] - 1, 0))[:, None]
    out.copy_(torch.where(labelled, -log_q.gather(1, index)[:, 0], 0.0).masked_fill_(unknown, torch.nan))
    if not wants_gradient or weight is None:
        return None
    is_certain = log_q.amax(-1) > _LOG_HALF
    result = log_q.exp_()
    result.scatter_add_(1, index, result.new_full((1, 1), -1.0).expand(index.shape))
    return balance_(result.mul_(labelled[:, None]).mul_(weight[:, None]), student, is_certain)


def _topk_block(call: RowCall, block: slice, student: Tensor) -> Tensor | None:
    """Write the block's T^2 D from a top-k teacher; return its part of the gradient as `_divergence_block` does.

    `topk_events.py` has the mathematics.
    """
    assert isinstance(call.teacher, TopK) and call.options.divergence is not None and call.outputs.divergence is not None
    teacher, temperature = call.teacher[block], call.options.temperature
    logits = student if temperature == 1.0 else student / temperature
    logits = logits - logits.amax(-1, keepdim=True)
    listed, others = listed_of(logits, teacher.ids), others_of(logits, teacher.ids)
    # The unlisted mass is a sum of its own, where 1 - sum_S q would cancel to nothing.
    log_rest = others.logsumexp(-1)
    log_q = torch.cat((listed, log_rest[:, None]), -1).log_softmax(-1)
    value, gradient = divergence_of_events(call.options.divergence, teacher_events(teacher, call.options.tail, log_q.dtype), log_q)
    # On a GPU nobody has checked the ids; one outside of the vocabulary gives NaN.
    value.masked_fill_((teacher.ids >= student.shape[-1]).any(-1), torch.nan)
    torch.mul(value, temperature**2, out=call.outputs.divergence[block])
    if call.gradient is None:
        return None
    # T^2 from the loss, 1/T from z/T.
    gradient.mul_((temperature * call.row_weight[block])[:, None])
    return spread_(others, log_rest, teacher.ids, gradient)
