"""Logits of a linear head, made a chunk at a time: hidden (N, H) times weight (V, H) transposed, plus bias (V,)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_plain, leading_shape

# 16-bit weights are raised to the compute dtype a tile at a time, so that no second copy of the head exists.
_TILE_ROWS = 4096


class LinearLogits:
    """A head and its hidden states as a source of logits (`LogitSource`), and for the student as a sink of their gradient.

    Products are accumulated in `dtype`, float32 or float64, whatever the dtype of hidden states and weight: 16-bit operands are exact
    in float32, and their logits are never rounded back. Weight and bias gradients accumulate in `dtype` too.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        valid: Tensor | None,
        dtype: torch.dtype,
        operand_dtype: torch.dtype | None,
    ) -> None:
        self.inputs = (hidden, weight, bias)
        self.valid, self.dtype = valid, dtype
        with torch.no_grad():
            rows = hidden.reshape(-1, hidden.shape[-1])
            rows = rows if valid is None else rows.index_select(0, valid)
            self.hidden = rows.to(operand_dtype or rows.dtype).to(dtype)
            self.weight = weight.detach().to(operand_dtype or weight.dtype)
            self.bias = None if bias is None else bias.detach().to(dtype)

    def load(self, rows: slice, out: Tensor) -> None:
        hidden = self.hidden[rows]
        for tile, weight in self._tiles():
            torch.mm(hidden, weight.T, out=out if weight.shape[0] == out.shape[1] else out[:, tile])
        if self.bias is not None:
            out.add_(self.bias)

    def begin(self, needed: Sequence[bool]) -> None:
        wants_hidden, wants_weight, wants_bias = needed
        self.grad_hidden = torch.zeros_like(self.hidden) if wants_hidden else None
        self.grad_weight = torch.empty_like(self.weight, dtype=self.dtype) if wants_weight else None
        self.grad_bias = torch.zeros_like(self.bias) if wants_bias and self.bias is not None else None
        self.first = True

    def collect(self, rows: slice, gradient: Tensor) -> None:
        if self.grad_hidden is not None:
            for tile, weight in self._tiles():
                self.grad_hidden[rows].addmm_(gradient[:, tile], weight)
        if self.grad_weight is not None:
            if self.first:
                torch.mm(gradient.T, self.hidden[rows], out=self.grad_weight)
            else:
                self.grad_weight.addmm_(gradient.T, self.hidden[rows])
        if self.grad_bias is not None:
            self.grad_bias.add_(gradient.sum(0))
        self.first = False

    def finish(self, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = self.inputs
        if self.grad_weight is not None and self.first:
            self.grad_weight.zero_()
        results: list[Tensor | None] = []
        for gradient, original in ((self.grad_hidden, hidden), (self.grad_weight, weight), (self.grad_bias, bias)):
            results.append(None if gradient is None or original is None else gradient.mul_(scale).to(original.dtype))
        if results[0] is not None:
            if self.valid is not None:
                full = results[0].new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1])
                results[0] = full.index_copy_(0, self.valid, results[0])
            results[0] = results[0].view(hidden.shape)
        self.grad_hidden = self.grad_weight = self.grad_bias = None
        return tuple(results)

    def _tiles(self) -> list[tuple[slice, Tensor]] | _RaisedTiles:
        if self.weight.dtype == self.dtype:
            return [(slice(0, self.weight.shape[0]), self.weight)]
        return _RaisedTiles(self.weight, self.dtype)


class _RaisedTiles:
    """Tiles of a 16-bit weight in the compute dtype, each alive only while it is used."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def __iter__(self):
        for start in range(0, self.weight.shape[0], _TILE_ROWS):
            tile = slice(start, start + _TILE_ROWS)
            yield tile, self.weight[tile].to(self.dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that GEMM operands take under torch.autocast on `device`; None outside it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    """Check that hidden (..., H), weight (V, H) and bias (V,) belong together; return the leading dims."""
    leading = leading_shape(f"{side}_hidden", hidden)
    check_plain(f"{side}_weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight has shape {tuple(weight.shape)} and {side}_hidden has width {hidden.shape[-1]}; "
            f"the weight must be (vocabulary, {hidden.shape[-1]})."
        )
    if bias is not None:
        check_plain(f"{side}_bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{side}_bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},), one value a vocabulary row.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{side}_{name} is on {tensor.device} and {side}_hidden on {hidden.device}; move them together.")
    if weight.dtype != hidden.dtype and autocast_dtype(hidden.device) is None:
        raise TypeError(
            f"{side}_hidden has dtype {hidden.dtype} and {side}_weight {weight.dtype}; cast one of them, or call under torch.autocast."
        )
    return leading
