"""The row kernel of a sparse teacher: of each token's distribution its K largest log-probabilities are known, and the mass of the rest.

This file holds the torch backend, block by block as `fastkd/ops/rows.py`, and the plain oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import _CPU_BLOCK_ELEMENTS, _GPU_BLOCK_ELEMENTS, RowLosses, RowOptions, _cross_entropy_block, _weighted

TAILS = ("bucket", "renormalize", "zero")
"""What stands for the tokens that are not listed; `topk_divergence_` has the formulas."""


@dataclass(frozen=True)
class TopK:
    """C rows of a teacher, at the temperature of the loss. A row lists a token at most once."""

    ids: Tensor
    """(C, K) int64 rows of the student's vocabulary; -1 where a row has fewer than K entries."""
    log_probabilities: Tensor
    """(C, K) log p of `ids`, any floating dtype; ignored where the id is -1."""
    log_tail: Tensor | None = None
    """(C,) log of the mass of all other tokens, -inf for none; needed by tail="bucket" alone."""

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        return TopK(self.ids[rows], self.log_probabilities[rows], None if self.log_tail is None else self.log_tail[rows])


def topk_divergence_(
    student_logits: Tensor,
    teacher: TopK,
    options: RowOptions,
    out: RowLosses,
    *,
    row_weight: Tensor,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Fill `out` with per-row losses, and `gradient` with that, with respect to `student_logits`, of

        sum_i row_weight_i T^2 D_i + label_weight_i CE(student_i, labels_i)

    where D, with q = softmax(student / T), S the listed tokens, q_tail the sum of q outside of S and p_tail = exp(log_tail), is

        bucket       sum_S p (log p - log q) + p_tail (log p_tail - log q_tail)
        renormalize  sum_S p' (log p' - log q), p' = p / sum_S p
        zero         sum_S p (log p - log q)

    "bucket" is the KL of what is known: never above the KL of the full distributions. With M the sum of all p in D (one, but for the
    rounding of a cache, and less for "zero") dD / d(student / T) is M q - p on S and q (M - p_tail / q_tail) elsewhere (p_tail left out
    but for "bucket"), so that gradient rows add up to zero whatever M is.

    Shapes: logits and `gradient` (C, V), any floating dtype; weights and losses (C,) float32 or float64, which is the dtype of all
    arithmetic; labels (C,) int64, negative where a row has none. `gradient` may be `student_logits`, or share its memory so that no row
    begins behind its logits. Of `options` only `tail`, `temperature` and `student` are read. Losses in `out` are unweighted. A row that
    lists nothing has no renormalised distribution: NaN.
    """
    check_tail(options.tail, teacher.log_tail is not None)
    rows, vocabulary = student_logits.shape
    elements = _GPU_BLOCK_ELEMENTS if student_logits.is_cuda else _CPU_BLOCK_ELEMENTS
    step = max(1, elements // max(1, vocabulary))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        student = options.student.apply(student_logits[block].to(row_weight.dtype))
        assert out.divergence is not None
        wanted = gradient is not None
        total = _topk_block(student, teacher[block], options.tail, options.temperature, out.divergence[block], wanted)
        if total is not None:
            total.mul_(row_weight[block, None])
        if labels is not None:
            assert out.cross_entropy is not None
            label_gradient = _cross_entropy_block(student, labels[block], out.cross_entropy[block], wanted and label_weight is not None)
            if total is not None and label_gradient is not None and label_weight is not None:
                total.add_(label_gradient.mul_(label_weight[block, None]))
        if gradient is not None:
            assert total is not None
            gradient[block] = options.student.backward_(total, student)


def check_tail(tail: str, has_log_tail: bool) -> None:
    """Refuse (ValueError) an unknown `tail`, and "bucket" without the log of the tail's mass."""
    if not isinstance(tail, str) or tail not in TAILS:
        raise ValueError(f"tail={tail!r} is not known; use one of {', '.join(map(repr, TAILS))}.")
    if tail == "bucket" and not has_log_tail:
        raise ValueError(
            "tail='bucket' needs tail_logprob, the log of the mass that the teacher does not list; or use tail='renormalize'."
        )


def _topk_block(student: Tensor, teacher: TopK, tail: str, temperature: float, out: Tensor, gradient: bool) -> Tensor | None:
    """Write the block's T^2 D into `out`; return d(T^2 D)/d(logits) if wanted."""
    is_listed = teacher.ids >= 0
    index = teacher.ids.clamp_min(0)
    logits = student if temperature == 1.0 else student / temperature
    logits = logits - logits.amax(-1, keepdim=True)
    listed = logits.gather(1, index).masked_fill_(~is_listed, -torch.inf)
    # The unlisted logits, -inf at the listed ones: their mass is a sum of their own, where 1 - sum_S q would cancel to nothing.
    # As a minimum, so that a missing entry, which stands at column 0, leaves what is there.
    limit = listed.new_full((), torch.inf).masked_fill(is_listed, -torch.inf)
    rest = logits.scatter_reduce(1, index, limit, "amin")
    log_rest = rest.logsumexp(-1)
    log_normaliser = torch.logaddexp(log_rest, listed.logsumexp(-1))
    log_q = listed - log_normaliser[:, None]
    log_p = teacher.log_probabilities.to(logits.dtype).masked_fill(~is_listed, -torch.inf)
    if tail == "renormalize":
        log_p = log_p.log_softmax(-1)
    p = log_p.exp()
    value, mass = _weighted(p, log_p - log_q).sum(-1), p.sum(-1)
    log_q_tail = log_rest - log_normaliser
    p_tail: Tensor | None = None
    if tail == "bucket":
        assert teacher.log_tail is not None
        log_p_tail = teacher.log_tail.to(logits.dtype)
        p_tail = log_p_tail.exp()
        value += _weighted(p_tail, log_p_tail - log_q_tail)
        mass += p_tail
    torch.mul(value, temperature**2, out=out)
    if not gradient:
        return None
    # q (M - p_tail / q_tail) = (q / q_tail) (M q_tail - p_tail), and q / q_tail is a softmax of its own, however small q_tail is.
    rest_gradient = mass * log_q_tail.exp()
    if p_tail is not None:
        rest_gradient -= p_tail
    # Where nothing is left beside the list, exp(-inf) is the zero that is wanted.
    shares = rest.sub_(log_rest.clamp_min(torch.finfo(rest.dtype).min)[:, None]).exp_()
    result = shares.mul_(rest_gradient[:, None])
    # A missing entry has p = q = 0 and adds nothing at column 0.
    result.scatter_add_(1, index, mass[:, None] * log_q.exp() - p)
    # T^2 from the loss, 1/T from z/T.
    return result.mul_(temperature)


def topk_kl_reference(logits: Tensor, teacher: TopK, tail: str, *, temperature: float = 1.0) -> Tensor:
    """T^2 D per row, (C,), by plain torch from the student's transformed `logits` (C, V) in their dtype: the oracle in float64."""
    check_tail(tail, teacher.log_tail is not None)
    log_q = torch.log_softmax(logits / temperature, dim=-1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_tail = (columns != teacher.ids[:, :, None]).all(1)
    q_tail = (log_q.exp() * is_tail).sum(-1)
    p = teacher.log_probabilities.to(logits.dtype).exp().masked_fill(teacher.ids < 0, 0.0)
    if tail == "renormalize":
        p = p / p.sum(-1, keepdim=True)
    kl = _kl_terms(p, log_q.gather(1, teacher.ids.clamp_min(0))).sum(-1)
    if tail == "bucket":
        assert teacher.log_tail is not None
        p_tail = teacher.log_tail.to(logits.dtype).exp()
        kl = kl + _kl_terms(p_tail, q_tail.masked_fill(p_tail == 0, 1.0).log())
    return temperature**2 * kl


def _kl_terms(p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * (p.masked_fill(p == 0, 1.0).log() - log_q))
