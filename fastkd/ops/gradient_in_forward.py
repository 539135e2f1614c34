"""Torch operators for losses that make their gradients in the forward pass; opaque to `torch.compile`, so that no size is a constant.

The backward pass multiplies them by the upstream gradient. A `deferred` call makes none: where every token has an upstream gradient of
its own, or where gradients are as large as the inputs, the pass is made again in the backward pass with that gradient in its weights.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Registered by hand: torch.library.custom_op imports torch._dynamo at the first call, which takes 3 s and 150 MB.
_library: Any = torch.library.Library("fastkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = (
    "(Tensor[] student, Tensor[] constants, Tensor? upstream, bool[] needs_grad, str call) "
    "-> (Tensor loss, Tensor scale, Tensor statistics, Tensor[] gradients)"
)


@dataclass(frozen=True)
class Inputs:
    """What a pass is given: tensors by name, those of the student, which may need gradients, and the rest."""

    student: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    needs_grad: Mapping[str, bool]
    """Whether the pass is to make the gradient of each of the student's tensors."""
    upstream: Tensor | None
    """The loss's gradient, () or one a token; None: not known yet, or no gradient is made."""
    options: str
    """As the loss's public function wrote them."""

    @property
    def makes_gradients(self) -> bool:
        """Whether the pass makes any gradient."""
        return any(self.needs_grad.values())


Arguments = tuple[list[Tensor], list[Tensor], Tensor | None, list[bool], str]
"""What the operators take."""
Results = tuple[Tensor, Tensor, Tensor, list[Tensor]]
"""The loss; a scale; statistics; and gradients in the order of the student's tensors, empty where none is wanted.

Gradients carry the upstream gradient if it was given, and are to be multiplied by the scale: (), or empty where they carry it too.
"""


@dataclass(frozen=True)
class _Call:
    student: tuple[str, ...]
    constants: tuple[str, ...]
    deferred: bool
    options: str


@lru_cache(maxsize=256)
def _parse(call: str) -> _Call:
    return _Call(*ast.literal_eval(call))


def register(name: str, make: Callable[..., Results], fake: Callable[..., Results]) -> Any:
    """Register the operator `fastkd::name` with its derivative, and return it.

    Args:
        name: of the operator.
        make: the pass over real tensors, from the operator's arguments, of which `unpack` makes `Inputs`.
        fake: the same with uninitialised results of the same shapes and dtypes, for `torch.compile`.
    """
    _library.define(name + _SCHEMA)
    _library.impl(name, make, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fastkd, name)

    def backward(ctx: Any, upstream: Tensor | None, *_others: Any) -> tuple[Any, ...]:
        students, constants = ctx.sizes
        nothing = [None] * constants, None, None, None
        if upstream is None:
            return [None] * students, *nothing
        if torch._C._functorch.is_legacy_batchedtensor(upstream) or torch._C._functorch.is_functorch_wrapped_tensor(upstream):
            raise NotImplementedError(
                "fastkd's losses do not go backward for many upstream gradients at once (is_grads_batched=True, vectorize=True, "
                "torch.vmap). Take one after another, or the plain function of the same name in fastkd.reference."
            )
        if ctx.deferred:
            saved = list(ctx.saved_tensors)
            _, scale, _, made = operator(saved[:students], saved[students:], upstream.detach(), ctx.needs_grad, ctx.call)
            factor = scale if scale.numel() else None
        else:
            scale, *made = ctx.saved_tensors
            factor = upstream.detach() * scale
        return finish_gradients(ctx, made, factor), *nothing

    torch.library.register_autograd(f"fastkd::{name}", backward, setup_context=_setup, lib=_library)
    return operator


def pack(student: Mapping[str, Tensor | None], constants: Mapping[str, Tensor | None], options: str, *, deferred: bool) -> Arguments:
    """An operator's arguments, of the tensors that are not None."""
    learned = {name: x for name, x in student.items() if x is not None}
    given = {name: x for name, x in constants.items() if x is not None}
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in learned.values()]
    call = repr((tuple(learned), tuple(given), deferred, options))
    return list(learned.values()), list(given.values()), None, needs_grad, call


def unpack(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Inputs:
    """What `pack` was given, and which gradients are to be made now."""
    parsed = _parse(call)
    makes = upstream is not None or not parsed.deferred
    return Inputs(
        dict(zip(parsed.student, student, strict=True)),
        dict(zip(parsed.constants, constants, strict=True)),
        {name: makes and needed for name, needed in zip(parsed.student, needs_grad, strict=True)},
        upstream,
        parsed.options,
    )


def _setup(ctx: Any, inputs: Arguments, output: Results) -> None:
    student, constants, _, needs_grad, call = inputs
    _, scale, _, gradients = output
    # Nobody differentiates the gradients: no zeros of their size are to be made for them.
    ctx.set_materialize_grads(False)
    ctx.needs_grad, ctx.call, ctx.dtypes = needs_grad, call, [x.dtype for x in student]
    ctx.deferred, ctx.sizes = _parse(call).deferred, (len(student), len(constants))
    ctx.save_for_backward(*([*student, *constants] if ctx.deferred else [scale, *gradients]))


def finish_gradients(ctx: Any, made: Sequence[Tensor], factor: Tensor | None) -> list[Tensor | None]:
    """Multiply `made` by `factor`, () or None for one, for the inputs that need gradients, each in its own dtype.

    In place where nobody will ask for `made` again. Under create_graph=True they refuse to be differentiated: as constants they would
    give wrong numbers silently.
    """
    in_place = ctx.deferred or not torch._C._autograd._get_current_graph_task_keep_graph()
    if factor is not None:
        # On a GPU a factor of no dims would be rounded to a 16-bit gradient's dtype before the product.
        factor = factor.detach().view(1) if factor.is_cuda else factor.detach()
    gradients: list[Tensor | None] = []
    for gradient, dtype, wanted in zip(made, ctx.dtypes, ctx.needs_grad, strict=True):
        if not wanted:
            gradients.append(None)
        elif factor is None:
            gradients.append(gradient.detach().to(dtype))
        elif gradient.dtype == dtype and in_place:
            gradients.append(gradient.detach().mul_(factor))
        else:
            gradients.append(torch.mul(gradient.detach(), factor, out=torch.empty_like(gradient, dtype=dtype)))
    if not torch.is_grad_enabled():
        return gradients
    refuse = torch._C._functions.DelayedError(
        "fastkd's losses make their gradients in the forward pass and cannot be differentiated twice. Take the plain function of the "
        "same name in fastkd.reference where a gradient of the gradient is needed.",
        1,
    )
    return [None if g is None else refuse(g.detach().requires_grad_()) for g in gradients]
