"""The Triton row kernel of a sparse teacher: one row of student logits against K listed log-probabilities and a tail.

`fastkd/ops/topk_events.py` states the mathematics. One program serves one row:

0. the K listed logits are gathered into registers, before anything is written;
1. from the last block to the first: maximum and sum of exponentials, online and lane by lane, of the logits that are NOT listed. Their
   sum never holds the listed mass, so q_tail keeps its relative precision where 1 - sum_S q has none left, and one pass is enough: the
   normaliser of the whole row is that sum plus the K gathered exponentials. Which columns of a block are listed is one bit an element
   and block, made once for `_GROUP` blocks by a loop over the K ids, so that no column is ever compared with every id;
2. from the first block to the last: the gradient of an unlisted column over the whole row; then a barrier, after which the K listed
   positions are overwritten: different threads make the two writes, and the barrier orders them.

As in `rows.py`, full blocks are read without a mask and the last pass runs forward. All arithmetic is in the dtype of the row weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_math import (
    BLOCK,
    ELEMENTS,
    LOG2E,
    LOWEST,
    WARPS,
    absorb,
    first_peak,
    lane_sum,
    merge_lanes,
    read_logits,
    row_begin,
    softcap_slope,
    tile_columns,
    vector_size,
)
from .rows import negative_log, value_and_coefficient

TAILS = ("bucket", "renormalize", "zero")
"""What stands for the tokens that are not listed."""

LONGEST_LIST = 1024
"""Entries a row at most: they stay in registers, four a thread."""

_GROUP = tl.constexpr(32)  # blocks that share an int32 of bits

_RUN_TIME = (
    "student", "gradient", "ids", "log_probabilities", "log_tail", "row_weight", "labels", "label_weight",
    "divergence_out", "cross_entropy_out", "student_stride", "gradient_stride", "id_row_stride", "id_stride",
    "log_probability_row_stride", "log_probability_stride", "vocabulary", "entries",
)  # fmt: skip


@triton.jit
def _listed_bits(row, ids, id_stride, entries, first, tile):
    """For each element an int32 whose bit b says that its column in block first + b is listed."""
    # A load that reads nothing gives the bits the layout of logits. They would else pass through shared memory at every block.
    bits = tl.load(row + tile, mask=tile < 0, other=0.0).to(tl.int32)
    for _ in range(entries):
        column = tl.load(ids) - first.to(tl.int64) * tile.numel
        ids += id_stride
        is_here = (column >= 0) & (column < _GROUP * tile.numel)
        column = tl.where(is_here, column, 0).to(tl.int32)
        bits |= tl.where(is_here & (tile == column % tile.numel), 1 << (column // tile.numel), 0)
    return bits


@triton.jit
def _statistics(
    state,
    label_sum,
    student,
    bits,
    first,
    block,
    tile,
    vocabulary,
    exponent,
    HAS_LABELS: tl.constexpr,
    HAS_PEAK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the first pass: of what is not listed."""
    s = read_logits(student, block * tile.numel + tile, vocabulary, SOFTCAP, MASKED)
    s = tl.where((bits >> (block - first)) & 1 == 1, float("-inf"), s)
    old, _, _, _ = state
    state, _, _ = absorb(s, state, block, exponent, False, HAS_PEAK, False)
    new, _, _, _ = state
    if HAS_LABELS:
        label_sum = label_sum * tl.exp2((old - new) * LOG2E) + lane_sum(tl.exp2((s - new[None, :, None]) * LOG2E))
    return state, label_sum


@triton.jit
def _gradient(
    others,
    student,
    gradient,
    factors,
    row_state,
    label,
    peak,
    block,
    tile,
    vocabulary,
    HAS_LABEL_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the second pass, as if nothing were listed. `others` adds up the label term but for the peak, in a masked block."""
    rest_factor, label_factor, label_share = factors
    rest_largest, largest, exponent = row_state
    columns = block * tile.numel + tile
    s = read_logits(student, columns, vocabulary, SOFTCAP, MASKED)
    slope = rest_factor * tl.exp2((s - rest_largest) * exponent)
    if HAS_LABEL_WEIGHT:
        share = label_share * tl.exp2((s - largest) * LOG2E)
        slope += share - tl.where(columns == label, label_factor, 0.0)
        others += lane_sum(tl.where(columns == peak, 0.0, share) if MASKED else share)
    if SOFTCAP:
        slope *= softcap_slope(s, student[3])
    slope = slope.to(gradient.dtype.element_ty)
    if MASKED:
        tl.store(gradient + columns, slope, mask=columns < vocabulary)
    else:
        tl.store(gradient + columns, slope)
    return others


@triton.jit(do_not_specialize=_RUN_TIME)
def topk_divergence_kernel(
    student,
    student_bias,
    gradient,
    ids,
    log_probabilities,
    log_tail,
    row_weight,
    labels,
    label_weight,
    divergence_out,
    cross_entropy_out,
    student_stride: tl.int64,
    gradient_stride: tl.int64,
    id_row_stride: tl.int64,
    id_stride: tl.int64,
    log_probability_row_stride: tl.int64,
    log_probability_stride: tl.int64,
    vocabulary: tl.int32,
    entries: tl.int32,
    temperature: tl.float64,
    mixing: tl.float64,
    scale: tl.float64,
    softcap: tl.float64,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = row_weight.dtype.element_ty
    HAS_LABELS: tl.constexpr = labels is not None
    HAS_PEAK: tl.constexpr = gradient is not None
    # Scalars travel in float64, so that float64 logits lose nothing.
    temperature = tl.full((), temperature, DTYPE)
    inverse_temperature = 1.0 / temperature
    exponent = inverse_temperature * LOG2E
    own = tl.full((), mixing, DTYPE)
    mixing = (own, tl.log(own), tl.log(1.0 - own))
    scale = tl.full((), scale, DTYPE)
    softcap = tl.full((), softcap, DTYPE)

    row = tl.program_id(0)
    student = (row_begin(student, student_stride, VECTOR), student_bias, scale, softcap)
    ids = row_begin(ids, id_row_stride, 1)
    tile = tile_columns(BLOCK, VECTOR)
    full = vocabulary // BLOCK

    # The listed entries. An id or a label outside of the vocabulary reads nothing and gives NaN.
    entry = tl.arange(0, BLOCK_K)
    listed_id = tl.load(ids + entry * id_stride, mask=entry < entries, other=-1)
    is_listed = listed_id >= 0
    is_known = is_listed & (listed_id < vocabulary)
    listed = read_logits(student, tl.where(is_known, listed_id, 0), vocabulary, SOFTCAP, False)
    listed = tl.where(is_known, listed, tl.where(is_listed, float("nan"), float("-inf")))
    log_p = row_begin(log_probabilities, log_probability_row_stride, 1) + entry * log_probability_stride
    log_p = tl.load(log_p, mask=is_listed, other=float("-inf")).to(DTYPE)
    label = -1
    if HAS_LABELS:
        label = tl.load(labels + row)
        labelled = label >= 0
        known = labelled & (label < vocabulary)
        label_logit = read_logits(student, tl.where(known, label, 0), vocabulary, SOFTCAP, False)
        label_logit = tl.where(known, label_logit, float("nan"))
        label = tl.where(known, label, -1).to(tl.int32)

    # Pass 1.
    zeros = tl.zeros((BLOCK // ELEMENTS,), DTYPE)
    state = (zeros + LOWEST, tl.zeros((BLOCK // ELEMENTS,), tl.int32), zeros, zeros)
    label_sum = zeros
    groups = tl.cdiv(tl.cdiv(vocabulary, BLOCK), _GROUP)
    for step in range(groups):
        first = (groups - 1 - step) * _GROUP
        bits = _listed_bits(student[0], ids, id_stride, entries, first, tile)
        end = tl.minimum(full, first + _GROUP)
        if (step == 0) & (full * BLOCK < vocabulary):
            state, label_sum = _statistics(
                state, label_sum, student, bits, first, full, tile, vocabulary, exponent, HAS_LABELS, HAS_PEAK, SOFTCAP, True
            )
        for block in range(first, end):
            state, label_sum = _statistics(
                state, label_sum, student, bits, first, first + end - 1 - block, tile, vocabulary, exponent,
                HAS_LABELS, HAS_PEAK, SOFTCAP, False,
            )  # fmt: skip

    # The row: what is listed and the rest, both from the larger maximum.
    rest_largest, rest_sum, _, _ = merge_lanes(state, exponent)
    listed_largest = tl.max(listed, axis=0)
    largest = tl.maximum(listed_largest, rest_largest)
    rest_shift = (rest_largest - largest) * inverse_temperature
    listed_shift = (listed - largest) * inverse_temperature
    listed_exp = tl.exp2(listed_shift * LOG2E)
    normaliser = tl.sum(listed_exp, axis=0) + rest_sum * tl.exp2(rest_shift * LOG2E)
    q = listed_exp / normaliser
    q_tail = rest_sum * tl.exp2(rest_shift * LOG2E) / normaliser
    if TAIL == "renormalize":
        shifted = log_p - tl.max(log_p, axis=0)
        log_p = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))
    log_p_tail = tl.full((), float("-inf"), DTYPE)
    if TAIL == "bucket":
        log_p_tail = tl.load(log_tail + row).to(DTYPE)
    # The K + 1 events.
    p = tl.exp(log_p)
    value, coefficient = value_and_coefficient(p, q, log_p - (listed_shift - tl.log(normaliser)), mixing, KIND)
    log_ratio = log_p_tail - (rest_shift + tl.log(rest_sum / normaliser))
    p_tail = tl.exp(log_p_tail)
    value_tail, coefficient_tail = value_and_coefficient(p_tail, q_tail, log_ratio, mixing, KIND)
    coefficient_sum = tl.sum(coefficient, axis=0) + coefficient_tail
    divergence = tl.sum(value, axis=0) + value_tail
    if KIND == "nla":
        accepted = tl.sum(tl.minimum(p, q), axis=0) + tl.minimum(p_tail, q_tail)
        divergence = negative_log(accepted, divergence)
    tl.store(divergence_out + row, temperature * temperature * divergence)
    label_factor = 0.0
    label_share = 0.0
    if HAS_LABELS:
        listed_share = tl.exp2((listed - largest) * LOG2E)
        label_sum = tl.sum(label_sum * tl.exp2((state[0] - largest) * LOG2E), axis=0) + tl.sum(listed_share, axis=0)
        tl.store(cross_entropy_out + row, tl.where(labelled, tl.log(label_sum) - (label_logit - largest), 0.0))
        if label_weight is not None:
            label_factor = tl.where(labelled, tl.load(label_weight + row), 0.0) * scale
            label_share = label_factor / label_sum

    # Pass 2, from the beginning, where the one before it ended.
    if gradient is not None:
        gradient = row_begin(gradient, gradient_stride, VECTOR)
        # T^2 from the loss, 1/T from z/T.
        factor = temperature * tl.load(row_weight + row) * scale
        if KIND == "nla":
            factor /= accepted
        slope = coefficient - q * coefficient_sum
        # The terms add up to zero over the row: what would cancel is minus the sum of the others.
        rest_slope = tl.where(q_tail > 0.5, -tl.sum(slope, axis=0), coefficient_tail - q_tail * coefficient_sum)
        is_certain = normaliser < 2.0
        is_listed_peak = listed_largest >= rest_largest
        peak = vocabulary
        if is_certain:
            unlisted_peak = first_peak(student, state, tile, vocabulary, SOFTCAP)
            peak = tl.where(is_listed_peak, tl.max(tl.where(listed == largest, listed_id, -1)).to(tl.int32), unlisted_peak)
        is_peak = listed_id == peak
        slope = factor * tl.where(is_peak, -(tl.sum(tl.where(is_peak, 0.0, slope), axis=0) + rest_slope), slope)
        # exp / rest_sum is q / q_tail: a softmax of its own, however small q_tail is.
        rest_factor = tl.where(rest_sum == 0, 0.0, factor * rest_slope / rest_sum)

        factors = (rest_factor, label_factor, label_share)
        row_state = (rest_largest, largest, exponent)
        others = zeros
        begin = 0
        end = peak // BLOCK
        while begin <= full:
            for block in range(begin, end):
                others = _gradient(
                    others, student, gradient, factors, row_state, label, peak, block, tile, vocabulary,
                    label_weight is not None, SOFTCAP, False,
                )  # fmt: skip
            if end * BLOCK < vocabulary:
                others = _gradient(
                    others, student, gradient, factors, row_state, label, peak, end, tile, vocabulary,
                    label_weight is not None, SOFTCAP, True,
                )  # fmt: skip
            begin = end + 1
            end = full
        # Other threads wrote these columns as if they were neither listed nor the peak.
        tl.debug_barrier()
        if label_weight is not None:
            label_at_peak = tl.where((label >= 0) & (label != peak), label_factor, 0.0) - tl.sum(others, axis=0)
            label_slope = label_share * listed_share - tl.where(listed_id == label, label_factor, 0.0)
            slope += tl.where(is_peak, label_at_peak, label_slope)
            at_peak = rest_factor + label_at_peak
            if SOFTCAP:
                at_peak *= softcap_slope(rest_largest, softcap)
            tl.store(gradient + peak, at_peak.to(gradient.dtype.element_ty), mask=is_certain & (listed_largest < rest_largest))
        if SOFTCAP:
            slope *= softcap_slope(listed, softcap)
        tl.store(gradient + listed_id, slope.to(gradient.dtype.element_ty), mask=is_known)


def topk_divergence(
    student: Tensor,
    ids: Tensor,
    log_probabilities: Tensor,
    log_tail: Tensor | None,
    *,
    kind: str,
    tail: str,
    row_weight: Tensor,
    divergence: Tensor,
    cross_entropy: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    mixing: float = 0.5,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    gradient: Tensor | None = None,
    block: int = BLOCK,
) -> None:
    """Launch the kernel: losses per row into the (C,) outputs, and into `gradient` (C, V), if given, that of `student` (C, V).

    Tensors are as `RowCall` and `TopK` of `fastkd/ops/row_call.py` say, C and V at least 1. `ids` and `log_probabilities` (C, K): any
    strides, K up to `LONGEST_LIST`. `log_tail` (C,) is contiguous. Nothing is allocated and the host never waits.
    """
    block_k = triton.next_power_of_2(max(1, ids.shape[1]))
    with torch.cuda.device_of(student):
        topk_divergence_kernel[(len(student),)](
            student,
            student_bias,
            gradient,
            ids,
            log_probabilities,
            log_tail,
            row_weight,
            labels,
            label_weight,
            divergence,
            cross_entropy,
            student.stride(0),
            0 if gradient is None else gradient.stride(0),
            ids.stride(0),
            ids.stride(1),
            log_probabilities.stride(0),
            log_probabilities.stride(1),
            student.shape[1],
            ids.shape[1],
            temperature,
            mixing,
            student_scale,
            student_softcap or 0.0,
            KIND=kind,
            TAIL=tail,
            SOFTCAP=student_softcap is not None,
            BLOCK_K=block_k,
            VECTOR=vector_size(student, None, gradient, student_bias),
            BLOCK=block,
            **launch_options(block_k, row_weight.dtype == torch.float64),
        )


def launch_options(block_k: int, double: bool) -> dict[str, int]:
    """Warps, and registers a thread: two programs share a multiprocessor where that spills none."""
    return {"num_warps": WARPS, "maxnreg": 255 if double or block_k > 512 else 128}
