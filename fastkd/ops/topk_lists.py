"""A top-k teacher's lists as the losses take them, and what is told of them beside the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .backend_torch import blocks, transformed
from .checks import check_topk_ids, check_topk_masses, compute_dtype
from .options import LossOptions
from .row_call import LogitTransform, TopK
from .topk_events import listed_of


def read_lists(constants: Mapping[str, Tensor], valid: Tensor | None, vocabulary: int, options: LossOptions) -> TopK:
    """The lists of the tokens that count, checked, at the temperature of the loss.

    Args:
        constants: "topk_ids" (N, K), "topk_logprobs" (N, K) and perhaps "tail_logprob" (N,).
        valid: (n,) the tokens that count; None: all.
        vocabulary: of the student.
        options: of which the temperatures are read.
    """
    check_topk_ids(constants["topk_ids"], vocabulary)
    known = [constants[name] for name in ("topk_ids", "topk_logprobs", "tail_logprob") if name in constants]
    lists = TopK(*known if valid is None else (x.index_select(0, valid) for x in known))
    check_topk_masses(lists.ids, lists.log_probabilities, lists.log_tail)
    made_at = options.topk_temperature
    if made_at is None or made_at == options.temperature:
        return lists
    # Renormalising takes out the constant.
    log_probabilities = lists.log_probabilities.to(compute_dtype(lists.log_probabilities))
    return TopK(lists.ids, log_probabilities * (made_at / options.temperature))


def write_list_statistics(
    raw: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    temperature: float,
    ids: Tensor,
    listed_mass: Tensor,
    topk_overlap: Tensor,
) -> None:
    """Fill (C,) the student's mass on the list, and the share of the list that is among the student's own as many largest logits.

    raw: (C, V) as the head's GEMM wrote it; bias: (V,) or None; transform: makes logits of both; ids: (C, K).
    """
    for block in blocks(raw):
        logits = transformed(raw[block], bias, transform, listed_mass.dtype)
        listed = listed_of(logits, ids[block])
        listed_mass[block] = ((listed / temperature).logsumexp(-1) - (logits / temperature).logsumexp(-1)).exp()
        topk_overlap[block] = overlap(listed, ids[block] >= 0, logits.topk(min(listed.shape[-1], logits.shape[-1])).values)


def overlap(listed: Tensor, is_listed: Tensor, largest: Tensor) -> Tensor:
    """The share (C,) of the listed logits that are no smaller than the last of the student's as many largest; zero of an empty list.

    listed, is_listed: (C, K) and which entries are not missing; largest: (C, K or all) of all logits, in descending order.
    """
    count = is_listed.sum(-1)
    last = largest.gather(1, (count - 1).clamp_min(0)[:, None])
    return ((listed >= last) & is_listed).sum(-1).to(listed.dtype) / count.clamp_min(1)
