"""Losses on the scores of a labelled task, one value an example; the methods say how they are weighted and what is beside them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..tasks.labelled import Kind


def label_loss(kind: Kind, scores: Tensor, labels: Tensor) -> Tensor:
    """(B,) what transformers' heads compute: cross-entropy over classes or choices, squared error for regression, and for question
    answering the mean of the cross-entropies of the answer's first and last token."""
    scores = upcast(scores)
    if kind == "regression":
        return (scores - labels.to(scores.dtype)).square()
    if kind == "question_answering":
        return functional.cross_entropy(scores.mT, labels, reduction="none").mean(-1)
    return functional.cross_entropy(scores, labels, reduction="none")


def score_divergence(
    kind: Kind,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    form: Literal["kl", "cross_entropy"] = "kl",
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) T^2 KL(softmax(z_t / T) || softmax(z_s / T)) over classes or choices; for question answering over positions, the mean of
    the answer's first and last token. No gradient flows to the teacher.

    form: "cross_entropy" adds T^2 times the teacher's entropy; the gradient is the same. mask: (B, S) bool, positions outside which are
    in neither softmax. Regression has no distribution and is refused.
    """
    if kind == "regression":
        raise ValueError("Regression scores are no distribution; compare them by their squared error.")
    student, teacher = (upcast(x) / temperature for x in (student, teacher.detach()))
    if mask is not None:
        # The lowest number and not -inf, whose difference with itself is NaN where the teacher's probability is zero.
        student, teacher = (x.masked_fill(~mask[:, None], torch.finfo(x.dtype).min) for x in (student, teacher))
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    terms = (log_p.exp() * (log_p - log_q if form == "kl" else -log_q)).sum(-1)
    per_example = terms.mean(-1) if kind == "question_answering" else terms
    return temperature**2 * per_example


def upcast(scores: Tensor) -> Tensor:
    """16-bit scores in float32; others as they are."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
