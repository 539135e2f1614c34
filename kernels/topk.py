"""Floor 1: the Triton row kernel of a sparse teacher. One row of student logits against K listed log-probabilities and a tail.

`fastkd/ops/topk_rows.py` states the mathematics and holds the torch backend, whose results these are. One program serves one row:

0. the K listed logits are gathered into registers, before anything is written;
1. from the last block to the first: maximum and normaliser, online, of the logits that are NOT listed. Their sum never holds the listed
   mass, so q_tail keeps its relative precision where 1 - sum_S q has none left, and one pass is enough: the normaliser of the whole
   row is that sum plus the K gathered exponentials. Which columns of a block are listed is one bit a lane and block, made once for
   `_GROUP` blocks by a loop over the K ids, so that no column is ever compared with every id;
2. from the first block to the last: the gradient of an unlisted column over the whole row; then a barrier, after which the K listed
   positions are overwritten: different threads make the two writes, and the barrier orders them. This pass runs forward, because the
   gradient may lie over the student's own logits in a narrower dtype: it then covers only what was read before.

Logits may be float16, bfloat16, float32 or float64; all arithmetic is in the dtype of the row weights, float32 or float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import BLOCK, WARPS, _finite, _logits, _tanh, _weighted

TAILS = ("bucket", "renormalize", "zero")
"""What stands for the tokens that are not listed."""

LONGEST_LIST = 1024
"""Entries a row at most: they stay in registers, two a thread."""

_GROUP = tl.constexpr(32)  # blocks that share an int32 of bits


@triton.jit
def _listed_bits(ids, id_stride, entries, start, offsets, BLOCK: tl.constexpr):
    """For each lane an int32 whose bit b says that column start + b * BLOCK + lane is listed."""
    bits = tl.zeros((BLOCK,), tl.int32)
    for _ in range(entries):
        column = tl.load(ids).to(tl.int64) - start
        ids += id_stride
        inside = (column >= 0) & (column < _GROUP * BLOCK)
        column = tl.where(inside, column, 0).to(tl.int32)
        bits |= tl.where(inside & (offsets == column % BLOCK), 1 << (column // BLOCK), 0)
    return bits


@triton.jit
def _chained(gradient, logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """From the gradient of the model's logits to that of the head's output."""
    if HAS_SOFTCAP:
        capped = logits / softcap
        gradient *= 1.0 - capped * capped
    return gradient * scale


@triton.jit
def topk_divergence_kernel(
    student,
    gradient,
    ids,
    log_probabilities,
    log_tail,
    student_stride,
    gradient_stride,
    id_row_stride,
    id_stride,
    log_probability_row_stride,
    log_probability_stride,
    vocabulary,
    entries,
    row_weight,
    labels,
    label_weight,
    divergence_out,
    cross_entropy_out,
    temperature: tl.float64,
    scale: tl.float64,
    softcap: tl.float64,
    TAIL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = row_weight.dtype.element_ty
    # Scalars travel in float64, so that float64 logits lose nothing.
    temperature = tl.full((), temperature, DTYPE)
    inverse_temperature = 1.0 / temperature
    scale = tl.full((), scale, DTYPE)
    softcap = tl.full((), softcap, DTYPE)
    minus_infinity = tl.full((), float("-inf"), DTYPE)

    # Rows times stride passes 2^31 in everyday chunks.
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    ids += row * id_row_stride
    log_probabilities += row * log_probability_row_stride
    offsets = tl.arange(0, BLOCK)
    blocks = tl.cdiv(vocabulary, BLOCK)
    groups = tl.cdiv(blocks, _GROUP)

    # The listed entries. An id or a label outside of the vocabulary reads nothing and gives NaN.
    entry = tl.arange(0, BLOCK_K)
    listed_id = tl.load(ids + entry.to(tl.int64) * id_stride, mask=entry < entries, other=-1).to(tl.int64)
    is_listed = listed_id >= 0
    is_known = is_listed & (listed_id < vocabulary)
    listed = tl.load(student + listed_id, mask=is_known, other=float("nan")).to(DTYPE) * scale
    if SOFTCAP:
        listed = softcap * _tanh(listed / softcap)
    listed = tl.where(is_listed, listed, minus_infinity)
    log_p = tl.load(log_probabilities + entry.to(tl.int64) * log_probability_stride, mask=is_listed, other=float("-inf")).to(DTYPE)
    if HAS_LABELS:
        label = tl.load(labels + row)
        labelled = label >= 0
        label_logit = tl.load(student + label, mask=labelled & (label < vocabulary), other=float("nan")).to(DTYPE) * scale
        if SOFTCAP:
            label_logit = softcap * _tanh(label_logit / softcap)

    # Pass 1. Sums stay apart by lane and are rescaled by the whole block's maximum: one reduction a block.
    rest_max = minus_infinity
    rest_sum = tl.zeros((BLOCK,), DTYPE)
    label_sum = tl.zeros((BLOCK,), DTYPE)
    for group_step in range(groups):
        first = (groups - 1 - group_step) * _GROUP
        bits = _listed_bits(ids, id_stride, entries, first.to(tl.int64) * BLOCK, offsets, BLOCK)
        here = tl.minimum(blocks - first, _GROUP)
        for step in range(here):
            block = here - 1 - step
            s = _logits(student, (first + block) * BLOCK + offsets, vocabulary, scale, softcap, SOFTCAP, DTYPE)
            s = tl.where((bits >> block) & 1 == 1, minus_infinity, s)
            largest = tl.max(s, axis=0)
            new_max = tl.where(largest > rest_max, largest, rest_max)
            finite = _finite(new_max)
            rest_sum = rest_sum * tl.exp((rest_max - finite) * inverse_temperature) + tl.exp((s - finite) * inverse_temperature)
            if HAS_LABELS:
                label_sum = label_sum * tl.exp(rest_max - finite) + tl.exp(s - finite)
            rest_max = new_max

    # The row: what is listed and the rest, both from the larger maximum.
    listed_max = tl.max(listed, axis=0)
    top = tl.where(listed_max > rest_max, listed_max, rest_max)
    rest_normaliser = tl.sum(rest_sum, axis=0)
    rest_shift = (rest_max - top) * inverse_temperature
    listed_shift = (listed - top) * inverse_temperature
    listed_exp = tl.exp(listed_shift)
    normaliser = tl.sum(listed_exp, axis=0) + rest_normaliser * tl.exp(rest_shift)
    q_tail = rest_normaliser * tl.exp(rest_shift) / normaliser
    if TAIL == "renormalize":
        shifted = log_p - tl.max(log_p, axis=0)
        log_p = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))
    p = tl.exp(log_p)
    value = tl.sum(_weighted(p, log_p - (listed_shift - tl.log(normaliser))), axis=0)
    mass = tl.sum(p, axis=0)
    rest_gradient = mass * q_tail
    if TAIL == "bucket":
        log_p_tail = tl.load(log_tail + row).to(DTYPE)
        p_tail = tl.exp(log_p_tail)
        value += _weighted(p_tail, log_p_tail - (rest_shift + tl.log(rest_normaliser / normaliser)))
        mass += p_tail
        rest_gradient = mass * q_tail - p_tail
    tl.store(divergence_out + row, temperature * temperature * value)
    if HAS_LABELS:
        # Every label logit is read before the first gradient is written: the reductions between are barriers.
        label_exp = tl.exp(listed - top)
        label_normaliser = tl.sum(label_exp, axis=0) + tl.sum(label_sum, axis=0) * tl.exp(rest_max - top)
        tl.store(cross_entropy_out + row, tl.where(labelled, tl.log(label_normaliser) - (label_logit - top), 0.0))

    # Pass 2, from the beginning, where the one before it ended.
    if WANTS_GRADIENT:
        gradient += row * gradient_stride
        # T^2 from the loss, 1/T from z/T.
        factor = temperature * tl.load(row_weight + row)
        if HAS_LABEL_WEIGHT:
            label_factor = tl.where(labelled, tl.load(label_weight + row), 0.0)
            label_share = label_factor / label_normaliser
        # exp / rest_normaliser is q / q_tail: a softmax of its own, however small q_tail is.
        rest_finite = _finite(rest_max)
        rest_factor = tl.where(rest_normaliser == 0, 0.0, factor * rest_gradient / rest_normaliser)
        for block in range(blocks):
            columns = block * BLOCK + offsets
            s = _logits(student, columns, vocabulary, scale, softcap, SOFTCAP, DTYPE)
            slope = rest_factor * tl.exp((s - rest_finite) * inverse_temperature)
            if HAS_LABEL_WEIGHT:
                slope += label_share * tl.exp(s - top) - tl.where(columns == label, label_factor, 0.0)
            slope = _chained(slope, s, scale, softcap, SOFTCAP)
            if gradient.dtype.element_ty.primitive_bitwidth < student.dtype.element_ty.primitive_bitwidth:
                # Over the student's row, this block's gradient covers this block's logits and earlier ones, which other warps read:
                # all of them must have done so.
                tl.debug_barrier()
            tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=columns < vocabulary)
        slope = factor * (mass * listed_exp / normaliser - p)
        if HAS_LABEL_WEIGHT:
            slope += label_share * label_exp - tl.where(listed_id == label, label_factor, 0.0)
        slope = _chained(slope, listed, scale, softcap, SOFTCAP)
        tl.debug_barrier()
        tl.store(gradient + listed_id, slope.to(gradient.dtype.element_ty), mask=is_known)


def topk_divergence(
    student: Tensor,
    ids: Tensor,
    log_probabilities: Tensor,
    log_tail: Tensor | None,
    *,
    tail: str,
    row_weight: Tensor,
    divergence: Tensor,
    cross_entropy: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    gradient: Tensor | None = None,
    block: int = BLOCK,
) -> None:
    """Launch the kernel: losses per row into the (C,) outputs, and into `gradient` (C, V), if given, that of `student` (C, V).

    Logits and gradient: unit stride along the vocabulary, any stride between rows; `gradient` may be `student`, or lie over it in a
    narrower dtype with each row beginning where its logits do. `ids` and `log_probabilities` (C, K): any strides, -1 for no entry, K up
    to `LONGEST_LIST`. `log_tail` (C,) is needed for tail="bucket", `cross_entropy` with `labels` ((C,) int64, negative for none).
    Outputs, weights and `log_tail` are contiguous, the first two of one dtype, float32 or float64. Nothing is allocated and the host
    never waits.
    """
    rows, vocabulary = student.shape
    entries = ids.shape[1]
    for name, tensor in (("student", student), ("gradient", gradient)):
        if tensor is not None and vocabulary > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}; the row kernel needs stride 1 along the vocabulary: .contiguous()."
            )
    if entries > LONGEST_LIST:
        raise ValueError(f"ids lists {entries} tokens a row; the Triton kernel takes up to {LONGEST_LIST}. Use backend='torch'.")
    if rows == 0 or vocabulary == 0:
        return
    if gradient is not None:
        _check_overlap(student, gradient)
    block_k = triton.next_power_of_2(max(1, entries))
    with torch.cuda.device_of(student):
        topk_divergence_kernel[(rows,)](
            student,
            gradient,
            ids,
            log_probabilities,
            log_tail,
            student.stride(0),
            0 if gradient is None else gradient.stride(0),
            ids.stride(0),
            ids.stride(1),
            log_probabilities.stride(0),
            log_probabilities.stride(1),
            vocabulary,
            entries,
            row_weight,
            labels,
            label_weight,
            divergence,
            cross_entropy,
            temperature,
            student_scale,
            student_softcap or 0.0,
            TAIL=tail,
            HAS_LABELS=labels is not None,
            HAS_LABEL_WEIGHT=label_weight is not None,
            SOFTCAP=student_softcap is not None,
            WANTS_GRADIENT=gradient is not None,
            BLOCK_K=block_k,
            BLOCK=block,
            **launch_options(block_k, row_weight.dtype == torch.float64),
        )


def launch_options(block_k: int, double: bool) -> dict[str, int]:
    """Warps and registers: two rows share a multiprocessor where that spills nothing, which it does for one entry a thread."""
    rows = 1 if double or block_k > 32 * WARPS else 2
    return {"num_warps": WARPS, "maxnreg": 65536 // (32 * WARPS * rows)}


def _check_overlap(student: Tensor, gradient: Tensor) -> None:
    """Refuse a `gradient` of which one row lies over logits of another: a different program may still have to read them."""
    begin, end = _span(student)
    gradient_begin, gradient_end = _span(gradient)
    if gradient_end <= begin or end <= gradient_begin:
        return
    size, gradient_size = student.element_size(), gradient.element_size()
    rows_agree = len(student) == 1 or student.stride(0) * size == gradient.stride(0) * gradient_size
    if gradient_begin != begin or not rows_agree or gradient_size > size:
        raise ValueError(
            f"gradient ({gradient.dtype}, strides {gradient.stride()}) overlaps student ({student.dtype}, strides {student.stride()}) "
            "but its rows do not begin where the logits' rows do, so that one row would overwrite another that is still to be read; "
            "use student.view(dtype)[:, :vocabulary] or memory of its own."
        )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address of a matrix's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
