"""The pass that `relation_kl` makes, as one torch operator with its derivative: tile by tile, scores in, losses and gradients out.

A tile holds some query rows of one (batch, head) pair or all rows of several. Gradients are made while it is there and meet their
upstream gradient in the backward pass; with reduction="none", where every row has one of its own, the pass is made again in the
backward pass with it in the row weights. Nothing is allocated in the loop and the host waits for nothing in it. With backend="triton"
kernels of their own keep the tiles in registers (`relation_triton.py`), but for float64 and head sizes that they have no room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import relation_triton
from .arguments import compute_dtype
from .backends import RowKernel, row_kernel
from .operator import finished_gradients
from .plan import default_budget
from .rows import RowLosses, RowOptions

# The row kernel and both backward products read a tile soon after it was written: on a CPU it is to be in the cache still.
_CPU_BUDGET = 16 << 20
_SCHEMA = (
    "(Tensor student_q, Tensor student_k, Tensor[] target_q, Tensor[] target_k, Tensor[] key_masks, Tensor[] query_masks, "
    "Tensor? query_mask, Tensor weights, Tensor? upstream, bool[] needs_grad, *, str form, str reduction, int? chunk_size, "
    "int? memory_budget, str backend) -> (Tensor, Tensor, Tensor[])"
)


class _Relation:
    """Queries and keys of every (batch, head) pair, (B heads, S, d): a source of scores, and a sink of their gradient."""

    def __init__(self, q: Tensor, k: Tensor, dtype: torch.dtype, grad_q: Tensor | None = None, grad_k: Tensor | None = None) -> None:
        self.scale = q.shape[-1] ** -0.5
        self.q, self.k = (x.flatten(0, 1).to(dtype) for x in (q, k))
        self.grad_q, self.grad_k = (None if x is None else x.flatten(0, 1) for x in (grad_q, grad_k))

    def write_scores(self, out: Tensor, pairs: slice, rows: slice, bias: Tensor | None = None) -> None:
        """q k^T / sqrt(d) of these rows, plus `bias` (B heads, 1, S)."""
        if bias is not None:
            out.copy_(bias[pairs])
        out.baddbmm_(self.q[pairs, rows], self.k[pairs].mT, beta=0 if bias is None else 1, alpha=self.scale)

    def collect(self, gradient: Tensor, pairs: slice, rows: slice) -> None:
        """Take the scores' gradient back to q and k. The rows of a pair come in order: the first of them write to k, later ones add."""
        if self.grad_q is not None:
            self.grad_q[pairs, rows].baddbmm_(gradient, self.k[pairs], beta=0, alpha=self.scale)
        if self.grad_k is not None:
            self.grad_k[pairs].baddbmm_(gradient.mT, self.q[pairs, rows], beta=1 if rows.start else 0, alpha=self.scale)


@dataclass(frozen=True)
class _Term:
    """One target: `bias` (B heads, 1, S), -inf at masked keys; `row_weight` and the `losses` to be filled, all (B heads, S)."""

    relation: _Relation
    bias: Tensor | None
    row_weight: Tensor
    losses: Sequence[Tensor]
    kernel: RowKernel
    options: RowOptions

    def compare(self, scores: Tensor, teacher: Tensor, pairs: slice, rows: slice, gradient: Tensor | None) -> None:
        """Fill `losses`, and `gradient` with that of the student's masked `scores`, which are used up; `teacher` is scratch."""
        self.relation.write_scores(teacher, pairs, rows, self.bias)
        divergence, *statistics = (x[pairs, rows].view(-1) for x in self.losses)
        self.kernel(
            scores.flatten(0, 1),
            teacher.flatten(0, 1),
            self.options,
            RowLosses(divergence, None, *statistics),
            row_weight=self.row_weight[pairs, rows].flatten(),
            gradient=None if gradient is None else gradient.flatten(0, 1),
        )


def _forward(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Sequence[Tensor],
    target_k: Sequence[Tensor],
    key_masks: Sequence[Tensor],
    query_masks: Sequence[Tensor],
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

    An empty mask of a target is none: the derivative of a torch operator takes no list with None in it. `query_mask` is the call's,
    beside which `query_masks` are the targets' own: it alone decides what the mean is over.
    """
    if not weights.is_cuda and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"The weights of the targets are {weights.tolist()}; give finite numbers >= 0.")
    kernel, cross_entropy = row_kernel(backend, student_q.device), form == "cross_entropy"
    dtype = compute_dtype(student_q, student_k, *target_q, *target_k)
    batch, heads, length, _ = student_q.shape
    if upstream is None and reduction == "none":
        needs_grad = [False, False]
    counted = student_q.new_ones(batch, length, dtype=dtype) if query_mask is None else query_mask.to(dtype)
    row_weights = student_q.new_empty(len(target_q), batch, heads, length, dtype=dtype)
    target_q, target_k = list(target_q), list(target_k)
    kept_keys: list[Tensor | None] = []
    queries: list[Tensor | None] = []
    keys: list[Tensor | None] = []
    for index, (key_mask, own_query_mask, weight) in enumerate(zip(key_masks, query_masks, weights.to(dtype), strict=True)):
        row_weight, kept_queries = weight * counted, query_mask
        if own_query_mask.numel():
            row_weight = row_weight * own_query_mask
            kept_queries = own_query_mask if kept_queries is None else kept_queries & own_query_mask
        if key_mask.numel():
            # A batch entry without a key is compared as if it had them all, with weight zero: no softmax is over nothing.
            has_key = key_mask.any(-1, keepdim=True)
            row_weight = row_weight * has_key
            kept_queries = has_key.expand_as(key_mask) if kept_queries is None else kept_queries & has_key
            kept_keys.append(key_mask | ~has_key)
        else:
            kept_keys.append(None)
        keys.append(key_mask if key_mask.numel() else None)
        queries.append(kept_queries)
        target_q[index], target_k[index] = kept_rows(target_q[index], kept_queries), kept_rows(target_k[index], keys[-1])
        row_weights[index] = row_weight[:, None]
    student_q, student_k = kept_rows(student_q, _any(queries)), kept_rows(student_k, _any(keys))
    if upstream is not None:
        row_weights *= upstream
    values = torch.empty_like(row_weights)
    made = [x.new_empty(x.shape, dtype=dtype) if wanted else None for x, wanted in zip((student_q, student_k), needs_grad, strict=True)]
    # On CUDA "auto" is the tiles until a GPU run has checked and timed the fused kernels, as in `backends.py`.
    if backend == "triton" and relation_triton.has_kernel(dtype, [student_q, *target_q]):
        fill: Callable[..., None] = relation_triton.fill
    else:
        fill = partial(_fill, kernel=kernel, chunk_size=chunk_size, memory_budget=memory_budget)
    fill(student_q, student_k, target_q, target_k, kept_keys, row_weights, values, *made, cross_entropy=cross_entropy)
    per_row = (row_weights * values).sum(0)
    scale = 1 / (heads * counted.sum()).clamp_min(1) if reduction == "mean" else counted.new_ones(())
    loss = per_row if reduction == "none" else per_row.sum() * scale
    return loss, scale, [counted.new_empty(0) if gradient is None else gradient for gradient in made]


def kept_rows(x: Tensor, *masks: Tensor | None) -> Tensor:
    """Put zeros where masks (B, S), True = keep, leave rows of `x` (B, heads, S, d) out: 0 * NaN would have a part in every product."""
    for mask in masks:
        if mask is not None:
            x = x.masked_fill(~mask[:, None, :, None], 0.0)
    return x


def _any(masks: Sequence[Tensor | None]) -> Tensor | None:
    """What some mask keeps; None: everything, as a mask that is None does."""
    kept: Tensor | None = None
    for mask in masks:
        if mask is None:
            return None
        kept = mask if kept is None else kept | mask
    return kept


def _fill(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Sequence[Tensor],
    target_k: Sequence[Tensor],
    key_masks: Sequence[Tensor | None],
    row_weights: Tensor,
    values: Tensor,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    *,
    cross_entropy: bool,
    kernel: RowKernel,
    chunk_size: int | None,
    memory_budget: int | None,
) -> None:
    """Fill `values` (n, B, heads, S) with the divergences from the n targets, and what there is of gradients with those of their sum,
    weighted with `row_weights`. A key mask leaves every batch entry a key.
    """
    dtype, heads = values.dtype, values.shape[2]
    options = RowOptions(stats=cross_entropy)
    # What the kernel gives with the teacher's entropy: the student's before it, top-1 agreement after it.
    statistics = values.new_empty(3 if cross_entropy else 0, *values.shape)
    terms = []
    for index, (q, k, key_mask) in enumerate(zip(target_q, target_k, key_masks, strict=True)):
        bias = None
        if key_mask is not None:
            bias = values.new_zeros(key_mask.shape).masked_fill_(~key_mask, -torch.inf).repeat_interleave(heads, dim=0)[:, None]
        losses = [x.flatten(0, 1) for x in (values[index], *statistics[:, index])]
        terms.append(_Term(_Relation(q, k, dtype), bias, row_weights[index].flatten(0, 1), losses, kernel, options))
    _loop(_Relation(student_q, student_k, dtype, grad_q, grad_k), terms, chunk_size, memory_budget)
    if cross_entropy:
        values += statistics[1]


def _loop(student: _Relation, terms: Sequence[_Term], chunk_size: int | None, memory_budget: int | None) -> None:
    """Fill the terms' losses, and what there is of the student's gradients."""
    pairs, length, _ = student.q.shape
    # Scores of both models; with several terms also a copy of the student's for the kernel to use up, and the sum of the gradients.
    buffers = 2 if len(terms) == 1 else 4
    tile_rows = chunk_size or _fitting_rows(buffers * length, student.q, memory_budget)
    groups, blocks = list(_even_slices(pairs, max(1, tile_rows // max(1, length)))), list(_even_slices(length, tile_rows))
    if not groups or not blocks:
        return
    memory = student.q.new_empty(buffers, groups[0].stop, blocks[0].stop, length)
    wants_gradient = not (student.grad_q is None and student.grad_k is None)
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


relation_pass = torch.library.custom_op("fastkd::relation_kl", _forward, mutates_args=(), schema=_SCHEMA)


@relation_pass.register_fake
def _fake(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Sequence[Tensor],
    target_k: Sequence[Tensor],
    key_masks: Sequence[Tensor],
    query_masks: Sequence[Tensor],
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
    student_q, student_k, target_q, target_k, key_masks, query_masks, query_mask, weights, _upstream, needs_grad = inputs
    _, scale, gradients = output
    # Nobody differentiates the gradients: no zeros of their size are to be made for them.
    ctx.set_materialize_grads(False)
    ctx.needs_grad, ctx.dtypes, ctx.scalars = needs_grad, [student_q.dtype, student_k.dtype], keyword_only_inputs
    ctx.targets, ctx.deferred = len(target_q), keyword_only_inputs["reduction"] == "none"
    inputs = (student_q, student_k, query_mask, weights, *target_q, *target_k, *key_masks, *query_masks)
    ctx.save_for_backward(*(inputs if ctx.deferred else (scale, *gradients)))


def _backward(ctx: Any, upstream: Tensor | None, *_others: Any) -> tuple[Any, ...]:
    nothing = *[[None] * ctx.targets] * 4, *[None] * 4
    if upstream is None:
        return None, None, *nothing
    if ctx.deferred:
        student_q, student_k, query_mask, weights, *rest = ctx.saved_tensors
        targets = [rest[start : start + ctx.targets] for start in range(0, len(rest), ctx.targets)]
        *_, made = relation_pass(student_q, student_k, *targets, query_mask, weights, upstream.detach(), ctx.needs_grad, **ctx.scalars)
        return *finished_gradients(ctx, made, None), *nothing
    scale, *made = ctx.saved_tensors
    return *finished_gradients(ctx, made, upstream * scale), *nothing


relation_pass.register_autograd(_backward, setup_context=_setup)
