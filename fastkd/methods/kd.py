"""Plain knowledge distillation over the teacher's whole vocabulary (Hinton et al., arXiv:1503.02531), the baseline of the methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.language_model import LanguageModel
from ..models.load import vocabulary_rows
from ..models.teacher_cache import CachedTeacher
from ..ops.checks import check_temperature
from ..ops.divergence import Divergence
from ..tasks.text import IGNORE_INDEX, TextBatch
from .language_modeling import check_mask_probability
from .objective import Objective
from .teaching import Lesson, plain


@dataclass(frozen=True, kw_only=True)
class KDOptions:
    """Options of method `kd`."""

    temperature: float = 2.0
    """Softens both distributions; the loss carries its square."""
    divergence: str = "forward_kl"
    """Divergence between teacher and student, by name or as mixed(0.5), jsd(0.5), skew_kl(0.1), skew_rkl(0.1)."""
    label_weight: float = 1.0
    """Weight of the hard labels' cross-entropy beside the divergence."""
    completion_only: bool = False
    """Whether the divergence, too, is over labelled tokens alone, as those of completions are; KDTrainer does so with decoders."""
    mask_probability: float = 0.15
    """Share of tokens an encoder predicts; decoders predict every next token whatever it says."""

    def __post_init__(self) -> None:
        Divergence.parse(self.divergence)
        check_mask_probability(self.mask_probability)
        check_temperature(self.temperature)
        if not self.label_weight >= 0:
            raise ValueError(f"label_weight={self.label_weight} must be >= 0.")


class KnowledgeDistillation(Objective):
    """mean over tokens of T^2 D(teacher, student) + label_weight * mean over labelled tokens of cross-entropy.

    A pad predicts nothing, whatever its label. With `completion_only` the first mean is over labelled tokens as well.

    A student on a kept vocabulary answers for every id of the teacher: a dropped id has its stand-in's logit (GLM's output mode A), so
    the softmax runs over the teacher's ids, and log(ids per slot), its `slot_bias`, turns its logits into those of the slots.
    """

    student: LanguageModel
    teacher: LanguageModel

    def __init__(self, student: LanguageModel, teacher: LanguageModel | CachedTeacher, options: KDOptions, tokens: int) -> None:
        """The teacher's rows of all ids are gathered here.

        Args:
            student: trained, perhaps on a kept vocabulary.
            teacher: frozen; or what stands for a cache.
            options: the method's.
            tokens: ids that there are; what the teacher's head has beyond them is padding.

        Raises:
            ValueError: a teacher that is not frozen.
        """
        super().__init__()
        self.student = student
        self.options = options
        self.tokens = min(tokens, vocabulary_rows(teacher))
        self.learn_from(teacher, Lesson(words=slice(self.tokens)))
        if student.vocab_map is not None:
            ids = torch.bincount(student.vocab_map.id_to_slot[: self.tokens], minlength=student.vocabulary)
            student.slot_bias = ids.double().log().float()

    def weight(self, batch: Any) -> np.ndarray:
        """(2,) float64, compared tokens and labelled tokens."""
        mask, labels = self._compared(plain(batch))
        return np.array([int(mask.sum()), int((labels != IGNORE_INDEX).sum())], dtype=np.float64)

    def _compared(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Where the models are compared, (B, S) bool, and the labels of no pad, (B, S) int64: what is counted is what is summed."""
        mask, labels = batch.attention_mask.bool(), batch.token_labels
        return labels != IGNORE_INDEX if self.options.completion_only else mask, labels

    def forward(self, batch: Any, denominator: np.ndarray) -> Tensor:
        """(): both terms, made in one pass over the logits. denominator: (2,), the step's `weight`."""
        (batch, taught), options, student = self.taught(batch), self.options, self.student
        mask, labels = self._compared(batch)
        words = taught.words
        assert words is not None
        tokens, labelled = (max(float(count), 1.0) for count in denominator)

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if student.vocab_map is not None:
                slots = student.id_to_slot[: self.tokens]
                # index_select, because its backward adds in a fixed order: indexing's does not, and a resumed run must be bit-equal.
                weight, bias = weight.index_select(0, slots), None if bias is None else bias.index_select(0, slots)
            loss, stats = words.divergence(
                hidden,
                weight,
                student_bias=bias,
                divergence=options.divergence,
                temperature=options.temperature,
                mask=mask,
                labels=labels if options.label_weight > 0 else None,
                label_weight=options.label_weight,
                denominator=tokens,
                label_denominator=labelled,
                **student.logit_options("student"),
            )
            if options.label_weight > 0:
                assert stats.divergence is not None and stats.cross_entropy is not None
                self.term("divergence", stats.divergence.sum() / tokens)
                self.term("labels", options.label_weight * stats.cross_entropy.sum() / labelled)
            return loss

        return student(batch.input_ids, batch.attention_mask, at_head)
