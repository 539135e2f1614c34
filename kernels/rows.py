"""Floor 1: the Triton row kernel. Two rows of logits in, their divergence and the gradient of the student's row out.

`fastkd/ops/rows.py` states the mathematics and holds the torch backend, whose results these are. One program serves one row, in two or
three passes, each of which begins where the one before it ended, so that it finds that end of the row in the second-level cache:

1. statistics: both maxima and normalisers, online; forward and reverse KL are complete after it, since their sum over the row is a
   moment of the difference of the logits, which is rescaled as the maxima move;
2. where that is not enough (the other divergences; entropies): the divergence and sum(c), c = dD / d log q;
3. the gradient c - q sum(c), chained through temperature and soft-cap. This pass runs forward, because the gradient may lie over the
   student's own logits in a narrower dtype: it then covers only what was read before.

Logits and gradient may be float16, bfloat16, float32 or float64; all arithmetic is in the dtype of the row weights, float32 or float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("none", "forward_kl", "reverse_kl", "tvd", "jsd", "skew_kl", "skew_rkl")
"""What a row's loss is; "none" has no teacher, only labels."""

# Four elements of each row a thread: the divergence alone needs at most 64 registers, so that two rows share a multiprocessor.
BLOCK = 2048
WARPS = 16


@triton.jit
def _tanh(x):
    """tanh without libdevice, which the interpreter lacks; the series keeps the relative precision that 1 - exp(-2x) loses near 0."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    ratio = (1.0 - e) / (1.0 + e)
    s = x * x
    series = -1382 / 155925 + s * (21844 / 6081075)
    series = -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * series)))
    return tl.where(size < 0.25, x + x * s * series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _logits(row, columns, vocabulary, scale, softcap, HAS_SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    """The model's logits at `columns` of the raw `row`; -inf, which has no part in a softmax, past the vocabulary."""
    inside = columns < vocabulary
    logits = tl.load(row + columns, mask=inside, other=0.0).to(DTYPE) * scale
    if HAS_SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _finite(largest):
    """A maximum that can be subtracted: a row that is -inf so far has none yet."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _weighted(probability, factor):
    """probability * factor, with 0 * (anything, infinite or undefined) = 0; NaN shows."""
    return tl.where(probability == 0, 0.0, probability * factor)


@triton.jit
def _value_and_coefficient(p, q, log_ratio, own, log_own, log_other, KIND: tl.constexpr):
    """An entry's part of D(p, q), and its c = dD / d log q with log q treated as free. `log_ratio` is log p - log q.

    A mixture enters by softplus(x) with x the log of its odds, so that neither probability can underflow and nothing of the size of
    log p cancels: log(m / q) = log_other + softplus(x) for m = own p + other q, and log(m / p) = log_own + softplus(-x).
    """
    if KIND == "forward_kl":
        value = _weighted(p, log_ratio)
        coefficient = -p
    elif KIND == "reverse_kl":
        value = _weighted(q, -log_ratio)
        coefficient = value + q
    elif KIND == "tvd":
        difference = q - p
        value = 0.5 * tl.abs(difference)
        coefficient = 0.5 * q * tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    else:
        odds = log_own - log_other + (-log_ratio if KIND == "skew_rkl" else log_ratio)
        e = tl.exp(-tl.abs(odds))
        rest = tl.log(1.0 + e)
        to_other = log_other + tl.where(odds > 0, odds, 0.0) + rest
        to_own = log_own + tl.where(odds < 0, -odds, 0.0) + rest
        other_share = tl.where(odds > 0, e, 1.0) / (1.0 + e)
        if KIND == "jsd":
            student = _weighted(q, -to_other)
            value = own * _weighted(p, -to_own) + (1.0 - own) * student
            coefficient = (1.0 - own) * student
        elif KIND == "skew_kl":
            value = _weighted(p, -to_own)
            coefficient = -_weighted(p, other_share)
        else:
            value = _weighted(q, -to_own)
            coefficient = value + _weighted(q, other_share)
    return value, coefficient


@triton.jit
def softmax_divergence_kernel(
    student,
    teacher,
    gradient,
    student_stride,
    teacher_stride,
    gradient_stride,
    vocabulary,
    row_weight,
    labels,
    label_weight,
    divergence_out,
    cross_entropy_out,
    student_entropy_out,
    teacher_entropy_out,
    agreement_out,
    temperature: tl.float64,
    mixing: tl.float64,
    student_scale: tl.float64,
    student_softcap: tl.float64,
    teacher_scale: tl.float64,
    teacher_softcap: tl.float64,
    KIND: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    WANTS_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = row_weight.dtype.element_ty
    HAS_TEACHER: tl.constexpr = KIND != "none"
    HAS_MOMENT: tl.constexpr = KIND == "forward_kl" or KIND == "reverse_kl"
    SECOND_PASS: tl.constexpr = HAS_TEACHER and (WANTS_STATS or not HAS_MOMENT)
    # Scalars travel in float64, so that float64 logits lose nothing.
    temperature = tl.full((), temperature, DTYPE)
    inverse_temperature = 1.0 / temperature
    mixing = tl.full((), mixing, DTYPE)
    student_scale = tl.full((), student_scale, DTYPE)
    student_softcap = tl.full((), student_softcap, DTYPE)
    teacher_scale = tl.full((), teacher_scale, DTYPE)
    teacher_softcap = tl.full((), teacher_softcap, DTYPE)
    minus_infinity = tl.full((), float("-inf"), DTYPE)

    # Rows times stride passes 2^31 in everyday chunks.
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    if HAS_TEACHER:
        teacher += row * teacher_stride
    if WANTS_GRADIENT:
        gradient += row * gradient_stride
    offsets = tl.arange(0, BLOCK)
    blocks = tl.cdiv(vocabulary, BLOCK)
    if HAS_LABELS:
        label = tl.load(labels + row)
        labelled = label >= 0
        # A label outside of the vocabulary reads nothing and gives NaN.
        label_logit = tl.load(student + label, mask=labelled & (label < vocabulary), other=float("nan")).to(DTYPE) * student_scale
        if STUDENT_SOFTCAP:
            label_logit = student_softcap * _tanh(label_logit / student_softcap)

    # Pass 1, in the direction that lets the last pass run forward. Sums stay apart by lane and are rescaled by the whole block's
    # maximum: one reduction a block and model.
    student_max = minus_infinity
    teacher_max = minus_infinity
    student_best = 0
    teacher_best = 0
    student_sum = tl.zeros((BLOCK,), DTYPE)
    teacher_sum = tl.zeros((BLOCK,), DTYPE)
    label_sum = tl.zeros((BLOCK,), DTYPE)
    moment = tl.zeros((BLOCK,), DTYPE)
    for step in range(blocks):
        block = step if SECOND_PASS or not WANTS_GRADIENT else blocks - 1 - step
        columns = block * BLOCK + offsets
        s = _logits(student, columns, vocabulary, student_scale, student_softcap, STUDENT_SOFTCAP, DTYPE)
        if WANTS_STATS:
            largest, at = tl.max(s, axis=0, return_indices=True)
            student_best = tl.where(largest > student_max, block * BLOCK + at, student_best)
        else:
            largest = tl.max(s, axis=0)
        new_student_max = tl.where(largest > student_max, largest, student_max)
        student_finite = _finite(new_student_max)
        student_from = s - student_finite
        if HAS_LABELS:
            label_sum = label_sum * tl.exp(student_max - student_finite) + tl.exp(student_from)
        if HAS_TEACHER:
            student_kept = tl.exp((student_max - student_finite) * inverse_temperature)
            student_exp = tl.exp(student_from * inverse_temperature)
            t = _logits(teacher, columns, vocabulary, teacher_scale, teacher_softcap, TEACHER_SOFTCAP, DTYPE)
            if WANTS_STATS:
                largest, at = tl.max(t, axis=0, return_indices=True)
                teacher_best = tl.where(largest > teacher_max, block * BLOCK + at, teacher_best)
            else:
                largest = tl.max(t, axis=0)
            new_teacher_max = tl.where(largest > teacher_max, largest, teacher_max)
            teacher_finite = _finite(new_teacher_max)
            teacher_kept = tl.exp((teacher_max - teacher_finite) * inverse_temperature)
            teacher_exp = tl.exp((t - teacher_finite) * inverse_temperature)
            if HAS_MOMENT:
                # sum of weight * (t - s), both from their maxima: of the size of the divergence, whatever is added to the logits.
                center = teacher_finite - student_finite
                shift = center - (_finite(teacher_max) - _finite(student_max))
                if KIND == "forward_kl":
                    kept = teacher_kept
                    weight = teacher_exp
                    weight_sum = teacher_sum
                else:
                    kept = student_kept
                    weight = student_exp
                    weight_sum = student_sum
                moment = _weighted(kept, moment - shift * weight_sum) + _weighted(weight, (t - s) - center)
            student_sum = student_sum * student_kept + student_exp
            teacher_sum = teacher_sum * teacher_kept + teacher_exp
            teacher_max = new_teacher_max
        student_max = new_student_max

    if HAS_LABELS:
        # Every label logit is read before the first gradient is written: the reductions between are barriers.
        label_normaliser = tl.sum(label_sum, axis=0)
        cross_entropy = tl.log(label_normaliser) - (label_logit - student_max)
        tl.store(cross_entropy_out + row, tl.where(labelled, cross_entropy, 0.0))
        label_factor = tl.zeros((), DTYPE)
        if HAS_LABEL_WEIGHT:
            label_factor = tl.where(labelled, tl.load(label_weight + row), 0.0)
        label_share = label_factor / label_normaliser
    if HAS_TEACHER:
        student_normaliser = tl.sum(student_sum, axis=0)
        teacher_normaliser = tl.sum(teacher_sum, axis=0)
        center = teacher_max - student_max
        log_center = tl.log(teacher_normaliser / student_normaliser)  # not a difference of logs: both are large where it is small
        log_own = tl.log(mixing)
        log_other = tl.log(1.0 - mixing)
        value = tl.zeros((), DTYPE)
        coefficient_sum = tl.zeros((), DTYPE)
        if KIND == "forward_kl":
            value = tl.sum(moment, axis=0) * inverse_temperature / teacher_normaliser - log_center
            coefficient_sum = tl.full((), -1.0, DTYPE)
        elif KIND == "reverse_kl":
            value = log_center - tl.sum(moment, axis=0) * inverse_temperature / student_normaliser
            coefficient_sum = value + 1.0

    # Pass 2, last block first.
    if SECOND_PASS:
        values = tl.zeros((BLOCK,), DTYPE)
        coefficients = tl.zeros((BLOCK,), DTYPE)
        student_entropies = tl.zeros((BLOCK,), DTYPE)
        teacher_entropies = tl.zeros((BLOCK,), DTYPE)
        student_log = tl.log(student_normaliser)
        teacher_log = tl.log(teacher_normaliser)
        for step in range(blocks):
            columns = (blocks - 1 - step) * BLOCK + offsets
            s = _logits(student, columns, vocabulary, student_scale, student_softcap, STUDENT_SOFTCAP, DTYPE)
            t = _logits(teacher, columns, vocabulary, teacher_scale, teacher_softcap, TEACHER_SOFTCAP, DTYPE)
            q = tl.exp((s - student_max) * inverse_temperature) / student_normaliser
            p = tl.exp((t - teacher_max) * inverse_temperature) / teacher_normaliser
            if WANTS_STATS:
                student_entropies -= _weighted(q, (s - student_max) * inverse_temperature - student_log)
                teacher_entropies -= _weighted(p, (t - teacher_max) * inverse_temperature - teacher_log)
            if not HAS_MOMENT:
                log_ratio = ((t - s) - center) * inverse_temperature - log_center
                part, coefficient = _value_and_coefficient(p, q, log_ratio, mixing, log_own, log_other, KIND)
                values += part
                coefficients += coefficient
        if not HAS_MOMENT:
            value = tl.sum(values, axis=0)
            coefficient_sum = tl.sum(coefficients, axis=0)
        if WANTS_STATS:
            tl.store(student_entropy_out + row, tl.sum(student_entropies, axis=0))
            tl.store(teacher_entropy_out + row, tl.sum(teacher_entropies, axis=0))
            tl.store(agreement_out + row, tl.where(student_best == teacher_best, 1.0, 0.0))
    if HAS_TEACHER:
        tl.store(divergence_out + row, temperature * temperature * value)

    # Pass 3, first block first.
    if WANTS_GRADIENT:
        if HAS_TEACHER:
            # T^2 from the loss, 1/T from z/T.
            factor = temperature * tl.load(row_weight + row)
        for block in range(blocks):
            columns = block * BLOCK + offsets
            s = _logits(student, columns, vocabulary, student_scale, student_softcap, STUDENT_SOFTCAP, DTYPE)
            slope = tl.zeros((BLOCK,), DTYPE)
            if HAS_TEACHER:
                t = _logits(teacher, columns, vocabulary, teacher_scale, teacher_softcap, TEACHER_SOFTCAP, DTYPE)
                q = tl.exp((s - student_max) * inverse_temperature) / student_normaliser
                p = tl.exp((t - teacher_max) * inverse_temperature) / teacher_normaliser
                log_ratio = ((t - s) - center) * inverse_temperature - log_center
                _, coefficient = _value_and_coefficient(p, q, log_ratio, mixing, log_own, log_other, KIND)
                slope = factor * (coefficient - q * coefficient_sum)
            if HAS_LABEL_WEIGHT:
                slope += label_share * tl.exp(s - student_max) - tl.where(columns == label, label_factor, 0.0)
            if STUDENT_SOFTCAP:
                capped = s / student_softcap
                slope *= 1.0 - capped * capped
            slope *= student_scale
            if gradient.dtype.element_ty.primitive_bitwidth < student.dtype.element_ty.primitive_bitwidth:
                # Over the student's row, this block's gradient covers this block's logits and earlier ones, which other warps read:
                # all of them must have done so.
                tl.debug_barrier()
            tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=columns < vocabulary)


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
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
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

    Logits and gradient: unit stride along the vocabulary, any stride between rows; `gradient` may be `student`, or lie over it in a
    narrower dtype with each row beginning where its logits do. `divergence` is needed with a teacher, `cross_entropy` with
    `labels` ((C,) int64, negative for none); the three statistics come together or not at all. Outputs and weights are contiguous
    and of one dtype, float32 or float64. Nothing is allocated and the host never waits.
    """
    rows, vocabulary = student.shape
    for name, logits in (("student", student), ("teacher", teacher), ("gradient", gradient)):
        if logits is not None and vocabulary > 1 and logits.stride(1) != 1:
            raise ValueError(
                f"{name} has strides {logits.stride()}; the row kernel needs stride 1 along the vocabulary: .contiguous()."
            )
    if rows == 0 or vocabulary == 0:
        return
    with torch.cuda.device_of(student):
        softmax_divergence_kernel[(rows,)](
            student,
            teacher,
            gradient,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            vocabulary,
            row_weight,
            labels,
            label_weight,
            divergence,
            cross_entropy,
            student_entropy,
            teacher_entropy,
            top1_agreement,
            temperature,
            mixing,
            student_scale,
            student_softcap or 0.0,
            teacher_scale,
            teacher_softcap or 0.0,
            KIND=kind,
            HAS_LABELS=labels is not None,
            HAS_LABEL_WEIGHT=label_weight is not None,
            STUDENT_SOFTCAP=student_softcap is not None,
            TEACHER_SOFTCAP=teacher_softcap is not None,
            WANTS_GRADIENT=gradient is not None,
            WANTS_STATS=student_entropy is not None,
            BLOCK=block,
            **launch_options(bare=labels is None and student_entropy is None and student_softcap is None and teacher_softcap is None),
        )


def launch_options(bare: bool) -> dict[str, int]:
    """Warps, and for what is more than a `bare` divergence leave to use all registers: ptxas would spill to get down to 64."""
    return {"num_warps": WARPS} if bare else {"num_warps": WARPS, "maxnreg": 65536 // (32 * WARPS)}
