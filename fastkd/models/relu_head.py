"""BERT with the classification head of CR-ILD's code, which no class of transformers has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertForSequenceClassification


class BertWithReLUHead(BertForSequenceClassification):
    """Scores (R, C) are Linear(ReLU(pooled)) of the pooler's tanh, without dropout.

    The Linear is `classifier.1`, so that plain transformers, which has no ReLU there, does not take its weights.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dropout = nn.Identity()  # type: ignore[assignment]
        self.classifier = nn.Sequential(nn.ReLU(), self.classifier)  # type: ignore[assignment]

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """A model with new weights, as the Auto classes make it."""
        return cls._from_config(config, **options)  # type: ignore[no-untyped-call]
