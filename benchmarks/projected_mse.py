"""Claim: `projected_mse` is exact, takes a quarter of eager torch's memory at most, and no more time.

A step of twelve layers, the loss summed over them, with gradients to the student's states, weights and biases, every implementation in
one run: time interleaved, peak memory above inputs and gradients each on its own, relative L2 error of the value and of all gradients
against float64. Eager torch filters the states of all layers first, as TED's own code does, and keeps them until the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.ops.plan import plan_chunks

from .claim import Settings, main
from .eager import EAGER, Implementation, Outcome, beside_eager, worst_errors
from .implementations import COMPILED, FLOOR

FEW_TOKENS = 512
"""Tokens of which errors are judged, and after which thread pools and workspaces exist."""
NAMES = ("states", "weight", "bias")


class Shape(NamedTuple):
    layers: int
    tokens: int
    student_width: int
    teacher_width: int
    filtered_width: int


class Layer(NamedTuple):
    """The first three take gradients."""

    student_states: Tensor  # (N, H_s)
    student_weight: Tensor  # (d_f, H_s)
    student_bias: Tensor  # (d_f,)
    teacher_states: Tensor  # (N, H_t)
    teacher_weight: Tensor  # (d_f, H_t)
    teacher_bias: Tensor  # (d_f,)


def measure(settings: Settings) -> dict[str, Any]:
    full = Shape(12, 8192, 1024, 1024, 1024)
    shape = settings.choose(cpu=full, cuda=full, smoke=Shape(3, 40, 8, 12, 16))
    dtype = settings.choose(cpu=torch.float32, cuda=torch.bfloat16, smoke=torch.float32)
    judged_shape = shape._replace(tokens=min(FEW_TOKENS, shape.tokens))
    judged = make_inputs(judged_shape, dtype, settings.device)
    results, left_out = beside_eager(
        settings,
        implementations(compiles=not settings.smoke),
        partial(build, shape=shape, dtype=dtype, device=settings.device),
        make_inputs(shape, dtype, settings.device),
        partial(worst_errors, ("value", *NAMES * shape.layers), judged, exact(judged)),
    )
    return {
        "shape": shape._asdict(),
        "judged_shape": judged_shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "results": results,
        "left_out": left_out,
    }


def implementations(*, compiles: bool = True) -> dict[str, Implementation]:
    """The floor first. `compiles`: torch.compile among them."""
    found: dict[str, Implementation] = {FLOOR: gemms_alone, EAGER: partial(with_gradients, eager)}
    if compiles:
        found[COMPILED] = partial(with_gradients, torch.compile(eager, dynamic=False))
    return found | {"fastkd": partial(with_gradients, partial(layer_by_layer, fastkd.projected_mse))}


def gemms_alone(layers: list[Layer]) -> Outcome:
    """The four dense products of a layer, in chunks, and in a buffer made once. The "gradients" are those of no loss: the teacher's
    filtered states stand for the residual.
    """
    with torch.no_grad():
        (tokens, _), width = layers[0].student_states.shape, len(layers[0].student_weight)
        plan = plan_chunks(tokens, width, device=layers[0].student_states.device, has_teacher=False)
        buffer = layers[0].student_states.new_empty(plan.backward_tokens, width)
        gradients = []
        for states, weight, _, teacher_states, teacher_weight, _ in layers:
            grad_states, grad_weight = torch.empty_like(states), torch.empty_like(weight)
            for rows in plan.backward_chunks():
                residual = buffer[: rows.stop - rows.start]
                torch.mm(states[rows], weight.T, out=residual)
                torch.mm(teacher_states[rows], teacher_weight.T, out=residual)
                torch.mm(residual, weight, out=grad_states[rows])
                grad_weight.addmm_(residual.T, states[rows], beta=1 if rows.start else 0)
            gradients += [grad_states, grad_weight]
    return None, *gradients


def with_gradients(loss: Callable[[list[Layer]], Tensor], layers: list[Layer]) -> Outcome:
    """`loss` of all layers, forward and backward."""
    value = loss(layers)
    return value.detach(), *torch.autograd.grad(value, [x for layer in layers for x in layer[: len(NAMES)]])


def eager(layers: list[Layer]) -> Tensor:
    """What one writes first: the filtered states of both models, then their distances."""
    filtered = [F.linear(layer.student_states, layer.student_weight, layer.student_bias) for layer in layers]
    targets = [F.linear(layer.teacher_states, layer.teacher_weight, layer.teacher_bias) for layer in layers]
    return torch.stack([F.mse_loss(x, y) for x, y in zip(filtered, targets, strict=True)]).sum()


def layer_by_layer(loss: Callable[..., Tensor], layers: list[Layer]) -> Tensor:
    """The sum of `loss`, which is `projected_mse` or its reference."""
    values = [
        loss(
            layer.student_states,
            layer.student_weight,
            layer.teacher_states,
            layer.teacher_weight,
            student_bias=layer.student_bias,
            teacher_bias=layer.teacher_bias,
        )
        for layer in layers
    ]
    return torch.stack(values).sum()


def exact(layers: list[Layer]) -> Outcome:
    """In float64, by the reference."""
    raised = [Layer(*(x.detach().double().requires_grad_(x.requires_grad) for x in layer)) for layer in layers]
    return with_gradients(partial(layer_by_layer, fastkd.reference.projected_mse), raised)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """Filtered states of order one; teacher and student have nothing in common, which no timing depends on."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).mul_(scale).to(dtype)

    def side(width: int, learned: bool) -> list[Tensor]:
        weight = normal(shape.filtered_width, width, scale=width**-0.5)
        return [x.requires_grad_(learned) for x in (normal(shape.tokens, width), weight, normal(shape.filtered_width))]

    return [Layer(*side(shape.student_width, learned=True), *side(shape.teacher_width, learned=False)) for _ in range(shape.layers)]


def build(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Outcome], Callable[[], Outcome]]:
    run = implementations(compiles=name == COMPILED)[name]
    layers = make_inputs(shape, dtype, device)
    # torch.compile compiles for each shape, which is not to be part of the step.
    few = layers if name == COMPILED else make_inputs(shape._replace(tokens=min(FEW_TOKENS, shape.tokens)), dtype, device)
    return partial(run, few), partial(run, layers)


if __name__ == "__main__":
    sys.exit(main("projected_mse"))
