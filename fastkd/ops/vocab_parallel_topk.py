"""`topk_kl_div` with a `group`: the head split by vocabulary rows, and lists that name ids of all shards.

Every process has all lists. What it needs of the others is, of every chunk of tokens, the largest logit that is not listed (an
all-reduce, MAX), and the sum of exponentials of those that are not, and the logits that are (an all-reduce, SUM). Each process then has
the K + 1 events of every token, whose divergence it takes by itself. Compared over the lists alone, the K logits are all it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backend_torch import blocks, chain_, transformed
from .fused_loss import LossStats
from .gradient_in_forward import finish_gradients
from .linear_logits import LinearLogits, spread_gradients
from .listed_logits import GatheredRows, finished
from .options import LossOptions
from .plan import plan_chunks
from .row_call import RowOptions, TopK
from .token_weights import TokenWeights, counted
from .topk_events import divergence_of_events, listed_of, others_of, spread_, teacher_events
from .topk_lists import overlap, read_lists
from .vocab_parallel import Shard, ShardedTeacher, agree, uncompiled, vocab_parallel_loss

_TOLD = ("divergence", "cross_entropy", "listed_mass", "topk_overlap")


def topk_vocab_parallel_loss(
    student: Mapping[str, Tensor | None],
    teacher: Mapping[str, Tensor | None],
    options: LossOptions,
    leading: torch.Size,
    group: dist.ProcessGroup,
    **tokens: Tensor | None,
) -> Tensor | tuple[Tensor, LossStats]:
    """What `topk_kl_div` returns with a `group`; the arguments are those of `vocab_parallel_loss`."""
    loss, told = vocab_parallel_loss(student, teacher, options, leading, group, _TOPK, **tokens)
    if not options.statistics:
        return loss
    known = dict(zip(_TOLD, told.view(len(_TOLD), *leading), strict=True))
    if tokens["labels"] is None:
        del known["cross_entropy"]
    names = _TOLD if options.statistics == "all" else _TOLD[:2]
    return loss, LossStats(**{name: x for name, x in known.items() if name in names})


class Norms(NamedTuple):
    """What softmaxes over all shards need beside the logits z of one, equal on all processes. Logits are as the row kernels transform
    them, before the temperature T."""

    others_max: Tensor
    """(n,) the largest logit that is not listed"""
    others_log_sum: Tensor
    """(n,) log sum exp((z - others_max) / T) over those"""
    label_log_sum: Tensor
    """(n,) log sum exp(z - max) over all; zero without labels"""
    listed: Tensor
    """(n, K) the logits that are listed, -inf where an entry is missing"""

    @property
    def max(self) -> Tensor:
        """(n,) the largest logit of all."""
        return torch.maximum(self.others_max, self.listed.amax(-1))


@dataclass(frozen=True)
class _Rows:
    """A chunk of the student's logits over this shard, (C, V) as the head made them, and its lists."""

    logits: Tensor
    bias: Tensor | None
    lists: TopK
    own_ids: Tensor
    """(C, K) the lists' ids as columns of this shard, -1 where they are others'."""
    vocabulary: int
    """Of all shards."""
    options: RowOptions
    dtype: torch.dtype
    tells_overlap: bool

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """A few rows at a time: which, and their transformed logits, which may lie where the chunk lies."""
        for block in blocks(self.logits):
            yield block, transformed(self.logits[block], self.bias, self.options.student, self.dtype)

    def student_events(self, norms: Norms) -> Tensor:
        """log q of the events, (C, K + 1)."""
        others = (norms.others_max - norms.max) / self.options.temperature + norms.others_log_sum
        listed = (norms.listed - norms.max[:, None]) / self.options.temperature
        return torch.cat((listed, others[:, None]), -1).log_softmax(-1)

    def divergence(self, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """D (C,) of the events, and its gradient (C, K + 1); zeros where there is none to be taken."""
        if self.options.divergence is None:
            return log_q.new_zeros(len(log_q)), torch.zeros_like(log_q)
        return divergence_of_events(self.options.divergence, teacher_events(self.lists, self.options.tail, self.dtype), log_q)


def _rows(
    teacher: Sequence[Tensor], student: LinearLogits, shard: Shard, weights: TokenWeights, options: LossOptions
) -> Callable[[slice], _Rows]:
    names = ("topk_ids", "topk_logprobs", "tail_logprob")
    lists = read_lists(dict(zip(names, teacher, strict=False)), weights.valid, shard.vocabulary, options)

    def rows(chunk: slice) -> _Rows:
        own_ids, tells_overlap = shard.own(lists.ids[chunk]), options.statistics == "all"
        shape = shard.vocabulary, options.rows, student.dtype, tells_overlap
        return _Rows(student.logits(chunk), student.bias, lists[chunk], own_ids, *shape)

    return rows


def _reduce(rows: _Rows, norms: Norms, labels: Tensor | None, losses: Tensor, group: dist.ProcessGroup) -> None:
    temperature, largest = rows.options.temperature, norms.others_max
    for block, logits in rows.blocks():
        largest[block] = others_of(logits, rows.own_ids[block]).amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # Where nothing is unlisted, the distance of -inf to it still is.
    largest.clamp_min_(torch.finfo(largest.dtype).min)

    # The K listed logits, each from the shard that has it; the others' normaliser; with labels that at T = 1, and the label's logit.
    entries = rows.own_ids.shape[1]
    sums = largest.new_zeros(entries + (1 if labels is None else 3), len(largest))
    for block, logits in rows.blocks():
        ids = rows.own_ids[block]
        sums[:entries, block] = listed_of(logits, ids).masked_fill_(ids < 0, 0.0).T
        others = others_of(logits, ids).sub_(largest[block, None])
        sums[entries, block] = (others / temperature).exp().sum(-1)
        if labels is not None:
            label_logits = logits.gather(1, labels[block].clamp_min(0)[:, None])[:, 0]
            sums[entries + 1, block] = others.exp().sum(-1)
            sums[entries + 2, block] = torch.where(labels[block] >= 0, label_logits, 0.0)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    norms.listed.copy_(sums[:entries].T).masked_fill_(rows.lists.ids < 0, -torch.inf)
    norms.others_log_sum.copy_(sums[entries].log())
    if labels is not None:
        others, listed = sums[entries + 1] * (largest - norms.max).exp(), (norms.listed - norms.max[:, None]).exp().sum(-1)
        norms.label_log_sum.copy_((others + listed).log())
        losses[1] = norms.label_log_sum - (sums[entries + 2] - norms.max)

    log_q = rows.student_events(norms)
    value, _ = rows.divergence(log_q)
    # On a GPU nobody has checked the ids; one outside of the vocabulary gives NaN.
    value.masked_fill_((rows.lists.ids >= rows.vocabulary).any(-1), torch.nan)
    losses[0] = value * temperature**2
    losses[2] = log_q[:, :-1].exp().sum(-1)
    if rows.tells_overlap:
        losses[3] = overlap(norms.listed, rows.lists.ids >= 0, _largest(rows, entries, group))


def _largest(rows: _Rows, count: int, group: dist.ProcessGroup) -> Tensor:
    """The student's largest logits over all shards (C, count), in descending order; -inf where there are fewer. One all-gather."""
    own = torch.full((len(rows.logits), count), -torch.inf, dtype=rows.dtype, device=rows.logits.device)
    for block, logits in rows.blocks():
        kept = min(count, logits.shape[1])
        own[block, :kept] = logits.topk(kept).values
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    return torch.cat(gathered, 1).topk(count).values


def _write_gradient(
    rows: _Rows, norms: Norms, row_weight: Tensor, labels: Tensor | None, label_weight: Tensor | None, gradient: Tensor
) -> None:
    temperature, largest = rows.options.temperature, norms.max
    _, of_events = rows.divergence(rows.student_events(norms))
    # T^2 from the loss, 1/T from z/T.
    of_events.mul_((temperature * row_weight)[:, None])
    for block, logits in rows.blocks():
        ids = rows.own_ids[block]
        others = others_of(logits, ids).sub_(norms.others_max[block, None]).div_(temperature)
        total = spread_(others, norms.others_log_sum[block], ids, of_events[block])
        if labels is not None and label_weight is not None:
            shares = (logits - largest[block, None]).sub_(norms.label_log_sum[block, None]).exp_()
            is_own = (labels[block] >= 0).to(shares.dtype)
            shares.scatter_add_(1, labels[block].clamp_min(0)[:, None], -is_own[:, None])
            total.add_(shares.mul_(label_weight[block, None]))
        gradient[block] = chain_(total, logits, rows.options.student)


_TOPK = ShardedTeacher(
    models=1,
    told=len(_TOLD),
    norms=Norms,
    shapes=lambda teacher: [(), (), (), teacher[0].shape[1:]],
    sizes=lambda teacher, vocabulary: (vocabulary, teacher[0].shape[1]),
    rows=_rows,
    reduce=_reduce,
    write_gradient=_write_gradient,
)


@uncompiled
def sharded_listed_logits(
    student: Mapping[str, Tensor | None],
    ids: Tensor,
    log_probabilities: Tensor,
    mask: Tensor | None,
    options: LossOptions,
    group: dist.ProcessGroup,
) -> Tensor:
    """What `listed_logits` returns, of a head that is split over the processes of `group`; on each of them."""
    learned = {name: x for name, x in student.items() if x is not None}
    apply: Callable[..., Tensor] = _ShardedListedLogits.apply
    return apply(group, options, tuple(learned), {"topk_ids": ids, "topk_logprobs": log_probabilities}, mask, *learned.values())


class _ShardedListedLogits(torch.autograd.Function):
    """An all-reduce of (n, K) forward, and one of the hidden states' gradient backward."""

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        options: LossOptions,
        names: tuple[str, ...],
        known: Mapping[str, Tensor],
        mask: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        student, ids = dict(zip(names, tensors, strict=True)), known["topk_ids"]
        tokens, vocabulary, valid = len(ids), student["weight"].shape[0], counted(mask)
        plan = plan_chunks(tokens if valid is None else len(valid), vocabulary)
        shard = agree(tokens, plan, (vocabulary, ids.shape[1]), group, ids.device)
        lists = read_lists(known, valid, shard.vocabulary, options)
        rows = GatheredRows(student, shard.own(lists.ids), valid, options)
        products = rows.products()
        dist.all_reduce(products, dist.ReduceOp.SUM, group)
        # On a GPU nobody has checked the ids; one outside of the vocabulary gives NaN.
        products.masked_fill_(lists.ids >= shard.vocabulary, torch.nan)
        ctx.group, ctx.options, ctx.names, ctx.needs_grad = group, options, names, ctx.needs_input_grad[5:]
        ctx.deferred, ctx.dtypes = True, [x.dtype for x in tensors]
        ctx.save_for_backward(products, rows.ids, valid, *tensors)
        logits = finished(products, lists.ids, options.student_transform)
        return logits if valid is None else logits.new_zeros(tokens, logits.shape[1]).index_copy_(0, valid, logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return *(None,) * 5, *finish_gradients(ctx, _gradients_of_lists(ctx, upstream.detach()), None)


@torch.no_grad()
def _gradients_of_lists(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """The gradients of this shard's tensors, that of the hidden states complete, of the logits' gradient (N, K)."""
    products, own_ids, valid, *tensors = ctx.saved_tensors
    rows = GatheredRows(dict(zip(ctx.names, tensors, strict=True)), own_ids, valid, ctx.options)
    transform, needs_grad = ctx.options.student_transform, dict(zip(ctx.names, ctx.needs_grad, strict=True))
    gradient = upstream.clone() if valid is None else upstream.index_select(0, valid)
    made = rows.gradients(chain_(gradient, transform.apply(products), transform), needs_grad)
    made = spread_gradients(made, valid, len(upstream), rows.dtype)
    if needs_grad["hidden"]:
        dist.all_reduce(made["hidden"], dist.ReduceOp.SUM, ctx.group)
    return [made[name] for name in ctx.names]
