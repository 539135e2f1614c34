"""What the Triton row kernels share: a row in blocks of columns, its logits, and softmaxes that every lane keeps for itself.

A lane is a thread's share of a block. Its maximum and sums need no other thread until the row's end, so that no loop waits.
"""

import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
# What a thread holds of a block: four 16-byte loads of each float32 row in flight.
ELEMENTS = tl.constexpr(16)
BLOCK = 16 * 32 * WARPS

LOG2E = tl.constexpr(1.4426950408889634)
# The maximum of a lane that has seen nothing but -inf; it can be subtracted.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tanh(x):
    """tanh without libdevice, which the interpreter lacks; the series keeps the relative precision that 1 - exp(-2x) loses near 0."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2.0 * LOG2E))
    ratio = (1.0 - e) * (1.0 / (1.0 + e))
    s = x * x
    series = -1382 / 155925 + s * (21844 / 6081075)
    series = -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * series)))
    return tl.where(size < 0.25, x + x * s * series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1; in float32 by a polynomial within 3e-8 of it, which is half as long as the library's log."""
    if e.dtype == tl.float64:
        return tl.log(1.0 + e)
    else:
        series = -0.13663245295851173 + e * (0.0782259478173932 + e * (-0.02950523727631827 + e * 0.00523269410982686))
        series = 0.33319096791560926 + e * (-0.2484298210970902 + e * (0.19106006444399673 + e * series))
        return e * (0.9999999698796846 + e * (-0.4999949313968335 + e * series))


@triton.jit
def weighted(probability, factor):
    """probability * factor, with 0 * (anything, infinite or undefined) = 0; NaN shows."""
    return tl.where(probability == 0, 0.0, probability * factor)


@triton.jit
def row_begin(block, stride, VECTOR: tl.constexpr):
    """Where this program's row of a block begins: at a multiple of 16 bytes if vectors are read."""
    # Rows times stride passes 2^31 in everyday chunks.
    begin = block + tl.program_id(0).to(tl.int64) * stride
    return tl.multiple_of(begin, 16) if VECTOR > 1 else begin


@triton.jit
def tile_columns(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """A block's columns, (ELEMENTS / VECTOR, lanes, VECTOR): a lane's own, which one thread holds, lie along the outer axes."""
    LANES: tl.constexpr = BLOCK // ELEMENTS
    run = tl.arange(0, ELEMENTS // VECTOR)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return run + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def lane_sum(x):
    """Every lane's own sum of a block."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def read_logits(model, columns, vocabulary, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """A model's logits at `columns`; -inf, which has no part in a softmax, past the vocabulary."""
    row, bias, scale, softcap = model
    if MASKED:
        inside = columns < vocabulary
        logits = tl.load(row + columns, mask=inside, other=0.0).to(scale.dtype)
        if bias is not None:
            logits += tl.load(bias + columns, mask=inside, other=0.0)
    else:
        logits = tl.load(row + columns).to(scale.dtype)
        if bias is not None:
            logits += tl.load(bias + columns)
    logits *= scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits * (1.0 / softcap))
    if MASKED:
        logits = tl.where(inside, logits, float("-inf"))
    return logits


@triton.jit
def absorb(logits, state, block, exponent, HAS_ENTROPY: tl.constexpr, HAS_PEAK: tl.constexpr, FORWARD: tl.constexpr):
    """One block more in every lane's softmax of a model.

    Its state: the largest logit and the block of the first such, the sum of exponentials, and their moment with the logits. Returned
    beside it: what old sums were multiplied by, and the block's exponentials.
    """
    largest, peak_block, total, moment = state
    here = tl.max(tl.max(logits, axis=2), axis=0)
    if HAS_PEAK:
        peak_block = tl.where(here > largest if FORWARD else here >= largest, block, peak_block)
    new = tl.maximum(largest, here)
    # The maximum is subtracted before the factor: one FMA for both would round the maximum's product, which differs from lane to lane.
    kept = tl.exp2((largest - new) * exponent)
    distance = logits - new[None, :, None]
    weight = tl.exp2(distance * exponent)
    if HAS_ENTROPY:
        moment = weighted(kept, moment + (largest - new) * total) + lane_sum(weighted(weight, distance))
    total = total * kept + lane_sum(weight)
    return (new, peak_block, total, moment), kept, weight


@triton.jit
def merge_lanes(state, exponent):
    """The lanes' softmaxes as the row's: the largest logit, the sum of exponentials, their moment, and the lanes' factors."""
    lane_largest, _, total, moment = state
    largest = tl.max(lane_largest, axis=0)
    kept = tl.exp2((lane_largest - largest) * exponent)
    moment = tl.sum(weighted(kept, moment + (lane_largest - largest) * total), axis=0)
    return largest, tl.sum(total * kept, axis=0), moment, kept


@triton.jit
def first_peak(model, state, tile, vocabulary, HAS_SOFTCAP: tl.constexpr):
    """The first column of a model's largest logit; any column where the row is NaN."""
    lane_largest, peak_block, _, _ = state
    nowhere = vocabulary // tile.numel
    block = tl.min(tl.where(lane_largest == tl.max(lane_largest, axis=0), peak_block, nowhere), axis=0)
    columns = block * tile.numel + tile
    logits = read_logits(model, columns, vocabulary, HAS_SOFTCAP, True)
    return tl.min(tl.where(logits == tl.max(logits), columns, vocabulary - 1))


@triton.jit
def softcap_slope(logits, softcap):
    """d logits / d (scale * x) where logits = softcap * tanh(scale * x / softcap)."""
    capped = logits * (1.0 / softcap)
    return 1.0 - capped * capped


def vector_size(student: Tensor, teacher: Tensor | None, *others: Tensor | None) -> int:
    """Count the logits that a 16-byte load brings; 1 where not every row begins at a multiple of 16 bytes.

    student, teacher: (C, V) logits; others: what else is read or written column by column, (C, V) or (V,).
    """
    logits = [block for block in (student, teacher) if block is not None]
    for block in (*logits, *(other for other in others if other is not None)):
        if block.data_ptr() % 16 or (block.dim() == 2 and block.stride(0) * block.element_size() % 16):
            return 1
    return 16 // min(block.element_size() for block in logits)
