"""`kl_div`: divergence between teacher and student logits that exist already."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .checks import check_denominators, check_teacher, check_teacher_mass, check_token_tensors, leading_shape
from .divergence import Divergence
from .fused_loss import LossStats, fused_loss
from .options import LossOptions, divergence_options, statistics_option


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    mask: Tensor | None = None,
    vocab_index: Tensor | None = None,
    teacher_mass: str = "renormalize",
    vocab_slots: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_denominator: float | Tensor | None = None,
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
        temperature_squared: whether value and gradient carry T^2.
        mask: (...) bool, or float token weights >= 0.
        vocab_index: (V_s,) int64, the teacher's column behind every student's; None: the teacher's first V_s.
        teacher_mass: "renormalize", "full" or "slots", as in `linear_kl_div`.
        vocab_slots: (V_t,) int64, with "slots" alone: the student's column of every column of the teacher; -1: none.
        labels: (...) int64 student ids of a cross-entropy at T = 1.
        label_weight: of that cross-entropy.
        ignore_index: the label of a token that has none.
        student_softcap: what the student's model does after its head, if the logits are still without it.
        teacher_softcap: the same of the teacher's.
        student_logit_scale: the same, a factor before the soft-cap.
        teacher_logit_scale: the same of the teacher's.
        reduction: "mean", "sum" or "none".
        denominator: number, or tensor of shape (), that replaces the mean's.
        label_denominator: number, or tensor of shape (), that replaces the mean's of the labels' term alone.
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
    vocabularies = student_logits.shape[-1], teacher_logits.shape[-1]
    check_teacher_mass(teacher_mass, vocab_index, vocab_slots, *vocabularies, device, has_head=False)
    options = LossOptions(
        **divergence_options(divergence),
        teacher_mass=teacher_mass,
        temperature=temperature,
        temperature_squared=temperature_squared,
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
        statistics=statistics_option(return_stats),
    )
    mask, labels = check_token_tensors(leading, device, options, mask, labels)
    return fused_loss(
        {"logits": student_logits.reshape(-1, student_logits.shape[-1])},
        {"teacher_logits": teacher_logits.reshape(-1, teacher_logits.shape[-1])},
        options,
        leading,
        vocab_index=vocab_index,
        vocab_slots=vocab_slots,
        mask=mask,
        labels=labels,
        denominator=check_denominators(denominator, label_denominator, reduction, device),
    )
