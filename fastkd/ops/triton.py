"""The Triton row kernel on CUDA (`kernels/rows.py`), or under Triton's interpreter on the CPU, which tests use (TRITON_INTERPRET=1).

Nothing here imports triton before a kernel is asked for.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .rows import RowLosses, RowOptions
from .topk_rows import TopK, check_tail


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
    """`fastkd.ops.rows.softmax_divergence_` with one program a row."""
    from ..kernels.rows import softmax_divergence

    divergence = options.divergence
    softmax_divergence(
        student_logits,
        teacher_logits,
        kind="none" if divergence is None else divergence.kind,
        row_weight=row_weight.contiguous(),
        divergence=out.divergence,
        cross_entropy=out.cross_entropy,
        student_entropy=out.student_entropy,
        teacher_entropy=out.teacher_entropy,
        top1_agreement=out.top1_agreement,
        labels=None if labels is None else labels.contiguous(),
        label_weight=None if label_weight is None else label_weight.contiguous(),
        mixing=0.5 if divergence is None or divergence.mixing is None else divergence.mixing,
        temperature=options.temperature,
        student_scale=options.student.scale,
        student_softcap=options.student.softcap,
        teacher_scale=options.teacher.scale,
        teacher_softcap=options.teacher.softcap,
        gradient=gradient,
    )


def topk_divergence_(
    student_logits: Tensor,
    teacher: TopK,
    options: RowOptions,
    out: RowLosses,
    *,
    row_weight: Tensor,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """`fastkd.ops.topk_rows.topk_divergence_` with one program a row (`kernels/topk.py`)."""
    from ..kernels.topk import topk_divergence

    check_tail(options.tail, teacher.log_tail is not None)
    assert out.divergence is not None
    topk_divergence(
        student_logits,
        teacher.ids,
        teacher.log_probabilities,
        None if teacher.log_tail is None else teacher.log_tail.contiguous(),
        tail=options.tail,
        row_weight=row_weight.contiguous(),
        divergence=out.divergence,
        cross_entropy=out.cross_entropy,
        labels=None if labels is None else labels.contiguous(),
        label_weight=None if label_weight is None else label_weight.contiguous(),
        temperature=options.temperature,
        student_scale=options.student.scale,
        student_softcap=options.student.softcap,
        gradient=gradient,
    )


def is_ready(device: torch.device) -> bool:
    """Whether triton is installed and its kernels run on `device`: an NVIDIA GPU, or the CPU under the interpreter."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (on_nvidia or interpreted) and _is_installed()


@functools.cache
def _is_installed() -> bool:
    try:
        from ..kernels import rows  # noqa: F401
    except ImportError:
        return False
    return True
