"""Perplexity over mapped tokens: one event, judged alike for teacher, students and baselines of different vocabularies.

The event is "the next (or masked) token is y, or any token that shares y's slot". A model over all ids is credited with the summed
probability of the slot's ids; a model over slots with its own probability. So every row of a table counts the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..models.language_model import AtHead, LanguageModel
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..tasks.text import IGNORE_INDEX, TextBatch
from ..vocab.map import VocabMap

_CHUNK_ROWS = 256


def perplexity(model: LanguageModel, batches: Iterable[TextBatch], **judging: Any) -> float:
    """exp of the mean negative log-likelihood of the labels, in evaluation mode; `judging` is that of `loss_at_head`."""
    training = model.training
    model.eval()
    sums = [summed_loss(model, batch, **judging) for batch in batches]
    model.train(training)
    return perplexity_of(sums)


def perplexity_of(sums: Iterable[tuple[float, int]]) -> float:
    """The perplexity of all batches together, from `summed_loss` of each."""
    losses, counts = zip(*sums, strict=True)
    if not sum(counts):
        raise ValueError("The evaluation rows hold no token to predict; give longer rows.")
    return math.exp(min(sum(losses) / sum(counts), 700.0))


@torch.no_grad()
def summed_loss(
    model: LanguageModel, batch: TextBatch, *, fold: VocabMap | None = None, kept_only: VocabMap | None = None
) -> tuple[float, int]:
    """The summed negative log-likelihood of a batch's labels, and their number; `fold` and `kept_only` as for `loss_at_head`."""
    batch = batch.to(model.device)
    at_head, count = loss_at_head(model, batch.labels, fold=fold, kept_only=kept_only)
    return float(model(batch.input_ids, batch.attention_mask, at_head)), count


def events(vocab_map: VocabMap | None, ids: int) -> str:
    """Name what a perplexity is over, for a model or a fold with this map, or one over all `ids`: two compare only where this is the
    same."""
    return f"all {ids} ids" if vocab_map is None else f"{vocab_map.num_kept} slots of {vocab_map.vocab_size} ids"


def loss_at_head(
    model: LanguageModel, labels: Tensor, *, fold: VocabMap | None = None, kept_only: VocabMap | None = None
) -> tuple[AtHead[Tensor], int]:
    """What computes at the model's head the summed negative log-likelihood of the ids `labels`, (...) for states (..., H), and how many
    there are but -100.

    fold: judge a model over all ids on this map's slots. kept_only: judge only the labels that this map keeps, by the model's
    distribution over the kept ids alone; no two ids share a slot there.
    """
    if kept_only is not None:
        labels = torch.where(kept_only.is_kept.to(labels.device)[labels.clamp_min(0)], labels, IGNORE_INDEX)
        if model.vocab_map is None:
            slots = kept_only.id_to_slot.to(labels.device)[labels.clamp_min(0)]
            labels = torch.where(labels == IGNORE_INDEX, labels, slots)
    labels = model.to_slots(labels, ignore_index=IGNORE_INDEX)

    def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if fold is not None:
            return _folded(model, hidden, weight, bias, labels, fold)
        if kept_only is None:
            bias = bias_of_slots(model, bias)
        elif model.vocab_map is None:
            rows = kept_only.kept_ids.to(weight.device)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        transform = model.transform
        loss: Tensor = linear_cross_entropy(
            hidden, weight, labels, bias=bias, softcap=transform.softcap, logit_scale=transform.scale, reduction="sum"
        )
        return loss

    return at_head, int((labels != IGNORE_INDEX).sum())


def bias_of_slots(model: LanguageModel, bias: Tensor | None) -> Tensor | None:
    """The head's `bias` and the model's `slot_bias` in one; None without either."""
    if model.slot_bias is None:
        return bias
    slot_bias = model.slot_bias.to(model.head.weight)
    return slot_bias if bias is None else bias + slot_bias


def _folded(model: LanguageModel, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, fold: VocabMap) -> Tensor:
    """-sum log of the summed probability of all ids in the label's slot, a few rows of logits at a time; rows of the model that the map
    does not know are padding, and are left out."""
    id_to_slot = fold.id_to_slot[: len(weight)].to(hidden.device)
    weight, bias = weight[: len(id_to_slot)], None if bias is None else bias[: len(id_to_slot)]
    predicted = labels != IGNORE_INDEX
    hidden, slots = hidden[predicted], id_to_slot[labels[predicted]]
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, slot in zip(torch.split(hidden, _CHUNK_ROWS), torch.split(slots, _CHUNK_ROWS), strict=True):
        logits = model.transform.apply(torch.nn.functional.linear(rows, weight, bias).float())
        same_slot = id_to_slot[None, :] == slot[:, None]
        total += (logits.logsumexp(-1) - logits.masked_fill(~same_slot, -math.inf).logsumexp(-1)).sum()
    return total
