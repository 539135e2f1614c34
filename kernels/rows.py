"""The Triton row kernel: two rows of logits in, their divergence and the gradient of the student's row out.

`fastkd/ops/row_call.py` states the contract. One program serves one row, in two or three passes, each of which begins where the one
before it ended, so that it finds that end of the row in the second-level cache:

1. statistics: both maxima and sums of exponentials, online. A lane keeps its own and rescales them as its maximum moves; lanes meet
   after the loop. Forward and reverse KL are complete after this pass: their sums over the row are moments of the difference of the
   logits. So are entropies;
2. where that is not enough: the divergence and sum(c), c = dD / d log q;
3. the gradient c - q sum(c), chained through temperature and soft-cap, and the acceptance among statistics. At the student's largest
   logit the gradient cancels where the student is nearly certain: that entry is minus the sum of the others. This pass runs forward:
   in the interpreter the gradient may lie over the student's own logits in a narrower dtype, and then covers only what was read before.

Full blocks are read without a mask, the rest of the row as one masked block. All arithmetic is in the dtype of the row weights.
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
    log1p,
    merge_lanes,
    read_logits,
    row_begin,
    softcap_slope,
    tile_columns,
    vector_size,
    weighted,
)

KINDS = ("none", "forward_kl", "reverse_kl", "mixed", "tvd", "nla", "jsd", "skew_kl", "skew_rkl")
"""What a row's loss is; "none" has no teacher, only labels."""

_RUN_TIME = (
    "teacher_rest", "row_weight", "labels", "label_weight", "divergence_out", "cross_entropy_out", "student_entropy_out",
    "teacher_entropy_out", "agreement_out", "acceptance_out", "student", "teacher", "gradient", "student_stride", "teacher_stride",
    "gradient_stride", "vocabulary",
)  # fmt: skip


@triton.jit
def _statistics(
    state,
    student,
    teacher,
    block,
    tile,
    vocabulary,
    exponent,
    KIND: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_PEAK: tl.constexpr,
    FORWARD: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the first pass."""
    student_state, teacher_state, label_sum, forward_moment, reverse_moment = state
    columns = block * tile.numel + tile
    s = read_logits(student, columns, vocabulary, STUDENT_SOFTCAP, MASKED)
    if KIND != "none":
        t = read_logits(teacher, columns, vocabulary, TEACHER_SOFTCAP, MASKED)
        old_teacher, _, teacher_sum, _ = teacher_state
        teacher_state, teacher_kept, teacher_weight = absorb(t, teacher_state, block, exponent, HAS_STATISTICS, HAS_STATISTICS, FORWARD)
        teacher_largest, _, _, _ = teacher_state
    old_student, _, student_sum, _ = student_state
    student_state, student_kept, student_weight = absorb(s, student_state, block, exponent, HAS_STATISTICS, HAS_PEAK, FORWARD)
    student_largest, _, _, _ = student_state
    if HAS_LABELS and KIND != "none":
        kept_at_one = tl.exp2((old_student - student_largest) * LOG2E)
        label_sum = label_sum * kept_at_one + lane_sum(tl.exp2((s - student_largest[None, :, None]) * LOG2E))
    if KIND == "forward_kl" or KIND == "reverse_kl" or KIND == "mixed":
        # Sums of weight * (t - s), both from their maxima: of the size of the divergence, whatever is added to the logits.
        center = teacher_largest - student_largest
        shift = center - (old_teacher - old_student)
        difference = (t - s) - center[None, :, None]
        if KIND != "reverse_kl":
            here = lane_sum(weighted(teacher_weight, difference))
            forward_moment = weighted(teacher_kept, forward_moment - shift * teacher_sum) + here
        if KIND != "forward_kl":
            here = lane_sum(weighted(student_weight, difference))
            reverse_moment = weighted(student_kept, reverse_moment - shift * student_sum) + here
    return student_state, teacher_state, label_sum, forward_moment, reverse_moment


@triton.jit
def _probabilities(s, t, row):
    """p, q and log p - log q of a block from the row's maxima and normalisers."""
    student_largest, teacher_largest, student_share, teacher_share, log_center, inverse_temperature = row
    exponent = inverse_temperature * LOG2E
    q = tl.exp2((s - student_largest) * exponent) * student_share
    p = tl.exp2((t - teacher_largest) * exponent) * teacher_share
    return p, q, ((t - s) - (teacher_largest - student_largest)) * inverse_temperature - log_center


@triton.jit
def value_and_coefficient(p, q, log_ratio, mixing, KIND: tl.constexpr):
    """An entry's part of D(p, q), and its c = dD / d log q with log q treated as free. `log_ratio` is log p - log q.

    For "nla" it is the part of tvd, and c times the acceptance: that of sum min(p, q), which does not cancel where that is small.

    A mixture enters by softplus(x) with x the log of its odds, so that neither probability can underflow and nothing of the size of
    log p cancels: log(m / q) = log_other + softplus(x) for m = own p + other q, and log(m / p) = log_own + softplus(-x).
    """
    own, log_own, log_other = mixing
    if KIND == "forward_kl":
        value = weighted(p, log_ratio)
        coefficient = -p
    elif KIND == "reverse_kl":
        value = weighted(q, -log_ratio)
        coefficient = value + q
    elif KIND == "mixed":
        student = weighted(q, -log_ratio)
        value = own * weighted(p, log_ratio) + (1.0 - own) * student
        coefficient = (1.0 - own) * (student + q) - own * p
    elif KIND == "tvd" or KIND == "nla":
        difference = q - p
        value = 0.5 * tl.abs(difference)
        coefficient = 0.5 * q * tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
        if KIND == "nla":
            coefficient -= 0.5 * q
    else:
        odds = (log_own - log_other) + (-log_ratio if KIND == "skew_rkl" else log_ratio)
        e = tl.exp2(tl.abs(odds) * -LOG2E)
        rest = log1p(e)
        to_other = (log_other + rest) + tl.maximum(odds, 0.0)
        to_own = (log_own + rest) + tl.maximum(-odds, 0.0)
        if KIND == "jsd":
            student = weighted(q, -to_other)
            value = own * weighted(p, -to_own) + (1.0 - own) * student
            coefficient = (1.0 - own) * student
        else:
            other_share = tl.where(odds > 0, e, 1.0) * (1.0 / (1.0 + e))
            if KIND == "skew_kl":
                value = weighted(p, -to_own)
                coefficient = -weighted(p, other_share)
            else:
                value = weighted(q, -to_own)
                coefficient = value + weighted(q, other_share)
    return value, coefficient


@triton.jit
def negative_log(accepted, rejected):
    """-log(accepted) where both sum to one: exact also where little is rejected."""
    odds = rejected / accepted
    return tl.where(odds > 1, tl.log(1.0 + odds), log1p(tl.minimum(odds, 1.0, propagate_nan=tl.PropagateNan.ALL)))


@triton.jit
def _divergence(
    sums,
    student,
    teacher,
    row,
    mixing,
    peak,
    block,
    tile,
    vocabulary,
    KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the second pass: more of the sums of values and coefficients.

    For "tvd" and "nla" these are without the peak, as that of q - p; "nla" has that of min(p, q), too.
    """
    values, coefficients, differences, accepted = sums
    columns = block * tile.numel + tile
    s = read_logits(student, columns, vocabulary, STUDENT_SOFTCAP, MASKED)
    t = read_logits(teacher, columns, vocabulary, TEACHER_SOFTCAP, MASKED)
    p, q, log_ratio = _probabilities(s, t, row)
    if KIND == "nla":
        accepted += lane_sum(tl.minimum(p, q))
    if KIND == "tvd" or KIND == "nla":
        p = tl.where(columns == peak, q, p)
        differences += lane_sum(q - p)
    value, coefficient = value_and_coefficient(p, q, log_ratio, mixing, KIND)
    return values + lane_sum(value), coefficients + lane_sum(coefficient), differences, accepted


@triton.jit
def _gradient(
    sums,
    student,
    teacher,
    gradient,
    row,
    mixing,
    factors,
    label,
    peak,
    block,
    tile,
    vocabulary,
    KIND: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the last pass: more of the sums of the gradient, but for the peak's entry, which lies in a masked block, and, with
    statistics, of min(p, q)."""
    total, accepted = sums
    factor, coefficient_sum, label_factor, label_share = factors
    student_largest = row[0]
    columns = block * tile.numel + tile
    s = read_logits(student, columns, vocabulary, STUDENT_SOFTCAP, MASKED)
    slope = tl.zeros_like(s)
    if KIND != "none":
        t = read_logits(teacher, columns, vocabulary, TEACHER_SOFTCAP, MASKED)
        p, q, log_ratio = _probabilities(s, t, row)
        _, coefficient = value_and_coefficient(p, q, log_ratio, mixing, KIND)
        slope = factor * (coefficient - q * coefficient_sum)
        if HAS_STATISTICS:
            accepted += lane_sum(tl.minimum(p, q, propagate_nan=tl.PropagateNan.ALL))
    if HAS_LABEL_WEIGHT:
        slope += label_share * tl.exp2((s - student_largest) * LOG2E) - tl.where(columns == label, label_factor, 0.0)
    if MASKED:
        total += lane_sum(tl.where(columns == peak, 0.0, slope))
    else:
        total += lane_sum(slope)
    if STUDENT_SOFTCAP:
        slope *= softcap_slope(s, student[3])
    if gradient is not None:
        slope = slope.to(gradient.dtype.element_ty)
        if MASKED:
            tl.store(gradient + columns, slope, mask=columns < vocabulary)
        else:
            tl.store(gradient + columns, slope)
    return total, accepted


@triton.jit(do_not_specialize=_RUN_TIME)
def softmax_divergence_kernel(
    student,
    teacher,
    gradient,
    student_bias,
    teacher_bias,
    teacher_rest,
    row_weight,
    labels,
    label_weight,
    divergence_out,
    cross_entropy_out,
    student_entropy_out,
    teacher_entropy_out,
    agreement_out,
    acceptance_out,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    gradient_stride: tl.int64,
    vocabulary: tl.int32,
    temperature: tl.float64,
    mixing: tl.float64,
    student_scale: tl.float64,
    student_softcap: tl.float64,
    teacher_scale: tl.float64,
    teacher_softcap: tl.float64,
    KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = row_weight.dtype.element_ty
    HAS_MOMENT: tl.constexpr = KIND == "forward_kl" or KIND == "reverse_kl" or KIND == "mixed"
    HAS_DISTANCE: tl.constexpr = KIND == "tvd" or KIND == "nla"
    HAS_LABELS: tl.constexpr = labels is not None
    HAS_STATISTICS: tl.constexpr = student_entropy_out is not None
    HAS_PEAK: tl.constexpr = HAS_STATISTICS or gradient is not None
    SECOND_PASS: tl.constexpr = KIND != "none" and not HAS_MOMENT
    # Scalars travel in float64, so that float64 logits lose nothing.
    temperature = tl.full((), temperature, DTYPE)
    inverse_temperature = 1.0 / temperature
    exponent = inverse_temperature * LOG2E
    if KIND == "none":
        exponent = tl.full((), LOG2E, DTYPE)
    own = tl.full((), mixing, DTYPE)
    mixing = (own, tl.log(own), tl.log(1.0 - own))
    student_scale = tl.full((), student_scale, DTYPE)
    student_softcap = tl.full((), student_softcap, DTYPE)
    teacher_scale = tl.full((), teacher_scale, DTYPE)
    teacher_softcap = tl.full((), teacher_softcap, DTYPE)

    row = tl.program_id(0)
    student = (row_begin(student, student_stride, VECTOR), student_bias, student_scale, student_softcap)
    if KIND != "none":
        teacher = (row_begin(teacher, teacher_stride, VECTOR), teacher_bias, teacher_scale, teacher_softcap)
    tile = tile_columns(BLOCK, VECTOR)
    full = vocabulary // BLOCK
    has_tail = full * BLOCK < vocabulary
    label = -1
    if HAS_LABELS:
        # Read before the first gradient is written. A label outside of the vocabulary gives NaN.
        label = tl.load(labels + row)
        labelled = label >= 0
        known = labelled & (label < vocabulary)
        label_logit = read_logits(student, tl.where(known, label, 0), vocabulary, STUDENT_SOFTCAP, False)
        label_logit = tl.where(known, label_logit, float("nan"))
        label = tl.where(known, label, -1).to(tl.int32)

    # Pass 1. Its direction lets the last pass run forward.
    zeros = tl.zeros((BLOCK // ELEMENTS,), DTYPE)
    softmax = (zeros + LOWEST, tl.zeros((BLOCK // ELEMENTS,), tl.int32), zeros, zeros)
    state = (softmax, softmax, zeros, zeros, zeros)
    if has_tail and not SECOND_PASS:
        state = _statistics(
            state, student, teacher, full, tile, vocabulary, exponent,
            KIND, HAS_LABELS, HAS_STATISTICS, HAS_PEAK, SECOND_PASS, STUDENT_SOFTCAP, TEACHER_SOFTCAP, True,
        )  # fmt: skip
    for step in range(full):
        block = step if SECOND_PASS else full - 1 - step
        state = _statistics(
            state, student, teacher, block, tile, vocabulary, exponent,
            KIND, HAS_LABELS, HAS_STATISTICS, HAS_PEAK, SECOND_PASS, STUDENT_SOFTCAP, TEACHER_SOFTCAP, False,
        )  # fmt: skip
    if has_tail and SECOND_PASS:
        state = _statistics(
            state, student, teacher, full, tile, vocabulary, exponent,
            KIND, HAS_LABELS, HAS_STATISTICS, HAS_PEAK, SECOND_PASS, STUDENT_SOFTCAP, TEACHER_SOFTCAP, True,
        )  # fmt: skip
    student_state, teacher_state, label_sum, forward_moment, reverse_moment = state

    student_largest, student_sum, student_moment, student_kept = merge_lanes(student_state, exponent)
    row_state = (student_largest,)
    is_certain = student_sum < 2.0
    student_peak = vocabulary
    if HAS_PEAK and (is_certain | HAS_STATISTICS):
        student_peak = first_peak(student, student_state, tile, vocabulary, STUDENT_SOFTCAP)
    # Where more than half of the student's mass lies; past the end if there is no such column.
    peak = tl.where(is_certain, student_peak, vocabulary)
    label_factor = 0.0
    label_share = 0.0
    if HAS_LABELS:
        if KIND == "none":
            label_sum = student_sum
        else:
            label_sum = tl.sum(label_sum * tl.exp2((student_state[0] - student_largest) * LOG2E), axis=0)
        cross_entropy = tl.log(label_sum) - (label_logit - student_largest)
        tl.store(cross_entropy_out + row, tl.where(labelled, cross_entropy, 0.0))
        if label_weight is not None:
            label_factor = tl.where(labelled, tl.load(label_weight + row), 0.0) * student_scale
            label_share = label_factor / label_sum
    factor = 0.0
    coefficient_sum = 0.0
    if KIND != "none":
        teacher_largest, teacher_sum, teacher_moment, teacher_kept = merge_lanes(teacher_state, exponent)
        log_center = tl.log(teacher_sum / student_sum)  # not a difference of logs: both are large where it is small
        mass = tl.full((), 1.0, DTYPE)  # of the teacher on the columns; `rest` is that of its other tokens
        rest = tl.full((), 0.0, DTYPE)
        log_mass = tl.full((), 0.0, DTYPE)
        if teacher_rest is not None:
            odds = tl.load(teacher_rest + row) - (teacher_largest * inverse_temperature + tl.log(teacher_sum))
            small = tl.exp(-tl.abs(odds))
            log_mass = -(tl.maximum(odds, 0.0) + log1p(small))
            mass = tl.exp(log_mass)
            rest = tl.where(odds > 0, 1.0, small) / (1.0 + small)
            log_center -= log_mass
        row_state = (student_largest, teacher_largest, 1.0 / student_sum, mass / teacher_sum, log_center, inverse_temperature)  # type: ignore[assignment]
        if HAS_MOMENT:
            shift = (teacher_largest - teacher_state[0]) - (student_largest - student_state[0])
            if KIND != "reverse_kl":
                moment = tl.sum(weighted(teacher_kept, forward_moment - shift * teacher_state[2]), axis=0)
                value = mass * (moment * inverse_temperature / teacher_sum - log_center)
                coefficient_sum = -mass
            if KIND != "forward_kl":
                moment = tl.sum(weighted(student_kept, reverse_moment - shift * student_state[2]), axis=0)
                reverse = log_center - moment * inverse_temperature / student_sum
                if KIND == "mixed":
                    value = own * value + (1.0 - own) * reverse
                    coefficient_sum = own * coefficient_sum + (1.0 - own) * (reverse + 1.0)
                else:
                    value = reverse
                    coefficient_sum = reverse + 1.0
        else:
            # Pass 2, last block first.
            sums = (zeros, zeros, zeros, zeros)
            if has_tail:
                sums = _divergence(
                    sums, student, teacher, row_state, mixing, peak, full, tile, vocabulary,
                    KIND, STUDENT_SOFTCAP, TEACHER_SOFTCAP, True,
                )  # fmt: skip
            for step in range(full):
                sums = _divergence(
                    sums, student, teacher, row_state, mixing, peak, full - 1 - step, tile, vocabulary,
                    KIND, STUDENT_SOFTCAP, TEACHER_SOFTCAP, False,
                )  # fmt: skip
            value = tl.sum(sums[0], axis=0)
            if KIND == "jsd":
                value -= mixing[0] * mixing[1] * rest
            if KIND == "skew_kl":
                value -= mixing[1] * rest
            coefficient_sum = tl.sum(sums[1], axis=0)
            if HAS_DISTANCE:
                # At the peak q - p is minus the sum of the others too: its sign is all that counts in a certain student's gradient.
                at_peak = tl.where(peak < vocabulary, rest - tl.sum(sums[2], axis=0), 0.0)
                sign = tl.where(at_peak > 0, 1.0, tl.where(at_peak < 0, -1.0, 0.0))
                value += 0.5 * (tl.abs(at_peak) + rest)
                coefficient_sum += 0.5 * sign / student_sum
        # T^2 from the loss, 1/T from z/T.
        factor = temperature * tl.load(row_weight + row) * student_scale
        if KIND == "nla":
            accepted = tl.sum(sums[3], axis=0)
            value = negative_log(accepted, value)
            factor /= accepted
        tl.store(divergence_out + row, temperature * temperature * value)
    if HAS_STATISTICS:
        tl.store(student_entropy_out + row, tl.log(student_sum) - student_moment * inverse_temperature / student_sum)
        teacher_entropy = tl.log(teacher_sum) - teacher_moment * inverse_temperature / teacher_sum
        if teacher_rest is not None:
            teacher_entropy = mass * (teacher_entropy - log_mass) - weighted(rest, tl.log(rest))
        tl.store(teacher_entropy_out + row, teacher_entropy)
        agrees = student_peak == first_peak(teacher, teacher_state, tile, vocabulary, TEACHER_SOFTCAP)
        tl.store(agreement_out + row, tl.where(agrees, 1.0, 0.0))

    # The last pass, first block first: up to the peak's block, which is masked to leave the peak out, then the rest and the tail.
    if gradient is not None or HAS_STATISTICS:
        if gradient is not None:
            gradient = row_begin(gradient, gradient_stride, VECTOR)
        factors = (factor, coefficient_sum, label_factor, label_share)
        last_sums = (zeros, zeros)
        begin = 0
        end = peak // BLOCK
        while begin <= full:
            for block in range(begin, end):
                last_sums = _gradient(
                    last_sums, student, teacher, gradient, row_state, mixing, factors, label, peak, block, tile, vocabulary,
                    KIND, HAS_STATISTICS, label_weight is not None, STUDENT_SOFTCAP, TEACHER_SOFTCAP, False,
                )  # fmt: skip
            if end * BLOCK < vocabulary:
                last_sums = _gradient(
                    last_sums, student, teacher, gradient, row_state, mixing, factors, label, peak, end, tile, vocabulary,
                    KIND, HAS_STATISTICS, label_weight is not None, STUDENT_SOFTCAP, TEACHER_SOFTCAP, True,
                )  # fmt: skip
            begin = end + 1
            end = full
        if HAS_STATISTICS:
            tl.store(acceptance_out + row, tl.sum(last_sums[1], axis=0))
        if gradient is not None:
            at_peak = -tl.sum(last_sums[0], axis=0)
            if STUDENT_SOFTCAP:
                at_peak *= softcap_slope(student_largest, student_softcap)
            # Another thread wrote the peak's column as it came.
            tl.debug_barrier()
            tl.store(gradient + peak, at_peak.to(gradient.dtype.element_ty), mask=is_certain)


def softmax_divergence(
    student: Tensor,
    teacher: Tensor | None,
    *,
    kind: str,
    row_weight: Tensor,
    divergence: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    student_entropy: Tensor | None = None,
    teacher_entropy: Tensor | None = None,
    top1_agreement: Tensor | None = None,
    acceptance: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_rest: Tensor | None = None,
    mixing: float = 0.5,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    gradient: Tensor | None = None,
    block: int = BLOCK,
) -> None:
    """Launch the kernel: losses per row into the (C,) outputs, and the gradient of `student` (C, V) into `gradient` if it is given.

    Tensors are as `RowCall` of `fastkd/ops/row_call.py` says, V at least 1. Nothing is allocated and the host never waits.
    """
    rows, vocabulary = student.shape
    if rows == 0:
        return
    extras = (student_bias, teacher_bias, student_softcap, teacher_softcap)
    with torch.cuda.device_of(student):
        softmax_divergence_kernel[(rows,)](
            student,
            teacher,
            gradient,
            student_bias,
            teacher_bias,
            teacher_rest,
            row_weight,
            labels,
            label_weight,
            divergence,
            cross_entropy,
            student_entropy,
            teacher_entropy,
            top1_agreement,
            acceptance,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            vocabulary,
            temperature,
            mixing,
            student_scale,
            student_softcap or 0.0,
            teacher_scale,
            teacher_softcap or 0.0,
            KIND=kind,
            STUDENT_SOFTCAP=student_softcap is not None,
            TEACHER_SOFTCAP=teacher_softcap is not None,
            VECTOR=vector_size(student, teacher, gradient, student_bias, teacher_bias),
            BLOCK=block,
            **launch_options(kind, row_weight.dtype == torch.float64, extras=any(x is not None for x in extras)),
        )


def launch_options(kind: str, double: bool, extras: bool) -> dict[str, int]:
    """Warps, and registers a thread: three programs share a multiprocessor, or fewer where registers would spill."""
    programs = 1 if double else 2 if extras or kind in ("skew_kl", "skew_rkl") else 3
    return {"num_warps": WARPS, "maxnreg": {1: 255, 2: 128, 3: 80}[programs]}
