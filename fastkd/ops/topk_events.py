"""The K + 1 events of a token whose teacher is a list: the K ids that it lists, and "any other"; in plain torch.

Every divergence of `divergence.py` is taken over them as if they were a vocabulary. Its derivative by the student's logits z is, with
c = dD / d log q of the events, c_k - q_k sum(c) at a listed id; elsewhere it is that of the last event, shared out as q is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Divergence, acceptance, balance_, column_sums, of_acceptance
from .row_call import TopK


def teacher_events(teacher: TopK, tail: str, dtype: torch.dtype) -> Tensor:
    """log p of the events (C, K + 1), -inf where an entry is missing. A row that lists nothing cannot be renormalised: NaN."""
    log_p = teacher.log_probabilities.to(dtype).masked_fill(teacher.ids < 0, -torch.inf)
    if tail == "renormalize":
        log_p = log_p.log_softmax(-1)
    log_tail = log_p.new_full(log_p.shape[:1], -torch.inf)
    if tail == "bucket":
        assert teacher.log_tail is not None
        log_tail = teacher.log_tail.to(dtype)
    return torch.cat((log_p, log_tail[:, None]), -1)


def listed_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The logits at `ids` (C, K), -inf where an entry is missing.

    logits: (C, V) of whole rows; or of a shard, with ids as its own columns and below zero where they are other shards'.
    """
    return logits.gather(1, _columns(ids, logits)).masked_fill(ids < 0, -torch.inf)


def others_of(logits: Tensor, ids: Tensor) -> Tensor:
    """A copy of the logits (C, V), -inf at the listed ids (C, K), which are as for `listed_of`."""
    # As a minimum, so that a missing entry, which stands at column 0, leaves what is there.
    limit = logits.new_full((), torch.inf).masked_fill(ids >= 0, -torch.inf)
    return logits.scatter_reduce(1, _columns(ids, logits), limit, "amin")


def _columns(ids: Tensor, logits: Tensor) -> Tensor:
    """Where to read and write for ids (C, K): a missing entry stands at column 0. On a GPU nobody has checked the ids."""
    return ids.clamp(0, max(logits.shape[-1] - 1, 0))


def divergence_of_events(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """D per row (C,), and its gradient (C, K + 1) by logits of the student's events, of log-probabilities (C, K + 1).

    q sums to one and p need not: rounding, or tail="zero", leaves it less.
    """
    p, q = log_p.exp(), log_q.exp()
    value, coefficient = column_sums(divergence, p, q, log_p, log_q, is_shard=True)
    if divergence.kind == "nla":
        value, coefficient = of_acceptance(acceptance(p, q), value, coefficient)
    gradient = coefficient.sub_(q * coefficient.sum(-1, keepdim=True))
    return value, balance_(gradient, q, q.amax(-1) > 0.5)


def spread_(others: Tensor, log_rest: Tensor, ids: Tensor, gradient: Tensor) -> Tensor:
    """Turn the unlisted logits, as `others_of` gives them, into the gradient of all logits (C, V).

    Args:
        others: (C, V), overwritten.
        log_rest: (C,) their log-sum-exp, or that of all shards.
        ids: (C, K) as for `listed_of`.
        gradient: (C, K + 1) of the events.
    """
    # q / q_tail is a softmax of its own, however small q_tail is. Where nothing is left beside the list, exp(-inf) is the zero wanted.
    shares = others.sub_(log_rest.clamp_min(torch.finfo(others.dtype).min)[:, None]).exp_().mul_(gradient[:, -1:])
    # A missing entry adds nothing at column 0.
    return shares.scatter_add_(1, _columns(ids, others), gradient[:, :-1].masked_fill(ids < 0, 0.0))
