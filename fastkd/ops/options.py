"""`LossOptions`: the numbers and names among a logit loss's arguments, checked once and carried through the operator as one string."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any, Literal

import torch

from .checks import check_choice, check_flag, check_number, check_temperature, check_transform, check_whole
from .divergence import Divergence
from .row_call import LogitTransform, RowOptions

BACKENDS = ("auto", "torch", "cpp", "triton", "cuda")
REDUCTIONS = ("mean", "sum", "none")
TEACHER_MASSES = ("renormalize", "full", "slots")
"""What is done with the mass of the teacher's tokens that the student does not have; `linear_kl_div` says what each means."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the public functions document, in plain numbers and names.

    `divergence` is None without a teacher, `tail` without a top-k one. `operand_dtype` is the name of autocast's dtype.
    """

    divergence: str | None = None
    mixing: float | None = None
    tail: str | None = None
    topk_temperature: float | None = None
    teacher_mass: str = "renormalize"
    temperature: float = 1.0
    temperature_squared: bool = True
    label_weight: float = 0.0
    ignore_index: int = -100
    student_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_softcap: float | None = None
    reduction: str = "mean"
    chunk_size: int | None = None
    memory_budget: int | None = None
    backend: str = "auto"
    statistics: str = ""
    """"" for none; "losses" for those that are there in any case; "all"."""
    grad_filter: float | None = None
    operand_dtype: str | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_flag("temperature_squared", self.temperature_squared)
        check_number("label_weight", self.label_weight, may_be_zero=True)
        check_whole("ignore_index", self.ignore_index)
        for side in ("student", "teacher"):
            check_transform(f"{side}_", getattr(self, f"{side}_logit_scale"), getattr(self, f"{side}_softcap"))
        if self.grad_filter is not None:
            check_number("grad_filter", self.grad_filter)
        check_choice("teacher_mass", self.teacher_mass, TEACHER_MASSES)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("backend", self.backend, BACKENDS)
        for name, unit in (("chunk_size", "rows"), ("memory_budget", "bytes")):
            count = getattr(self, name)
            if count is not None:
                check_whole(name, count, least=1, unit=unit)

    @cached_property
    def rows(self) -> RowOptions:
        """What the row kernels are told."""
        return RowOptions(
            divergence=None if self.divergence is None else Divergence(self.divergence, self.mixing),
            tail=self.tail or "bucket",
            temperature=self.temperature,
            student=self.student_transform,
            # The logits of slots are finished.
            teacher=LogitTransform() if self.teacher_mass == "slots" else self.teacher_transform,
        )

    @property
    def student_transform(self) -> LogitTransform:
        """What the student does to its head's output."""
        return LogitTransform(self.student_logit_scale, self.student_softcap)

    @property
    def told_factor(self) -> float:
        """What the row kernels' T^2 D is multiplied by where it is told."""
        return 1.0 if self.temperature_squared else 1.0 / self.temperature**2

    @property
    def has_dense_teacher(self) -> bool:
        """Whether the teacher has a logit for each of the student's."""
        return self.divergence is not None and self.tail is None

    @property
    def teacher_transform(self) -> LogitTransform:
        """What the teacher does to its head's output."""
        return LogitTransform(self.teacher_logit_scale, self.teacher_softcap)

    @cached_property
    def operand(self) -> torch.dtype | None:
        """The dtype that GEMM operands take under torch.autocast; None outside it."""
        return None if self.operand_dtype is None else getattr(torch, self.operand_dtype)

    def to_text(self) -> str:
        """All fields as one string, from which `from_text` makes the same options."""
        return literal(*(getattr(self, name) for name in _NAMES))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str) -> LossOptions:
        """The options that `to_text` wrote; the same object for the same text, so that nothing is checked twice."""
        return LossOptions(**dict(zip(_NAMES, ast.literal_eval(text), strict=True)))


_NAMES = tuple(field.name for field in fields(LossOptions))


def literal(*values: float | str | bool | None) -> str:
    """The values as the text of a tuple, which `ast.literal_eval` reads."""
    # torch.compile may hold a number for a symbol, which has no text; the member of a set is always a constant.
    names = {None: "None", True: "True", False: "False"}

    def text(value: float | str | bool | None) -> str:
        if isinstance(value, str):
            return f"'{value}'"
        return names[value] if value is None or isinstance(value, bool) else str(_plain([*{value}][0]))  # noqa: RUF015

    parts = [text(value) for value in values]
    return "(" + ", ".join(parts) + ",)"


def _plain(number: Any) -> int | float:
    """Any library's number as Python's own."""
    return int(number) if isinstance(number, Integral) else float(number)


def divergence_options(divergence: str | Divergence) -> dict[str, Any]:
    """A public `divergence` argument as `LossOptions` holds it."""
    parsed = Divergence.parse(divergence)
    return {"divergence": parsed.kind, "mixing": parsed.mixing}


def statistics_option(return_stats: bool | Literal["losses"]) -> str:
    """A public `return_stats` argument as `LossOptions.statistics`: the losses alone are there in any case, the rest costs time."""
    if not isinstance(return_stats, bool) and (not isinstance(return_stats, str) or return_stats != "losses"):
        raise ValueError(f"return_stats={return_stats!r} is not known; use True, False or 'losses'.")
    return {True: "all", False: "", "losses": "losses"}[return_stats]


def autocast_dtype(device: torch.device) -> str | None:
    """The name of the dtype that GEMM operands take under torch.autocast on `device`; None outside it."""
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if torch.is_autocast_enabled(device.type) else None
