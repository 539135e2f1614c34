"""The pass of `projected_mse`: a chunk of residuals at a time, squared, reduced and turned into the student's gradients in cache.

The residual of two filtered states is one product, [H_s | H_t] [W_s | -W_t]^T: neither it nor a filtered state is ever kept. Masked
rows are packed out chunk by chunk; their number is read from the device once, and while a CUDA graph is captured, where nothing can
be read, they stay in with weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import LossOptions, check_row_values, compute_dtype
from .chunked import RowWeights, row_weights
from .gemm import mm_, multiplies_unraised
from .plan import KNEE_ROWS, Plan, plan_chunks

# Bytes of residual in a chunk, unless that is fewer rows than the weight gradient's knee: what a cache holds.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}


def residual_pass(
    student: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    mask: Tensor | None,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    options: LossOptions,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Make the pass over checked, flattened arguments: the loss, `factor`, and the student's gradients, not yet times `factor`.

    student, teacher: states (N, d), weight (d_f, d) or None for the identity, bias (d_f,) or None. mask, upstream: (N,) or None; the
    gradients carry both.
    """
    (states, weight, bias), (teacher_states, teacher_weight, teacher_bias) = student, teacher
    assert states is not None and teacher_states is not None
    tokens, width = states.shape[0], states.shape[1] if weight is None else weight.shape[0]
    check_row_values(options, width, mask, None)
    dtype = compute_dtype(states, teacher_states)
    weights = row_weights(options, tokens, dtype, states.device, mask, None, None)
    row, peak = _gradient_rows(weights, mask, upstream)
    plan = _plan(weights.row.numel(), width, states.device, dtype, options)
    own = _Side(states, weight, weights.valid, dtype, options.operand_dtype)
    other = _Side(teacher_states, None if teacher_weight is None else -teacher_weight, weights.valid, dtype, options.operand_dtype)
    biases = [x.to(dtype) for x in (bias, None if teacher_bias is None else -teacher_bias) if x is not None]
    shift = torch.stack(biases).sum(0) if biases else None
    gradients = empty_gradients(student, needs_grad, dtype)
    sink = _Gradients(own, gradients, needs_grad, plan, dtype)
    buffer = states.new_empty(plan.chunk_rows, width, dtype=dtype)
    values = states.new_empty(plan.tokens, dtype=dtype)
    for rows in plan.slices():
        residual = buffer[: rows.stop - rows.start]
        inputs, targets = own.rows(rows), other.rows(rows)
        if own.weight is None:
            residual.copy_(inputs)
        else:
            mm_(residual, inputs, own.weight.T)
        if other.weight is None:
            residual.sub_(targets)
        else:
            mm_(residual, targets, other.weight.T, accumulate=True)
        if shift is not None:
            residual.add_(shift)
        torch.linalg.vector_norm(residual, dim=1, out=values[rows])
        if any(needs_grad):
            sink.collect(rows, residual if row is None else residual.mul_(row[rows, None]), inputs)
    total = weights.row * values.square_() / width
    loss = weights.spread(total, tokens) if options.reduction == "none" else total.sum() * weights.scale
    return loss, weights.scale * peak * (2 / width), gradients


def empty_gradients(student: Sequence[Tensor | None], needs_grad: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """One a student's tensor, of no elements where none is needed.

    That of the states is in their own dtype, for it lives until the backward pass. But not in float16: not yet divided by the number
    of tokens, it may be out of range.
    """
    states = student[0]
    assert states is not None
    dtypes = (dtype if states.dtype == torch.float16 else states.dtype, dtype, dtype)
    return [
        states.new_empty(x.shape if x is not None and wanted else 0, dtype=own)
        for x, wanted, own in zip(student, needs_grad, dtypes, strict=True)
    ]


class _Side:
    """One model's states (N, d) and weight (d_f, d), None for the identity, a few rows at a time and as GEMMs take them."""

    def __init__(
        self, states: Tensor, weight: Tensor | None, valid: Tensor | None, dtype: torch.dtype, operand_dtype: torch.dtype | None
    ) -> None:
        self.states, self.valid = states, valid
        self.operand_dtype = operand_dtype or states.dtype
        unraised = multiplies_unraised(self.operand_dtype, dtype, states.device)
        self.gemm_dtype = self.operand_dtype if unraised else dtype
        self.weight = None if weight is None else self._operand(weight)

    def rows(self, rows: slice) -> Tensor:
        states = self.states[rows] if self.valid is None else self.states.index_select(0, self.valid[rows])
        return states if self.weight is None else self._operand(states)

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self.operand_dtype).to(self.gemm_dtype)


class _Gradients:
    """The student's gradients of sum_i row_i |r_i|^2 / 2, from residuals r_i that were multiplied by row_i."""

    def __init__(self, student: _Side, gradients: Sequence[Tensor], needs_grad: Sequence[bool], plan: Plan, dtype: torch.dtype) -> None:
        self.student = student
        self.states, self.weight, self.bias = gradients
        self.wants_states, self.wants_weight, self.wants_bias = needs_grad
        self.bias.zero_()
        if student.valid is not None:
            self.states.zero_()
        if not plan.tokens:
            self.weight.zero_()
        # Where products can be written to their place at once, they are.
        self.product: Tensor | None = None
        if student.valid is not None or self.states.dtype != dtype:
            rows = plan.chunk_rows if self.wants_states and student.weight is not None else 0
            self.product = self.states.new_empty(rows, student.states.shape[1], dtype=dtype)

    def collect(self, rows: slice, residual: Tensor, inputs: Tensor) -> None:
        """Add what `rows` give, whose states are `inputs`. The first chunk writes the weight's gradient, later ones add."""
        weight = self.student.weight
        if self.wants_bias:
            self.bias += residual.sum(0)
        if weight is None:
            if self.wants_states:
                self._store(rows, residual)
            return
        operand = residual.to(weight.dtype)
        if self.wants_weight:
            mm_(self.weight, operand.T, inputs, accumulate=rows.start > 0)
        if not self.wants_states:
            return
        if self.product is None:
            mm_(self.states[rows], operand, weight)
        else:
            product = self.product[: residual.shape[0]]
            mm_(product, operand, weight)
            self._store(rows, product)

    def _store(self, rows: slice, gradient: Tensor) -> None:
        if self.student.valid is None:
            self.states[rows].copy_(gradient)
        else:
            self.states.index_copy_(0, self.student.valid[rows], gradient.to(self.states.dtype))


def _gradient_rows(weights: RowWeights, mask: Tensor | None, upstream: Tensor | None) -> tuple[Tensor | None, float | Tensor]:
    """What residuals are multiplied by, (n,), or None where that is one, and what is left for the end.

    The former is of order one, so that a weighted residual of 16 bits does not underflow.
    """
    is_packed = weights.valid is not None and mask is not None and mask.dtype == torch.bool
    if upstream is None and (mask is None or is_packed):
        return None, 1.0
    row = weights.row
    if upstream is not None:
        upstream = upstream.to(row.dtype)
        row = row * (upstream if weights.valid is None else upstream[weights.valid])
    if not row.numel():
        return row, 1.0
    peak = row.abs().amax().clamp_min(torch.finfo(row.dtype).tiny)
    return row / peak, peak


def _plan(tokens: int, width: int, device: torch.device, dtype: torch.dtype, options: LossOptions) -> Plan:
    default = max(_CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"]), KNEE_ROWS * width * dtype.itemsize)
    return plan_chunks(
        tokens,
        width,
        device=device,
        element_size=dtype.itemsize,
        has_teacher=False,
        chunk_size=options.chunk_size,
        memory_budget=options.memory_budget or default,
    )
