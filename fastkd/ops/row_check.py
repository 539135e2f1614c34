"""Whether a backend's row kernel is right for a kind of call on this machine: calls with known answers, which no fault should pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backend_torch import run as run_exactly
from .divergence import MIXING, Divergence
from .row_call import LogitTransform, RowCall, RowOptions, RowOutputs, TopK

TOLERANCE = 1e-4
"""The largest relative L2 error against float64 that is right."""
NARROW_TOLERANCE = 5e-3
"""The same of a gradient that is stored in 16 bits."""

_SIZES = {True: ((4128, 1.0), (128256, 1.25)), False: ((4113, 1.0), (128257, 1.25))}
"""Vocabularies, and the logit scale with each, by whether 16 divides them: of a few blocks and a tail, and as large as they come."""
_ROWS = 4
_TAIL = 32
_TEMPERATURE = 2.0
_ODDS = torch.tensor([-2.0, 0.5, 3.0, -math.inf], dtype=torch.float64)
_FRAME = 9.0


@dataclass(frozen=True)
class CallKind:
    """What decides which instructions run a `RowCall`: names of dtypes, and what is present."""

    divergence: str | None
    tail: str | None
    entries: int
    """The list's length of a sparse teacher, rounded up to a power of two."""
    arithmetic: str
    student: str
    teacher: str | None
    """The dtype of a dense teacher's logits or of a sparse one's log-probabilities."""
    gradient: str | None
    in_place: bool
    labels: bool
    label_gradient: bool
    student_bias: bool
    teacher_bias: bool
    teacher_rest: bool
    student_softcap: bool
    teacher_softcap: bool
    statistics: bool
    aligned_vocabulary: bool
    """Whether 16 divides V."""
    aligned_rows: bool
    """Whether rows of logits and gradient are a multiple of 16 bytes apart."""

    @classmethod
    def of(cls, call: RowCall) -> CallKind:
        """The kind of `call`."""
        sparse = call.teacher if isinstance(call.teacher, TopK) else None
        dense = call.teacher if isinstance(call.teacher, Tensor) else None
        teacher = dense if sparse is None else sparse.log_probabilities
        blocks = [block for block in (call.student, dense, call.gradient) if block is not None]
        return cls(
            divergence=None if call.options.divergence is None else call.options.divergence.kind,
            tail=None if sparse is None else call.options.tail,
            entries=0 if sparse is None else 1 << (sparse.ids.shape[1] - 1).bit_length(),
            arithmetic=_dtype(call.row_weight),
            student=_dtype(call.student),
            teacher=None if teacher is None else _dtype(teacher),
            gradient=None if call.gradient is None else _dtype(call.gradient),
            in_place=call.gradient is not None and call.gradient.data_ptr() == call.student.data_ptr(),
            labels=call.labels is not None,
            label_gradient=call.label_weight is not None,
            student_bias=call.student_bias is not None,
            teacher_bias=call.teacher_bias is not None,
            teacher_rest=call.teacher_rest is not None,
            student_softcap=call.options.student.softcap is not None,
            teacher_softcap=call.options.teacher.softcap is not None,
            statistics=call.wants_statistics,
            aligned_vocabulary=call.student.shape[1] % 16 == 0,
            aligned_rows=all(block.stride(0) * block.element_size() % 16 == 0 for block in blocks),
        )


def check(run: Callable[[RowCall], None], kind: CallKind, device: torch.device) -> str | None:
    """Run calls of `kind` on `device` and compare with torch in float64 on the CPU; what is wrong, in a sentence, or None.

    Of four rows, one is shifted up, one down, and one has a student and a teacher who are nearly certain. Outputs are NaN before, and
    lie in frames that nobody may write to. A row's gradient, its last columns by themselves, and every output are right to
    `TOLERANCE`, or `NARROW_TOLERANCE`. Lets `torch.OutOfMemoryError` through.
    """
    exact_kind = replace(
        kind,
        arithmetic="float64",
        student="float64",
        teacher=kind.teacher and "float64",
        gradient=kind.gradient and "float64",
        in_place=False,
    )
    for vocabulary, scale in _SIZES[kind.aligned_vocabulary]:
        options, inputs = _inputs(kind, vocabulary, scale)
        exact, _ = _call(exact_kind, options, inputs, torch.device("cpu"))
        run_exactly(exact)
        call, frames = _call(kind, options, inputs, device)
        try:
            run(call)
            wrong = _first_wrong(call, exact, inputs, frames)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            wrong = f"it raised {type(error).__name__}: {error}"
        if wrong:
            return f"{wrong} (V = {vocabulary})."
    return None


class _Framed:
    """Rows of NaN to write to, in memory whose other elements have to stay what they are."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, aligned: bool = True) -> None:
        # Eight rows before, so that the first begins at a multiple of 16 bytes in any case, as those of a model's logits do.
        pitch = 64 * (columns // 64 + 2) if aligned else (columns + 8) | 1
        self.memory = torch.full((8 + rows + 1, pitch), _FRAME, dtype=dtype, device=device)
        self.inside = self.memory[8:-1, :columns].fill_(math.nan)

    def is_whole(self) -> bool:
        """Whether nothing but the rows was written to; they are overwritten."""
        self.inside.fill_(_FRAME)
        return bool((self.memory == _FRAME).all())


def _inputs(kind: CallKind, vocabulary: int, scale: float) -> tuple[RowOptions, dict[str, Tensor]]:
    """The options of a call and its tensors by name, in float64 on the CPU, rounded to the dtypes of `kind`."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def rounded(x: Tensor, dtype: str | None) -> Tensor:
        return x.to(getattr(torch, dtype or "float64")).double()

    transforms = (
        LogitTransform(scale, 30.0 if kind.student_softcap else None),
        LogitTransform(softcap=30.0 if kind.teacher_softcap else None),
    )
    student = 1.5 * normal(_ROWS, vocabulary)
    logits = [student, student + 4 * normal(_ROWS, vocabulary)]
    # The other exponentials' sum is about e^0.3 V for the student and e^2.3 V for the teacher: they are certain but for e^-9 and e^-6.
    for block, gap in zip(logits, (0.3 + 9, 2.3 + 6), strict=True):
        block[3, vocabulary // 2] = _TEMPERATURE * (math.log(vocabulary) + gap)
    for block, transform in zip(logits, transforms, strict=True):
        if transform.softcap is None:  # else both ends would be flat
            block[1] += 200
            block[2] -= 200
    if not (kind.student_softcap or kind.teacher_softcap):
        for block in logits:
            block[:3, [7, vocabulary // 3]] = -math.inf
    names = kind.student, None if kind.tail else kind.teacher
    logits = [rounded(block, name) for block, name in zip(logits, names, strict=True)]
    biases = [rounded(normal(vocabulary), kind.arithmetic) * present for present in (kind.student_bias, kind.teacher_bias)]

    def log_probabilities(side: int) -> Tensor:
        return torch.log_softmax(transforms[side].apply(logits[side] + biases[side]) / _TEMPERATURE, -1)

    # Where p and q are all but equal, tvd's gradient is of either sign.
    close = (log_probabilities(0) - log_probabilities(1)).abs() < 1e-3
    logits[1] = rounded(torch.where(close, logits[1] - 8, logits[1]), names[1])
    log_p = log_probabilities(1)
    log_top, ids = log_p.topk(max(kind.entries, 1))
    inputs = {
        "student": logits[0],
        "teacher": logits[1],
        "student_bias": biases[0],
        "teacher_bias": biases[1],
        # Of the teacher's mass more is on other tokens in each row, and none in the last.
        "teacher_rest": (transforms[1].apply(logits[1] + biases[1]) / _TEMPERATURE).logsumexp(-1) + _ODDS,
        "ids": ids,
        "log_probabilities": rounded(log_top, kind.teacher),
        "log_tail": rounded(log_p.scatter(1, ids, -math.inf).logsumexp(1), kind.teacher),
        "row_weight": 2048 * torch.arange(1, _ROWS + 1, dtype=torch.float64, device="cpu"),
        "label_weight": 512 * torch.arange(_ROWS, 0, -1, dtype=torch.float64, device="cpu"),
        "labels": torch.tensor([vocabulary // 4, -100, vocabulary - 1, 1], device="cpu"),
    }
    inputs["ids"][0, -1] = -1 if kind.entries > 1 else ids[0, -1]
    mixing = 0.3 if kind.divergence in MIXING else None
    divergence = None if kind.divergence is None else Divergence(kind.divergence, mixing)
    return RowOptions(divergence, _TEMPERATURE, *transforms, tail=kind.tail or "bucket"), inputs


def _call(kind: CallKind, options: RowOptions, inputs: dict[str, Tensor], device: torch.device) -> tuple[RowCall, dict[str, _Framed]]:
    """A call of `inputs` in the dtypes of `kind` on `device`, and the memory that it may write to or read."""
    arithmetic = getattr(torch, kind.arithmetic)
    rows, vocabulary = inputs["student"].shape
    frames: dict[str, _Framed] = {}

    def block(name: str, dtype: str) -> Tensor:
        frames[name] = _Framed(rows, vocabulary, getattr(torch, dtype), device, aligned=kind.aligned_rows)
        return frames[name].inside

    def vector(name: str, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        frames[name] = _Framed(1, rows, arithmetic, device)
        return frames[name].inside[0]

    def given(name: str, wanted: bool, dtype: torch.dtype = arithmetic) -> Tensor | None:
        return inputs[name].to(device, dtype) if wanted else None

    teacher: Tensor | TopK | None = None
    if kind.teacher is not None and kind.tail is None:
        teacher = block("teacher", kind.teacher).copy_(inputs["teacher"])
    elif kind.teacher is not None:
        log_p, log_tail = (inputs[name].to(device, getattr(torch, kind.teacher)) for name in ("log_probabilities", "log_tail"))
        teacher = TopK(inputs["ids"].to(device), log_p, log_tail if kind.tail == "bucket" else None)
    student = block("student", kind.student).copy_(inputs["student"])
    gradient = None
    if kind.gradient is not None:
        gradient = student if kind.in_place else block("gradient", kind.gradient)
    return RowCall(
        student=student,
        teacher=teacher,
        options=options,
        outputs=RowOutputs(
            divergence=vector("divergence", kind.teacher is not None),
            cross_entropy=vector("cross_entropy", kind.labels),
            student_entropy=vector("student_entropy", kind.statistics),
            teacher_entropy=vector("teacher_entropy", kind.statistics),
            top1_agreement=vector("top1_agreement", kind.statistics),
            acceptance=vector("acceptance", kind.statistics),
        ),
        row_weight=inputs["row_weight"].to(device, arithmetic),
        labels=given("labels", kind.labels, torch.int64),
        label_weight=given("label_weight", kind.label_gradient),
        student_bias=given("student_bias", kind.student_bias),
        teacher_bias=given("teacher_bias", kind.teacher_bias),
        teacher_rest=given("teacher_rest", kind.teacher_rest),
        gradient=gradient,
        keeps_logits=not kind.in_place,
    ), frames


def _first_wrong(call: RowCall, exact: RowCall, inputs: dict[str, Tensor], frames: dict[str, _Framed]) -> str | None:
    """What `call` left that is not as `exact` has it, or that it had no business with."""
    for name, truth in vars(exact.outputs).items():
        if truth is not None and not (error := _error(getattr(call.outputs, name), truth)) <= TOLERANCE:
            return f"its {name} is off by {error:.1e} of its size, and {TOLERANCE:g} is allowed"
    if call.gradient is not None and exact.gradient is not None:
        made = call.gradient.cpu()
        allowed = NARROW_TOLERANCE if made.element_size() == 2 else TOLERANCE
        # The last columns of the row that is nearly certain may be too small for 16 bits.
        parts = [(row, slice(None)) for row in range(_ROWS)] + [(row, slice(-_TAIL, None)) for row in range(_ROWS - 1)]
        for part in parts:
            if not (error := _error(made[part], exact.gradient[part])) <= allowed:
                where = f"the last {_TAIL} columns of row {part[0]}" if part[1].start else f"row {part[0]}"
                return f"its gradient is off by {error:.1e} of its size in {where}, and {allowed:g} is allowed"
    for name, block in (("student", call.student), ("teacher", call.teacher)):
        if call.keeps_logits and isinstance(block, Tensor) and not torch.equal(block.cpu().double(), inputs[name]):
            return f"it changed the logits of the {name}"
    touched = [name for name, rows in frames.items() if not rows.is_whole()]
    return f"it wrote outside of the {touched[0]}'s memory" if touched else None


def _error(value: Tensor, truth: Tensor) -> float:
    """||value - truth||_2 / ||truth||_2 in float64; a truth of zero has to be met."""
    difference = float((value.cpu().double() - truth).norm())
    return difference and difference / max(float(truth.norm()), sys.float_info.min)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
