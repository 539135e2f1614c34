"""A teacher's logits by an 8-bit product: half the time of a 16-bit one where the GPU has it; docs/numerics.md has its error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max
# The library's 8-bit product takes sizes that are multiples of this.
_MULTIPLE = 16
_CAPABILITY = (8, 9)


class Fp8Logits:
    """hidden (N, H) times weight (V, H) transposed, plus bias, both rounded to float8 e4m3 with a scale a row, sums in float32.

    The rounding is about 4 % of the logits' standard deviation; the student's side and its gradient are computed as ever.
    """

    late_bias: Tensor | None = None

    def __init__(self, hidden: Tensor, head: Sequence[Tensor], valid: Tensor | None, rows: int, dtype: torch.dtype) -> None:
        weight, *bias = head
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < _CAPABILITY:
            name = torch.cuda.get_device_name(weight.device)
            raise ValueError(
                f"teacher_precision='fp8' needs a GPU of compute capability 8.9 or more, and {name} has less; "
                "use teacher_precision='full'."
            )
        self.vocabulary = weight.shape[0]
        self.hidden, self.hidden_scale = _quantise(hidden if valid is None else hidden.index_select(0, valid), dtype)
        self.weight, weight_scale = _quantise(weight, dtype, pad_rows=True)
        self.weight_scale = weight_scale[: self.vocabulary, 0]
        self.bias = bias[0].to(dtype) if bias else None
        self.one = torch.ones((), dtype=torch.float32, device=weight.device)
        self.buffer = weight.new_empty(rows, self.weight.shape[0], dtype=torch.float32)

    def logits(self, rows: slice) -> Tensor:
        """(rows, V) in float32; see `TeacherSource`."""
        out = self.buffer[: rows.stop - rows.start]
        torch._scaled_mm(self.hidden[rows], self.weight.T, self.one, self.one, out_dtype=torch.float32, out=out)
        logits = out[:, : self.vocabulary].mul_(self.weight_scale).mul_(self.hidden_scale[rows])
        return logits if self.bias is None else logits.add_(self.bias)


def _quantise(tensor: Tensor, dtype: torch.dtype, pad_rows: bool = False) -> tuple[Tensor, Tensor]:
    """tensor ~ quantised * scale, scale (rows, 1); padded with zeros to the multiples that the product takes."""
    rows, width = tensor.shape
    scale = tensor.abs().amax(1, keepdim=True).to(dtype).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    padding = (0, -width % _MULTIPLE, 0, -rows % _MULTIPLE if pad_rows else 0)
    return torch.nn.functional.pad((tensor / scale).to(_FORMAT).view(torch.uint8), padding).view(_FORMAT), scale
