"""`linear_kl_div` with a `group`: both heads split by vocabulary rows, or the teacher's logits by columns, in the same way.

What a process needs of the others are, of every chunk of tokens, the maxima of both models (an all-reduce, MAX), then normalisers and
sums (an all-reduce, SUM); a divergence whose terms need both normalisers takes one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backend_torch import blocks, chain_, transformed
from .divergence import acceptance, column_sums, of_acceptance, weighted
from .given_logits import GivenLogits
from .linear_logits import LinearLogits
from .options import LossOptions
from .row_call import RowOptions
from .token_weights import TokenWeights
from .vocab_parallel import Shard, ShardedTeacher, head_logits

_LINEAR = ("forward_kl", "reverse_kl")
"""Divergences whose sums are taken before the normalisers are known."""


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
    """sum of dD / d log q; see `value_and_coefficient`"""
    accepted: Tensor
    """sum min(p, q), for "nla" alone"""

    def at(self, rows: slice) -> Norms:
        """Those of some of the rows."""
        return Norms(*(x[rows] for x in self))


def _dense_rows(
    teacher: Sequence[Tensor], student: LinearLogits, shard: Shard, weights: TokenWeights, options: LossOptions
) -> Callable[[slice], _Pair]:
    plan, dtype = shard.plan, student.dtype
    source: GivenLogits | LinearLogits
    if len(teacher) == 1:
        source = GivenLogits(teacher[0], weights.valid, plan.backward_tokens)
    else:
        source = head_logits(teacher, weights.valid, plan, dtype, options)

    def rows(chunk: slice) -> _Pair:
        return _Pair(student.logits(chunk), source.logits(chunk), student.bias, source.bias, options.rows, dtype)

    return rows


@dataclass(frozen=True)
class _Pair:
    """A chunk of both models' logits over this shard, (C, V) each, as the heads made them, and their biases (V,)."""

    student: Tensor
    teacher: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    options: RowOptions
    dtype: torch.dtype

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A few rows at a time: which, and both models' transformed logits of them. They may lie where the chunk lies."""
        for block in blocks(self.student):
            student = transformed(self.student[block], self.student_bias, self.options.student, self.dtype)
            yield block, student, transformed(self.teacher[block], self.teacher_bias, self.options.teacher, self.dtype)

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
            terms = weighted(p, log_p - log_q) if divergence.kind == "forward_kl" else weighted(q, log_q - log_p)
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
        is_nla = divergence.kind == "nla"
        parts = maxima.new_zeros(3 if is_nla else 2, maxima.shape[1])
        for block, _, log_q, log_p in pair.log_probabilities(norms):
            p, q = log_p.exp(), log_q.exp()
            own_value, coefficient = column_sums(divergence, p, q, log_p, log_q, is_shard=True)
            parts[0, block], parts[1, block] = own_value, coefficient.sum(-1)
            if is_nla:
                parts[2, block] = acceptance(p, q)
        dist.all_reduce(parts, dist.ReduceOp.SUM, group)
        value, coefficient_sum = parts[0], parts[1]
        if is_nla:
            norms.accepted.copy_(parts[2])
            value, coefficient_sum = of_acceptance(parts[2], value, coefficient_sum[:, None])
        norms.coefficient_sum.copy_(coefficient_sum.view(-1))
    losses[0] = value * pair.options.temperature**2


def _write_gradient(
    pair: _Pair, norms: Norms, row_weight: Tensor, labels: Tensor | None, label_weight: Tensor | None, gradient: Tensor
) -> None:
    """The gradient of sum_i (row_weight_i T^2 D_i + label_weight_i CE_i) with respect to this shard's raw student logits, which
    `gradient` may lie over as `RowCall` says."""
    divergence, temperature = pair.options.divergence, pair.options.temperature
    assert divergence is not None
    for block, student, log_q, log_p in pair.log_probabilities(norms):
        q = log_q.exp()
        _, total = column_sums(divergence, log_p.exp(), q, log_p, log_q, is_shard=True)
        if divergence.kind == "nla":
            total.div_(norms.accepted[block, None])
        # T^2 from the loss, 1/T from z/T.
        total.sub_(q.mul_(norms.coefficient_sum[block, None])).mul_(temperature * row_weight[block, None])
        if labels is not None and label_weight is not None:
            shifted = student - norms.student_max[block, None]
            shares = shifted.sub_(norms.label_log_sum[block, None]).exp_()
            is_own = (labels[block] >= 0).to(shares.dtype)
            shares.scatter_add_(1, labels[block].clamp_min(0)[:, None], -is_own[:, None])
            total.add_(shares.mul_(label_weight[block, None]))
        gradient[block] = chain_(total, student, pair.options.student)


DENSE = ShardedTeacher(
    models=2,
    told=2,
    norms=Norms,
    shapes=lambda teacher: [()] * len(Norms._fields),
    sizes=lambda teacher, vocabulary: (teacher[0].shape[1] if len(teacher) == 1 else teacher[1].shape[0], 0),
    rows=_dense_rows,
    reduce=_reduce,
    write_gradient=_write_gradient,
)
