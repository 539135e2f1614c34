"""`projected_mse`: the mean squared distance between two models' filtered states, without the filtered states (TED, arXiv:2210.01351).

A chunk of residuals at a time is squared, reduced and turned into the student's gradients in cache. The residual of two filtered states
is one product, [H_s | H_t] [W_s | -W_t]^T: neither it nor a filtered state is ever kept. Masked tokens are packed out chunk by chunk;
their number is read from the device once, and while a CUDA graph is captured, where nothing can be read, they stay in with weight zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_plain, check_teacher, check_token_tensors, check_token_values, compute_dtype, leading_shape
from .gemm import mm_, multiplies
from .gradient_in_forward import Results, pack, register, unpack
from .options import LossOptions, autocast_dtype
from .plan import KNEE_TOKENS, Plan, plan_chunks
from .token_weights import TokenWeights, token_weights

# Bytes of residual in a chunk, unless that is fewer tokens than the weight gradient's knee: what a cache holds.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}


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
    mask, _ = check_token_tensors(leading, device, options, mask, None)
    student = {"states": student_states.reshape(-1, student_states.shape[-1]), "weight": student_weight, "bias": student_bias}
    constants = {
        "teacher_states": teacher_states.reshape(-1, teacher_states.shape[-1]),
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "mask": mask,
    }
    loss: Tensor
    loss, _, _, _ = _operator(*pack(student, constants, options.to_text(), deferred=reduction == "none"))
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


def _make(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options, learned, given = LossOptions.from_text(inputs.options), inputs.student, inputs.constants
    states, teacher_states, mask = learned["states"], given["teacher_states"], given.get("mask")
    weight, teacher_weight = learned.get("weight"), given.get("teacher_weight")
    tokens, width = states.shape[0], states.shape[1] if weight is None else weight.shape[0]
    check_token_values(options, width, mask, None)
    dtype = compute_dtype(states, teacher_states)
    weights = token_weights(options, tokens, dtype, states.device, mask, None, None)
    plan = _plan(weights.token.numel(), width, states.device, dtype, options)
    token, peak = _gradient_weights(weights, mask, inputs.upstream)
    own = _Side(states, weight, weights.valid, dtype, options.operand)
    other = _Side(teacher_states, None if teacher_weight is None else -teacher_weight, weights.valid, dtype, options.operand)
    bias, teacher_bias = learned.get("bias"), given.get("teacher_bias")
    biases = [x.to(dtype) for x in (bias, None if teacher_bias is None else -teacher_bias) if x is not None]
    shift = torch.stack(biases).sum(0) if biases else None
    made = {
        name: states.new_empty(x.shape if inputs.needs_grad[name] else 0, dtype=_gradient_dtype(name, x, dtype))
        for name, x in learned.items()
    }
    sink = _Gradients(own, made, inputs.needs_grad, plan, dtype)
    buffer = states.new_empty(plan.backward_tokens, width, dtype=dtype)
    values = states.new_empty(plan.tokens, dtype=dtype)
    for chunk in plan.backward_chunks():
        residual = buffer[: chunk.stop - chunk.start]
        own_states, other_states = own.states_of(chunk), other.states_of(chunk)
        if own.weight is None:
            residual.copy_(own_states)
        else:
            mm_(residual, own_states, own.weight.T)
        if other.weight is None:
            residual.sub_(other_states)
        else:
            mm_(residual, other_states, other.weight.T, accumulate=True)
        if shift is not None:
            residual.add_(shift)
        torch.linalg.vector_norm(residual, dim=1, out=values[chunk])
        if inputs.makes_gradients:
            sink.collect(chunk, residual if token is None else residual.mul_(token[chunk, None]), own_states)
    total = weights.token * values.square_() / width
    loss = weights.spread(total, tokens) if options.reduction == "none" else total.sum() * weights.scale
    return loss, weights.scale * peak * (2 / width), states.new_empty(0, dtype=dtype), list(made.values())


def _fake(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options, states = LossOptions.from_text(inputs.options), inputs.student["states"]
    dtype = compute_dtype(states, inputs.constants["teacher_states"])
    made = [
        x.new_empty(x.shape if inputs.needs_grad[name] else 0, dtype=_gradient_dtype(name, x, dtype))
        for name, x in inputs.student.items()
    ]
    loss = states.new_empty(states.shape[0] if options.reduction == "none" else (), dtype=dtype)
    return loss, states.new_empty((), dtype=dtype), states.new_empty(0, dtype=dtype), made


_operator = register("projected_mse", _make, _fake)


def _gradient_dtype(name: str, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """That of the states' gradient is their own, for it lives until the backward pass; else the compute dtype.

    But not float16: not yet divided by the number of tokens, the gradient may be out of its range.
    """
    return x.dtype if name == "states" and x.dtype != torch.float16 else dtype


class _Side:
    """One model's states (N, d) and weight (d_f, d), None for the identity, a few rows at a time and as GEMMs take them."""

    def __init__(
        self, states: Tensor, weight: Tensor | None, valid: Tensor | None, dtype: torch.dtype, operand: torch.dtype | None
    ) -> None:
        self.states, self.valid = states, valid
        self.operand_dtype = operand or states.dtype
        self.gemm_dtype = self.operand_dtype if multiplies(self.operand_dtype, dtype, states.device) else dtype
        self.weight = None if weight is None else self._operand(weight)

    def states_of(self, chunk: slice) -> Tensor:
        """The states of these of the tokens that count, (tokens, d)."""
        states = self.states[chunk] if self.valid is None else self.states.index_select(0, self.valid[chunk])
        return states if self.weight is None else self._operand(states)

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self.operand_dtype).to(self.gemm_dtype)


class _Gradients:
    """The student's gradients of sum_i token_i |r_i|^2 / 2, from residuals r_i that were multiplied by token_i."""

    def __init__(
        self, student: _Side, made: Mapping[str, Tensor], needs_grad: Mapping[str, bool], plan: Plan, dtype: torch.dtype
    ) -> None:
        self.student = student
        nothing = made["states"].new_empty(0)
        self.states, self.weight, self.bias = made["states"], made.get("weight", nothing), made.get("bias", nothing)
        self.wants_states, self.wants_weight, self.wants_bias = (needs_grad.get(name, False) for name in ("states", "weight", "bias"))
        self.bias.zero_()
        if student.valid is not None:
            self.states.zero_()
        if not plan.tokens:
            self.weight.zero_()
        # Where products can be written to their place at once, they are.
        self.product: Tensor | None = None
        if student.valid is not None or self.states.dtype != dtype:
            tokens = plan.backward_tokens if self.wants_states and student.weight is not None else 0
            self.product = self.states.new_empty(tokens, student.states.shape[1], dtype=dtype)

    def collect(self, chunk: slice, residual: Tensor, inputs: Tensor) -> None:
        """Add what `chunk` gives, whose states are `inputs`. The first chunk writes the weight's gradient, later ones add."""
        weight = self.student.weight
        if self.wants_bias:
            self.bias += residual.sum(0)
        if weight is None:
            if self.wants_states:
                self._store(chunk, residual)
            return
        operand = residual.to(weight.dtype)
        if self.wants_weight:
            mm_(self.weight, operand.T, inputs, accumulate=chunk.start > 0)
        if not self.wants_states:
            return
        if self.product is None:
            mm_(self.states[chunk], operand, weight)
        else:
            product = self.product[: residual.shape[0]]
            mm_(product, operand, weight)
            self._store(chunk, product)

    def _store(self, chunk: slice, gradient: Tensor) -> None:
        if self.student.valid is None:
            self.states[chunk].copy_(gradient)
        else:
            self.states.index_copy_(0, self.student.valid[chunk], gradient.to(self.states.dtype))


def _gradient_weights(weights: TokenWeights, mask: Tensor | None, upstream: Tensor | None) -> tuple[Tensor | None, float | Tensor]:
    """What residuals are multiplied by, (n,), or None where that is one, and what is left for the end.

    The former is of order one, so that a weighted residual of 16 bits does not underflow.
    """
    is_packed = weights.valid is not None and mask is not None and mask.dtype == torch.bool
    if upstream is None and (mask is None or is_packed):
        return None, 1.0
    token = weights.token
    if upstream is not None:
        upstream = upstream.to(token.dtype)
        token = token * (upstream if weights.valid is None else upstream[weights.valid])
    if not token.numel():
        return token, 1.0
    peak = token.abs().amax().clamp_min(torch.finfo(token.dtype).tiny)
    return token / peak, peak


def _plan(tokens: int, width: int, device: torch.device, dtype: torch.dtype, options: LossOptions) -> Plan:
    default = max(_CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"]), KNEE_TOKENS * width * dtype.itemsize)
    return plan_chunks(
        tokens,
        width,
        element_size=dtype.itemsize,
        has_teacher=False,
        chunk_size=options.chunk_size,
        memory_budget=options.memory_budget or default,
    )


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
