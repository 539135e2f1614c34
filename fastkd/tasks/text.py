"""Batches of plain text for language modelling: padded rows, and the label that each position predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .token_rows import num_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class TextBatch:
    """B rows of S tokens. `labels[b, i]` is the id that position i predicts, so no loss shifts anything."""

    input_ids: Tensor
    """(B, S) int64, padded."""
    attention_mask: Tensor
    """(B, S) int64, 1 on tokens and 0 on padding."""
    labels: Tensor
    """(B, S) int64: the next id (decoders) or the masked one (encoders); -100 where there is none."""

    @property
    def token_labels(self) -> Tensor:
        """(B, S) int64, the labels of no pad: under left padding the last pad would predict the first token."""
        return self.labels.masked_fill(self.attention_mask == 0, IGNORE_INDEX)

    def to(self, device: torch.device | str) -> TextBatch:
        """The same batch on `device`."""
        return TextBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class Masking:
    """BERT's masking: `probability` of the ordinary tokens are predicted; of those 80 % become the mask token, 10 % a random one."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocabulary: int
    probability: float = 0.15
    gaps: tuple[int, ...] = ()
    """Ids below `vocabulary` that no token has: none of them is drawn."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, probability: float) -> Masking:
        if tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token, so an encoder cannot be trained with it on plain text; add one.")
        rows = num_ids(tokenizer)
        gaps = tuple(sorted({*range(rows)}.difference(tokenizer.get_vocab().values())))
        return cls(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), rows, probability, gaps)


def shifted(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Turn labels of the positions themselves, as transformers has them, into labels of what each position of a decoder predicts.

    labels: (..., S). Returns (..., S), with `ignore_index` at the end.
    """
    return pad(labels, (0, 1), value=ignore_index)[..., 1:]


def collate_text(
    rows: Sequence[np.ndarray], *, pad_id: int, masking: Masking | None, generator: torch.Generator, pad_to_multiple_of: int = 8
) -> TextBatch:
    """Pad `rows` of ids to the longest of them. `masking` None: a decoder's batch, every position predicts its successor.

    With masking, which tokens are masked follows from `generator` alone.
    """
    width = -(-max(len(row) for row in rows) // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        attention_mask[index, : len(row)] = 1
    if masking is None:
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, :-1] = torch.where(attention_mask[:, 1:].bool(), input_ids[:, 1:], IGNORE_INDEX)
        return TextBatch(input_ids, attention_mask, labels)
    ordinary = attention_mask.bool() & ~torch.isin(input_ids, torch.tensor(masking.special_ids))
    chosen = ordinary & (torch.rand(input_ids.shape, generator=generator) < masking.probability)
    labels = torch.where(chosen, input_ids, IGNORE_INDEX)
    fate = torch.rand(input_ids.shape, generator=generator)
    random_ids = torch.randint(masking.vocabulary - len(masking.gaps), input_ids.shape, generator=generator)
    if masking.gaps:
        tokens = torch.ones(masking.vocabulary, dtype=torch.bool)
        tokens[list(masking.gaps)] = False
        random_ids = tokens.nonzero()[random_ids, 0]
    replaced = torch.where(fate < 0.8, masking.mask_id, torch.where(fate < 0.9, random_ids, input_ids))
    return TextBatch(torch.where(chosen, replaced, input_ids), attention_mask, labels)
