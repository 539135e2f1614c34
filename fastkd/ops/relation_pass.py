"""The pass that `relation_kl` makes, as one torch operator with its derivative: tile by tile, scores in, losses and gradients out.

A tile holds some query rows of one (batch, head) pair or all rows of several. Gradients are made while it is there and meet their
upstream gradient in the backward pass; with reduction="none", where every row has one of its own, the pass is made again in the
backward pass with it in the row weights. Nothing is allocated in the loop and the host waits for nothing in it. With backend="triton"
kernels of their own keep the tiles in registers (`relation_triton.py`), but for float64 and head sizes that they have no room for.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import relation_triton
from .backends import choose
from .checks import compute_dtype
from .gradient_in_forward import Results, register, unpack
from .options import literal
from .plan import default_budget
from .row_call import RowCall, RowOptions, RowOutputs

# The row kernel and both backward products read a tile soon after it was written: on a CPU it is to be in the cache still.
_CPU_BUDGET = 16 << 20
_ROW_OPTIONS = RowOptions()


@dataclass(frozen=True)
class RelationOptions:
    """The numbers and names of a call; `relation_kl` documents them."""

    targets: int
    form: str
    reduction: str
    chunk_size: int | None
    memory_budget: int | None
    backend: str

    def to_text(self) -> str:
        """All fields as one string, from which `from_text` makes the same options."""
        return literal(self.targets, self.form, self.reduction, self.chunk_size, self.memory_budget, self.backend)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str) -> RelationOptions:
        """The options that `to_text` wrote."""
        return RelationOptions(*ast.literal_eval(text))


class _Relation:
    """Queries and keys of every (batch, head) pair, (B heads, S, d): a source of scores, and a sink of their gradient."""

    def __init__(self, q: Tensor, k: Tensor, dtype: torch.dtype, grad_q: Tensor | None = None, grad_k: Tensor | None = None) -> None:
        self.scale = q.shape[-1] ** -0.5
        self.q, self.k = (x.flatten(0, 1).to(dtype) for x in (q, k))
        self.grad_q, self.grad_k = (None if x is None else x.flatten(0, 1) for x in (grad_q, grad_k))

    @property
    def is_trained(self) -> bool:
        """Whether q or k take a gradient."""
        return not (self.grad_q is None and self.grad_k is None)

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
    """One target: `bias` (B heads, 1, S), -inf at masked keys; `row_weight` and the `outputs` to be filled, all (B heads, S)."""

    relation: _Relation
    bias: Tensor | None
    row_weight: Tensor
    outputs: Mapping[str, Tensor]
    """By the names of `RowOutputs`."""
    backend: str

    def compare(self, scores: Tensor, teacher: Tensor, pairs: slice, rows: slice, gradient: Tensor | None) -> None:
        """Fill `losses`, and `gradient` with that of the student's masked `scores`, which are used up; `teacher` is scratch."""
        self.relation.write_scores(teacher, pairs, rows, self.bias)
        call = RowCall(
            student=scores.flatten(0, 1),
            teacher=teacher.flatten(0, 1),
            options=_ROW_OPTIONS,
            outputs=RowOutputs(**{name: x[pairs, rows].view(-1) for name, x in self.outputs.items()}),
            row_weight=self.row_weight[pairs, rows].flatten(),
            gradient=None if gradient is None else gradient.flatten(0, 1),
        )
        choose(self.backend, call)(call)


def _make(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    """The gradients lack `scale`, and the upstream gradient unless it is given.

    The call's `query_mask` alone decides what the mean is over; the targets' own ones stand beside it.
    """
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options, given = RelationOptions.from_text(inputs.options), inputs.constants
    student_q, student_k = inputs.student["q"], inputs.student["k"]
    query_mask, weights = given.get("query_mask"), given["weights"]
    target_q, target_k = ([given[f"{index}.{name}"] for index in range(options.targets)] for name in "qk")
    key_masks, query_masks = ([given.get(f"{index}.{name}") for index in range(options.targets)] for name in ("key_mask", "query_mask"))
    if not weights.is_cuda and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"The weights of the targets are {weights.tolist()}; give finite numbers >= 0.")
    cross_entropy = options.form == "cross_entropy"
    dtype = compute_dtype(student_q, student_k, *target_q, *target_k)
    batch, heads, length, _ = student_q.shape
    counted = student_q.new_ones(batch, length, dtype=dtype) if query_mask is None else query_mask.to(dtype)
    row_weights = student_q.new_empty(len(target_q), batch, heads, length, dtype=dtype)
    kept_keys: list[Tensor | None] = []
    queries: list[Tensor | None] = []
    keys: list[Tensor | None] = []
    for index, (key_mask, own_query_mask, weight) in enumerate(zip(key_masks, query_masks, weights.to(dtype), strict=True)):
        row_weight, kept_queries = weight * counted, query_mask
        if own_query_mask is not None:
            row_weight = row_weight * own_query_mask
            kept_queries = own_query_mask if kept_queries is None else kept_queries & own_query_mask
        if key_mask is not None:
            # A batch entry without a key is compared as if it had them all, with weight zero: no softmax is over nothing.
            has_key = key_mask.any(-1, keepdim=True)
            row_weight = row_weight * has_key
            kept_queries = has_key.expand_as(key_mask) if kept_queries is None else kept_queries & has_key
            kept_keys.append(key_mask | ~has_key)
        else:
            kept_keys.append(None)
        keys.append(key_mask)
        queries.append(kept_queries)
        target_q[index], target_k[index] = kept_rows(target_q[index], kept_queries), kept_rows(target_k[index], keys[-1])
        row_weights[index] = row_weight[:, None]
    student_q, student_k = kept_rows(student_q, _any(queries)), kept_rows(student_k, _any(keys))
    if inputs.upstream is not None:
        row_weights *= inputs.upstream
    values = torch.empty_like(row_weights)
    made = [x.new_empty(x.shape, dtype=dtype) if inputs.needs_grad[name] else None for name, x in inputs.student.items()]
    # On CUDA "auto" is the tiles until a GPU run has checked and timed the fused kernels, as in `backends.py`.
    if options.backend == "triton" and relation_triton.has_kernel(dtype, [student_q, *target_q]):
        fill: Callable[..., None] = relation_triton.fill
    else:
        fill = partial(_fill, options=options)
    fill(student_q, student_k, target_q, target_k, kept_keys, row_weights, values, *made, cross_entropy=cross_entropy)
    per_row = (row_weights * values).sum(0)
    scale = 1 / (heads * counted.sum()).clamp_min(1) if options.reduction == "mean" else counted.new_ones(())
    loss = per_row if options.reduction == "none" else per_row.sum() * scale
    gradients = [counted.new_empty(0) if gradient is None else gradient for gradient in made]
    return loss, scale, counted.new_empty(0), gradients


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
    options: RelationOptions,
) -> None:
    """Fill `values` (n, B, heads, S) with the divergences from the n targets, and what there is of gradients with those of their sum,
    weighted with `row_weights`. A key mask leaves every batch entry a key.
    """
    dtype, heads = values.dtype, values.shape[2]
    names = ("student_entropy", "teacher_entropy", "top1_agreement", "acceptance") if cross_entropy else ()
    outputs = {"divergence": values} | {name: torch.empty_like(values) for name in names}
    terms = []
    for index, (q, k, key_mask) in enumerate(zip(target_q, target_k, key_masks, strict=True)):
        bias = None
        if key_mask is not None:
            bias = values.new_zeros(key_mask.shape).masked_fill_(~key_mask, -torch.inf).repeat_interleave(heads, dim=0)[:, None]
        own = {name: x[index].flatten(0, 1) for name, x in outputs.items()}
        terms.append(_Term(_Relation(q, k, dtype), bias, row_weights[index].flatten(0, 1), own, options.backend))
    _loop(_Relation(student_q, student_k, dtype, grad_q, grad_k), terms, options)
    if cross_entropy:
        values += outputs["teacher_entropy"]


def _loop(student: _Relation, terms: Sequence[_Term], options: RelationOptions) -> None:
    """Fill the terms' losses, and what there is of the student's gradients."""
    pairs, length, _ = student.q.shape
    # Scores of both models; with several terms also a copy of the student's for the kernel to use up, and the sum of the gradients.
    buffers = 2 if len(terms) == 1 else 4
    tile_rows = options.chunk_size or _fitting_rows(buffers * length, student.q, options.memory_budget)
    groups, blocks = list(_even_slices(pairs, max(1, tile_rows // max(1, length)))), list(_even_slices(length, tile_rows))
    if not groups or not blocks:
        return
    # Either groups are single pairs or the only block is all rows: what a tile takes of every buffer is contiguous.
    memory = student.q.new_empty(buffers, groups[0].stop, blocks[0].stop, length)
    for group in groups:
        for block in blocks:
            tile = memory[:, : group.stop - group.start, : block.stop - block.start]
            total = (_one_target if len(terms) == 1 else _several_targets)(student, terms, group, block, *tile)
            if student.is_trained:
                student.collect(total, group, block)


def _one_target(student: _Relation, terms: Sequence[_Term], group: slice, block: slice, scores: Tensor, teacher: Tensor) -> Tensor:
    """Fill the term's losses of a tile; return the gradient of the student's scores, over which it lies."""
    student.write_scores(scores, group, block, terms[0].bias)
    terms[0].compare(scores, teacher, group, block, scores if student.is_trained else None)
    return scores


def _several_targets(
    student: _Relation,
    terms: Sequence[_Term],
    group: slice,
    block: slice,
    scores: Tensor,
    teacher: Tensor,
    masked_scores: Tensor,
    total: Tensor,
) -> Tensor:
    """The same of more terms: each masks a copy of the scores; the first writes its gradient to `total`, later ones add theirs."""
    student.write_scores(scores, group, block)
    for index, term in enumerate(terms):
        torch.add(scores, 0 if term.bias is None else term.bias[group], out=masked_scores)
        gradient = masked_scores if index else total
        term.compare(masked_scores, teacher, group, block, gradient if student.is_trained else None)
        if index and student.is_trained:
            total.add_(masked_scores)
    return total


def _fitting_rows(row_elements: int, like: Tensor, memory_budget: int | None) -> int:
    if memory_budget is None:
        memory_budget = default_budget(like.device) if like.is_cuda else _CPU_BUDGET
    return max(1, memory_budget // max(1, row_elements * like.itemsize))


def _even_slices(total: int, most: int) -> Iterator[slice]:
    """Slices of range(total) of nearly one size, none larger than `most`."""
    if total:
        step = -(-total // -(-total // most))
        yield from (slice(start, min(start + step, total)) for start in range(0, total, step))


def _fake(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options, q = RelationOptions.from_text(inputs.options), inputs.student["q"]
    targets = [inputs.constants[f"{index}.{name}"] for index in range(options.targets) for name in "qk"]
    dtype = compute_dtype(*inputs.student.values(), *targets)
    gradients = [x.new_empty(x.shape if inputs.needs_grad[name] else 0, dtype=dtype) for name, x in inputs.student.items()]
    loss = q.new_empty(q.shape[:3] if options.reduction == "none" else (), dtype=dtype)
    return loss, q.new_empty((), dtype=dtype), q.new_empty(0, dtype=dtype), gradients


relation_pass = register("relation_kl", _make, _fake)
