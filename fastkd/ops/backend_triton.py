"""The Triton row kernels (`kernels/rows.py`, `kernels/topk.py`) on NVIDIA GPUs, or on the CPU under Triton's interpreter, as in tests.

Nothing here imports triton before a kernel is asked for.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .row_call import RowCall, TopK


def run(call: RowCall) -> None:
    """Do what `RowCall` says with one program a row. The logits stay what they are, but where the gradient lies over them."""
    if not call.student.numel():
        return
    options, out = call.options, call.outputs
    kind = "none" if call.teacher is None or options.divergence is None else options.divergence.kind
    mixing = 0.5 if options.divergence is None or options.divergence.mixing is None else options.divergence.mixing
    if isinstance(call.teacher, TopK):
        from ..kernels.topk import topk_divergence

        assert out.divergence is not None
        topk_divergence(
            call.student,
            call.teacher.ids,
            call.teacher.log_probabilities,
            None if call.teacher.log_tail is None else call.teacher.log_tail.contiguous(),
            kind=kind,
            tail=options.tail,
            mixing=mixing,
            row_weight=call.row_weight,
            divergence=out.divergence,
            cross_entropy=out.cross_entropy,
            labels=call.labels,
            label_weight=call.label_weight,
            student_bias=call.student_bias,
            temperature=options.temperature,
            student_scale=options.student.scale,
            student_softcap=options.student.softcap,
            gradient=call.gradient,
        )
        return
    from ..kernels.rows import softmax_divergence

    softmax_divergence(
        call.student,
        call.teacher,
        kind=kind,
        row_weight=call.row_weight,
        divergence=out.divergence,
        cross_entropy=out.cross_entropy,
        student_entropy=out.student_entropy,
        teacher_entropy=out.teacher_entropy,
        top1_agreement=out.top1_agreement,
        acceptance=out.acceptance,
        labels=call.labels,
        label_weight=call.label_weight,
        student_bias=call.student_bias,
        teacher_bias=call.teacher_bias,
        teacher_rest=call.teacher_rest,
        mixing=mixing,
        temperature=options.temperature,
        student_scale=options.student.scale,
        student_softcap=options.student.softcap,
        teacher_scale=options.teacher.scale,
        teacher_softcap=options.teacher.softcap,
        gradient=call.gradient,
    )


def why_not(call: RowCall) -> str | None:
    """Say why `run` cannot take this call, and the remedy; None: it can."""
    device = call.student.device
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not (on_nvidia or interpreted):
        return f"it runs on NVIDIA GPUs and the tensors are on {device}; move them, or set TRITON_INTERPRET=1 to try it on a CPU."
    if on_nvidia and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs a GPU of compute capability 8.0 or newer and {device} has {major}.{minor}; use one of Ampere or later."
    if not _is_installed():
        return "triton is not installed, or its import fails; pip install triton."
    blocks = {"student": call.student, "teacher": call.teacher, "gradient": call.gradient}
    matrices = {name: block for name, block in blocks.items() if isinstance(block, Tensor)}
    for name, block in matrices.items():
        if block.dtype not in _DTYPES:
            return f"{name} is {block.dtype}; it takes float16, bfloat16, float32 and float64: cast it."
        if block.shape[1] > 1 and block.stride(1) != 1:
            return f"{name} has strides {block.stride()}; it needs stride 1 along the vocabulary: .contiguous()."
    if isinstance(call.teacher, TopK):
        from ..kernels.topk import LONGEST_LIST

        entries = call.teacher.ids.shape[1]
        if entries > LONGEST_LIST:
            return f"the teacher lists {entries} tokens a row; it takes up to {LONGEST_LIST}: keep fewer."
    for name in matrices.keys() - {"gradient"}:
        if call.gradient is not None and not _is_safe(call.gradient, matrices[name], may_cover=name == "student"):
            return (
                f"gradient ({call.gradient.dtype}, strides {call.gradient.stride()}) lies over {name} ({matrices[name].dtype}, strides "
                f"{matrices[name].stride()}), which is read later; give it memory of its own, or the rows of the student."
            )
    return None


_OLDEST_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_safe(gradient: Tensor, logits: Tensor, may_cover: bool) -> bool:
    """Whether writing `gradient` (C, V) leaves every logit alone or, if it `may_cover` them, none is written before it is read.

    A program of a GPU reads its row while other threads write theirs, so elements must agree one by one; the interpreter's programs are
    sequential, so a narrower gradient may begin where its row of logits begins.
    """
    steps = [block.stride(0) * block.element_size() if len(block) > 1 else 0 for block in (gradient, logits)]
    begin, end = logits.data_ptr(), logits.data_ptr() + (len(logits) - 1) * steps[1] + _row_bytes(logits)
    gradient_begin = gradient.data_ptr()
    gradient_end = gradient_begin + (len(gradient) - 1) * steps[0] + _row_bytes(gradient)
    if gradient_end <= begin or end <= gradient_begin:
        return True
    if steps[0] != steps[1]:
        return False
    if begin == gradient_begin:
        narrower = gradient.element_size() < logits.element_size() and gradient.device.type == "cpu"
        return may_cover and (narrower or gradient.dtype == logits.dtype)
    # Columns of one block of memory beside each other.
    offset = (gradient_begin - begin) % steps[0] if steps[0] else 0
    return steps[0] > 0 and offset >= _row_bytes(logits) and offset + _row_bytes(gradient) <= steps[0]


def _row_bytes(block: Tensor) -> int:
    return block.shape[1] * block.element_size()


@functools.cache
def _is_installed() -> bool:
    try:
        from ..kernels import rows  # noqa: F401
    except Exception:  # a broken installation raises what it likes
        return False
    return True
