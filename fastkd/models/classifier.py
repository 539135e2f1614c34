"""A sequence classifier over the teacher's ids, started from a language-model student when there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..vocab.map import VocabMap
from .load import VOCAB_MAP_FOLDER, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Classifier(nn.Module):
    """(input_ids, attention_mask) -> class logits (B, C); ids become slots on the way in if there is a vocabulary map."""

    model: Any
    id_to_slot: Tensor

    def __init__(self, model: PreTrainedModel, vocab_map: VocabMap | None = None) -> None:
        super().__init__()
        self.model, self.vocab_map = model, vocab_map
        if vocab_map is not None:
            self.register_buffer("id_to_slot", vocab_map.id_to_slot, persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        ids = input_ids if self.vocab_map is None else self.id_to_slot[input_ids]
        return self.model(input_ids=ids, attention_mask=attention_mask).logits


def load_classifier(name_or_path: str, num_labels: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Classifier:
    """The classifier at `name_or_path`, or a new class head (drawn from `seed`) on the backbone found there."""
    from transformers import AutoModelForSequenceClassification

    config = load_config(name_or_path)
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    folder = Path(name_or_path) / VOCAB_MAP_FOLDER
    return Classifier(model, VocabMap.load(folder) if folder.is_dir() else None)
