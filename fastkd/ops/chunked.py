"""The one pass that every logit loss makes: chunk by chunk, logits in, losses and gradients out, one chunk of logits alive.

Gradients are computed in the forward pass and scaled by the upstream gradient in the backward pass; only reduction="none", whose
upstream gradient differs from row to row, makes the pass again in backward, with that gradient as row weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import RowKernel
from .plan import Plan
from .rows import RowLosses, RowOptions


class LogitSource(Protocol):
    """Rows of logits that can be made a chunk at a time."""

    def load(self, rows: slice, out: Tensor) -> None:
        """Write the logits of `rows` into `out` (rows, V)."""


class StudentSource(LogitSource, Protocol):
    """A source that also takes the gradient of its logits back to what they were made of."""

    def begin(self, needed: Sequence[bool]) -> None:
        """Allocate gradients for the inputs that need one."""

    def collect(self, rows: slice, gradient: Tensor) -> None:
        """Add the gradient of the logits of `rows` (rows, V) to the inputs' gradients."""

    def finish(self, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The inputs' gradients times `scale` (0-dim), each in its input's dtype."""


@dataclass(frozen=True)
class LossStats:
    """Per-token values in the shape of the leading dims, zero where masked; no gradient flows. Nats; `divergence` carries T^2.

    Entropies are those of the tempered distributions; `top1_agreement` is 1 where both models rank the same token first.
    """

    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None


@dataclass
class Problem:
    """One call of a loss, validated and packed: only the valid rows, weights of order one, everything else in `scale`.

    loss = scale * sum_i (row_weight_i T^2 D_i + label_weight_i CE_i). Keeping 1 / denominator out of the row weights keeps 16-bit
    gradients from underflowing.
    """

    student: StudentSource
    teacher: LogitSource | None
    options: RowOptions
    plan: Plan
    kernel: RowKernel
    dtype: torch.dtype
    device: torch.device
    row_weight: Tensor
    labels: Tensor | None
    label_weight: Tensor | None
    scale: Tensor
    per_token: bool

    def run(self, row_weight: Tensor, label_weight: Tensor | None, needed: Sequence[bool]) -> RowLosses:
        """Make the pass. Gradients are left in the student's source if any is `needed`."""
        rows, vocabulary = self.plan.chunk_rows, self.plan.vocabulary
        student_buffer = torch.empty(rows, vocabulary, dtype=self.dtype, device=self.device)
        teacher_buffer = torch.empty_like(student_buffer) if self.teacher is not None else None
        losses = self._empty_losses()
        gradient = any(needed)
        self.student.begin(needed)
        for chunk in self.plan.slices():
            size = chunk.stop - chunk.start
            student_logits = student_buffer[:size]
            self.student.load(chunk, student_logits)
            teacher_logits = None
            if self.teacher is not None and teacher_buffer is not None:
                teacher_logits = teacher_buffer[:size]
                self.teacher.load(chunk, teacher_logits)
            self.kernel(
                student_logits,
                teacher_logits,
                self.options,
                RowLosses(*(None if x is None else x[chunk] for x in _values(losses))),
                row_weight=row_weight[chunk],
                labels=None if self.labels is None else self.labels[chunk],
                label_weight=None if label_weight is None else label_weight[chunk],
                gradient=gradient,
            )
            if gradient:
                self.student.collect(chunk, student_logits)
        return losses

    def weighted(self, losses: RowLosses) -> Tensor:
        """row_weight_i T^2 D_i + label_weight_i CE_i, (N,)."""
        total = torch.zeros(self.plan.tokens, dtype=self.dtype, device=self.device)
        if losses.divergence is not None:
            total += self.row_weight * losses.divergence
        if losses.cross_entropy is not None and self.label_weight is not None:
            total += self.label_weight * losses.cross_entropy
        return total

    def _empty_losses(self) -> RowLosses:
        def column(wanted: bool) -> Tensor | None:
            return torch.empty(self.plan.tokens, dtype=self.dtype, device=self.device) if wanted else None

        teacher, stats = self.teacher is not None, self.options.stats and self.teacher is not None
        return RowLosses(column(teacher), column(self.labels is not None), column(stats), column(stats), column(stats))


class ChunkedLoss(torch.autograd.Function):
    """(problem, *inputs of the student's source) -> loss and the per-row statistics."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, needed: Sequence[bool], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        now = [False] * len(needed) if problem.per_token else needed
        losses = problem.run(problem.row_weight, problem.label_weight, now)
        total = problem.weighted(losses)
        if problem.per_token:
            ctx.problem, ctx.needed = problem, needed
        else:
            total = total.sum() * problem.scale
            gradients = problem.student.finish(problem.scale) if any(needed) else tuple(None for _ in inputs)
            ctx.save_for_backward(*gradients)
        statistics = _values(losses)
        ctx.mark_non_differentiable(*(x for x in statistics if x is not None))
        ctx.set_materialize_grads(False)
        return total, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        if hasattr(ctx, "problem"):
            problem: Problem = ctx.problem
            label_weight = None if problem.label_weight is None else problem.label_weight * upstream
            problem.run(problem.row_weight * upstream, label_weight, ctx.needed)
            return None, None, *problem.student.finish(problem.scale)
        return None, None, *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)


def evaluate(
    problem: Problem, inputs: Sequence[Tensor | None], leading: torch.Size, valid: Tensor | None, return_stats: bool
) -> Tensor | tuple[Tensor, LossStats]:
    """Run `problem`, spread per-token results over the leading dims, and return what the public functions return."""
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    loss, *statistics = ChunkedLoss.apply(problem, needed, *inputs)

    def spread(values: Tensor) -> Tensor:
        if valid is not None:
            values = values.new_zeros(leading.numel()).index_copy(0, valid, values)
        return values.view(leading)

    if problem.per_token:
        loss = spread(loss)
    if not return_stats:
        return loss
    return loss, LossStats(*(None if x is None else spread(x) for x in statistics))


def _values(losses: RowLosses) -> tuple[Tensor | None, ...]:
    return tuple(getattr(losses, f.name) for f in fields(losses))
