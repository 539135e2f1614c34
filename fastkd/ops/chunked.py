"""The one pass that every logit loss makes: chunk by chunk, logits in, losses and gradients out, one chunk of logits alive.

Nothing is allocated inside its loop and the host waits for nothing in it. Masked rows are packed out before it, which reads their
number from the device once; while a CUDA graph is captured, where nothing can be read, they stay in with weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from .arguments import LossOptions, check_index_values, check_row_values, check_topk_ids, check_topk_masses, compute_dtype
from .backends import RowKernel, row_kernel, takes_bias, topk_kernel
from .fp8_logits import Fp8Logits
from .given_logits import GivenLogits
from .grad_filter import GradFilter
from .linear_logits import LinearLogits
from .plan import Plan, plan_chunks
from .rows import RowLosses
from .topk_rows import TopK


@dataclass(frozen=True)
class LossStats:
    """Per-token values in the shape of the leading dims, zero where masked; no gradient flows. Nats; `divergence` carries T^2.

    Entropies are those of the tempered distributions; `top1_agreement` is 1 where both models rank the same token first. With
    `grad_filter`, `columns_kept` is the share of the vocabulary that the token's chunk kept, and `dropped_mass` the share of the L1
    norm of the token's logit gradient in the columns that were replaced by their mean; both are zero where no gradient was made.
    """

    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None
    columns_kept: Tensor | None = None
    dropped_mass: Tensor | None = None


STATISTICS = tuple(field.name for field in fields(LossStats))


class TeacherSource(Protocol):
    """Rows of logits that are made a few at a time."""

    late_bias: Tensor | None
    """(V,) that the row kernel is to add to the logits."""

    def logits(self, rows: slice) -> Tensor:
        """The logits of `rows`, (rows, V), in a buffer of the source's own that the next call overwrites."""


class StudentSource(TeacherSource, Protocol):
    """A source that also takes the gradient of its logits back to what they were made of."""

    def gradient_target(self, rows: slice) -> Tensor:
        """Where the gradient of the logits of `rows`, just made, is to be written: (rows, V), often over them."""

    def collect(self, rows: slice) -> None:
        """Add that gradient to the inputs' gradients."""

    def gradients(self) -> list[Tensor]:
        """The inputs' gradients; empty tensors where none is needed."""


@dataclass(frozen=True)
class RowWeights:
    """loss = scale * sum_i (row_i T^2 D_i + label_i CE_i) over the `valid` rows, (n,) indices; None: all rows.

    Weights are of order one and 1 / denominator stands in `scale`, so that 16-bit gradients do not underflow.
    """

    valid: Tensor | None
    row: Tensor
    labels: Tensor | None
    label: Tensor | None
    scale: Tensor

    def times(self, upstream: Tensor, *, linear: bool) -> RowWeights:
        """With the upstream gradient, 0-dim or one a token, and the scale multiplied in.

        linear: but for their largest value, which stays in `scale`: it would take 16-bit gradients of logits below what they can hold.
        """
        if upstream.dim() and self.valid is not None:
            upstream = upstream[self.valid]
        factor = upstream * self.scale
        scale = torch.ones_like(self.scale)
        if linear and factor.numel():
            scale = factor.abs().amax().clamp_min(torch.finfo(factor.dtype).tiny)
            factor = factor / scale
        label = None if self.label is None else self.label * factor
        return RowWeights(self.valid, self.row * factor, self.labels, label, scale)

    def total(self, losses: RowLosses) -> Tensor:
        """row_i T^2 D_i + label_i CE_i, (n,)."""
        total = torch.zeros_like(self.row)
        if losses.divergence is not None:
            total += self.row * losses.divergence
        if losses.cross_entropy is not None and self.label is not None:
            total += self.label * losses.cross_entropy
        return total

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """(..., n) values of the valid rows as (..., tokens), zero elsewhere."""
        if self.valid is None:
            return values
        return values.new_zeros(*values.shape[:-1], tokens).index_copy_(-1, self.valid, values)


@dataclass(frozen=True)
class Result:
    """What one pass leaves: `gradients` of sum_i (row_i T^2 D_i + label_i CE_i), not yet times `scale`; `statistics` (7, N)."""

    loss: Tensor
    scale: Tensor
    statistics: Tensor
    gradients: list[Tensor]


def chunked_pass(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    vocab_index: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    options: LossOptions,
) -> Result:
    """Make the pass over checked, flattened arguments.

    student: [logits (N, V)], or [hidden (N, H), weight (V, H)] and perhaps a bias (V,). teacher: the same; or, with `options.tail`,
    what a `TopK` holds; or [] for none. mask, labels: (N,). upstream: 0-dim or (N,); if given, gradients carry it, and those of logits
    `scale` too.
    """
    tokens, device = student[0].shape[0], student[0].device
    vocabulary = student[0].shape[1] if len(student) == 1 else student[1].shape[0]
    check_row_values(options, vocabulary, mask, labels, denominator)
    dtype = compute_dtype(student[0], *teacher[:1])
    weights = row_weights(options, tokens, dtype, device, mask, labels, denominator)
    if upstream is not None:
        weights = weights.times(upstream.to(dtype), linear=len(student) > 1)
    plan = plan_chunks(
        weights.row.numel(),
        vocabulary,
        device=device,
        element_size=dtype.itemsize,
        has_teacher=bool(teacher) and options.tail is None,
        chunk_size=options.chunk_size,
        memory_budget=options.memory_budget,
    )
    statistics = torch.zeros(len(STATISTICS), plan.tokens, dtype=dtype, device=device)
    kernel = (row_kernel if options.tail is None else topk_kernel)(options.backend, device)
    adds_bias = not takes_bias(kernel)
    source = _student_source(student, weights.valid, plan, dtype, needs_grad, options, statistics, adds_bias)
    teacher_source = _teacher_source(teacher, vocab_index, weights.valid, plan, dtype, options, adds_bias)
    losses = _loop(kernel, source, teacher_source, weights, plan, options, statistics, any(needs_grad))
    total = weights.total(losses)
    loss = weights.spread(total, tokens) if options.reduction == "none" else total.sum() * weights.scale
    return Result(loss, weights.scale, weights.spread(statistics, tokens), source.gradients())


def _loop(
    kernel: RowKernel,
    student: StudentSource,
    teacher: TeacherSource | TopK | None,
    weights: RowWeights,
    plan: Plan,
    options: LossOptions,
    statistics: Tensor,
    wants_gradient: bool,
) -> RowLosses:
    """Fill the rows of `statistics` that the call asks for, and the student's gradients if wanted."""
    row_options = options.row_options(has_teacher=teacher is not None)
    is_dense = teacher is not None and not isinstance(teacher, TopK)
    late = {"student_bias": student.late_bias, "teacher_bias": getattr(teacher, "late_bias", None)}
    biases = {name: bias for name, bias in late.items() if bias is not None}
    asked = [teacher is not None, weights.labels is not None, *[is_dense and options.return_stats] * 3]
    losses = [row if is_asked else None for row, is_asked in zip(statistics, asked, strict=False)]
    for chunk in plan.slices():
        student_logits = student.logits(chunk)
        gradient = student.gradient_target(chunk) if wants_gradient else None
        for part in plan.parts(chunk):
            inside = slice(part.start - chunk.start, part.stop - chunk.start)
            kernel(
                student_logits[inside],
                teacher[part] if isinstance(teacher, TopK) else None if teacher is None else teacher.logits(part),
                row_options,
                RowLosses(*(_at(row, part) for row in losses)),
                row_weight=weights.row[part],
                labels=_at(weights.labels, part),
                label_weight=_at(weights.label, part),
                gradient=_at(gradient, inside),
                **biases,
            )
        if wants_gradient:
            student.collect(chunk)
    return RowLosses(*losses)


def _at(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _student_source(
    student: Sequence[Tensor],
    valid: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    needs_grad: Sequence[bool],
    options: LossOptions,
    statistics: Tensor,
    adds_bias: bool,
) -> StudentSource:
    if len(student) == 1:
        return GivenLogits(student[0], valid, plan.chunk_rows, dtype, needs_grad=needs_grad[0])
    grad_filter = None
    if options.grad_filter is not None:
        grad_filter = GradFilter(options.grad_filter, statistics[-2:] if options.return_stats else None)
    return LinearLogits(
        student,
        valid,
        plan.chunk_rows,
        dtype,
        options.operand_dtype,
        needs_grad=needs_grad,
        grad_filter=grad_filter,
        adds_bias=adds_bias,
    )


def _teacher_source(
    teacher: Sequence[Tensor],
    vocab_index: Tensor | None,
    valid: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    options: LossOptions,
    adds_bias: bool,
) -> TeacherSource | TopK | None:
    """The teacher over the student's vocabulary: what it lists, the rows that `vocab_index` names, or the first V."""
    if not teacher:
        return None
    if options.tail is not None:
        check_topk_ids(teacher[0], plan.vocabulary)
        known = [x if valid is None else x.index_select(0, valid) for x in teacher]
        check_topk_masses(*known)
        return TopK(*known)
    check_index_values(vocab_index, teacher[0].shape[1] if len(teacher) == 1 else teacher[1].shape[0])
    if len(teacher) == 1:
        logits = teacher[0] if vocab_index is not None else teacher[0][:, : plan.vocabulary]
        return GivenLogits(logits, valid, plan.teacher_rows, dtype, columns=vocab_index)
    hidden, *head = teacher
    head = [x[: plan.vocabulary] if vocab_index is None else x.index_select(0, vocab_index) for x in head]
    if options.teacher_precision == "fp8":
        return Fp8Logits(hidden, head, valid, plan.teacher_rows, dtype)
    return LinearLogits([hidden, *head], valid, plan.teacher_rows, dtype, options.operand_dtype, adds_bias=adds_bias)


def row_weights(
    options: LossOptions,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
) -> RowWeights:
    """The weights of a call with these options, from `mask` (N,) and `labels` (N,), in `dtype` on `device`.

    Args:
        options: of which label_weight, ignore_index and reduction are read.
        tokens: N.
        dtype: float32 or float64, of the weights.
        device: of the weights.
        mask: (N,) bool or float weights; None: all ones. Rows of weight zero are left out of `valid`.
        labels: (N,) int64, or None.
        denominator: () float64, in place of the mean's; None: the unmasked weight.
    """
    valid = None
    row = torch.ones(tokens, dtype=dtype, device=device) if mask is None else mask.to(dtype)
    if mask is not None and not (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        valid = mask.nonzero()[:, 0]
        row = row[valid]
    scale = torch.ones((), dtype=dtype, device=device)
    if options.reduction == "mean":
        scale = _inverse_or_zero(row.sum() if denominator is None else denominator.to(dtype))
    if labels is None:
        return RowWeights(valid, row, None, None, scale)
    labels = torch.where(labels == options.ignore_index, -1, labels)
    labels = labels if valid is None else labels[valid]
    if options.label_weight == 0:
        return RowWeights(valid, row, labels, None, scale)
    label = row * (labels >= 0) * options.label_weight
    if options.reduction == "mean" and denominator is None:
        # Cross-entropy is averaged over its own tokens: undo the divergence's 1 / sum(row), which `scale` applies to all.
        label = label * (_inverse_or_zero(label.sum() / options.label_weight) * _inverse_or_zero(scale))
    return RowWeights(valid, row, labels, label, scale)


def _inverse_or_zero(total: Tensor) -> Tensor:
    """1 / total, 0 for 0. Of a NaN it is NaN: on a GPU nothing else tells of it."""
    return torch.where(total <= 0, 0.0, 1.0 / total.clamp_min(torch.finfo(total.dtype).tiny))
