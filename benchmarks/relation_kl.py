"""Claim: `relation_kl` is exact, takes a tenth of eager torch's memory at most, and no more time.

Forward and backward of the QK relation's divergence from one target and from three weighted ones, all with masked keys, every
implementation in one run: time interleaved, peak memory above inputs and gradients each on its own, relative L2 error of the value and
of both gradients against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.ops.plan import default_budget

from .claim import Settings, main
from .eager import EAGER, Implementation, Outcome, beside_eager, worst_errors
from .implementations import COMPILED, FLOOR, live_backends

NAMES = ("value", "q", "k")
TARGET_WEIGHTS = ((1.0,), (1.0, 0.7, 0.3))
FEW_ROWS = 128
JUDGED_HEADS = 2
"""Errors are those of all keys, but of fewer heads: float64 scores of all of them would fill the memory."""
TILE_BYTES = 16 << 20
"""Bytes of the floor's scores on a CPU, to stay in its cache."""


class Shape(NamedTuple):
    batch: int
    heads: int
    length: int
    head_size: int


class Inputs(NamedTuple):
    """The first two take gradients."""

    q: Tensor  # (B, heads, S, d)
    k: Tensor  # (B, heads, S, d)
    targets: tuple[fastkd.RelationTarget, ...]


def measure(settings: Settings) -> dict[str, Any]:
    shape = settings.choose(cpu=Shape(2, 12, 2048, 64), cuda=Shape(2, 12, 2048, 64), smoke=Shape(2, 3, 24, 8))
    judged_shape = shape._replace(heads=min(JUDGED_HEADS, shape.heads))
    found, left_out = implementations(settings.device, compiles=not settings.smoke)
    results = []
    for weights in TARGET_WEIGHTS:
        judged = make_inputs(judged_shape, weights, settings.device)
        rows, failed = beside_eager(
            settings,
            found,
            partial(build, shape=shape, weights=weights, device=settings.device),
            make_inputs(shape, weights, settings.device),
            partial(worst_errors, NAMES, judged, exact(judged)),
        )
        results += [{"targets": len(weights), **row} for row in rows]
        left_out |= {f"{name}, targets: {len(weights)}": reason for name, reason in failed.items()}
    return {
        "shape": shape._asdict(),
        "judged_shape": judged_shape._asdict(),
        "dtype": "float32",
        "target_weights": TARGET_WEIGHTS,
        "results": results,
        "left_out": left_out,
    }


def implementations(device: torch.device, *, compiles: bool = True) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Those that this machine has, the floor first; and why each of the others is left out. `compiles`: torch.compile among them."""
    eager = fastkd.reference.relation_kl
    found: dict[str, Implementation] = {FLOOR: gemms_alone, EAGER: partial(with_gradients, eager)}
    if compiles:
        found[COMPILED] = partial(with_gradients, torch.compile(eager, dynamic=False))
    backends, unavailable = live_backends(device)
    found |= {f"fastkd {name}": partial(with_gradients, partial(fastkd.relation_kl, backend=name)) for name in backends}
    return found, {f"fastkd {name}": reason for name, reason in unavailable.items()}


def gemms_alone(inputs: Inputs) -> Outcome:
    """The dense products: scores of the student and of every target, two of the student's gradients; a tile at a time, in buffers made
    once. The "gradients" are those of no loss: scores stand for their gradient.
    """
    with torch.no_grad():
        q, k = (x.flatten(0, 1) for x in (inputs.q, inputs.k))
        others = [(target.q.flatten(0, 1), target.k.flatten(0, 1)) for target in inputs.targets]
        pairs, length, _ = q.shape
        budget = default_budget(q.device) if q.is_cuda else TILE_BYTES
        fitting = max(1, budget // (2 * length * q.itemsize))
        group_pairs, block_rows = min(pairs, max(1, fitting // length)), min(length, fitting)
        scores, other = q.new_empty(2, group_pairs, block_rows, length)
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for group in (slice(start, min(start + group_pairs, pairs)) for start in range(0, pairs, group_pairs)):
            for block in (slice(start, min(start + block_rows, length)) for start in range(0, length, block_rows)):
                tile = slice(group.stop - group.start), slice(block.stop - block.start)
                scores[tile].baddbmm_(q[group, block], k[group].mT, beta=0)
                for other_q, other_k in others:
                    other[tile].baddbmm_(other_q[group, block], other_k[group].mT, beta=0)
                grad_q[group, block].baddbmm_(scores[tile], k[group], beta=0)
                grad_k[group].baddbmm_(scores[tile].mT, q[group, block], beta=1 if block.start else 0)
    return None, grad_q, grad_k


def with_gradients(loss: Callable[..., Tensor], inputs: Inputs) -> Outcome:
    """`loss` of the inputs, forward and backward."""
    value = loss(inputs.q, inputs.k, None, None, targets=inputs.targets)
    return value.detach(), *torch.autograd.grad(value, (inputs.q, inputs.k))


def exact(inputs: Inputs) -> Outcome:
    """In float64, by the reference."""
    q, k = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k))
    targets = tuple(replace(target, q=target.q.double(), k=target.k.double()) for target in inputs.targets)
    return with_gradients(fastkd.reference.relation_kl, Inputs(q, k, targets))


def make_inputs(shape: Shape, weights: Sequence[float], device: torch.device) -> Inputs:
    """Scores of order one and about a nat to the target, one for each of `weights`. Some keys are padding, others for each target."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k = normal().requires_grad_(), normal().requires_grad_()
    kept = torch.linspace(shape.length, shape.length // 2, shape.batch, device=device)
    position = torch.arange(shape.length, device=device)
    targets = [
        fastkd.RelationTarget(normal(), normal(), weight, key_mask=position < kept.roll(index)[:, None])
        for index, weight in enumerate(weights)
    ]
    return Inputs(q, k, tuple(targets))


def build(
    name: str, shape: Shape, weights: Sequence[float], device: torch.device
) -> tuple[Callable[[], Outcome], Callable[[], Outcome]]:
    run = implementations(device, compiles=name == COMPILED)[0][name]
    inputs = make_inputs(shape, weights, device)
    # torch.compile compiles for each shape, which is not to be part of the step.
    few = inputs if name == COMPILED else make_inputs(shape._replace(length=min(FEW_ROWS, shape.length)), weights, device)
    return partial(run, few), partial(run, inputs)


if __name__ == "__main__":
    sys.exit(main("relation_kl"))
