"""Logits that exist already, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm import row_buffer


class GivenLogits:
    """Logits (N, V) as a source (`TeacherSource`, `StudentSource`), and for the student as the place of their gradient.

    Rows are copied, because row kernels use their logits as scratch: 16-bit ones as they are, which a row kernel raises itself, others
    in `dtype`. `valid`: the rows that are meant, None for all. `columns`: the vocabulary columns that are meant, None for all.
    """

    late_bias: Tensor | None = None

    def __init__(
        self,
        logits: Tensor,
        valid: Tensor | None,
        rows: int,
        dtype: torch.dtype,
        *,
        columns: Tensor | None = None,
        needs_grad: bool = False,
    ) -> None:
        self.source, self.valid, self.columns = logits, valid, columns
        vocabulary = logits.shape[1] if columns is None else columns.shape[0]
        keeps = logits.dtype.itemsize == 2 and dtype == torch.float32
        self.buffer = row_buffer(rows, vocabulary, logits.dtype if keeps else dtype, logits.device)[:, :vocabulary]
        # Masked rows are never written, so they start as zeros.
        self.gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if needs_grad else logits.new_empty(0)

    def logits(self, rows: slice) -> Tensor:
        """(rows, V); see `TeacherSource`."""
        chunk = self.source[rows] if self.valid is None else self.source[self.valid[rows]]
        out = self.buffer[: rows.stop - rows.start]
        out.copy_(chunk if self.columns is None else chunk.index_select(1, self.columns))
        return out

    def gradient_target(self, rows: slice) -> Tensor:
        """(rows, V): the place in the gradient itself, or with masked rows over the logits; see `StudentSource`."""
        return self.gradient[rows] if self.valid is None else self.buffer[: rows.stop - rows.start]

    def collect(self, rows: slice) -> None:
        """Put the gradient of `rows` in its place, where it is not there already."""
        if self.valid is not None:
            self.gradient[self.valid[rows]] = self.buffer[: rows.stop - rows.start].to(self.gradient.dtype)

    def gradients(self) -> list[Tensor]:
        """[(N, V)] in the logits' dtype."""
        return [self.gradient]
