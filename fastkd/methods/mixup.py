"""MixUp of embeddings (CR-ILD): every row of a batch is mixed with the one that is as far from its end as it is from its beginning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.capture import Captured, Projections


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """A batch (a dataclass), and what its rows x become once they are embedded: mix x_i + (1 - mix) x_{B-1-i}.

    All rows share one mix, and both models of a distillation. In a batch of odd size the middle row stays as it is.
    """

    batch: Any
    mix: float | None
    """From 1/2 to 1; None: the rows are not mixed."""

    @classmethod
    def draw(cls, batch: Any, generator: torch.Generator) -> MixedBatch:
        """Mixed by the larger of u and 1 - u, with u ~ U(0, 1) = Beta(1, 1) from `generator`."""
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
        return cls(batch, max(drawn, 1 - drawn))

    @property
    def input_ids(self) -> Tensor:
        """(B, S) int64 of the rows as they are."""
        ids: Tensor = self.batch.input_ids
        return ids

    @property
    def attention_mask(self) -> Tensor:
        """(B, S) of the rows as they are; `tokens` is that of the mixed ones."""
        mask: Tensor = self.batch.attention_mask
        return mask

    @property
    def tokens(self) -> Tensor:
        """(B, S) bool: where a mixed row has a token, which is where either of its two rows has one."""
        own = self.attention_mask.bool()
        return own if self.mix is None else own | own.flip(0)

    @property
    def inputs(self) -> Any:
        """The batch that a model is called with while `embed` replaces its embeddings: attention is to all of `tokens`."""
        return replace(self.batch, attention_mask=self.tokens.to(self.attention_mask.dtype))

    def embed(self, embeddings: Tensor) -> Tensor:
        """(B, S, H) of the rows as they are -> of the mixed ones."""
        return embeddings if self.mix is None else self.mix * embeddings + (1 - self.mix) * embeddings.flip(0)

    def to(self, device: torch.device | str) -> MixedBatch:
        """The same with the batch on `device`."""
        return replace(self, batch=self.batch.to(device))


def partners(seen: Captured) -> Captured:
    """The states of every row's partner, B - 1 - i for row i."""
    attention = {layer: Projections(x.q.flip(0), x.k.flip(0), x.v.flip(0)) for layer, x in seen.attention.items()}
    return Captured({layer: state.flip(0) for layer, state in seen.hidden.items()}, attention)
