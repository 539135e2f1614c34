"""A linear head as a source of logits, a few tokens at a time, and as a sink of their gradient: hidden (N, H) times weight (V, H)^T."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .checks import check_plain, check_teacher, leading_shape
from .gemm import mm_, multiplies, row_buffer
from .grad_filter import GradFilter
from .options import autocast_dtype
from .plan import Plan

# A weight that has to be upcast to the compute dtype is, a tile at a time, so that no second copy of the head exists.
_TILE_ROWS = 4096


class LinearLogits:
    """A head and the hidden states of the tokens that count.

    Products are accumulated in `dtype`, float32 or float64, whatever the dtype of hidden states and weight: 16-bit operands are exact
    in float32, and their logits are never rounded back. The bias is the row kernel's.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        valid: (n,) the tokens that count; None: all.
        tokens: how many tokens' logits are made at a time.
        dtype: of the logits.
        operand: what hidden states and weight are cast to first; None: nothing.
    """

    rest: Tensor | None = None
    """(n,) log-sum of a teacher's tokens that have no column; see `RowCall.teacher_rest`."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        valid: Tensor | None,
        tokens: int,
        dtype: torch.dtype,
        operand: torch.dtype | None,
    ) -> None:
        self.dtype, self.operand = dtype, operand or weight.dtype
        self.upcasts = not multiplies(self.operand, dtype, weight.device)
        packed = (hidden if valid is None else hidden.index_select(0, valid)).to(self.operand)
        self.hidden = packed.to(dtype) if self.upcasts else packed
        self.weight = weight.to(self.operand)
        self.bias = None if bias is None else bias.to(dtype)
        vocabulary, width = weight.shape
        self.tile = weight.new_empty(min(_TILE_ROWS, vocabulary), width, dtype=dtype) if self.upcasts else None
        self.buffer = row_buffer(tokens, vocabulary, dtype, weight.device)

    def logits(self, part: slice) -> Tensor:
        """The logits of these of the tokens that count, (tokens, V), in a buffer that the next call overwrites."""
        out = self.buffer[: part.stop - part.start, : self.weight.shape[0]]
        for columns, weight in self.weight_tiles():
            mm_(out[:, columns], self.hidden[part], weight.T)
        return out

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
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


def gradient_dtype(x: Tensor, operand: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What the gradient of a head's input `x` is kept in until the backward pass.

    On a GPU bfloat16 is, for its products round once to it; elsewhere the compute dtype. float16 might overflow before the division by
    the number of tokens.
    """
    return torch.bfloat16 if x.is_cuda and operand == torch.bfloat16 else dtype


class LinearGradients:
    """The gradients of a head's hidden states, weight and bias, from the gradient of its logits, one backward chunk after the other.

    Where 16-bit operands are multiplied as they are, the logits' gradient is rounded to 16 bits. Sums over chunks are in the compute
    dtype.

    Args:
        source: of the logits, in parts of `plan`.
        plan: in place, the logits' gradient lies over them; else it has a buffer for a backward chunk.
        needs_grad: by name: "hidden", "weight", "bias".
        grad_filter: leaves columns out of the products.
    """

    def __init__(self, source: LinearLogits, plan: Plan, needs_grad: Mapping[str, bool], grad_filter: GradFilter | None) -> None:
        self.source, self.plan, self.needs_grad, self.grad_filter = source, plan, needs_grad, grad_filter
        vocabulary = source.weight.shape[0]
        device, dtype = source.weight.device, source.dtype
        element = dtype if source.upcasts else source.operand
        if plan.in_place:
            self.buffer = source.buffer.view(element)[:, :vocabulary]
        else:
            self.buffer = row_buffer(plan.backward_tokens, vocabulary, element, device)[:, :vocabulary]
        shapes = {"hidden": source.hidden.shape, "weight": source.weight.shape, "bias": source.weight.shape[:1]}
        kept = gradient_dtype(source.weight, source.operand, dtype)
        # A sum over several chunks is rounded at its end only.
        dtypes = {"hidden": kept, "weight": kept if plan.chunks == 1 else dtype, "bias": dtype}
        self.made = {
            name: torch.empty(shape if needs_grad.get(name) else 0, dtype=dtypes[name], device=device) for name, shape in shapes.items()
        }
        self.bias_sum = torch.empty_like(self.made["bias"])
        # The first chunk writes, later ones add; nothing is filled with zeros first.
        self.first = True
        if grad_filter is not None:
            self.weight_sum = source.weight.sum(0, dtype=dtype)

    def target(self, chunk: slice, part: slice) -> Tensor:
        """Where the gradient of the logits of `part` of `chunk` is to be written, (tokens, V)."""
        return self.buffer[part.start - chunk.start : part.stop - chunk.start]

    def collect(self, chunk: slice) -> None:
        """Add what the gradient of the chunk's logits gives."""
        gradient, hidden = self.target(chunk, chunk), self.source.hidden[chunk]
        if self.grad_filter is not None:
            self._collect_filtered(self.grad_filter, chunk, gradient)
            return
        if self.needs_grad["hidden"]:
            for columns, weight in self.source.weight_tiles():
                mm_(self.made["hidden"][chunk], gradient[:, columns], weight, accumulate=columns.start > 0)
        if self.needs_grad["weight"]:
            mm_(self.made["weight"], gradient.T, hidden, accumulate=not self.first)
        if self.needs_grad.get("bias"):
            bias = self.made["bias"]
            torch.sum(gradient, 0, dtype=bias.dtype, out=bias if self.first else self.bias_sum)
            if not self.first:
                bias.add_(self.bias_sum)
        self.first = False

    def _collect_filtered(self, grad_filter: GradFilter, chunk: slice, gradient: Tensor) -> None:
        """The gradient with its small columns replaced by their mean: products over the kept columns, and one of rank 1."""
        dtype, weight_grad, bias_grad = self.source.dtype, self.made["weight"], self.made["bias"]
        kept, gradient, tail = grad_filter.split(chunk, gradient, dtype)
        if self.first:
            weight_grad.zero_()
            bias_grad.zero_()
            self.tail_weight, self.tail_bias = torch.zeros_like(self.weight_sum), torch.zeros_like(self.weight_sum[0])
            self.first = False
        if self.needs_grad["hidden"]:
            weight = self.source.weight.index_select(0, kept).to(gradient.dtype)
            mm_(self.made["hidden"][chunk], gradient, weight)
            self.made["hidden"][chunk].addr_(tail, self.weight_sum - weight.sum(0, dtype=dtype))
        # What every row of the head gets from the tail is added once at the end, and taken back here from the rows that are kept.
        if self.needs_grad["weight"]:
            hidden = self.source.hidden[chunk]
            product = weight_grad.new_empty(kept.numel(), hidden.shape[1])
            mm_(product, gradient.T, hidden)
            shared = tail @ hidden.to(dtype)
            weight_grad.index_add_(0, kept, product.sub_(shared))
            self.tail_weight += shared
        if self.needs_grad.get("bias"):
            bias_grad.index_add_(0, kept, gradient.sum(0, dtype=dtype) - tail.sum())
            self.tail_bias += tail.sum()

    def gradients(self, valid: Tensor | None, tokens: int) -> dict[str, Tensor]:
        """By name: hidden (tokens, H), weight (V, H) and bias (V,), of `gradient_dtype`; empty where not wanted.

        valid: (n,) which of the tokens were counted; None: all.
        """
        # No logits are made any more: the memory of the last may be that of the rounded sums.
        for logits in (self.buffer, self.source.buffer):
            logits.untyped_storage().resize_(0)
        made = dict(self.made)
        if self.first:  # no tokens at all
            for gradient in made.values():
                gradient.zero_()
        elif self.grad_filter is not None:
            made["weight"] += self.tail_weight if self.needs_grad["weight"] else 0
            made["bias"] += self.tail_bias
        return spread_gradients(made, valid, tokens, gradient_dtype(self.source.weight, self.source.operand, self.source.dtype))


def spread_gradients(made: Mapping[str, Tensor], valid: Tensor | None, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A head's gradients by name in `dtype`, with "hidden" (n, H), or empty, spread over all tokens: zero where not `valid`."""
    hidden = made["hidden"]
    if valid is not None and hidden.dim() == 2:
        hidden = hidden.new_zeros(tokens, hidden.shape[1]).index_copy_(0, valid, hidden)
    return {name: x.to(dtype) for name, x in {**made, "hidden": hidden}.items()}


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
