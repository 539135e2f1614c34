"""`relation_kl`: divergence between the relations (attention-like softmaxes) of two models, without any of their S x S matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_number, check_plain, check_teacher, check_tensor
from .gradient_in_forward import pack
from .options import LossOptions
from .relation_pass import RelationOptions, relation_pass

FORMS = ("kl", "cross_entropy")


@dataclass(frozen=True, eq=False)
class RelationTarget:
    """A relation that the student's is drawn to, and how strongly."""

    q: Tensor
    """(B, heads, S, d), the student's shape but for d. No gradient ever flows to it."""
    k: Tensor
    """(B, heads, S, d); it may be the tensor `q`. No gradient ever flows to it."""
    weight: float | Tensor = 1.0
    """A finite number >= 0 that multiplies this target's term. A tensor of shape () where it changes from step to step under
    torch.compile, which takes a number for a constant."""
    key_mask: Tensor | None = None
    """(B, S) bool, True = keep. Masked keys are left out of both softmaxes of this term, the student's too."""
    query_mask: Tensor | None = None
    """(B, S) bool, True = keep: the query rows that count for this target, beside the call's query_mask. The mean is over the rows that
    the call's keeps, whatever this one says."""


def relation_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor | None,
    teacher_k: Tensor | None,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    targets: Sequence[RelationTarget] = (),
    form: str = "kl",
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(softmax(q_t k_t^T / sqrt(d_t)) || softmax(q_s k_s^T / sqrt(d_s))) over keys for every query row, reduced over heads and rows.

    The relations of MiniLM (arXiv:2002.10957, 2012.15828) and CR-ILD (arXiv:2302.01530). A tile of query rows of both models exists
    at a time; the gradients are made with it in the forward pass: two GEMMs for the student's, one for the scores of each model.

    Args:
        student_q: (B, heads, S, d_s), any floating dtype.
        student_k: (B, heads, S, d_s). The tensor `student_q` again is its relation with itself (QQ, KK, VV), whose gradient is
            two-sided: (G + G^T) x / sqrt(d_s), with G that of the softmax's input.
        teacher_q: (B, heads, S, d_t): with teacher_k the first target, of weight 1. None for both: `targets` alone.
        teacher_k: (B, heads, S, d_t). No gradient ever flows to the teacher.
        key_mask: (B, S) bool, True = keep: the teacher's. Masked keys are left out of both softmaxes, the student's too; where a row
            has no key left, it adds zero to the loss and to all gradients.
        query_mask: (B, S) bool, True = keep: the query rows that count, for every target.
        targets: `RelationTarget`s: more targets of the same student relation, each with its own weight and masks. The loss is the sum
            of all terms, and one pass makes it: the student's scores are computed once.
        form: "kl", or "cross_entropy": KL plus the target's entropy, with the same gradient.
        reduction: "mean" over heads and unmasked query rows, "sum", or "none" (one value per row, (B, heads, S), zero where masked).
        chunk_size: query rows of a tile, counted over heads; None: planned.
        memory_budget: bytes of tiles that may be alive, in place of chunk_size; None: planned.
        backend: "auto" or a backend's name. "triton" has no tiles in memory, short of float64 and of head sizes above 128.

    Returns:
        The loss, () or with reduction="none" (B, heads, S), in float32 (float64 if any input is), in which scores and gradients are
        made too, under torch.autocast as well. Gradients come back in each input's own dtype. No rows, or all masked: exact zeros with
        the graph connected.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    named = _named_targets(teacher_q, teacher_k, key_mask, targets)
    _check_pair("student_", student_q, student_k)
    for prefix, target in named.items():
        _check_target(prefix, target, student_q)
    _check_mask("query_mask", query_mask, student_q)
    check_choice("form", form, FORMS)
    LossOptions(reduction=reduction, chunk_size=chunk_size, memory_budget=memory_budget, backend=backend)  # refuses what is not known
    constants = {
        "query_mask": query_mask,
        "weights": torch.stack([_weight(prefix, target.weight, student_q.device) for prefix, target in named.items()]),
    }
    for index, target in enumerate(named.values()):
        fields = {"q": target.q, "k": target.k, "key_mask": target.key_mask, "query_mask": target.query_mask}
        constants |= {f"{index}.{name}": tensor for name, tensor in fields.items()}
    options = RelationOptions(len(named), form, reduction, chunk_size, memory_budget, backend)
    student = {"q": student_q, "k": student_k}
    loss: Tensor
    loss, _, _, _ = relation_pass(*pack(student, constants, options.to_text(), deferred=reduction == "none"))
    return loss


class RelationKLLoss(torch.nn.Module):
    """Module form of `relation_kl`: options at construction, tensors (and per-batch masks and targets) at the call.

    Args:
        options: keyword arguments of `relation_kl`, checked when the module is called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, student_q: Tensor, student_k: Tensor, teacher_q: Tensor | None, teacher_k: Tensor | None, **per_batch: Any
    ) -> Tensor:
        """`relation_kl` of these tensors, with the module's options and those of this call, which come first.

        Args:
            student_q: (B, heads, S, d_s).
            student_k: (B, heads, S, d_s).
            teacher_q: (B, heads, S, d_t) or None.
            teacher_k: (B, heads, S, d_t) or None.
            per_batch: keyword arguments of `relation_kl`: key_mask (B, S), query_mask (B, S), targets and others.

        Returns:
            What `relation_kl` does.
        """
        return relation_kl(student_q, student_k, teacher_q, teacher_k, **{**self.options, **per_batch})

    def extra_repr(self) -> str:
        """The options, as the module's repr shows them."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _named_targets(
    teacher_q: Tensor | None, teacher_k: Tensor | None, key_mask: Tensor | None, targets: Sequence[RelationTarget]
) -> dict[str, RelationTarget]:
    """All targets, the teacher first, under what their arguments' names begin with."""
    if not isinstance(targets, (list, tuple)):
        raise TypeError(f"targets is a {type(targets).__name__}; give a list of fastkd.RelationTarget.")
    named = {}
    if teacher_q is not None and teacher_k is not None:
        named["teacher_"] = RelationTarget(teacher_q, teacher_k, key_mask=key_mask)
    elif teacher_q is not None or teacher_k is not None:
        missing = "teacher_q" if teacher_q is None else "teacher_k"
        raise ValueError(f"{missing} is None and its counterpart is not; give both (one tensor may be both), or neither with targets=.")
    elif key_mask is not None:
        raise ValueError("key_mask is the teacher's, and there is no teacher_q and teacher_k; give the targets their own key_mask.")
    elif not targets:
        raise ValueError("There is nothing to compare with: give teacher_q and teacher_k, or targets=[RelationTarget(...)].")
    for index, target in enumerate(targets):
        if not isinstance(target, RelationTarget):
            raise TypeError(f"targets[{index}] is a {type(target).__name__}; give a fastkd.RelationTarget(q, k, weight).")
        named[f"targets[{index}]."] = target
    return named


def _check_pair(prefix: str, q: Tensor, k: Tensor) -> None:
    for name, tensor in ((f"{prefix}q", q), (f"{prefix}k", k)):
        check_plain(name, tensor)
        if tensor.dim() != 4 or tensor.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (batch, heads, sequence, head size), head size >= 1.")
    if k.shape != q.shape:
        raise ValueError(
            f"{prefix}k has shape {tuple(k.shape)} and {prefix}q {tuple(q.shape)}; they must be the same. Repeat grouped keys so that "
            "every query head has its own."
        )
    if k.device != q.device:
        raise ValueError(f"{prefix}k is on {k.device} and {prefix}q on {q.device}; move them together.")


def _check_target(prefix: str, target: RelationTarget, student_q: Tensor) -> None:
    _check_pair(prefix, target.q, target.k)
    check_teacher(f"{prefix}q", target.q)
    check_teacher(f"{prefix}k", target.k)
    for axis, what in enumerate(("batch size", "number of heads", "sequence length")):
        given, needed = target.q.shape[axis], student_q.shape[axis]
        if given != needed:
            raise ValueError(
                f"{prefix}q has {what} {given} and student_q {needed} (shapes {tuple(target.q.shape)} and {tuple(student_q.shape)}); "
                "relations are compared head by head and row by row. Where only the heads differ, split the width of both models into "
                "one number of heads."
            )
    if target.q.device != student_q.device:
        raise ValueError(f"{prefix}q is on {target.q.device} and student_q on {student_q.device}; move them together.")
    _check_mask(f"{prefix}key_mask".removeprefix("teacher_"), target.key_mask, student_q)
    _check_mask(f"{prefix}query_mask", target.query_mask, student_q)


def _check_mask(name: str, mask: Tensor | None, student_q: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise TypeError(
            f"{name} has {given}; give a torch.bool tensor, True = keep (an attention mask of ones and zeros: mask.bool())."
        )
    check_tensor(name, mask)
    batch, _, length, _ = student_q.shape
    if mask.shape != (batch, length):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; it must be (batch, sequence) = {(batch, length)}.")
    if mask.device != student_q.device:
        raise ValueError(f"{name} is on {mask.device} and the student is on {student_q.device}; move it there.")


def _weight(prefix: str, weight: float | Tensor, device: torch.device) -> Tensor:
    """As a 0-dim tensor on `device`, made there without a copy from the host; a tensor's value is checked in the pass."""
    if isinstance(weight, Tensor):
        check_tensor(f"{prefix}weight", weight)
        if weight.dim() != 0 or weight.dtype == torch.bool or weight.is_complex():
            raise ValueError(
                f"{prefix}weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; give a number, or one in a 0-dim tensor."
            )
        return weight.detach().to(device, torch.float64)
    check_number(f"{prefix}weight", weight, may_be_zero=True)
    return torch.full((), weight, dtype=torch.float64, device=device)
