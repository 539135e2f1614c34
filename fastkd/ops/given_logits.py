"""Logits that exist already, a few tokens at a time, and the place of their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm import row_buffer


class GivenLogits:
    """Logits (N, V), read where they lie if all tokens and columns count; else the rows that do are copied.

    Args:
        logits: (N, V), any floating dtype.
        valid: (n,) the tokens that count; None: all.
        tokens: how many tokens are read at a time.
        columns: (V',) the vocabulary columns that are meant; None: all.
        needs_grad: whether a gradient is made.
    """

    bias: Tensor | None = None
    rest: Tensor | None = None
    """(n,) log-sum of a teacher's tokens that have no column; see `RowCall.teacher_rest`."""

    def __init__(
        self, logits: Tensor, valid: Tensor | None, tokens: int, *, columns: Tensor | None = None, needs_grad: bool = False
    ) -> None:
        self.source, self.valid, self.columns = logits, valid, columns
        self.is_read_in_place = valid is None and columns is None and (logits.shape[1] <= 1 or logits.stride(1) == 1)
        vocabulary = logits.shape[1] if columns is None else columns.shape[0]
        rows = 0 if self.is_read_in_place else tokens
        self.buffer = row_buffer(rows, vocabulary, logits.dtype, logits.device)[:, :vocabulary]
        # Masked tokens are never written, so they start as zeros.
        self.gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if needs_grad else logits.new_empty(0)

    def logits(self, part: slice) -> Tensor:
        """The logits of these of the tokens that count, (tokens, V')."""
        if self.is_read_in_place:
            return self.source[part]
        rows = self.source[part] if self.valid is None else self.source[self.valid[part]]
        out = self.buffer[: part.stop - part.start]
        out.copy_(rows if self.columns is None else rows.index_select(1, self.columns))
        return out

    def target(self, chunk: slice, part: slice) -> Tensor:
        """Where the gradient of the logits of `part` of `chunk` is to be written: its own place, or with masked tokens the buffer."""
        return self.gradient[part] if self.valid is None else self.buffer[part.start - chunk.start : part.stop - chunk.start]

    def collect(self, chunk: slice) -> None:
        """Put the gradient of `chunk` in its place, where it is not there already."""
        if self.valid is not None:
            self.gradient[self.valid[chunk]] = self.buffer[: chunk.stop - chunk.start]
