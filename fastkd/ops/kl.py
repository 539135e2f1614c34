"""`kl_div`: divergence between teacher and student logits that exist already."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .arguments import (
    LossOptions,
    check_denominator,
    check_row_tensors,
    check_teacher,
    check_vocab_index,
    divergence_options,
    leading_shape,
    stats_options,
)
from .chunked import LossStats
from .divergence import Divergence
from .operator import chunked_loss


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_index: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(softmax(z_t / T), softmax(z_s / T)) per token from logits, reduced over tokens.

    The options, the result and the errors are those of `linear_kl_div`. Logits are read once in forward and once in backward, where the
    gradient is written, in the student's dtype; beside it only a chunk of both is alive.

    Args:
        student_logits: (..., V_s), any leading dims and floating dtype, as the head made them.
        teacher_logits: (..., V_t), same leading dims, of its own dtype. No gradient ever flows to the teacher.
        divergence: a name or a `Divergence`; p is the teacher, q the student.
        temperature: 1e-6 <= T <= 32, as in `linear_kl_div`.
        mask: (...) bool, or float token weights >= 0.
        vocab_index: (V_s,) int64, the teacher's column behind every student's; None: the teacher's first V_s.
        labels: (...) int64 student ids of a cross-entropy at T = 1.
        label_weight: of that cross-entropy.
        ignore_index: the label of a token that has none.
        student_softcap: what the student's model does after its head, if the logits are still without it.
        teacher_softcap: the same of the teacher's.
        student_logit_scale: the same, a factor before the soft-cap.
        teacher_logit_scale: the same of the teacher's.
        reduction: "mean", "sum" or "none".
        denominator: number, or tensor of shape (), that replaces the mean's.
        chunk_size: rows at a time; None: planned.
        memory_budget: bytes of logits that may be alive beside the arguments, in place of chunk_size.
        backend: "auto" or a backend's name.
        return_stats: also return `LossStats`; "losses": of it the divergence and the cross-entropy alone, at no cost.

    Returns:
        The loss, () or with reduction="none" (...), in float32 (float64 for float64 logits); with return_stats the pair of it and
        `LossStats`.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    leading = leading_shape("student_logits", student_logits)
    if leading_shape("teacher_logits", teacher_logits) != leading:
        raise ValueError(
            f"student_logits has leading dims {tuple(leading)} and teacher_logits {tuple(teacher_logits.shape[:-1])}; "
            "both models must have seen the same tokens."
        )
    device = student_logits.device
    if teacher_logits.device != device:
        raise ValueError(f"teacher_logits is on {teacher_logits.device} and student_logits on {device}; move them together.")
    check_teacher("teacher_logits", teacher_logits)
    check_vocab_index(vocab_index, student_logits.shape[-1], teacher_logits.shape[-1], device)
    options = LossOptions(
        **divergence_options(divergence),
        temperature=temperature,
        label_weight=label_weight,
        ignore_index=ignore_index,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        reduction=reduction,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        backend=backend,
        **stats_options(return_stats),
    )
    mask, labels = check_row_tensors(leading, device, options, mask, labels)
    return chunked_loss(
        [student_logits.reshape(-1, student_logits.shape[-1])],
        [teacher_logits.reshape(-1, teacher_logits.shape[-1])],
        options,
        leading,
        vocab_index=vocab_index,
        mask=mask,
        labels=labels,
        denominator=check_denominator(denominator, reduction, device),
    )


def kl_div_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_index: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """The same value by plain torch and autograd, all rows at once, in the inputs' dtype: the oracle in float64.

    `chunk_size`, `memory_budget` and `backend` are taken so that the call is the same, and change nothing.
    """
    divergence = Divergence.parse(divergence)
    vocabulary = student_logits.shape[-1]
    teacher_logits = teacher_logits.detach()
    teacher_logits = teacher_logits[..., :vocabulary] if vocab_index is None else teacher_logits[..., vocab_index]

    def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
        logits = logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    student = transformed(student_logits, student_logit_scale, student_softcap)
    teacher = transformed(teacher_logits, teacher_logit_scale, teacher_softcap)
    log_q, log_p = torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)
    values = temperature**2 * _reference_divergence(divergence, log_p, log_q)

    leading = student_logits.shape[:-1]
    weight = torch.ones(leading, dtype=values.dtype) if mask is None else mask.to(values.dtype)
    cross_entropy, label_values = None, torch.zeros_like(values)
    labelled = torch.zeros(leading, dtype=torch.bool)
    if labels is not None:
        labelled = labels != ignore_index
        log_likelihood = torch.log_softmax(student, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        cross_entropy = torch.where(labelled, -log_likelihood, 0.0)
        label_values = label_weight * cross_entropy
    if reduction == "none":
        loss = weight * (values + label_values)
    elif reduction == "sum" or denominator is not None:
        loss = (weight * (values + label_values)).sum()
        loss = loss if denominator is None else loss / denominator
    else:
        loss = (weight * values).sum() / weight.sum().clamp_min(1e-300)
        loss = loss + (weight * label_values).sum() / (weight * labelled).sum().clamp_min(1e-300)
    if not return_stats:
        return loss
    present = (weight > 0).to(values.dtype)
    if return_stats == "losses":
        return loss, LossStats(values.detach() * present, None if cross_entropy is None else cross_entropy.detach() * present)
    student_entropy, teacher_entropy = (-(x.exp() * x).sum(-1) * present for x in (log_q.detach(), log_p))
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)) * present
    cross_entropy = None if cross_entropy is None else cross_entropy.detach() * present
    return loss, LossStats(values.detach() * present, cross_entropy, student_entropy, teacher_entropy, agreement)


def _reference_divergence(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if divergence.kind == "forward_kl":
        return kl(log_p, log_q)
    if divergence.kind == "reverse_kl":
        return kl(log_q, log_p)
    if divergence.kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    assert divergence.mixing is not None
    own = divergence.mixing
    first, second = (log_q, log_p) if divergence.kind == "skew_rkl" else (log_p, log_q)
    log_m = (own * first.exp() + (1 - own) * second.exp()).log()
    if divergence.kind == "jsd":
        return own * kl(log_p, log_m) + (1 - own) * kl(log_q, log_m)
    return kl(first, log_m)
