"""Logits of a linear head, a few rows at a time: hidden (N, H) times weight (V, H) transposed, plus bias (V,)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .arguments import check_plain, check_teacher, leading_shape
from .gemm import mm_, multiplies_unraised, row_buffer
from .grad_filter import GradFilter

# A weight that has to be raised to the compute dtype is, a tile at a time, so that no second copy of the head exists.
_TILE_ROWS = 4096


class LinearLogits:
    """A head and its hidden states as a source of logits (`TeacherSource`), and for the student as a sink of their gradient.

    Products are accumulated in `dtype`, float32 or float64, whatever the dtype of hidden states and weight: 16-bit operands are exact
    in float32, and their logits are never rounded back. Where 16-bit operands are multiplied as they are, the logits' gradient is
    rounded to 16 bits and lies over the first half of its float32 logits. The inputs' gradients accumulate in `dtype`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        valid: Tensor | None,
        rows: int,
        dtype: torch.dtype,
        operand_dtype: torch.dtype | None,
        *,
        needs_grad: Sequence[bool] = (),
        grad_filter: GradFilter | None = None,
        adds_bias: bool = True,
    ) -> None:
        """adds_bias: the bias is in the logits; else it is left to the row kernel, as `late_bias`."""
        hidden, weight, *bias = tensors
        vocabulary, width = weight.shape
        operand = operand_dtype or weight.dtype
        raises = not multiplies_unraised(operand, dtype, weight.device)
        self.tokens, self.valid, self.dtype = hidden.shape[0], valid, dtype
        packed = hidden if valid is None else hidden.index_select(0, valid)
        self.hidden = packed.to(operand).to(dtype if raises else operand)
        self.weight = weight.to(operand)
        own_bias = bias[0].to(dtype) if bias else None
        self.bias = own_bias if adds_bias else None
        self.late_bias = None if adds_bias else own_bias
        self.tile = weight.new_empty(min(_TILE_ROWS, vocabulary), width, dtype=dtype) if raises else None
        buffer = row_buffer(rows, vocabulary, dtype, weight.device)
        self.buffer = buffer[:, :vocabulary]
        self.gradient_buffer = self.buffer if raises else buffer.view(operand)[:, :vocabulary]
        # The first chunk writes, later ones add; nothing is filled with zeros first.
        self.first = True
        shapes = [self.hidden.shape, weight.shape, weight.shape[:1]]
        self.wanted = [*needs_grad, False, False, False][:3]
        self.grad_hidden, self.grad_weight, self.grad_bias = (
            weight.new_empty(shape if wanted else 0, dtype=dtype) for shape, wanted in zip(shapes, self.wanted, strict=True)
        )
        self.bias_sum = torch.empty_like(self.grad_bias)
        self.results = len(tensors)
        self.grad_filter = grad_filter
        if grad_filter is not None:
            self.weight_sum = self.weight.sum(0, dtype=dtype)

    def logits(self, rows: slice) -> Tensor:
        """(rows, V) in the compute dtype; see `TeacherSource`."""
        out = self.buffer[: rows.stop - rows.start]
        for columns, weight in self._tiles():
            mm_(out[:, columns], self.hidden[rows], weight.T)
        return out if self.bias is None else out.add_(self.bias)

    def gradient_target(self, rows: slice) -> Tensor:
        """(rows, V), over the logits of these rows; see `StudentSource`."""
        return self.gradient_buffer[: rows.stop - rows.start]

    def collect(self, rows: slice) -> None:
        """Add what the gradient of the logits of `rows` gives to hidden states, weight and bias; see `StudentSource`."""
        gradient = self.gradient_target(rows)
        wants_hidden, wants_weight, wants_bias = self.wanted
        if self.grad_filter is not None:
            self._collect_filtered(self.grad_filter, rows, gradient)
            return
        if wants_hidden:
            for columns, weight in self._tiles():
                mm_(self.grad_hidden[rows], gradient[:, columns], weight, accumulate=columns.start > 0)
        if wants_weight:
            mm_(self.grad_weight, gradient.T, self.hidden[rows], accumulate=not self.first)
        if wants_bias:
            torch.sum(gradient, 0, dtype=self.dtype, out=self.grad_bias if self.first else self.bias_sum)
            if not self.first:
                self.grad_bias.add_(self.bias_sum)
        self.first = False

    def _collect_filtered(self, grad_filter: GradFilter, rows: slice, gradient: Tensor) -> None:
        """The gradient with its small columns replaced by their mean: products over the kept columns, and one of rank 1."""
        kept, gradient, tail = grad_filter.split(rows, gradient, self.dtype)
        wants_hidden, wants_weight, wants_bias = self.wanted
        if self.first:
            self.grad_weight.zero_()
            self.grad_bias.zero_()
            self.tail_weight, self.tail_bias = torch.zeros_like(self.weight_sum), torch.zeros_like(self.weight_sum[0])
            self.first = False
        if wants_hidden:
            weight = self.weight.index_select(0, kept).to(gradient.dtype)
            mm_(self.grad_hidden[rows], gradient, weight)
            self.grad_hidden[rows].addr_(tail, self.weight_sum - weight.sum(0, dtype=self.dtype))
        # What every row of the head gets from the tail is added once at the end, and taken back here from the rows that are kept.
        if wants_weight:
            hidden = self.hidden[rows]
            product = self.grad_weight.new_empty(kept.numel(), hidden.shape[1])
            mm_(product, gradient.T, hidden)
            shared = tail @ hidden.to(self.dtype)
            self.grad_weight.index_add_(0, kept, product.sub_(shared))
            self.tail_weight += shared
        if wants_bias:
            self.grad_bias.index_add_(0, kept, gradient.sum(0, dtype=self.dtype) - tail.sum())
            self.tail_bias += tail.sum()

    def gradients(self) -> list[Tensor]:
        """Of hidden states (N, H), weight (V, H), and the bias (V,) if there is one, in the compute dtype; empty where not wanted."""
        results = [self.grad_hidden, self.grad_weight, self.grad_bias][: self.results]
        if self.first:  # no rows at all
            for gradient in results:
                gradient.zero_()
        elif self.grad_filter is not None:
            self.grad_weight += self.tail_weight if self.wanted[1] else 0
            self.grad_bias += self.tail_bias
        if self.valid is not None and self.wanted[0]:
            full = self.grad_hidden.new_zeros(self.tokens, self.grad_hidden.shape[1])
            results[0] = full.index_copy_(0, self.valid, self.grad_hidden)
        return results

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the head, those rows as GEMMs take them)."""
        vocabulary = self.weight.shape[0]
        if self.tile is None:
            yield slice(0, vocabulary), self.weight
            return
        for start in range(0, vocabulary, _TILE_ROWS):
            columns = slice(start, min(start + _TILE_ROWS, vocabulary))
            tile = self.tile[: columns.stop - start]
            tile.copy_(self.weight[columns])
            yield columns, tile


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that GEMM operands take under torch.autocast on `device`; None outside it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, is_shard: bool = False) -> torch.Size:
    """Check that hidden (..., H), weight (V, H) and bias (V,) belong together; return the leading dims.

    Args:
        prefix: what the arguments' names begin with: "student_", "teacher_" or nothing.
        hidden: (..., H), H > 0.
        weight: (V, H).
        bias: (V,) or None.
        is_shard: V may be 0, which all processes of a group must refuse together.
    """
    leading = leading_shape(f"{prefix}hidden", hidden)
    check_plain(f"{prefix}weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and not is_shard):
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)} and {prefix}hidden has width {hidden.shape[-1]}; "
            f"the weight must be (vocabulary, {hidden.shape[-1]}), with at least one vocabulary row."
        )
    if bias is not None:
        check_plain(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{prefix}bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},), one value a vocabulary row."
            )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{prefix}{name} is on {tensor.device} and {prefix}hidden on {hidden.device}; move them together.")
        if prefix == "teacher_":
            check_teacher(f"{prefix}{name}", tensor)
    if weight.dtype != hidden.dtype and autocast_dtype(hidden.device) is None:
        raise TypeError(
            f"{prefix}hidden has dtype {hidden.dtype} and {prefix}weight {weight.dtype}; cast one, or call under torch.autocast."
        )
    return leading


def flatten_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """As the chunked pass takes them: hidden states (N, H), weight, and the bias if there is one."""
    return [hidden.reshape(-1, hidden.shape[-1]), weight, *([] if bias is None else [bias])]
