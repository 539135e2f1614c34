"""The chunked pass as one torch operator with its derivative: opaque to `torch.compile`, so that no batch size is a constant.

With a linear head gradients are made in the forward pass and multiplied by the upstream gradient in the backward pass. Where the
logits are given, or where every token has an upstream gradient of its own (reduction="none"), the pass is made again in the backward
pass with that gradient in its row weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .arguments import LossOptions, compute_dtype
from .chunked import STATISTICS, LossStats, chunked_pass

_TYPES = {"torch.dtype | None": "ScalarType?"} | {
    name + tail: name + mark for name in ("str", "float", "int", "bool") for tail, mark in (("", ""), (" | None", "?"))
}
_SCALARS = tuple(field.name for field in fields(LossOptions))
_SCHEMA = (
    "(Tensor[] student, Tensor[] teacher, Tensor? vocab_index, Tensor? mask, Tensor? labels, Tensor? denominator, Tensor? upstream, "
    f"bool[] needs_grad, *, {', '.join(f'{_TYPES[str(field.type)]} {field.name}' for field in fields(LossOptions))}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])"
)


def chunked_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    options: LossOptions,
    leading: torch.Size,
    *,
    vocab_index: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    denominator: Tensor | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """What the public losses return, from arguments that they have checked and flattened (see `chunked_pass`).

    leading: the shape of per-token results.
    """
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in student]
    scalars = {name: getattr(options, name) for name in _SCALARS}
    loss: Tensor
    loss, _, statistics, _ = _operator(student, teacher, vocab_index, mask, labels, denominator, None, needs_grad, **scalars)
    if options.reduction == "none":
        loss = loss.view(leading)
    if not (options.return_stats or options.return_losses):
        return loss
    is_dense = options.return_stats and bool(teacher) and options.tail is None
    is_filtered = options.return_stats and options.grad_filter is not None
    known = (bool(teacher), labels is not None, is_dense, is_dense, is_dense, is_filtered, is_filtered)
    rows = statistics.detach().view(len(STATISTICS), *leading)
    return loss, LossStats(*(row if is_known else None for row, is_known in zip(rows, known, strict=True)))


def _is_deferred(student: Sequence[Tensor], reduction: str) -> bool:
    """Whether gradients are made in the backward pass only."""
    return len(student) == 1 or reduction == "none"


def _forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    vocab_index: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    **scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, `scale`, statistics, and gradients: without the upstream gradient unless it is given, and but for logits no `scale`."""
    options = LossOptions(**scalars)
    if upstream is None and _is_deferred(student, options.reduction):
        needs_grad = [False] * len(student)
    result = chunked_pass(student, teacher, vocab_index, mask, labels, denominator, upstream, needs_grad, options)
    return result.loss, result.scale, result.statistics, result.gradients


_operator = torch.library.custom_op("fastkd::chunked_loss", _forward, mutates_args=(), schema=_SCHEMA)


@_operator.register_fake
def _fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    vocab_index: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    *,
    reduction: str,
    **_scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dtype = compute_dtype(student[0], *teacher[:1])
    first, tokens = student[0], student[0].shape[0]
    makes = upstream is not None or not _is_deferred(student, reduction)
    gradients = [
        x.new_empty(x.shape if makes and wanted else 0, dtype=x.dtype if len(student) == 1 else dtype)
        for x, wanted in zip(student, needs_grad, strict=True)
    ]
    return (
        first.new_empty(tokens if reduction == "none" else (), dtype=dtype),
        first.new_empty((), dtype=dtype),
        first.new_empty(len(STATISTICS), tokens, dtype=dtype),
        gradients,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    student, teacher, *others, _upstream, needs_grad = inputs
    _, scale, _, gradients = output
    # Nobody differentiates the gradients: no zeros of their size are to be made for them.
    ctx.set_materialize_grads(False)
    ctx.needs_grad, ctx.dtypes, ctx.scalars = needs_grad, [x.dtype for x in student], keyword_only_inputs
    ctx.deferred = _is_deferred(student, keyword_only_inputs["reduction"])
    ctx.sizes = len(student), len(teacher)
    ctx.save_for_backward(*([*student, *teacher, *others] if ctx.deferred else [scale, *gradients]))


def _backward(ctx: Any, upstream: Tensor | None, *_others: Any) -> tuple[Any, ...]:
    students, teachers = ctx.sizes
    nothing = [None] * teachers, *[None] * 6
    if upstream is None:
        return [None] * students, *nothing
    if ctx.deferred:
        saved = ctx.saved_tensors
        student, teacher, others = saved[:students], saved[students : students + teachers], saved[students + teachers :]
        _, scale, _, made = _operator(list(student), list(teacher), *others, upstream.detach(), ctx.needs_grad, **ctx.scalars)
        return finished_gradients(ctx, made, None if students == 1 else scale), *nothing
    scale, *made = ctx.saved_tensors
    return finished_gradients(ctx, made, upstream * scale), *nothing


def finished_gradients(ctx: Any, made: Sequence[Tensor], factor: Tensor | None) -> list[Tensor | None]:
    """`made` times `factor` (None: they carry it) for the inputs that need gradients, each in its own dtype.

    In place where nobody will ask for `made` again. Under create_graph=True they refuse to be differentiated: as constants they would
    give wrong numbers silently.
    """
    in_place = ctx.deferred or not torch._C._autograd._get_current_graph_task_keep_graph()
    gradients: list[Tensor | None] = []
    for gradient, dtype, wanted in zip(made, ctx.dtypes, ctx.needs_grad, strict=True):
        if not wanted:
            gradients.append(None)
        elif factor is None:
            gradients.append(gradient.detach().to(dtype))
        elif gradient.dtype == dtype and in_place:
            gradients.append(gradient.detach().mul_(factor.detach()))
        else:
            gradients.append(torch.mul(gradient.detach(), factor.detach(), out=torch.empty_like(gradient, dtype=dtype)))
    if not torch.is_grad_enabled():
        return gradients
    refuse = torch._C._functions.DelayedError(
        "fastkd's losses make their gradients in the forward pass and cannot be differentiated twice. Take the plain function of the "
        "same name in fastkd.reference where a gradient of the gradient is needed.",
        1,
    )
    return [None if g is None else refuse(g.detach().requires_grad_()) for g in gradients]


_operator.register_autograd(_backward, setup_context=_setup)
