"""The oracles: obvious torch on any device and in any floating dtype, float64 included, by the names and arguments of the fast ops.

All tokens at once, in the inputs' dtype, with gradients by autograd. What has no part in a loss, a masked token or a token of zero
probability, is left out before the arithmetic: autograd's 0 * infinity is NaN. Options that steer memory or choose a kernel are taken,
so that the call is the same, and change nothing; options that approximate are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from .ops.checks import check_tail
from .ops.divergence import Divergence
from .ops.fused_loss import LossStats, TokenWeight
from .ops.relation_kl import RelationTarget

__all__ = ["kl_div", "linear_cross_entropy", "linear_kl_div", "projected_mse", "relation_kl", "topk_kl_div"]


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    mask: Tensor | None = None,
    vocab_index: Tensor | None = None,
    teacher_mass: str = "renormalize",
    vocab_slots: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """What `fastkd.kl_div` computes, from logits (..., V_s) and (..., V_t)."""
    vocabulary = student_logits.shape[-1]
    student = _transformed(_kept(student_logits, mask), student_logit_scale, student_softcap)
    teacher = _transformed(_kept(teacher_logits.detach(), mask), teacher_logit_scale, teacher_softcap)
    log_q = torch.log_softmax(student / temperature, -1)
    log_p, log_rest = _over_student_vocabulary(teacher / temperature, vocabulary, vocab_index, teacher_mass, vocab_slots)
    values = (temperature**2 if temperature_squared else 1.0) * _divergence(Divergence.parse(divergence), log_p, log_q, log_rest)
    weight = _weight(values, mask)
    terms, cross_entropy = [(values, weight)], None
    if labels is not None:
        cross_entropy, labelled = _cross_entropy(student, labels, ignore_index)
        terms.append((label_weight * cross_entropy, weight * labelled))
    loss = _reduced(terms, reduction, denominator, label_denominator)
    if not return_stats:
        return loss
    statistics = {"divergence": values, "cross_entropy": cross_entropy}
    if return_stats is True:
        statistics |= _dense_statistics(log_p, log_q, log_rest)
        if vocab_index is not None or teacher_mass != "renormalize":
            slots = _slots(vocab_index, vocab_slots, vocabulary, teacher)
            statistics["kept_mass"] = (torch.softmax(teacher / temperature, -1) * (slots >= 0)).sum(-1)
            statistics["teacher_top1_kept"] = (slots[teacher.argmax(-1)] >= 0).to(values.dtype)
    return loss, _stats(weight, **statistics)


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weight: TokenWeight | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """What `fastkd.linear_kl_div` computes, from hidden states (..., H) and heads (V, H); `options` are those of `kl_div`."""
    student_logits = linear(_kept(student_hidden, mask), student_weight, student_bias)
    teacher_logits = teacher_hidden
    if teacher_weight is not None:
        teacher_logits = linear(_kept(teacher_hidden, mask), teacher_weight, teacher_bias)
    if token_weight is None:
        return kl_div(student_logits, teacher_logits, mask=mask, **options)
    return _weighted(token_weight, student_logits, teacher_logits, mask, **options)


def _weighted(
    token_weight: TokenWeight,
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    *,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_denominator: float | Tensor | None = None,
    return_stats: bool | Literal["losses"] = False,
    **options: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """`kl_div` of which each token's part is multiplied by what `token_weight` says of it, a constant."""
    terms: list[tuple[Tensor, Tensor]] = []
    for label_weight in (0.0, options.get("label_weight", 0.0)):
        one = {**options, "label_weight": label_weight, "reduction": "none"}
        both, stats = kl_div(student_logits, teacher_logits, mask=mask, **one, return_stats=return_stats or "losses")
        terms.append((both - sum(values for values, _ in terms), _weight(both, mask)))
    assert stats.divergence is not None
    losses = stats.divergence
    if stats.cross_entropy is not None:
        losses = losses + options.get("label_weight", 0.0) * stats.cross_entropy
        terms[1] = terms[1][0], terms[1][1] * (options["labels"] != options.get("ignore_index", -100))
    factor = token_weight(losses, stats).detach().where(terms[0][1] > 0, 0.0)
    # The values carry the mask's weights, which count in the means.
    totals = [(factor * values).sum() for values, _ in terms]
    if reduction == "mean":
        own = [weight.sum() for _, weight in terms]
        totals = [total / count for total, count in zip(totals, _denominators(own, denominator, label_denominator), strict=True)]
    loss = torch.stack(totals).sum()
    return (loss, stats) if return_stats else loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    token_weight: TokenWeight | None = None,
) -> Tensor:
    """What `fastkd.linear_cross_entropy` computes, from hidden states (..., H) and a head (V, H)."""
    logits = linear(_kept(hidden, labels != ignore_index), weight, bias)
    values, labelled = _cross_entropy(_transformed(logits, logit_scale, softcap), labels, ignore_index)
    weight, factor = labelled.to(values.dtype), torch.ones_like(values)
    if token_weight is not None:
        factor = token_weight(values.detach(), _stats(weight, cross_entropy=values)).detach().where(labelled, 0.0)
    return _reduced([(factor * values, weight)], reduction, denominator)


def topk_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprob: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    tail: str = "bucket",
    divergence: str | Divergence = "forward_kl",
    student_support: str = "full",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    topk_temperature: float | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """What `fastkd.topk_kl_div` computes, from hidden states (..., H), a head (V, H), and ids and log-probabilities (..., K)."""
    kind = Divergence.parse(divergence)
    check_tail(tail, tail_logprob is not None, kind, student_support, temperature, topk_temperature)
    logits = _transformed(linear(_kept(student_hidden, mask), student_weight, student_bias), student_logit_scale, student_softcap)
    is_missing = topk_ids < 0
    log_p = topk_logprobs.detach().to(logits.dtype) * ((topk_temperature or temperature) / temperature)
    log_p = log_p.masked_fill(is_missing, -math.inf)
    if tail == "renormalize":
        log_p = torch.log_softmax(log_p, -1)
    log_q = torch.log_softmax(logits / temperature, -1)
    listed = log_q.gather(-1, topk_ids.clamp_min(0)).masked_fill(is_missing, -math.inf)
    if student_support == "listed":
        log_q_of_events = torch.log_softmax(_kept(listed, mask), -1)
    else:
        # The last event is any other id; a missing entry stands behind the vocabulary.
        places = torch.where(is_missing, log_q.shape[-1], topk_ids)
        is_listed = log_q.new_zeros(*log_q.shape[:-1], log_q.shape[-1] + 1).scatter(-1, places, 1.0)[..., :-1] > 0
        others = log_q.masked_fill(is_listed, -math.inf)
        nothing = (others == -math.inf).all(-1, keepdim=True)
        log_q_tail = others.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)
        log_q_of_events = torch.cat((listed, log_q_tail), -1)
        log_p_tail = torch.full_like(log_q_tail, -math.inf)
        if tail == "bucket":
            assert tail_logprob is not None
            log_p_tail = tail_logprob.detach().to(logits.dtype)[..., None]
        log_p = torch.cat((log_p, log_p_tail), -1)
    if mask is not None:
        log_p = torch.where((mask == 0)[..., None], log_q_of_events.detach(), log_p)
    values = (temperature**2 if temperature_squared else 1.0) * _divergence(kind, log_p, log_q_of_events)
    weight = _weight(values, mask)
    terms, cross_entropy = [(values, weight)], None
    if labels is not None:
        cross_entropy, labelled = _cross_entropy(logits, labels, ignore_index)
        terms.append((label_weight * cross_entropy, weight * labelled))
    loss = _reduced(terms, reduction, denominator, label_denominator)
    if not return_stats:
        return loss
    statistics = {"divergence": values, "cross_entropy": cross_entropy}
    if return_stats is True and student_support == "listed":
        statistics |= _dense_statistics(log_p, log_q_of_events)
    elif return_stats is True:
        count = (~is_missing).sum(-1, keepdim=True)
        order = logits.argsort(-1, descending=True)
        own = torch.zeros_like(is_listed).scatter(-1, order, torch.arange(logits.shape[-1], device=logits.device) < count)
        statistics["listed_mass"] = (log_q.exp() * is_listed).sum(-1)
        statistics["topk_overlap"] = (own & is_listed).sum(-1).to(values.dtype) / count.clamp_min(1)[..., 0]
    return loss, _stats(weight, **statistics)


def projected_mse(
    student_states: Tensor,
    student_weight: Tensor | None,
    teacher_states: Tensor,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """What `fastkd.projected_mse` computes, from states (..., d) and weights (d_f, d)."""

    def filtered(states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        states = _kept(states, mask)
        states = states if weight is None else linear(states, weight)
        return states if bias is None else states + bias

    target = filtered(teacher_states, teacher_weight, teacher_bias).detach()
    values = (filtered(student_states, student_weight, student_bias) - target).square().mean(-1)
    return _reduced([(values, _weight(values, mask))], reduction, None)


def relation_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor | None,
    teacher_k: Tensor | None,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    targets: Sequence[RelationTarget] = (),
    form: str = "kl",
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """What `fastkd.relation_kl` computes, from queries and keys (B, heads, S, d)."""
    if teacher_q is not None and teacher_k is not None:
        targets = [RelationTarget(teacher_q, teacher_k, key_mask=key_mask), *targets]
    rows = student_q.new_zeros(student_q.shape[:3])
    weight = _weight(rows, None if query_mask is None else query_mask[:, None].expand(rows.shape))
    for target in targets:
        has_key = None if target.key_mask is None else target.key_mask.any(-1, keepdim=True).expand_as(target.key_mask)
        masks = [x[:, None].expand(rows.shape) for x in (query_mask, target.query_mask, has_key) if x is not None]
        log_q, log_p = (
            _log_relation(_kept(q, *masks), k, target.key_mask)
            for q, k in ((student_q, student_k), (target.q.detach(), target.k.detach()))
        )
        term = _kl(log_p, log_q) - (_kl(log_p, torch.zeros_like(log_p)) if form == "cross_entropy" else 0.0)
        rows = rows + target.weight * _kept(term[..., None], *masks)[..., 0]
    return _reduced([(rows, weight)], reduction, None)


def _log_relation(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """log softmax(q k^T / sqrt(d)) (B, heads, S, S) over the keys that `key_mask` keeps; over all where it keeps none."""
    if key_mask is None:
        return torch.log_softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    scores = q @ _kept(k, key_mask[:, None].expand(k.shape[:3])).mT / math.sqrt(q.shape[-1])
    left_out = ~key_mask & key_mask.any(-1, keepdim=True)
    return torch.log_softmax(scores.masked_fill(left_out[:, None, None], -math.inf), -1)


def _kept(x: Tensor, *masks: Tensor | None, instead: float = 0.0) -> Tensor:
    """Put `instead` where a mask (...) leaves a row of `x` (..., n) out, whatever it holds."""
    for mask in masks:
        x = x if mask is None else x.masked_fill((mask == 0)[..., None], instead)
    return x


def _weight(values: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(values) if mask is None else mask.detach().to(values.dtype)


def _transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _over_student_vocabulary(
    teacher: Tensor, vocabulary: int, vocab_index: Tensor | None, teacher_mass: str, vocab_slots: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """log p of the student's tokens (..., V_s) from tempered logits (..., V_t), and of all others together (..., 1) if they count."""
    if teacher_mass == "renormalize":
        return torch.log_softmax(teacher[..., slice(vocabulary) if vocab_index is None else vocab_index], -1), None
    log_p = torch.log_softmax(teacher, -1)
    slots = _slots(vocab_index, vocab_slots, vocabulary, teacher)
    places = [(slots == slot).nonzero()[:, 0] for slot in range(-1, vocabulary)]
    rest, *own = [log_p[..., place].logsumexp(-1) for place in places]
    return torch.stack(own, -1), rest[..., None]


def _slots(vocab_index: Tensor | None, vocab_slots: Tensor | None, vocabulary: int, teacher: Tensor) -> Tensor:
    """(V_t,) the student's row of every column of `teacher` (..., V_t); -1: none."""
    if vocab_slots is not None:
        return vocab_slots
    rows = torch.arange(vocabulary, device=teacher.device)
    slots = torch.full((teacher.shape[-1],), -1, device=teacher.device)
    slots[rows if vocab_index is None else vocab_index] = rows
    return slots


def _divergence(divergence: Divergence, log_p: Tensor, log_q: Tensor, log_rest: Tensor | None = None) -> Tensor:
    """D(p, q) (...) of log-probabilities (..., V); `log_rest` (..., 1): an event of the teacher alone, no part of forward KL."""
    if divergence.kind == "mixed":
        assert divergence.mixing is not None
        forward, reverse = (_divergence(Divergence(kind), log_p, log_q, log_rest) for kind in ("forward_kl", "reverse_kl"))
        return divergence.mixing * forward + (1.0 - divergence.mixing) * reverse
    if divergence.kind == "forward_kl":
        return _kl(log_p, log_q)
    if divergence.kind == "nla":
        return -torch.minimum(log_p, log_q).exp().sum(-1).log()
    if log_rest is not None:
        log_p, log_q = torch.cat((log_p, log_rest), -1), torch.cat((log_q, torch.full_like(log_rest, -math.inf)), -1)
    if divergence.kind == "reverse_kl":
        return _kl(log_q, log_p)
    if divergence.kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    assert divergence.mixing is not None
    own = divergence.mixing
    first, second = (log_q, log_p) if divergence.kind == "skew_rkl" else (log_p, log_q)
    impossible = (first == -math.inf) & (second == -math.inf)
    parts = first.masked_fill(impossible, 0.0) + math.log(own), second.masked_fill(impossible, 0.0) + math.log1p(-own)
    log_m = torch.logaddexp(*parts)
    if divergence.kind == "jsd":
        return own * _kl(log_p, log_m) + (1 - own) * _kl(log_q, log_m)
    return _kl(first, log_m)


def _dense_statistics(log_p: Tensor, log_q: Tensor, log_rest: Tensor | None = None) -> dict[str, Tensor]:
    """Entropies, agreement and acceptance (...) of log-probabilities (..., V); `log_rest` (..., 1) as `_divergence` takes it."""
    nothing = torch.zeros_like(log_q)  # the entropy is -KL(p || 1)
    entropy = -_kl(log_p, nothing) - (0.0 if log_rest is None else _kl(log_rest, torch.zeros_like(log_rest)))
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).to(log_q.dtype)
    accepted = torch.minimum(log_p, log_q).exp().sum(-1)
    return {"student_entropy": -_kl(log_q, nothing), "teacher_entropy": entropy, "top1_agreement": agreement, "acceptance": accepted}


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_i a_i (log a_i - log b_i) over the last dim; what has a_i = 0 adds nothing, whatever b_i is."""
    impossible = log_a.exp() == 0
    log_a, log_b = log_a.masked_fill(impossible, 0.0), log_b.masked_fill(impossible, 0.0)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[label] (...), zero without a label, and which tokens have one."""
    labelled = labels != ignore_index
    log_q = torch.log_softmax(logits, -1).gather(-1, torch.where(labelled, labels, 0)[..., None])[..., 0]
    return torch.where(labelled, -log_q, 0.0), labelled


def _reduced(
    terms: Sequence[tuple[Tensor, Tensor]],
    reduction: str,
    denominator: float | Tensor | None,
    label_denominator: float | Tensor | None = None,
) -> Tensor:
    """The sum of terms, each of values and weights (...), the labels' second; "mean" divides each by its own count, or as told."""
    weighted = [weight * values for values, weight in terms]
    if reduction == "none":
        return torch.stack(weighted).sum(0)
    totals = torch.stack([values.sum() for values in weighted])
    if reduction == "mean":
        counts = torch.stack([weight.sum() for _, weight in terms])
        own = [*torch.where(counts > 0, counts, 1.0)]
        totals = torch.stack([x / n for x, n in zip(totals, _denominators(own, denominator, label_denominator), strict=True)])
    return totals.sum().to(totals.dtype)


def _denominators(
    own: Sequence[Tensor], denominator: float | Tensor | None, label_denominator: float | Tensor | None
) -> list[float | Tensor]:
    """What each term is divided by: its own count () unless another is given; the labels' term comes second."""
    given = [denominator, denominator if label_denominator is None else label_denominator]
    return [count if other is None else other for count, other in zip(own, given, strict=False)]


def _stats(weight: Tensor, **values: Tensor | None) -> LossStats:
    return LossStats(**{name: None if x is None else x.detach() * (weight > 0) for name, x in values.items()})
