"""Losses with a `group`: heads split by vocabulary rows over the processes of a tensor-parallel group.

Every process makes the logits of its own rows for all tokens, a chunk at a time. What a softmax needs of the other processes are a few
numbers a token, which a kind of teacher (`vocab_parallel_dense.py`, `vocab_parallel_topk.py`) brings together. With them the gradient
of the logits is local, and so is that of a shard of the head. That of the hidden states is a sum over the shards: one all-reduce, in
the backward pass.

Processes that call a collective a different number of times wait for each other for ever. So its calls depend on nothing but numbers
that all processes have agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_token_values, compute_dtype
from .gradient_in_forward import finish_gradients
from .linear_logits import LinearGradients, LinearLogits
from .options import LossOptions
from .plan import Plan, default_budget, plan_chunks
from .token_weights import TokenWeights, token_weights

P = ParamSpec("P")
R = TypeVar("R")


def check_group(group: Any, vocab_index: Tensor | None, options: LossOptions) -> None:
    """Refuse what a split vocabulary does not have, with the same sentence on every process."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; give a torch.distributed.ProcessGroup that this process is a member of "
            "(of a DeviceMesh: mesh.get_group())."
        )
    if options.teacher_mass != "renormalize":
        raise ValueError(f"teacher_mass={options.teacher_mass!r} does not go with group; pass teacher_mass='renormalize'.")
    if vocab_index is not None:
        raise ValueError(
            "vocab_index picks rows of a whole teacher, and group= takes the teacher's shard: pass the rows of the teacher's head that "
            "stand behind the student's shard, teacher_weight[vocab_index[shard]]."
        )
    if options.backend not in ("auto", "torch"):
        raise ValueError(f"backend={options.backend!r} has no kernel for a shard of the vocabulary; use 'auto' or 'torch' with group=.")
    if options.statistics and options.tail is None:
        raise ValueError("return_stats is not available with group=; leave it out, or take reduction='none' for the losses.")
    if options.grad_filter is not None:
        raise ValueError(f"grad_filter={options.grad_filter} is not available with group=; leave it out.")


uncompiled: Callable[[Callable[P, R]], Callable[P, R]] = torch.compiler.disable  # which says nothing of types


@uncompiled
def vocab_parallel_loss(
    student: Mapping[str, Tensor | None],
    teacher: Mapping[str, Tensor | None],
    options: LossOptions,
    leading: torch.Size,
    group: dist.ProcessGroup,
    kind: ShardedTeacher,
    *,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss that a public function returns with a `group`, from arguments that it has checked and flattened (see `fused_loss`).

    kind: of the teacher. Beside the loss there is what its `reduce` fills for every token, (S, N).
    """
    learned, given = ([x for x in tensors.values() if x is not None] for tensors in (student, teacher))
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in learned]
    apply: Callable[..., tuple[Tensor, Tensor]] = _VocabParallel.apply
    loss, told = apply(group, kind, options, len(learned), needs_grad, mask, labels, denominator, *learned, *given)
    return loss.view(leading) if options.reduction == "none" else loss, told


class _VocabParallel(torch.autograd.Function):
    """Gradients are made in the forward pass. Where every token has an upstream gradient of its own (reduction="none") they are made in
    the backward pass, again without a collective: the normalisers are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        kind: ShardedTeacher,
        options: LossOptions,
        students: int,
        needs_grad: Sequence[bool],
        mask: Tensor | None,
        labels: Tensor | None,
        denominator: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        student, teacher = tensors[:students], tensors[students:]
        tokens, vocabulary = student[0].shape[0], student[1].shape[0]
        dtype = compute_dtype(student[0], teacher[0])
        weights = token_weights(options, tokens, dtype, student[0].device, mask, labels, denominator)
        budget = options.memory_budget or (default_budget(student[0].device) if student[0].is_cuda else None)
        # The logits of all models are alive together; the gradient lies over the student's.
        plan = plan_chunks(
            weights.token.numel(),
            vocabulary,
            element_size=kind.models * dtype.itemsize,
            has_teacher=False,
            chunk_size=options.chunk_size,
            memory_budget=budget,
        )
        shard = agree(tokens, plan, kind.sizes(teacher, vocabulary), group, student[0].device)
        check_token_values(options, shard.vocabulary, mask, labels, denominator)
        norms = kind.norms(*(torch.zeros(plan.tokens, *shape, dtype=dtype, device=student[0].device) for shape in kind.shapes(teacher)))
        losses = torch.zeros(kind.told, plan.tokens, dtype=dtype, device=student[0].device)
        deferred = options.reduction == "none"
        source = head_logits(student, weights.valid, shard.plan, dtype, options)
        gradients = None if deferred or not any(needs_grad) else LinearGradients(source, shard.plan, _named(needs_grad), None)
        _loop(source, kind, teacher, shard, weights, options, norms, gradients, losses, group)
        ctx.set_materialize_grads(False)
        ctx.group, ctx.kind, ctx.options, ctx.students, ctx.needs_grad, ctx.shard = group, kind, options, students, needs_grad, shard
        ctx.deferred, ctx.dtypes = deferred, [x.dtype for x in student]
        made = [] if gradients is None else list(gradients.gradients(weights.valid, tokens).values())[:students]
        ctx.save_for_backward(*([mask, labels, denominator, *norms, *tensors] if deferred else [weights.scale, *made]))
        if weights.labels is not None:
            losses[1].masked_fill_(weights.labels < 0, 0.0)
        total = weights.total(losses[0], losses[1])
        losses[0].mul_(options.told_factor)
        told = weights.spread(losses, tokens)
        ctx.mark_non_differentiable(told)
        return weights.spread(total, tokens) if deferred else total.sum() * weights.scale, told

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _told: Any) -> tuple[Any, ...]:
        teachers = len(ctx.needs_input_grad) - 8 - ctx.students
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.deferred:
            factor, *made = _deferred_gradients(ctx, upstream.detach())
        else:
            scale, *made = ctx.saved_tensors
            factor = upstream * scale
        if ctx.needs_grad[0]:
            # Shards are summed in float32, and what is saved may be asked for again.
            made[0] = made[0].to(compute_dtype(made[0]), copy=True)
            dist.all_reduce(made[0], dist.ReduceOp.SUM, ctx.group)
        return *(None,) * 8, *finish_gradients(ctx, made, factor), *(None,) * teachers


@torch.no_grad()
def _deferred_gradients(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """What the gradients are still to be multiplied by, and they, with `upstream`, one number a token, multiplied in; no collective."""
    mask, labels, denominator, *saved = ctx.saved_tensors
    count = len(ctx.kind.norms._fields)
    norms, tensors = ctx.kind.norms(*saved[:count]), saved[count:]
    student, teacher = tensors[: ctx.students], tensors[ctx.students :]
    dtype = norms[0].dtype
    weights = token_weights(ctx.options, student[0].shape[0], dtype, student[0].device, mask, labels, denominator)
    source = head_logits(student, weights.valid, ctx.shard.plan, dtype, ctx.options)
    gradients = LinearGradients(source, ctx.shard.plan, _named(ctx.needs_grad), None)
    weights = weights.times(upstream.to(dtype), linear=True)
    _loop(source, ctx.kind, teacher, ctx.shard, weights, ctx.options, norms, gradients)
    return [weights.scale, *list(gradients.gradients(weights.valid, student[0].shape[0]).values())[: ctx.students]]


def _named(needs_grad: Sequence[bool]) -> dict[str, bool]:
    return dict(zip(("hidden", "weight", "bias"), needs_grad, strict=False))


def head_logits(tensors: Sequence[Tensor], valid: Tensor | None, plan: Plan, dtype: torch.dtype, options: LossOptions) -> LinearLogits:
    """[hidden, weight] and perhaps a bias, a chunk at a time."""
    hidden, weight, *bias = tensors
    return LinearLogits(hidden, weight, bias[0] if bias else None, valid, plan.backward_tokens, dtype, options.operand)


@dataclass(frozen=True)
class Shard:
    """This process's rows of the vocabulary, and the plan, equal in its chunks on all processes."""

    offset: int
    """Rows of the processes before it."""
    vocabulary: int
    """Rows of all processes."""
    plan: Plan

    def own(self, ids: Tensor) -> Tensor:
        """Ids over all shards as rows of this one; -1 where they are none of its own."""
        own = ids - self.offset
        return own.masked_fill((own < 0) | (own >= self.plan.vocabulary), -1)


class ShardedTeacher(NamedTuple):
    """What a loss over shards does with a kind of teacher."""

    models: int
    """How many models' logits are alive together."""
    told: int
    """How many numbers `reduce` fills for a token: T^2 D, the cross-entropy, and others."""
    norms: type[Any]
    """A tuple of tensors by name, (n, ...) each, that are equal on all processes: what softmaxes over all shards need."""
    shapes: Callable[[Sequence[Tensor]], Sequence[tuple[int, ...]]]
    """The shapes of `norms` for one token, of the teacher's tensors."""
    sizes: Callable[[Sequence[Tensor], int], tuple[int, int]]
    """How many vocabulary rows the teacher's shard has, of its tensors and the student's rows; and how many entries its lists have."""
    rows: Callable[[Sequence[Tensor], LinearLogits, Shard, TokenWeights, LossOptions], Callable[[slice], Any]]
    """Of the teacher's tensors and the student's head: what makes a chunk's rows."""
    reduce: Callable[[Any, Any, Tensor | None, Tensor, dist.ProcessGroup], None]
    """Of a chunk's rows, norms, labels and (told, C) losses: fill norms and losses, by collectives of the group. Labels are rows of
    this shard, negative where the label is none of them."""
    write_gradient: Callable[[Any, Any, Tensor, Tensor | None, Tensor | None, Tensor], None]
    """Of a chunk's rows, norms, row weights, labels and label weights: write into the last the gradient of sum_i (row_weight_i T^2 D_i
    + label_weight_i CE_i) with respect to this shard's raw student logits, which it may lie over as `RowCall` says."""


def agree(tokens: int, plan: Plan, teacher: tuple[int, int], group: dist.ProcessGroup, device: torch.device) -> Shard:
    """One all-gather of every process's sizes. What is wrong with them is seen and refused by all processes alike."""
    own = torch.tensor([tokens, plan.tokens, plan.vocabulary, *teacher, plan.backward_tokens], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    all_tokens, all_kept, sizes, teacher_sizes, entries, chunk_tokens = torch.stack(gathered, 1).tolist()
    if len(set(all_tokens)) > 1 or len(set(all_kept)) > 1:
        raise ValueError(
            f"The processes of group hold {all_tokens} tokens, {all_kept} of them unmasked; "
            "all must pass the same hidden states and the same mask."
        )
    if len(set(entries)) > 1:
        raise ValueError(f"The processes of group hold lists of {entries} entries; all must pass the same lists.")
    if 0 in sizes:
        raise ValueError(f"The processes of group hold {sizes} vocabulary rows of the student; every one must hold at least one row.")
    if sizes != teacher_sizes:
        raise ValueError(
            f"The processes of group hold {sizes} vocabulary rows of the student and {teacher_sizes} of the teacher; both shards of a "
            "process must hold the same ids, row by row."
        )
    rank = dist.get_rank(group)
    plan = replace(plan, backward_tokens=min(chunk_tokens), forward_tokens=min(chunk_tokens))
    return Shard(sum(sizes[:rank]), sum(sizes), plan)


def _loop(
    student: LinearLogits,
    kind: ShardedTeacher,
    teacher: Sequence[Tensor],
    shard: Shard,
    weights: TokenWeights,
    options: LossOptions,
    norms: Any,
    gradients: LinearGradients | None,
    losses: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Over all chunks: fill `norms` and `losses` if they are given, by collectives of `group`; collect the gradients if wanted."""
    own_labels = None
    if weights.labels is not None and (weights.label is not None or options.statistics):
        own_labels = shard.own(weights.labels)
    rows_of = kind.rows(teacher, student, shard, weights, options)
    for chunk in shard.plan.backward_chunks():
        rows, chunk_norms = rows_of(chunk), kind.norms(*(x[chunk] for x in norms))
        labels = None if own_labels is None else own_labels[chunk]
        if losses is not None and group is not None:
            kind.reduce(rows, chunk_norms, labels, losses[:, chunk], group)
        if gradients is not None:
            label_weight = None if weights.label is None else weights.label[chunk]
            kind.write_gradient(rows, chunk_norms, weights.token[chunk], labels, label_weight, gradients.target(chunk, chunk))
            gradients.collect(chunk)
