"""What every logit loss takes beside its tensors: validated before any work, packed into a `Problem`. Errors say what would do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import BACKENDS, row_kernel
from .chunked import LogitSource, Problem, StudentSource
from .divergence import Divergence
from .plan import plan_chunks
from .rows import LogitTransform, RowOptions

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, kw_only=True)
class LossArguments:
    """The keyword arguments shared by the logit losses; the public functions document them."""

    divergence: str | Divergence | None = None
    temperature: float = 1.0
    mask: Tensor | None = None
    labels: Tensor | None = None
    label_weight: float = 0.0
    ignore_index: int = -100
    student: LogitTransform = LogitTransform()
    teacher: LogitTransform = LogitTransform()
    reduction: str = "mean"
    denominator: float | Tensor | None = None
    chunk_size: int | None = None
    memory_budget: int | None = None
    backend: str = "auto"
    return_stats: bool = False

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        if not math.isfinite(self.label_weight) or self.label_weight < 0:
            raise ValueError(f"label_weight={self.label_weight} must be a finite number >= 0.")
        if self.label_weight > 0 and self.labels is None:
            raise ValueError(f"label_weight={self.label_weight} needs labels=; pass them or leave label_weight at 0.")
        for side, transform in (("student", self.student), ("teacher", self.teacher)):
            if transform.softcap is not None:
                _positive(f"{side}_softcap", transform.softcap)
            if not math.isfinite(transform.scale) or transform.scale == 0:
                raise ValueError(f"{side}_logit_scale={transform.scale} must be finite and not zero.")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not known; use one of {', '.join(map(repr, REDUCTIONS))}.")
        if self.denominator is not None:
            self._check_denominator(self.denominator)
        for name, count in (("chunk_size", self.chunk_size), ("memory_budget", self.memory_budget)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{name}={count!r} must be a whole number >= 1 ({'rows' if name == 'chunk_size' else 'bytes'}).")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is not known; use one of {', '.join(map(repr, BACKENDS))}.")

    def _check_denominator(self, denominator: float | Tensor) -> None:
        if self.reduction != "mean":
            raise ValueError(f"denominator replaces the mean's denominator, but reduction={self.reduction!r}; use reduction='mean'.")
        if isinstance(denominator, Tensor):
            if denominator.dim() != 0:
                raise ValueError(f"denominator has shape {tuple(denominator.shape)}; give a number or a 0-dim tensor.")
        elif not math.isfinite(denominator) or denominator < 0:
            raise ValueError(f"denominator={denominator} must be a finite number >= 0 (0 gives a loss of zero).")

    def valid_rows(self, leading: torch.Size, device: torch.device) -> Tensor | None:
        """Indices of the unmasked rows, (N_valid,) int64; None when all are."""
        if self.mask is None:
            return None
        mask = self.mask
        check_same_place("mask", mask, leading, device)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask has dtype {mask.dtype}; give torch.bool, or float weights >= 0.")
        if not mask.is_cuda and mask.is_floating_point() and not bool(((mask >= 0) & mask.isfinite()).all()):
            raise ValueError("mask holds negative or non-finite weights; float token weights must be finite and >= 0.")
        return mask.reshape(-1).nonzero()[:, 0]

    def problem(
        self,
        student: StudentSource,
        teacher: LogitSource | None,
        leading: torch.Size,
        vocabulary: int,
        valid: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Problem:
        """The validated call on its `valid` rows. `dtype` is the compute dtype: float32, or float64 for float64 inputs."""
        tokens = leading.numel() if valid is None else valid.numel()
        weight = torch.ones(tokens, dtype=dtype, device=device)
        if valid is not None and self.mask is not None and self.mask.is_floating_point():
            weight = self.mask.reshape(-1)[valid].to(dtype)
        scale = torch.ones((), dtype=dtype, device=device)
        if self.reduction == "mean":
            given = self.denominator
            total = weight.sum() if given is None else torch.as_tensor(given, dtype=dtype, device=device)
            scale = _inverse_or_zero(total)
        labels, label_weight = self._labels(leading, vocabulary, valid, weight, scale)
        options = RowOptions(
            divergence=None if teacher is None else Divergence.parse(self.divergence or "forward_kl"),
            temperature=self.temperature,
            student=self.student,
            teacher=self.teacher,
            stats=self.return_stats,
        )
        plan = plan_chunks(
            tokens,
            vocabulary,
            device=device,
            element_size=dtype.itemsize,
            logit_buffers=1 if teacher is None else 2,
            chunk_size=self.chunk_size,
            memory_budget=self.memory_budget,
        )
        per_token = self.reduction == "none"
        kernel = row_kernel(self.backend, device)
        return Problem(student, teacher, options, plan, kernel, dtype, device, weight, labels, label_weight, scale, per_token)

    def _labels(
        self, leading: torch.Size, vocabulary: int, valid: Tensor | None, weight: Tensor, scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels of the valid rows with -1 for "none", and their weights relative to `scale`."""
        if self.labels is None:
            return None, None
        labels = self.labels
        check_same_place("labels", labels, leading, weight.device)
        if labels.dtype != torch.int64:
            raise TypeError(f"labels has dtype {labels.dtype}; give torch.int64 ids (ignore_index={self.ignore_index} for none).")
        labels = labels.reshape(-1)
        labelled = labels != self.ignore_index
        if not labels.is_cuda:
            outside = (labelled & ((labels < 0) | (labels >= vocabulary))).nonzero()
            if outside.numel():
                row = int(outside[0, 0])
                raise ValueError(
                    f"labels holds {int(labels[row])} at row {row}, outside the vocabulary of {vocabulary}. Map the labels to the "
                    f"student's ids, or mark rows without one by ignore_index={self.ignore_index}."
                )
        labels = torch.where(labelled, labels, -1)
        if valid is not None:
            labels = labels[valid]
        if self.label_weight == 0:
            return labels, None
        label_weight = weight * (labels >= 0) * self.label_weight
        if self.reduction == "mean" and self.denominator is None:
            # Cross-entropy is averaged over its own tokens: undo the divergence's 1 / sum(weight), which `scale` applies to all.
            own_total = label_weight.sum() / self.label_weight
            label_weight = label_weight * (_inverse_or_zero(own_total) * _inverse_or_zero(scale))
        return labels, label_weight


def leading_shape(name: str, tensor: Tensor) -> torch.Size:
    """Check that `tensor` is a plain floating tensor of at least two dims; return all of its dims but the last."""
    check_plain(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs at least one leading dim: (..., features).")
    return tensor.shape[:-1]


def check_plain(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor.")
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        raise TypeError(
            f"{name} is a DTensor. Call the loss inside the head module's own forward, where FSDP has gathered the weight into a "
            "plain tensor, or pass tensor.full_tensor() with grad_placements=[Partial()]."
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; give a floating tensor.")


def check_same_place(name: str, tensor: Tensor, leading: torch.Size, device: torch.device) -> None:
    if tensor.shape != leading:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must match the leading dims {tuple(leading)}.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the student is on {device}; move it there.")


def check_vocab_index(vocab_index: Tensor | None, student_vocabulary: int, teacher_vocabulary: int) -> None:
    """The teacher row behind every student row; without it the same ids are meant, and a longer teacher is sliced."""
    if vocab_index is None:
        if teacher_vocabulary < student_vocabulary:
            raise ValueError(
                f"The student has {student_vocabulary} vocabulary rows and the teacher only {teacher_vocabulary}: student ids "
                "without a teacher row have no target. Pass vocab_index (the teacher row of every student row) or slice the student."
            )
        return
    if vocab_index.dtype != torch.int64 or vocab_index.shape != (student_vocabulary,):
        raise ValueError(
            f"vocab_index has dtype {vocab_index.dtype} and shape {tuple(vocab_index.shape)}; give torch.int64 of shape "
            f"({student_vocabulary},), one teacher row for every student row."
        )
    if (
        not vocab_index.is_cuda
        and vocab_index.numel()
        and not 0 <= int(vocab_index.min()) <= int(vocab_index.max()) < teacher_vocabulary
    ):
        raise ValueError(f"vocab_index reaches outside the teacher's {teacher_vocabulary} rows; give ids in [0, {teacher_vocabulary}).")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: logits are never rounded to 16 bits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _inverse_or_zero(total: Tensor) -> Tensor:
    return torch.where(total > 0, 1.0 / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a finite number > 0.")
