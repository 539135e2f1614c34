"""The student's logits at the ids that its teacher lists, and nothing else: of each token K products with rows of the head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .backend_torch import chain_
from .gemm import row_buffer
from .linear_logits import gradient_dtype, spread_gradients
from .options import LossOptions


class ListedLogits:
    """A source of logits (tokens, K), finished and -inf where an entry is missing, and the sink of their gradient.

    The rows of the head are gathered, and upcast, for a chunk of tokens at a time: (tokens, K, H) is all that is alive. A chunk's
    gradient, over its logits, must be collected before the next chunk's are made.

    Args:
        student: "hidden" (N, H), "weight" (V, H) and, if there is one, "bias" (V,).
        ids: (n, K) of the tokens that count; -1 for no entry.
        valid: (n,) the tokens that count; None: all.
        tokens: how many tokens' logits are made at a time.
        dtype: of the logits.
        options: of which the operands' dtype and what the student does after its head are read.
        needs_grad: by name, of the student's tensors.
    """

    bias: Tensor | None = None

    def __init__(
        self,
        student: Mapping[str, Tensor],
        ids: Tensor,
        valid: Tensor | None,
        tokens: int,
        dtype: torch.dtype,
        options: LossOptions,
        needs_grad: Mapping[str, bool],
    ) -> None:
        self.weight, self.head_bias, self.ids = student["weight"], student.get("bias"), ids
        self.dtype, self.operand, self.needs_grad = dtype, options.operand or self.weight.dtype, needs_grad
        self.transform = options.student_transform
        hidden = student["hidden"]
        self.hidden = (hidden if valid is None else hidden.index_select(0, valid)).to(self.operand).to(dtype)
        entries, width, device = ids.shape[1], hidden.shape[1], hidden.device
        self.rows = torch.empty(tokens, entries, width, dtype=dtype, device=device)
        self.buffer = row_buffer(tokens, entries, dtype, device)[:, :entries]
        shapes = {"hidden": self.hidden.shape, "weight": self.weight.shape, "bias": self.weight.shape[:1]}
        self.made = {
            name: torch.zeros(shape if needs_grad.get(name) else 0, dtype=dtype, device=device) for name, shape in shapes.items()
        }

    def logits(self, part: slice) -> Tensor:
        """The logits of these of the tokens that count, (tokens, K), in a buffer that the next call overwrites."""
        count, ids = part.stop - part.start, self.ids[part]
        rows, out = self.rows[:count], self.buffer[:count]
        # Entries that are missing read row 0.
        self.missing, self.index = ids < 0, ids.clamp_min(0).view(-1)
        rows.view(-1, rows.shape[-1]).copy_(self.weight.index_select(0, self.index).to(self.operand))
        z = torch.bmm(rows, self.hidden[part, :, None])[..., 0]
        if self.head_bias is not None:
            z += self.head_bias.index_select(0, self.index).to(self.dtype).view_as(z)
        self.finished = self.transform.apply(z)
        return out.copy_(self.finished).masked_fill_(self.missing, -torch.inf)

    def target(self, chunk: slice, part: slice) -> Tensor:
        """Where the gradient of the logits of `part` of `chunk` is to be written, (tokens, K): over them."""
        return self.buffer[part.start - chunk.start : part.stop - chunk.start]

    def collect(self, chunk: slice) -> None:
        """Add what the gradient of the chunk's logits gives."""
        # A missing entry has no gradient, whatever is written there where a loss is infinite.
        gradient = chain_(self.target(chunk, chunk).masked_fill(self.missing, 0.0), self.finished, self.transform)
        rows, hidden = self.rows[: len(gradient)], self.hidden[chunk]
        if self.needs_grad["hidden"]:
            torch.bmm(gradient[:, None], rows, out=self.made["hidden"][chunk, None])
        if self.needs_grad["weight"]:
            torch.mul(gradient[..., None], hidden[:, None], out=rows)
            self.made["weight"].index_add_(0, self.index, rows.view(-1, rows.shape[-1]))
        if self.needs_grad.get("bias"):
            self.made["bias"].index_add_(0, self.index, gradient.reshape(-1))

    def gradients(self, valid: Tensor | None, tokens: int) -> dict[str, Tensor]:
        """What `LinearGradients.gradients` says."""
        return spread_gradients(self.made, valid, tokens, gradient_dtype(self.weight, self.operand, self.dtype))
