"""Matrix products whose result and sums are in float32 (or float64) whatever the operands are, and the buffers that they fill."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend_cpp

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_ROW_BYTES = 64


def row_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised (rows, columns or a few more): every row begins at a multiple of 64 bytes, so that kernels move whole vectors."""
    multiple = _ROW_BYTES // dtype.itemsize
    return torch.empty(rows, -(-columns // multiple) * multiple, dtype=dtype, device=device)


def multiplies(operand: torch.dtype, result: torch.dtype, device: torch.device) -> bool:
    """Whether `mm_` takes operands of dtype `operand` into `result` as they are; otherwise they are to be upcast to `result` first.

    True for equal dtypes, and for 16-bit operands into float32 where a library has that product: on CUDA, and on CPUs with MKL.
    """
    if operand == result:
        return True
    if operand not in _SIXTEEN_BITS or result != torch.float32:
        return False
    return device.type == "cuda" or (device.type == "cpu" and operand in backend_cpp.sixteen_bit_dtypes())


def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out (M, N) = a (M, K) b (K, N), or out += a b, without any allocation. 16-bit operands are exact in float32: only sums round."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        backend_cpp.mm_16bit_(out, _read_by_blas(a), _read_by_blas(b), accumulate)


def _read_by_blas(matrix: Tensor) -> Tensor:
    """The matrix, copied if it lies in memory neither row by row nor column by column, as an expanded one or every other column."""
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    by_rows = (columns == 1 or column_stride == 1) and (rows == 1 or row_stride >= columns)
    by_columns = (rows == 1 or row_stride == 1) and (columns == 1 or column_stride >= rows)
    return matrix if by_rows or by_columns else matrix.contiguous()
