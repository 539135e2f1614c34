"""The pass that `relation_kl` makes, as one torch operator with its derivative: tile by tile, scores in, losses and gradients out.

A tile holds some query rows of one (batch, head) pair or all rows of several. Gradients are made while it is there and meet their
upstream gradient in the backward pass; with reduction="none", where every row has one of its own, the pass is made again in the
backward pass with it in the row weights. Nothing is allocated in the loop and the host waits for nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import compute_dtype
from .backends import RowKernel, row_kernel
from .operator import once_differentiable, times
from .plan import default_budget
from .rows import RowLosses, RowOptions

# The row kernel and both backward products read a tile soon after it was written: on a CPU it is to be in the cache still.
_CPU_BUDGET = 16 << 20
_SCHEMA = (
    "(Tensor student_q, Tensor student_k, Tensor[] target_q, Tensor[] target_k, Tensor[] key_masks, Tensor? query_mask, "
    "Tensor weights, Tensor? upstream, bool[] needs_grad, *, str form, str reduction, int? chunk_size, int? memory_budget, "
    "str backend) -> (Tensor, Tensor, Tensor[])"
)


class _Relation:
    """Queries and keys of every (batch, head) pair, (B heads, S, d): a source of scores, and a sink of their gradient."""

    def __init__(self, q: Tensor, k: Tensor, dtype: torch.dtype, needs_grad: Sequence[bool] = (False, False)) -> None:
        self.shape, self.scale = q.shape, q.shape[-1] ** -0.5
        self.q, self.k = (x.flatten(0, 1).to(dtype) for x in (q, k))
        self.needs_grad = needs_grad
        self.grad_q, self.grad_k = (self.q.new_empty(self.q.shape if wanted else 0) for wanted in needs_grad)

    def write_scores(self, out: Tensor, pairs: slice, rows: slice, bias: Tensor | None = None) -> None:
        """q k^T / sqrt(d) of these rows, plus `bias` (B heads, 1, S)."""
        if bias is not None:
            out.copy_(bias[pairs])
        out.baddbmm_(self.q[pairs, rows], self.k[pairs].mT, beta=0 if bias is None else 1, alpha=self.scale)

    def collect(self, gradient: Tensor, pairs: slice, rows: slice) -> None:
        """Take the scores' gradient back to q and k. The rows of a pair come in order: the first of them write to k, later ones add."""
        wants_q, wants_k = self.needs_grad
        if wants_q:
            self.grad_q[pairs, rows].baddbmm_(gradient, self.k[pairs], beta=0, alpha=self.scale)
        if wants_k:
            self.grad_k[pairs].baddbmm_(gradient.mT, self.q[pairs, rows], beta=1 if rows.start else 0, alpha=self.scale)

    def gradients(self) -> list[Tensor]:
        made = zip((self.grad_q, self.grad_k), self.needs_grad, strict=True)
        return [gradient.view(self.shape) if wanted else gradient for gradient, wanted in made]


@dataclass(frozen=True)
class _Term:
    """One target: `bias` (B heads, 1, S), -inf at masked keys; `row_weight` (B heads, S); `values` (n, B heads, S), to be filled."""

    relation: _Relation
    bias: Tensor | None
    row_weight: Tensor
    values: Tensor
    kernel: RowKernel
    options: RowOptions

    def compare(self, scores: Tensor, teacher: Tensor, pairs: slice, rows: slice, gradient: Tensor | None) -> None:
        """Fill `values`, and `gradient` with that of the student's masked `scores`, which are used up; `teacher` is scratch."""
        self.relation.write_scores(teacher, pairs, rows, self.bias)
        divergence, *others = (x.view(-1) for x in self.values[:, pairs, rows])
        self.kernel(
            scores.flatten(0, 1),
            teacher.flatten(0, 1),
            self.options,
            RowLosses(divergence, None, *others),
            row_weight=self.row_weight[pairs, rows].flatten(),
            gradient=None if gradient is None else gradient.flatten(0, 1),
        )


def _forward(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Sequence[Tensor],
    target_k: Sequence[Tensor],
    key_masks: Sequence[Tensor],
    query_mask: Tensor | None,
    weights: Tensor,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    *,
    form: str,
    reduction: str,
    chunk_size: int | None,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, `scale`, and gradients, which lack `scale` and the upstream gradient unless it is given.

    An empty key mask is none: the derivative of a torch operator takes no list with None in it.
    """
    if not weights.is_cuda and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"The weights of the targets are {weights.tolist()}; give finite numbers >= 0.")
    kernel, options = row_kernel(backend, student_q.device), RowOptions(stats=form == "cross_entropy")
    dtype = compute_dtype(student_q, student_k, *target_q, *target_k)
    batch, heads, length, _ = student_q.shape
    if upstream is None and reduction == "none":
        needs_grad = [False, False]
    student = _Relation(student_q, student_k, dtype, needs_grad)
    counted = student.q.new_ones(batch, length) if query_mask is None else query_mask.to(dtype)
    # Divergence, and for the cross-entropy what the kernel gives with it: the student's entropy, the teacher's, top-1 agreement.
    values = student.q.new_empty(4 if options.stats else 1, len(target_q), batch * heads, length)
    row_weights = torch.empty_like(values[0])
    terms = []
    for index, (q, k, mask, weight) in enumerate(zip(target_q, target_k, key_masks, weights.to(dtype), strict=True)):
        row_weight, bias = weight * counted, None
        if mask.numel():
            # A batch entry without a key is compared as if it had them all, with weight zero: no softmax is over nothing.
            has_key = mask.any(-1, keepdim=True)
            row_weight = row_weight * has_key
            bias = _every_head(torch.zeros_like(counted).masked_fill_(~(mask | ~has_key), -torch.inf), heads)[:, None]
        row_weights[index] = _every_head(row_weight, heads)
        if upstream is not None:
            row_weights[index].mul_(upstream.flatten(0, 1))
        terms.append(_Term(_Relation(q, k, dtype), bias, row_weights[index], values[:, index], kernel, options))
    _loop(student, terms, chunk_size, memory_budget)
    per_row = values[0] + values[2] if options.stats else values[0]
    per_row = (row_weights * per_row).sum(0)
    scale = 1 / (heads * counted.sum()).clamp_min(1) if reduction == "mean" else counted.new_ones(())
    loss = per_row.view(batch, heads, length) if reduction == "none" else per_row.sum() * scale
    return loss, scale, student.gradients()


def _loop(student: _Relation, terms: Sequence[_Term], chunk_size: int | None, memory_budget: int | None) -> None:
    """Fill the terms' values, and the student's gradients if it needs any."""
    pairs, length, _ = student.q.shape
    # Scores of both models; with several terms also a copy of the student's for the kernel to use up, and the sum of the gradients.
    buffers = 2 if len(terms) == 1 else 4
    tile_rows = chunk_size or _fitting_rows(buffers * length, student.q, memory_budget)
    groups, blocks = list(_even_slices(pairs, max(1, tile_rows // max(1, length)))), list(_even_slices(length, tile_rows))
    if not groups or not blocks:
        return
    memory = student.q.new_empty(buffers, groups[0].stop, blocks[0].stop, length)
    wants_gradient = any(student.needs_grad)
    for group in groups:
        for block in blocks:
            # Either groups are single pairs or the only block is all rows: what is left of every buffer is contiguous.
            scores, teacher, *more = memory[:, : group.stop - group.start, : block.stop - block.start]
            if not more:
                student.write_scores(scores, group, block, terms[0].bias)
                terms[0].compare(scores, teacher, group, block, scores if wants_gradient else None)
                total = scores
            else:
                own, total = more
                student.write_scores(scores, group, block)
                for index, term in enumerate(terms):
                    torch.add(scores, 0 if term.bias is None else term.bias[group], out=own)
                    gradient = own if index else total
                    term.compare(own, teacher, group, block, gradient if wants_gradient else None)
                    if index and wants_gradient:
                        total.add_(own)
            if wants_gradient:
                student.collect(total, group, block)


def _fitting_rows(row_elements: int, like: Tensor, memory_budget: int | None) -> int:
    if memory_budget is None:
        memory_budget = default_budget(like.device) if like.is_cuda else _CPU_BUDGET
    return max(1, memory_budget // max(1, row_elements * like.itemsize))


def _even_slices(total: int, most: int) -> Iterator[slice]:
    """Slices of range(total) of nearly one size, none larger than `most`."""
    if total:
        step = -(-total // -(-total // most))
        yield from (slice(start, min(start + step, total)) for start in range(0, total, step))


def _every_head(per_batch: Tensor, heads: int) -> Tensor:
    """(B, S) as (B heads, S)."""
    return per_batch.repeat_interleave(heads, dim=0)


relation_pass = torch.library.custom_op("fastkd::relation_kl", _forward, mutates_args=(), schema=_SCHEMA)


@relation_pass.register_fake
def _fake(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Sequence[Tensor],
    target_k: Sequence[Tensor],
    key_masks: Sequence[Tensor],
    query_mask: Tensor | None,
    weights: Tensor,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    *,
    reduction: str,
    **_scalars: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = compute_dtype(student_q, student_k, *target_q, *target_k)
    makes = upstream is not None or reduction != "none"
    gradients = [
        x.new_empty(x.shape if makes and wanted else 0, dtype=dtype)
        for x, wanted in zip((student_q, student_k), needs_grad, strict=True)
    ]
    loss = student_q.new_empty(student_q.shape[:3] if reduction == "none" else (), dtype=dtype)
    return loss, student_q.new_empty((), dtype=dtype), gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    student_q, student_k, target_q, target_k, key_masks, query_mask, weights, _upstream, needs_grad = inputs
    _, scale, gradients = output
    # Nobody differentiates the gradients: no zeros of their size are to be made for them.
    ctx.set_materialize_grads(False)
    ctx.needs_grad, ctx.dtypes, ctx.scalars = needs_grad, [student_q.dtype, student_k.dtype], keyword_only_inputs
    ctx.targets, ctx.deferred = len(target_q), keyword_only_inputs["reduction"] == "none"
    inputs = (student_q, student_k, query_mask, weights, *target_q, *target_k, *key_masks)
    ctx.save_for_backward(*(inputs if ctx.deferred else (scale, *gradients)))


def _backward(ctx: Any, upstream: Tensor | None, *_others: Any) -> tuple[Any, ...]:
    nothing = *[[None] * ctx.targets] * 3, *[None] * 4
    if upstream is None:
        return None, None, *nothing
    upstream = upstream.detach()
    if ctx.deferred:
        student_q, student_k, query_mask, weights, *rest = ctx.saved_tensors
        targets = [rest[start : start + ctx.targets] for start in range(0, len(rest), ctx.targets)]
        *_, made = relation_pass(student_q, student_k, *targets, query_mask, weights, upstream, ctx.needs_grad, **ctx.scalars)
        gradients = [g.to(dtype) if wanted else None for g, dtype, wanted in zip(made, ctx.dtypes, ctx.needs_grad, strict=True)]
    else:
        scale, *made = (x.detach() for x in ctx.saved_tensors)
        factor = upstream * scale
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [
            times(g, factor, dtype, in_place) if wanted else None
            for g, dtype, wanted in zip(made, ctx.dtypes, ctx.needs_grad, strict=True)
        ]
    return *once_differentiable(gradients), *nothing


relation_pass.register_autograd(_backward, setup_context=_setup)
