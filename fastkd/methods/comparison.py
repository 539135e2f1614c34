"""Language models on held-out text, prediction by prediction: how sure they are and how often right, and how far from a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.language_model import LanguageModel, head_rows
from ..ops.fused_loss import LossStats
from ..ops.linear_kl import linear_kl_div
from ..tasks.metrics import calibration_error
from ..tasks.text import IGNORE_INDEX, TextBatch
from ..vocab.map import VocabMap
from .perplexity import bias_of_slots, loss_at_head, perplexity_of

_CHUNK_ROWS = 256
_FIRST_POSITIONS = 8


@dataclass(frozen=True)
class Predictions:
    """What all models were asked: the position (N,) of every prediction in its row, from 1, and the bytes of what is predicted."""

    positions: np.ndarray
    text_bytes: int


@dataclass
class Judged:
    """A language model, and what is known of its predictions so far."""

    model: LanguageModel
    losses: list[tuple[float, int]] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    is_right: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)

    def summary(self, asked: Predictions) -> dict[str, Any]:
        """`scores`, and beside a teacher `divergence_by_position`. Bits per byte are the perplexity's nats over the predicted bytes."""
        scores = {"perplexity": perplexity_of(self.losses)}
        if asked.text_bytes:
            scores["bits_per_byte"] = sum(loss for loss, _ in self.losses) / math.log(2) / asked.text_bytes
        scores["calibration_error"] = calibration_error(torch.cat(self.confidence), torch.cat(self.is_right))
        if not self.divergence:
            return {"scores": scores}
        divergence = torch.cat(self.divergence).double().numpy()
        scores["teacher_agreement"] = float(torch.cat(self.agreement).double().mean())
        scores["teacher_divergence"] = float(divergence.mean())
        return {"scores": scores, "divergence_by_position": by_position(divergence, asked.positions)}


@torch.no_grad()
def judge(
    models: Mapping[str, Judged],
    batches: Iterable[tuple[TextBatch, int]],
    *,
    teacher: str | None = None,
    fold: VocabMap | None = None,
    kept: slice | Tensor,
) -> Predictions:
    """Show every model the same batches, each with the bytes of the tokens that it has predicted, and note what it predicts.

    teacher: the model that all others are compared with. fold: the map on whose slots models over all ids are judged. kept: the ids
    over which models are compared.
    """
    positions, total = [], 0
    for batch, text_bytes in batches:
        predicted = batch.labels != IGNORE_INDEX
        labels = batch.labels[predicted]
        positions.append(predicted.nonzero()[:, 1].numpy() + 1)
        total += text_bytes
        states = {name: predicting_states(each.model, batch) for name, each in models.items()}
        for name, each in models.items():
            own_fold = fold if each.model.vocab_map is None else None
            loss, count = loss_at_head(each.model, labels.to(each.model.device), fold=own_fold)
            each.losses.append((float(each.model.through_head(states[name], loss)), count))
            confidence, is_right = top_predictions(each.model, states[name], labels, fold=own_fold)
            each.confidence.append(confidence.cpu())
            each.is_right.append(is_right.cpu())
            if teacher not in (None, name):
                stats = distance(each.model, models[teacher].model, states[name], states[teacher], kept)
                assert stats.top1_agreement is not None and stats.divergence is not None
                each.agreement.append(stats.top1_agreement.cpu())
                each.divergence.append(stats.divergence.cpu())
    return Predictions(np.concatenate(positions), total)


def by_position(divergence: np.ndarray, positions: np.ndarray) -> list[dict[str, Any]]:
    """Mean of the (N,) values at positions 1-8, 9-16, 17-32, ..., each bin as long as all before it; empty ones are left out."""
    ends = [_FIRST_POSITIONS]
    while ends[-1] < positions.max():
        ends.append(2 * ends[-1])
    bins = np.searchsorted(ends, positions, side="left")
    return [
        {
            "positions": [1 if index == 0 else ends[index - 1] + 1, min(ends[index], int(positions.max()))],
            "predictions": int((bins == index).sum()),
            "divergence": float(divergence[bins == index].mean()),
        }
        for index in np.unique(bins)
    ]


@torch.no_grad()
def predicting_states(model: LanguageModel, batch: TextBatch) -> Tensor:
    """(N, H): the states from which the model predicts the batch's N labels, in the order of `batch.labels[batch.labels != -100]`."""
    batch = batch.to(model.device)
    predicted = batch.labels != IGNORE_INDEX
    return model(batch.input_ids, batch.attention_mask, lambda hidden, weight, bias: hidden[predicted])


@torch.no_grad()
def top_predictions(model: LanguageModel, states: Tensor, labels: Tensor, *, fold: VocabMap | None = None) -> tuple[Tensor, Tensor]:
    """(N,) probability of the model's likeliest event, and (N,) bool whether that is the label's, a few rows of logits at a time.

    states: those of `predicting_states`; labels: (N,) ids. The events are those of `perplexity`: rows of the model's own head, or with
    `fold` this map's slots, each with the summed probability of its ids.
    """
    head, labels = model.head, labels.to(states.device)
    bias = bias_of_slots(model, head.bias)
    weight, id_to_slot = head.weight, None
    if fold is not None:  # rows of the model that the map does not know are padding
        id_to_slot = fold.id_to_slot[: len(weight)].to(states.device)
        weight, bias = weight[: len(id_to_slot)], None if bias is None else bias[: len(id_to_slot)]
    events = model.to_slots(labels) if id_to_slot is None else id_to_slot[labels]
    parts = []
    for rows in torch.split(states, _CHUNK_ROWS):
        probability = model.transform.apply(torch.nn.functional.linear(rows, weight, bias).float()).softmax(-1)
        if fold is not None and id_to_slot is not None:
            probability = probability.new_zeros(len(rows), fold.num_kept).index_add_(1, id_to_slot, probability)
        parts.append(probability.max(-1))
    confidence, top = (torch.cat(column) for column in zip(*parts, strict=True))
    return confidence.clamp(max=1.0), top == events  # a sum of probabilities may round to a little more than one


@torch.no_grad()
def distance(
    student: LanguageModel, teacher: LanguageModel, student_states: Tensor, teacher_states: Tensor, kept: slice | Tensor
) -> LossStats:
    """Compare every prediction, (N,): `divergence` KL(teacher || student) in nats, `top1_agreement`, and the entropies.

    Both distributions are over the ids `kept`, those that both models have rows for; a model without a map is restricted to them.
    """
    (student_weight, student_bias), (teacher_weight, teacher_bias) = head_rows(student, kept), head_rows(teacher, kept)
    _, stats = linear_kl_div(
        student_states,
        student_weight,
        teacher_states,
        teacher_weight,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        return_stats=True,
        **student.logit_options("student"),
        **teacher.logit_options("teacher"),
    )
    assert isinstance(stats, LossStats)
    return stats
