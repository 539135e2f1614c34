"""`linear_kl_div` with a `group`: both heads split by vocabulary rows over the processes of a tensor-parallel group.

Every process makes the logits of its own rows for all tokens, a chunk at a time. What a softmax needs of the other processes are a few
numbers a token: of every chunk the maxima of both models (an all-reduce, MAX), then normalisers and sums (an all-reduce, SUM); a
divergence whose terms need both normalisers takes one more. With them the gradient of the logits is local, and so is that of a shard of
the head. That of the hidden states is a sum over the shards: one all-reduce, in the backward pass.

Processes that call a collective a different number of times wait for each other for ever. So its calls depend on nothing but numbers
that all processes have agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import LossOptions, check_row_values, compute_dtype
from .chunked import RowWeights, row_weights
from .given_logits import GivenLogits
from .kl import kl_div_reference
from .linear_logits import LinearLogits
from .operator import finished_gradients
from .plan import Plan, plan_chunks
from .rows import _CPU_BLOCK_ELEMENTS, _GPU_BLOCK_ELEMENTS, RowLosses, RowOptions, _value_and_coefficient, _weighted

P = ParamSpec("P")
R = TypeVar("R")
_LINEAR = ("forward_kl", "reverse_kl")
"""Divergences whose sums are taken before the normalisers are known."""


def check_group(group: Any, vocab_index: Tensor | None, options: LossOptions) -> None:
    """Refuse what a split vocabulary does not have, with the same sentence on every process."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; give a torch.distributed.ProcessGroup that this process is a member of "
            "(of a DeviceMesh: mesh.get_group())."
        )
    if vocab_index is not None:
        raise ValueError(
            "vocab_index picks rows of a whole teacher, and group= takes the teacher's shard: pass the rows of the teacher's head that "
            "stand behind the student's shard, teacher_weight[vocab_index[shard]]."
        )
    if options.backend not in ("auto", "torch"):
        raise ValueError(f"backend={options.backend!r} has no kernel for a shard of the vocabulary; use 'auto' or 'torch' with group=.")
    if options.return_stats or options.return_losses:
        raise ValueError("return_stats is not available with group=; leave it out, or take reduction='none' for the losses.")
    if options.grad_filter is not None:
        raise ValueError(f"grad_filter={options.grad_filter} is not available with group=; leave it out.")
    if options.teacher_precision != "full":
        raise ValueError(f"teacher_precision={options.teacher_precision!r} is not available with group=; leave it at 'full'.")


_uncompiled: Callable[[Callable[P, R]], Callable[P, R]] = torch.compiler.disable  # which says nothing of types


@_uncompiled
def vocab_parallel_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    options: LossOptions,
    leading: torch.Size,
    group: dist.ProcessGroup,
    *,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
) -> Tensor:
    """What `linear_kl_div` returns with a `group`, from arguments that it has checked and flattened."""
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in student]
    apply: Callable[..., Tensor] = _VocabParallel.apply
    loss = apply(group, options, len(student), needs_grad, mask, labels, denominator, *student, *teacher)
    return loss.view(leading) if options.reduction == "none" else loss


class _VocabParallel(torch.autograd.Function):
    """Gradients are made in the forward pass. Where every token has an upstream gradient of its own (reduction="none") they are made in
    the backward pass, again without a collective: the normalisers are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        options: LossOptions,
        students: int,
        needs_grad: Sequence[bool],
        mask: Tensor | None,
        labels: Tensor | None,
        denominator: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        student, teacher = tensors[:students], tensors[students:]
        tokens, vocabulary = student[0].shape[0], student[1].shape[0]
        dtype = compute_dtype(student[0], teacher[0])
        weights = row_weights(options, tokens, dtype, student[0].device, mask, labels, denominator)
        # Logits of both models are alive together, so a row is as wide as two.
        plan = plan_chunks(
            weights.row.numel(),
            vocabulary,
            device=student[0].device,
            element_size=2 * dtype.itemsize,
            has_teacher=False,
            chunk_size=options.chunk_size,
            memory_budget=options.memory_budget,
        )
        teacher_rows = teacher[0].shape[1] if len(teacher) == 1 else teacher[1].shape[0]
        shard = _agree(tokens, plan, teacher_rows, group, student[0].device)
        check_row_values(options, shard.vocabulary, mask, labels, denominator)
        norms = Norms(*torch.zeros(len(Norms._fields), plan.tokens, dtype=dtype, device=student[0].device))
        losses = torch.zeros(2, plan.tokens, dtype=dtype, device=student[0].device)
        deferred = options.reduction == "none"
        makes = [False] * students if deferred else needs_grad
        source = LinearLogits(student, weights.valid, shard.plan.chunk_rows, dtype, options.operand_dtype, needs_grad=makes)
        _loop(source, teacher, shard, weights, options, norms, any(makes), losses, group)
        ctx.set_materialize_grads(False)
        ctx.group, ctx.options, ctx.students, ctx.needs_grad, ctx.shard = group, options, students, needs_grad, shard
        ctx.deferred, ctx.dtypes = deferred, [x.dtype for x in student]
        kept = [mask, labels, denominator, *norms, *tensors] if deferred else [weights.scale, *source.gradients()]
        ctx.save_for_backward(*kept)
        total = weights.total(RowLosses(*losses))
        return weights.spread(total, tokens) if deferred else total.sum() * weights.scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
        teachers = len(ctx.needs_input_grad) - 7 - ctx.students
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.deferred:
            factor, *made = _deferred_gradients(ctx, upstream.detach())
        else:
            scale, *made = ctx.saved_tensors
            factor = upstream * scale
        if ctx.needs_grad[0]:
            if not ctx.deferred and torch._C._autograd._get_current_graph_task_keep_graph():
                made[0] = made[0].clone()  # the saved one will be asked for again
            dist.all_reduce(made[0], dist.ReduceOp.SUM, ctx.group)
        return *(None,) * 7, *finished_gradients(ctx, made, factor), *(None,) * teachers


@torch.no_grad()
def _deferred_gradients(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """What the gradients are still to be multiplied by, and they, with `upstream`, one number a token, multiplied in; no collective."""
    mask, labels, denominator, *saved = ctx.saved_tensors
    norms, tensors = Norms(*saved[: len(Norms._fields)]), saved[len(Norms._fields) :]
    student, teacher = tensors[: ctx.students], tensors[ctx.students :]
    dtype = norms.student_max.dtype
    weights = row_weights(ctx.options, student[0].shape[0], dtype, student[0].device, mask, labels, denominator)
    rows, operand_dtype = ctx.shard.plan.chunk_rows, ctx.options.operand_dtype
    source = LinearLogits(student, weights.valid, rows, dtype, operand_dtype, needs_grad=ctx.needs_grad)
    weights = weights.times(upstream.to(dtype), linear=True)
    _loop(source, teacher, ctx.shard, weights, ctx.options, norms, True)
    return [weights.scale, *source.gradients()]


@dataclass(frozen=True)
class Shard:
    """This process's rows of the vocabulary, and the plan, equal in its chunks on all processes."""

    offset: int
    """Rows of the processes before it."""
    vocabulary: int
    """Rows of all processes."""
    plan: Plan


class Norms(NamedTuple):
    """What softmaxes over all shards need beside the logits z of one, (n,) each, equal on all processes. Logits are as the row kernels
    transform them, before the temperature T."""

    student_max: Tensor
    teacher_max: Tensor
    student_log_sum: Tensor
    """log sum exp((z - max) / T)"""
    teacher_log_sum: Tensor
    label_log_sum: Tensor
    """log sum exp(z - max) of the student; zero without labels"""
    coefficient_sum: Tensor
    """sum of dD / d log q; see `_value_and_coefficient`"""

    def at(self, rows: slice) -> Norms:
        """Those of some of the rows."""
        return Norms(*(x[rows] for x in self))


def _agree(tokens: int, plan: Plan, teacher_rows: int, group: dist.ProcessGroup, device: torch.device) -> Shard:
    """One all-gather of every process's sizes. What is wrong with them is seen and refused by all processes alike."""
    own = torch.tensor([tokens, plan.tokens, plan.vocabulary, teacher_rows, plan.chunk_rows], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    all_tokens, all_kept, sizes, teacher_sizes, chunk_rows = torch.stack(gathered, 1).tolist()
    if len(set(all_tokens)) > 1 or len(set(all_kept)) > 1:
        raise ValueError(
            f"The processes of group hold {all_tokens} tokens, {all_kept} of them unmasked; "
            "all must pass the same hidden states and the same mask."
        )
    if 0 in sizes:
        raise ValueError(f"The processes of group hold {sizes} vocabulary rows of the student; every one must hold at least one row.")
    if sizes != teacher_sizes:
        raise ValueError(
            f"The processes of group hold {sizes} vocabulary rows of the student and {teacher_sizes} of the teacher; both shards of a "
            "process must hold the same ids, row by row."
        )
    rank = dist.get_rank(group)
    return Shard(sum(sizes[:rank]), sum(sizes), replace(plan, chunk_rows=min(chunk_rows)))


def _loop(
    student: LinearLogits,
    teacher: Sequence[Tensor],
    shard: Shard,
    weights: RowWeights,
    options: LossOptions,
    norms: Norms,
    makes_gradient: bool,
    losses: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Over all chunks: fill `norms` and `losses` if they are given, by collectives of `group`; collect the gradients if wanted."""
    plan, dtype, row_options = shard.plan, student.dtype, options.row_options(has_teacher=True)
    source: GivenLogits | LinearLogits
    if len(teacher) == 1:
        source = GivenLogits(teacher[0], weights.valid, plan.chunk_rows, dtype)
    else:
        source = LinearLogits(teacher, weights.valid, plan.chunk_rows, dtype, options.operand_dtype)
    own_labels = None
    if weights.labels is not None and weights.label is not None:
        own_labels = weights.labels - shard.offset
        own_labels = own_labels.masked_fill((own_labels < 0) | (own_labels >= plan.vocabulary), -1)
    for chunk in plan.slices():
        pair = _Pair(student.logits(chunk), source.logits(chunk), row_options, dtype)
        labels = None if own_labels is None else own_labels[chunk]
        if losses is not None and group is not None:
            _reduce(pair, norms.at(chunk), labels, losses[:, chunk], group)
        if makes_gradient:
            label_weight = None if weights.label is None else weights.label[chunk]
            _write_gradient(pair, norms.at(chunk), weights.row[chunk], labels, label_weight, student.gradient_target(chunk))
            student.collect(chunk)


@dataclass(frozen=True)
class _Pair:
    """A chunk of both models' logits over this shard, (C, V) each, as the heads made them."""

    student: Tensor
    teacher: Tensor
    options: RowOptions
    dtype: torch.dtype

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A few rows at a time: which, and both models' transformed logits of them. They may lie where the chunk lies."""
        rows, vocabulary = self.student.shape
        elements = _GPU_BLOCK_ELEMENTS if self.student.is_cuda else _CPU_BLOCK_ELEMENTS
        step = max(1, elements // vocabulary)
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            student, teacher = self.student[block].to(self.dtype), self.teacher[block].to(self.dtype)
            yield block, self.options.student.apply(student), self.options.teacher.apply(teacher)

    def log_probabilities(self, norms: Norms) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """`blocks`, with log q and log p: which, the student's logits, log q, log p."""
        for block, student, teacher in self.blocks():
            at = norms.at(block)
            log_q = self.tempered(student, at.student_max) - at.student_log_sum[:, None]
            log_p = self.tempered(teacher, at.teacher_max) - at.teacher_log_sum[:, None]
            yield block, student, log_q, log_p

    def tempered(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """(z - max) / T, in new memory."""
        return (logits - maximum[:, None]).div_(self.options.temperature)


def _reduce(pair: _Pair, norms: Norms, labels: Tensor | None, losses: Tensor, group: dist.ProcessGroup) -> None:
    """Fill the chunk's `norms` and `losses` (2, C), T^2 D and the cross-entropy, by two or three all-reduces.

    labels: rows of this shard, negative where the label is none of them.
    """
    divergence = pair.options.divergence
    assert divergence is not None
    maxima = norms.student_max.new_empty(2, len(norms.student_max))
    for block, student, teacher in pair.blocks():
        maxima[0, block], maxima[1, block] = student.amax(-1), teacher.amax(-1)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    norms.student_max.copy_(maxima[0])
    norms.teacher_max.copy_(maxima[1])

    # Normalisers of student and teacher; sum of e_p (a_p - a_q), with a = (z - max) / T and e = exp(a), or of its mirror; with labels
    # the student's normaliser at T = 1, and the label's logit.
    sums = maxima.new_zeros(3 if labels is None else 5, maxima.shape[1])
    for block, student, teacher in pair.blocks():
        log_q, log_p = pair.tempered(student, norms.student_max[block]), pair.tempered(teacher, norms.teacher_max[block])
        q, p = log_q.exp(), log_p.exp()
        sums[0, block], sums[1, block] = q.sum(-1), p.sum(-1)
        if divergence.kind in _LINEAR:
            terms = _weighted(p, log_p - log_q) if divergence.kind == "forward_kl" else _weighted(q, log_q - log_p)
            sums[2, block] = terms.sum(-1)
        if labels is not None:
            shifted = student - norms.student_max[block, None]
            label_logits = shifted.gather(1, labels[block].clamp_min(0)[:, None])[:, 0]
            sums[3, block], sums[4, block] = shifted.exp().sum(-1), torch.where(labels[block] >= 0, label_logits, 0.0)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    log_sums = sums[:2].log()
    norms.student_log_sum.copy_(log_sums[0])
    norms.teacher_log_sum.copy_(log_sums[1])
    if labels is not None:
        norms.label_log_sum.copy_(sums[3].log())
        losses[1] = norms.label_log_sum - sums[4]

    if divergence.kind == "forward_kl":
        value = sums[2] / sums[1] + (log_sums[0] - log_sums[1])
        norms.coefficient_sum.fill_(-1.0)
    elif divergence.kind == "reverse_kl":
        value = sums[2] / sums[0] + (log_sums[1] - log_sums[0])
        norms.coefficient_sum.copy_(value + 1.0)
    else:
        for block, _, log_q, log_p in pair.log_probabilities(norms):
            own_value, coefficient = _value_and_coefficient(divergence, log_p.exp(), log_q.exp(), log_p, log_q)
            maxima[0, block], maxima[1, block] = own_value, coefficient.sum(-1)
        dist.all_reduce(maxima, dist.ReduceOp.SUM, group)
        value = maxima[0]
        norms.coefficient_sum.copy_(maxima[1])
    losses[0] = value * pair.options.temperature**2


def _write_gradient(
    pair: _Pair, norms: Norms, row_weight: Tensor, labels: Tensor | None, label_weight: Tensor | None, gradient: Tensor
) -> None:
    """The gradient of sum_i (row_weight_i T^2 D_i + label_weight_i CE_i) with respect to this shard's raw student logits, which
    `gradient` may lie over as in `softmax_divergence_`."""
    divergence, temperature = pair.options.divergence, pair.options.temperature
    assert divergence is not None
    for block, student, log_q, log_p in pair.log_probabilities(norms):
        q = log_q.exp()
        _, total = _value_and_coefficient(divergence, log_p.exp(), q, log_p, log_q)
        # T^2 from the loss, 1/T from z/T.
        total.sub_(q.mul_(norms.coefficient_sum[block, None])).mul_(temperature * row_weight[block, None])
        if labels is not None and label_weight is not None:
            shifted = student - norms.student_max[block, None]
            shares = shifted.sub_(norms.label_log_sum[block, None]).exp_()
            is_own = (labels[block] >= 0).to(shares.dtype)
            shares.scatter_add_(1, labels[block].clamp_min(0)[:, None], -is_own[:, None])
            total.add_(shares.mul_(label_weight[block, None]))
        gradient[block] = pair.options.student.backward_(total, student)


def vocab_parallel_reference(
    student_hidden: Tensor,
    student_weights: Sequence[Tensor],
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weights: Sequence[Tensor] | None,
    *,
    student_biases: Sequence[Tensor] | None = None,
    teacher_biases: Sequence[Tensor] | None = None,
    **options: Any,
) -> Any:
    """The same value from all shards in one process: the dense loss on the concatenated ones, by plain torch in the inputs' dtype."""

    def logits(hidden: Any, weights: Sequence[Tensor] | None, biases: Sequence[Tensor] | None) -> Tensor:
        if weights is None:
            return torch.cat(list(hidden), -1)
        return torch.nn.functional.linear(hidden, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))

    student = logits(student_hidden, student_weights, student_biases)
    return kl_div_reference(student, logits(teacher_hidden, teacher_weights, teacher_biases), **options)
