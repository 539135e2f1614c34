"""Task scores of a cloze batch: what the model says of each class or candidate, differentiable, without full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear_cross_entropy import linear_cross_entropy
from ..tasks.cloze import ClozeBatch
from .language_model import LanguageModel


def verbalizer_scores(model: LanguageModel, batch: ClozeBatch, label_word_ids: Tensor) -> Tensor:
    """(B, C): the raw LM logit of each label word (C,) at the scored position. No softmax over the vocabulary (as GLM's downstream)."""
    words = model.to_slots(label_word_ids)
    rows = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)

    def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scored = hidden[rows, batch.score_positions[:, 0]]
        return model.transform.apply(torch.nn.functional.linear(scored, weight[words], None if bias is None else bias[words]))

    return model(batch.input_ids, batch.attention_mask, at_head)


def choice_scores(model: LanguageModel, batch: ClozeBatch, length_penalty: float = 0.0) -> Tensor:
    """(B, C): sum over the candidate's tokens of log softmax(z)[token], divided by length^length_penalty."""
    targets = model.to_slots(batch.score_targets, ignore_index=-100)

    def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scored = hidden.gather(1, batch.score_positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return linear_cross_entropy(
            scored, weight, targets, bias=bias, softcap=model.transform.softcap, logit_scale=model.transform.scale, reduction="none"
        )

    log_likelihood = -model(batch.input_ids, batch.attention_mask, at_head).sum(-1)
    if length_penalty:
        log_likelihood = log_likelihood / batch.score_mask.sum(-1).clamp_min(1) ** length_penalty
    return log_likelihood.view(batch.choice_mask.shape)
