"""The door to the row kernels: two blocks of logits in, per-row losses and the gradient of the student's logits out.

This file holds the torch backend, which is exact on every device and dtype; compiled backends answer the same call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .divergence import Divergence

# A block of rows is sized so that its temporaries stay in cache on a CPU, and so that they stay small beside a chunk on a GPU.
_CPU_BLOCK_ELEMENTS = 1 << 18
_GPU_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's output: logits = softcap * tanh(scale * x / softcap); no soft-cap: scale * x."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Raw head outputs of any shape -> logits, in their dtype."""
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Chain `gradient` (with respect to `logits`) in place to one with respect to the raw head output."""
        if self.softcap is not None:
            gradient.mul_(1.0 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class RowOptions:
    """What is computed of each row. `divergence` None: no dense teacher; `tail`: how a sparse one (`topk_rows.py`) is completed."""

    divergence: Divergence | None = field(default_factory=lambda: Divergence("forward_kl"))
    temperature: float = 1.0
    student: LogitTransform = LogitTransform()
    teacher: LogitTransform = LogitTransform()
    stats: bool = False
    tail: str = "bucket"


@dataclass
class RowLosses:
    """Per-row results, (C,) each, in the row weights' dtype.

    `divergence` carries T^2; entropies are those of the tempered distributions.
    """

    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None


def softmax_divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    options: RowOptions,
    out: RowLosses,
    *,
    row_weight: Tensor,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Fill `out` with per-row losses, and `gradient` if it is given with the gradient, with respect to `student_logits`, of

        sum_i row_weight_i T^2 D(softmax(teacher_i / T), softmax(student_i / T)) + label_weight_i CE(student_i, labels_i)

    Logits and `gradient` are (C, V), each in float16, bfloat16, float32 or float64, of any row stride and unit column stride; logits
    are as the heads' GEMMs wrote them (before `LogitTransform`). Labels are (C,) int64, negative where a row has none. Weights (C,) and
    `out` are float32 or float64, and so is all arithmetic. Losses in `out` are unweighted.

    `gradient` may be `student_logits`, or lie over it in a narrower dtype, each of its rows beginning where a row of logits begins (a
    bfloat16 view of a float32 buffer, of twice its row stride), or lie elsewhere. Both blocks of logits are scratch afterwards.
    """
    rows, vocabulary = student_logits.shape
    dtype = row_weight.dtype
    elements = _GPU_BLOCK_ELEMENTS if student_logits.is_cuda else _CPU_BLOCK_ELEMENTS
    step = max(1, elements // max(1, vocabulary))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        student = options.student.apply(student_logits[block].to(dtype))
        total = None
        if options.divergence is not None:
            assert teacher_logits is not None and out.divergence is not None
            teacher = options.teacher.apply(teacher_logits[block].to(dtype))
            total = _divergence_block(student, teacher, options, out, block, gradient is not None)
            if total is not None:
                total.mul_(row_weight[block, None])
        if labels is not None:
            assert out.cross_entropy is not None
            wanted = gradient is not None and label_weight is not None
            label_gradient = _cross_entropy_block(student, labels[block], out.cross_entropy[block], wanted)
            if label_gradient is not None and label_weight is not None:
                label_gradient.mul_(label_weight[block, None])
                total = label_gradient if total is None else total.add_(label_gradient)
        if gradient is not None:
            assert total is not None
            # `total` has memory of its own and a row of `gradient` lies over none but its own row of logits: all of those were read.
            gradient[block] = options.student.backward_(total, student)


def _divergence_block(
    student: Tensor, teacher: Tensor, options: RowOptions, out: RowLosses, block: slice, gradient: bool
) -> Tensor | None:
    """Write the block's losses into `out`; return d(T^2 D)/d(logits) if wanted."""
    assert options.divergence is not None and out.divergence is not None
    temperature = options.temperature
    log_q = torch.log_softmax(student if temperature == 1.0 else student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher if temperature == 1.0 else teacher / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    value, coefficient = _value_and_coefficient(options.divergence, p, q, log_p, log_q)
    out.divergence[block] = value * temperature**2
    if options.stats:
        assert out.student_entropy is not None and out.teacher_entropy is not None and out.top1_agreement is not None
        out.student_entropy[block] = -_weighted(q, log_q).sum(-1)
        out.teacher_entropy[block] = -_weighted(p, log_p).sum(-1)
        out.top1_agreement[block] = (log_q.argmax(-1) == log_p.argmax(-1)).to(student.dtype)
    if not gradient:
        return None
    # T^2 from the loss, 1/T from z/T: the gradient of T^2 D carries T once.
    return coefficient.sub_(q.mul_(coefficient.sum(-1, keepdim=True))).mul_(temperature)


def _value_and_coefficient(divergence: Divergence, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """D(p, q) per row, and c = dD / d log q with log q treated as free; then dD / dz = c - q sum(c) for q = softmax(z)."""
    kind, mixing = divergence.kind, divergence.mixing
    if kind == "forward_kl":
        return _weighted(p, log_p - log_q).sum(-1), -p
    if kind == "reverse_kl":
        terms = _weighted(q, log_q - log_p)
        return terms.sum(-1), terms + q
    if kind == "tvd":
        difference = q - p
        return 0.5 * difference.abs().sum(-1), 0.5 * q * difference.sign()
    assert mixing is not None
    own, other = math.log(mixing), math.log1p(-mixing)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p + own, log_q + other)
        student_terms = _weighted(q, log_q - log_m)
        value = mixing * _weighted(p, log_p - log_m).sum(-1) + (1.0 - mixing) * student_terms.sum(-1)
        return value, student_terms.mul_(1.0 - mixing)
    if kind == "skew_kl":
        log_m = torch.logaddexp(log_p + own, log_q + other)
        return _weighted(p, log_p - log_m).sum(-1), -_weighted(p, (log_q - log_m + other).exp())
    log_m = torch.logaddexp(log_q + own, log_p + other)
    terms = _weighted(q, log_q - log_m)
    return terms.sum(-1), terms + _weighted(q, 1.0 - (log_q - log_m + own).exp())


def _weighted(probability: Tensor, factor: Tensor) -> Tensor:
    """probability * factor, with 0 * (anything, infinite or undefined) = 0: a token of zero probability adds nothing."""
    return (probability * factor).masked_fill_(probability == 0, 0.0)


def _cross_entropy_block(student: Tensor, labels: Tensor, out: Tensor, gradient: bool) -> Tensor | None:
    """Write CE at T = 1 into `out` (zero where the label is negative); return softmax - one_hot if wanted (zero rows there too)."""
    log_q = torch.log_softmax(student, dim=-1)
    labelled = labels >= 0
    index = labels.clamp_min(0)[:, None]
    out.copy_(torch.where(labelled, -log_q.gather(1, index)[:, 0], 0.0))
    if not gradient:
        return None
    result = log_q.exp_()
    result.scatter_add_(1, index, result.new_full((1, 1), -1.0).expand(index.shape))
    return result.mul_(labelled[:, None])
