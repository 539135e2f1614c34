"""Floor 1: Triton gathers over a vocabulary map: a weight's rows (an embedding or a head), or the columns of logits.

Equal to `index_select` bit for bit, with 64-bit addresses and any strides. An index outside of the vocabulary reads nothing and gives
NaN: the map is checked where it is made, and the device is never waited for here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4


@triton.jit
def vocab_gather_kernel(
    source,
    index,
    out,
    source_row_stride,
    source_column_stride,
    vocabulary,
    out_row_stride,
    out_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i, j] = source[index[i], j] if ROWS, else source[i, index[j]]. One program a block of one row of `out`."""
    # Blocks of all rows are counted along the first axis of the grid: the others end at 65535.
    blocks = tl.cdiv(out_columns, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_columns
    if ROWS:
        source_row = tl.load(index + row)
        source_columns = columns
        known = inside & (source_row >= 0) & (source_row < vocabulary)
    else:
        source_row = row
        source_columns = tl.load(index + columns, mask=inside, other=-1)
        known = inside & (source_columns >= 0) & (source_columns < vocabulary)
    address = source + source_row * source_row_stride + source_columns * source_column_stride
    tl.store(out + row * out_row_stride + columns, tl.load(address, mask=known, other=float("nan")), mask=inside)


def gather_rows(weight: Tensor, index: Tensor) -> Tensor:
    """weight (V, H), index (K,) int64 -> (K, H): `weight.index_select(0, index)`."""
    _check("weight", weight, index)
    out = weight.new_empty(index.shape[0], weight.shape[1])
    _launch(weight, index, out, vocabulary=weight.shape[0], rows=True)
    return out


def gather_columns(logits: Tensor, index: Tensor) -> Tensor:
    """logits (N, V), index (K,) int64 -> (N, K): `logits.index_select(1, index)`."""
    _check("logits", logits, index)
    out = logits.new_empty(logits.shape[0], index.shape[0])
    _launch(logits, index, out, vocabulary=logits.shape[1], rows=False)
    return out


def _launch(source: Tensor, index: Tensor, out: Tensor, vocabulary: int, rows: bool) -> None:
    if out.numel() == 0:
        return
    with torch.cuda.device_of(source):
        vocab_gather_kernel[(out.shape[0] * triton.cdiv(out.shape[1], BLOCK),)](
            source,
            index.contiguous(),
            out,
            source.stride(0),
            source.stride(1),
            vocabulary,
            out.stride(0),
            out.shape[1],
            ROWS=rows,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _check(name: str, source: Tensor, index: Tensor) -> None:
    if source.dim() != 2 or not source.is_floating_point():
        raise ValueError(f"{name} is {source.dtype} of shape {tuple(source.shape)}; give a floating tensor of two dims.")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; give int64 ids of one dim.")
    if index.device != source.device:
        raise ValueError(f"index is on {index.device} and {name} on {source.device}; move one to the other.")
