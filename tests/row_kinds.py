"""Kinds of row calls, as many as there are different instructions to run, and a call of each."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastkd.ops.row_call import RowCall
from fastkd.ops.row_check import CallKind, check

CPU = torch.device("cpu")
DENSE = CallKind(
    divergence="forward_kl",
    tail=None,
    entries=0,
    arithmetic="float32",
    student="float32",
    teacher="float32",
    gradient="bfloat16",
    in_place=False,
    labels=False,
    label_gradient=False,
    student_bias=False,
    teacher_bias=False,
    teacher_rest=False,
    student_softcap=False,
    teacher_softcap=False,
    statistics=False,
    aligned_vocabulary=False,
    aligned_rows=False,
)
ALIGNED = replace(DENSE, aligned_vocabulary=True, aligned_rows=True)
FULL = replace(DENSE, gradient="float32", labels=True, label_gradient=True, statistics=True, student_bias=True, teacher_bias=True)
SPARSE = replace(DENSE, tail="bucket", entries=8)
DIVERGENCES = ("forward_kl", "reverse_kl", "mixed", "tvd", "nla", "jsd", "skew_kl", "skew_rkl")
KINDS = {
    **{name: replace(FULL, divergence=name) for name in DIVERGENCES},
    **{f"{name} with a rest": replace(FULL, divergence=name, teacher_rest=True) for name in DIVERGENCES},
    **{f"top-k, {tail}": replace(SPARSE, tail=tail, gradient="float32") for tail in ("bucket", "renormalize", "zero")},
    **{f"top-k, {name}": replace(SPARSE, divergence=name, gradient="float32") for name in DIVERGENCES[1:]},
    "labels": replace(DENSE, divergence=None, teacher=None, labels=True, label_gradient=True),
    "aligned": ALIGNED,
    "aligned rows of an odd vocabulary": replace(DENSE, aligned_rows=True),
    "in place": replace(ALIGNED, gradient="float32", in_place=True),
    "soft-caps": replace(FULL, student_softcap=True, teacher_softcap=True),
    "one soft-cap": replace(FULL, student_softcap=True),
    "values alone": replace(FULL, gradient=None, label_gradient=False),
    "bfloat16": replace(ALIGNED, student="bfloat16", teacher="bfloat16"),
    "float16": replace(FULL, student="float16", teacher="float16", gradient="float16", in_place=True),
    "float64": replace(FULL, arithmetic="float64", student="float64", teacher="float64", gradient="float64"),
}


def make_call(kind: CallKind) -> RowCall:
    """The first call on the CPU that checks `kind`."""
    calls: list[RowCall] = []
    check(calls.append, kind, CPU)
    return calls[0]
