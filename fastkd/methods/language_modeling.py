"""Language modelling on hard labels: how a teacher is made, and the student that is trained alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models.language_model import LanguageModel
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..tasks.text import IGNORE_INDEX, TextBatch
from .objective import Objective


@dataclass(frozen=True, kw_only=True)
class LanguageModelingOptions:
    """Options of method `lm`."""

    mask_probability: float = 0.15
    """Share of tokens an encoder predicts; decoders predict every next token whatever it says."""

    def __post_init__(self) -> None:
        check_mask_probability(self.mask_probability)
        if self.mask_probability == 0:
            raise ValueError("mask_probability=0 leaves an encoder nothing to predict; BERT uses 0.15.")


class LanguageModeling(Objective):
    """mean over labelled tokens of -log softmax(z)[label]; labels of dropped ids are those of their stand-ins."""

    student: LanguageModel

    def __init__(self, student: LanguageModel) -> None:
        super().__init__()
        self.student = student

    def weight(self, batch: TextBatch) -> float:
        """How many labelled tokens the batch has."""
        return float((batch.labels != IGNORE_INDEX).sum())

    def forward(self, batch: TextBatch, denominator: float) -> Tensor:
        """(): summed over labelled tokens, divided by the step's number of them."""
        labels = self.student.to_slots(batch.labels, ignore_index=IGNORE_INDEX)
        transform = self.student.transform

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, labels, bias=bias, softcap=transform.softcap, logit_scale=transform.scale, denominator=denominator
            )

        return self.student(batch.input_ids, batch.attention_mask, at_head)


def check_mask_probability(probability: float) -> None:
    """Refuse (ValueError) a share of masked tokens outside of [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"mask_probability={probability} must lie in [0, 1); BERT uses 0.15.")
