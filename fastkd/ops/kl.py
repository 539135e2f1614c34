"""`kl_div`: divergence between teacher and student logits that exist already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import LossArguments, check_vocab_index, compute_dtype, leading_shape
from .chunked import LossStats, evaluate
from .divergence import Divergence
from .rows import LogitTransform


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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(softmax(z_t / T), softmax(z_s / T)) per token from logits, reduced over tokens.

    `student_logits` (..., V_s), `teacher_logits` (..., V_t); no gradient flows to the teacher. `vocab_index` (V_s,) int64 picks the
    teacher's columns. All other options, the result and the errors are those of `linear_kl_div`. Beside its gradient, which is as
    large as `student_logits`, only chunks in float32 (float64 for float64 inputs) are alive.
    """
    leading = leading_shape("student_logits", student_logits)
    if leading_shape("teacher_logits", teacher_logits) != leading:
        raise ValueError(
            f"student_logits has leading dims {tuple(leading)} and teacher_logits {tuple(teacher_logits.shape[:-1])}; "
            "both models must have seen the same tokens."
        )
    if teacher_logits.device != student_logits.device:
        raise ValueError(f"teacher_logits is on {teacher_logits.device} and student_logits on {student_logits.device}.")
    vocabulary = student_logits.shape[-1]
    check_vocab_index(vocab_index, vocabulary, teacher_logits.shape[-1])
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
    device = student_logits.device
    valid = arguments.valid_rows(leading, device)
    dtype = compute_dtype(student_logits, teacher_logits)
    student = GivenLogits(student_logits, valid)
    teacher = GivenLogits(teacher_logits if vocab_index is not None else teacher_logits[..., :vocabulary], valid, vocab_index)
    problem = arguments.problem(student, teacher, leading, vocabulary, valid, dtype, device)
    return evaluate(problem, student.inputs, leading, valid, return_stats)


class GivenLogits:
    """Logits that exist, as a source of chunks (`LogitSource`) and, for the student, as a sink of their gradient."""

    def __init__(self, logits: Tensor, valid: Tensor | None, columns: Tensor | None = None) -> None:
        self.inputs = (logits,)
        self.logits = logits.detach().reshape(-1, logits.shape[-1])
        self.valid, self.columns = valid, columns

    def load(self, rows: slice, out: Tensor) -> None:
        chunk = self.logits[rows] if self.valid is None else self.logits[self.valid[rows]]
        out.copy_(chunk if self.columns is None else chunk.index_select(1, self.columns))

    def begin(self, needed: Sequence[bool]) -> None:
        # Masked rows are never written, so they start as zeros.
        self.gradient = torch.zeros_like(self.logits) if needed[0] else None

    def collect(self, rows: slice, gradient: Tensor) -> None:
        assert self.gradient is not None
        target: slice | Tensor = rows if self.valid is None else self.valid[rows]
        self.gradient[target] = gradient.to(self.gradient.dtype)

    def finish(self, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient, self.gradient = self.gradient, None
        if gradient is None:
            return (None,)
        return (gradient.mul_(scale).view(self.inputs[0].shape),)


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
    return_stats: bool = False,
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
