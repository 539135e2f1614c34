"""`projected_mse`: the mean squared distance between two models' filtered states, without the filtered states (TED, arXiv:2210.01351).

Gradients are made in the forward pass and multiplied by the upstream gradient in the backward pass. With reduction="none", where every
token has an upstream gradient of its own, the pass is made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import LossOptions, check_plain, check_row_tensors, check_teacher, compute_dtype, leading_shape
from .linear_logits import autocast_dtype
from .operator import finished_gradients
from .residual import empty_gradients, residual_pass

_SCHEMA = (
    "(Tensor student_states, Tensor? student_weight, Tensor? student_bias, Tensor teacher_states, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? mask, Tensor? upstream, bool[] needs_grad, *, str reduction, int? chunk_size, int? memory_budget, "
    "ScalarType? operand_dtype) -> (Tensor, Tensor, Tensor[])"
)


def projected_mse(
    student_states: Tensor,
    student_weight: Tensor | None,
    teacher_states: Tensor,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """mean_f (h_s W_s^T + b_s - h_t W_t^T - b_t)_f^2 per token, reduced over tokens (TED, arXiv:2210.01351).

    Args:
        student_states: (..., d_s), any leading dims.
        student_weight: (d_f, d_s) filter, outside autocast in the dtype of `student_states`; None: the identity, with d_f = d_s.
        teacher_states: (..., d_t), same leading dims. No gradient ever flows to the teacher's states, weight and bias.
        teacher_weight: (d_f, d_t); None: the identity, with d_f = d_t.
        student_bias: (d_f,).
        teacher_bias: (d_f,).
        mask: (...) bool, or float token weights >= 0; masked rows are packed out before any GEMM.
        reduction: "mean" over the unmasked weight, "sum" over tokens, or "none" (one value per token in the shape of the leading dims).
        chunk_size: rows of the residual that are made at a time; None: as much as a cache holds.
        memory_budget: bytes of the residual that may be alive, in place of chunk_size.

    Returns:
        The loss, () or with reduction="none" (...), in float32 (float64 for float64 states). Gradients accumulate in that dtype and
        come back in each input's own. No tokens, or all masked: exact zeros with the graph connected.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    leading, width = _check_side("student", student_states, student_weight, student_bias)
    teacher_leading, teacher_width = _check_side("teacher", teacher_states, teacher_weight, teacher_bias)
    if teacher_leading != leading:
        raise ValueError(
            f"student_states has leading dims {tuple(leading)} and teacher_states {tuple(teacher_leading)}; "
            "both models must have seen the same tokens."
        )
    if teacher_width != width:
        raise ValueError(
            f"The student's side is {width} wide and the teacher's {teacher_width}; give weights with equally many rows "
            "(without a weight a side is as wide as its states)."
        )
    device = student_states.device
    if teacher_states.device != device:
        raise ValueError(f"teacher_states is on {teacher_states.device} and student_states on {device}; move them together.")
    options = LossOptions(reduction=reduction, chunk_size=chunk_size, memory_budget=memory_budget, operand_dtype=autocast_dtype(device))
    mask, _ = check_row_tensors(leading, device, options, mask, None)
    student = (student_states, student_weight, student_bias)
    loss: Tensor
    loss, _, _ = _operator(
        student_states.reshape(-1, student_states.shape[-1]),
        student_weight,
        student_bias,
        teacher_states.reshape(-1, teacher_states.shape[-1]),
        teacher_weight,
        teacher_bias,
        mask,
        None,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student],
        reduction=reduction,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        operand_dtype=options.operand_dtype,
    )
    return loss.view(leading) if reduction == "none" else loss


def _check_side(side: str, states: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[torch.Size, int]:
    """Check that states (..., d), weight (d_f, d) and bias (d_f,) belong together; return the leading dims and d_f."""
    leading, width = leading_shape(f"{side}_states", states), states.shape[-1]
    if weight is not None:
        check_plain(f"{side}_weight", weight)
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"{side}_weight has shape {tuple(weight.shape)} and {side}_states has width {width}; the weight must be (d_f, {width})."
            )
        if weight.dtype != states.dtype and autocast_dtype(states.device) is None:
            raise TypeError(
                f"{side}_states has dtype {states.dtype} and {side}_weight {weight.dtype}; cast one of them, or call under "
                "torch.autocast."
            )
        width = weight.shape[0]
    if width == 0:
        raise ValueError(f"The {side}'s side is 0 wide; there is nothing to compare. Give states, or a weight, with features.")
    if bias is not None:
        check_plain(f"{side}_bias", bias)
        if bias.shape != (width,):
            raise ValueError(f"{side}_bias has shape {tuple(bias.shape)}; it must be ({width},), one value a filtered feature.")
    for name, tensor in (("states", states), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != states.device:
            raise ValueError(f"{side}_{name} is on {tensor.device} and {side}_states on {states.device}; move them together.")
        if side == "teacher":
            check_teacher(f"{side}_{name}", tensor)
    return leading, width


def _forward(
    student_states: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_states: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    **scalars: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, `factor`, and gradients that lack `factor`, and the upstream gradient unless it is given."""
    options = LossOptions(**scalars)
    if upstream is None and options.reduction == "none":
        needs_grad = [False] * 3
    student, teacher = (student_states, student_weight, student_bias), (teacher_states, teacher_weight, teacher_bias)
    return residual_pass(student, teacher, mask, upstream, needs_grad, options)


_operator = torch.library.custom_op("fastkd::projected_mse", _forward, mutates_args=(), schema=_SCHEMA)


@_operator.register_fake
def _fake(
    student_states: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_states: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor | None,
    needs_grad: Sequence[bool],
    *,
    reduction: str,
    **_scalars: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = compute_dtype(student_states, teacher_states)
    if upstream is None and reduction == "none":
        needs_grad = [False] * 3
    return (
        student_states.new_empty(student_states.shape[0] if reduction == "none" else (), dtype=dtype),
        student_states.new_empty((), dtype=dtype),
        empty_gradients((student_states, student_weight, student_bias), needs_grad, dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    *tensors, _upstream, needs_grad = inputs
    _, factor, gradients = output
    # Nobody differentiates the gradients: no zeros of their size are to be made for them.
    ctx.set_materialize_grads(False)
    ctx.needs_grad, ctx.scalars = needs_grad, keyword_only_inputs
    ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
    ctx.deferred = keyword_only_inputs["reduction"] == "none"
    ctx.save_for_backward(*(tensors if ctx.deferred else [factor, *gradients]))


def _backward(ctx: Any, upstream: Tensor | None, *_others: Any) -> tuple[Any, ...]:
    nothing = [None] * 6
    if upstream is None:
        return None, None, None, *nothing
    if ctx.deferred:
        _, factor, made = _operator(*ctx.saved_tensors, upstream, ctx.needs_grad, **ctx.scalars)
    else:
        factor, *made = ctx.saved_tensors
        factor = upstream * factor
    # On a GPU a factor of no dims would be rounded to a 16-bit gradient's dtype before the product.
    return *finished_gradients(ctx, made, factor.view(1) if factor.is_cuda else factor), *nothing


_operator.register_autograd(_backward, setup_context=_setup)


def projected_mse_reference(
    student_states: Tensor,
    student_weight: Tensor | None,
    teacher_states: Tensor,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The same value by plain torch and autograd, all rows at once, in the inputs' dtype: the oracle in float64.

    `chunk_size` and `memory_budget` are taken so that the call is the same, and change nothing.
    """

    def filtered(states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        states = states if weight is None else states @ weight.T
        return states if bias is None else states + bias

    target = filtered(teacher_states, teacher_weight, teacher_bias).detach()
    values = (filtered(student_states, student_weight, student_bias) - target).square().mean(-1)
    weight = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    if reduction == "none":
        return weight * values
    total = (weight * values).sum()
    return total if reduction == "sum" else total / weight.sum().clamp_min(torch.finfo(values.dtype).tiny)


class ProjectedMSELoss(torch.nn.Module):
    """Module form of `projected_mse`: options at construction, tensors (and a batch's mask and biases) at the call.

    Args:
        options: keyword arguments of `projected_mse`, checked when the module is called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_states: Tensor,
        student_weight: Tensor | None,
        teacher_states: Tensor,
        teacher_weight: Tensor | None,
        **per_batch: Any,
    ) -> Tensor:
        """`projected_mse` of these tensors, with the module's options and those of this call, which come first.

        Args:
            student_states: (..., d_s).
            student_weight: (d_f, d_s), or None for the identity.
            teacher_states: (..., d_t).
            teacher_weight: (d_f, d_t), or None for the identity.
            per_batch: keyword arguments of `projected_mse`: mask (...), biases (d_f,) and others.

        Returns:
            What `projected_mse` does.
        """
        return projected_mse(student_states, student_weight, teacher_states, teacher_weight, **{**self.options, **per_batch})

    def extra_repr(self) -> str:
        """The options, as the module's repr shows them."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
