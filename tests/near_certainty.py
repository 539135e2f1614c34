"""Gradients of rows of which one logit lies far above the rest: float32 sums cancel there unless a kernel sees to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions
from tests.oracle import assert_close
from tests.row_kernels import make_outputs, oracle

GAPS = [2.0, 5.0, 10.0, 20.0, 30.0]
PEAK, ELSEWHERE = 7, 1009
LABELS = torch.tensor([PEAK, ELSEWHERE, -1, PEAK])


def check_near_certainty(run: Callable[[RowCall], None], divergence: str | None, gap: float) -> None:
    """Rows of a student `gap` sure of a token, and of a teacher 0.8 `gap` sure of it or of another: each gradient is right to 1e-4."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 2000, generator=generator) for _ in range(2))
    student[:, PEAK] += gap
    teacher[:2, PEAK] += 0.8 * gap
    teacher[2:, ELSEWHERE] += 0.8 * gap
    for temperature, softcap, has_labels in itertools.product((1.0, 2.0), (None, 50.0), (False, True)):
        if divergence is None and not has_labels:
            continue
        transform = LogitTransform(1.0, softcap)
        call = RowCall(
            student=student.clone(),
            teacher=teacher.clone() if divergence else None,
            options=RowOptions(Divergence.parse(divergence) if divergence else None, temperature, transform, transform),
            outputs=make_outputs(4, torch.float32, divergence is not None, has_labels, statistics=False),
            row_weight=torch.linspace(0.5, 2.0, 4),
            labels=LABELS if has_labels else None,
            label_weight=torch.tensor([0.3, 0.7, 5.0, 1.1]) if has_labels else None,
            gradient=torch.empty_like(student),
        )
        truth = exact_gradient(replace(call, student=student, teacher=teacher if divergence else None))
        run(call)
        assert call.gradient is not None
        for row, (made, exact) in enumerate(zip(call.gradient, truth, strict=True)):
            assert_close(made, exact, 1e-4, f"row {row} at T={temperature}, softcap={softcap}, labels={has_labels}")


def exact_gradient(call: RowCall) -> torch.Tensor:
    """In float64 (C, V), where the peak's entry would cancel too: it is minus the sum of the others, before the soft-cap's slope."""
    assert call.teacher is None or isinstance(call.teacher, torch.Tensor)
    _, truth = oracle(call.student, call.teacher, call.options, call.row_weight, call.labels, call.label_weight)
    softcap = call.options.student.softcap
    slope = 1.0 if softcap is None else 1.0 - torch.tanh(call.student.double() / softcap) ** 2
    truth = truth / slope
    truth[:, PEAK] = 0.0
    truth[:, PEAK] = -truth.sum(1)
    return truth * slope
