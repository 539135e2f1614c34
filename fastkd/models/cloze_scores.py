"""Task scores of a cloze batch: what the model says of each class or candidate, differentiable, without full logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops.linear_cross_entropy import linear_cross_entropy
from ..tasks.cloze import ClozeBatch, Example
from ..tasks.cloze_task import ClozeTask
from ..vocab.map import VocabMap
from .language_model import LanguageModel

log = logging.getLogger("fastkd")


def check_label_words(task: ClozeTask, label_word_ids: Tensor, vocab_map: VocabMap) -> None:
    """Refuse label words, ids (C,), of which a model on this vocabulary reads a stand-in: two can be one, and then score alike."""
    kept = vocab_map.is_kept[label_word_ids.to(vocab_map.kept_ids.device)].tolist()
    dropped = [word for word, is_kept in zip(task.label_words, kept, strict=True) if not is_kept]
    if dropped:
        raise ValueError(
            f"The vocabulary was pruned without {', '.join(map(repr, dropped))} of label_words {list(task.label_words)}: the model "
            "would answer with other words in their place. Make its vocabulary anew, in a run with this task or with "
            f"vocabulary.protected: {list(task.label_words)}, or use label words that it keeps."
        )


def check_candidates(task: ClozeTask, examples: Sequence[Example], vocab_map: VocabMap) -> None:
    """Refuse, or warn of, candidates of one example that differ, and are one to a model on this vocabulary.

    Those that a task has for all rows are refused. Those of a row of its own cost that row alone, which is told in the log.
    """
    ids, slots = np.arange(vocab_map.vocab_size), vocab_map.id_to_slot.cpu().numpy()
    merged = [number for number, example in enumerate(examples) if _num_different(example, slots) < _num_different(example, ids)]
    if merged and task.choices:
        raise ValueError(
            f"The student's vocabulary was pruned without tokens by which choices {list(task.choices)} differ: two of them are one to "
            f"it. Make its vocabulary anew with vocabulary.protected: {list(task.choices)}, or use choices that it can tell apart."
        )
    if merged:
        log.warning(
            "%d of %d examples have candidates that the student's vocabulary makes one: it cannot choose between them. The first is "
            "%d (from 0). Keep more of the vocabulary if these are many.",
            *(len(merged), len(examples), merged[0]),
        )


def _num_different(example: Example, rows: np.ndarray) -> int:
    """How many different candidates an example has to a model that reads every id as its entry of `rows` (V,)."""
    pairs = zip(example.sequences, example.score_targets, strict=True)
    return len({(rows[ids].tobytes(), rows[np.array(targets, np.int64)].tobytes()) for ids, targets in pairs})


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
