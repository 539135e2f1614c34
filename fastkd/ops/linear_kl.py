"""`linear_kl_div`: divergence between teacher and student straight from hidden states and heads, without the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import LossArguments, check_vocab_index, compute_dtype
from .chunked import LossStats, evaluate
from .divergence import Divergence
from .kl import kl_div_reference
from .linear_logits import LinearLogits, autocast_dtype, check_head
from .rows import LogitTransform


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(softmax(z_t / T), softmax(z_s / T)) per token, with z = softcap(scale (h W^T + b)), reduced over tokens.

    Only one chunk of logits exists at a time; gradients are made in the forward pass: four GEMMs in all (three student, one teacher).

    Args:
        student_hidden: (..., H_s) states before the head, any leading dims.
        student_weight: (V_s, H_s) head; outside autocast in the dtype of `student_hidden`.
        teacher_hidden: (..., H_t), same leading dims. No gradient ever flows to the teacher.
        teacher_weight: (V_t, H_t).
        student_bias, teacher_bias: (V_s,), (V_t,).
        divergence: a name or a `Divergence`; p is the teacher, q the student.
        temperature: T > 0. Value and gradient both carry T^2 (Hinton et al., arXiv:1503.02531).
        mask: (...) bool, or float token weights >= 0; masked rows are packed out before any GEMM.
        vocab_index: (V_s,) int64, the teacher row behind every student row: the teacher's softmax is taken over those rows alone.
            None: same ids, a longer teacher is sliced to V_s rows.
        labels: (...) int64 student ids; adds label_weight times the cross-entropy of the same student logits at T = 1, averaged over
            its own unmasked labelled tokens (or over `denominator`).
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: what the model does after its head.
        reduction: "mean" over the unmasked weight, "sum", or "none" (one value per token in the shape of the leading dims).
        denominator: number or 0-dim tensor that replaces the mean's denominator (global token count of an optimizer step).
        chunk_size, memory_budget: rows, or bytes of logits alive; None: planned (`fastkd.ops.plan`).
        backend: "auto" or a backend's name.
        return_stats: also return `LossStats`, per token and without gradient.

    Returns:
        The loss in float32 (float64 for float64 inputs). Gradients accumulate in that dtype and come back in each input's own.
        No tokens, or all masked: exact zeros with the graph connected.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    leading = check_head("student", student_hidden, student_weight, student_bias)
    if check_head("teacher", teacher_hidden, teacher_weight, teacher_bias) != leading:
        raise ValueError(
            f"student_hidden has leading dims {tuple(leading)} and teacher_hidden {tuple(teacher_hidden.shape[:-1])}; "
            "both models must have seen the same tokens."
        )
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(f"teacher_hidden is on {teacher_hidden.device} and student_hidden on {student_hidden.device}.")
    vocabulary = student_weight.shape[0]
    check_vocab_index(vocab_index, vocabulary, teacher_weight.shape[0])
    arguments = LossArguments(
        divergence=Divergence.parse(divergence),
        temperature=temperature,
        mask=mask,
        labels=labels,
        label_weight=label_weight,
        ignore_index=ignore_index,
        student=LogitTransform(student_logit_scale, student_softcap),
        teacher=LogitTransform(teacher_logit_scale, teacher_softcap),
        reduction=reduction,
        denominator=denominator,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        backend=backend,
        return_stats=return_stats,
    )
    device = student_hidden.device
    valid = arguments.valid_rows(leading, device)
    dtype = compute_dtype(student_hidden, teacher_hidden)
    with torch.no_grad():
        kept_weight = _rows(teacher_weight, vocab_index, vocabulary)
        kept_bias = None if teacher_bias is None else _rows(teacher_bias, vocab_index, vocabulary)
    operand_dtype = autocast_dtype(device)
    student = LinearLogits(student_hidden, student_weight, student_bias, valid, dtype, operand_dtype)
    teacher = LinearLogits(teacher_hidden, kept_weight, kept_bias, valid, dtype, operand_dtype)
    problem = arguments.problem(student, teacher, leading, vocabulary, valid, dtype, device)
    return evaluate(problem, student.inputs, leading, valid, return_stats)


def linear_kl_div_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """The same value by plain torch in the inputs' dtype, all logits at once: the oracle in float64."""
    student_logits = torch.nn.functional.linear(student_hidden, student_weight, student_bias)
    teacher_logits = torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias)
    return kl_div_reference(student_logits, teacher_logits, **options)


def _rows(tensor: Tensor, vocab_index: Tensor | None, vocabulary: int) -> Tensor:
    return tensor[:vocabulary] if vocab_index is None else tensor.index_select(0, vocab_index)


class LinearKLDivLoss(torch.nn.Module):
    """Module form of `linear_kl_div`: options at construction, tensors (and per-batch mask, labels, denominator) at the call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        **per_batch: Any,
    ) -> Tensor | tuple[Tensor, LossStats]:
        return linear_kl_div(student_hidden, student_weight, teacher_hidden, teacher_weight, **{**self.options, **per_batch})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
