"""The student's logits at the ids that its teacher lists, and no others: of each token K products with rows of the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .backend_torch import chain_
from .checks import compute_dtype
from .gradient_in_forward import Results, pack, register, unpack
from .linear_logits import gradient_dtype, spread_gradients
from .options import LossOptions
from .plan import default_budget, slices
from .row_call import LogitTransform
from .token_weights import counted
from .topk_lists import read_lists


def listed_logits(
    student: Mapping[str, Tensor | None], ids: Tensor, log_probabilities: Tensor, mask: Tensor | None, options: LossOptions
) -> Tensor:
    """The logits (N, K) of the tokens that count, -inf where an entry is missing; zero of the others.

    In the compute dtype; gradients flow to the student.

    Args:
        student: "hidden" (N, H), "weight" (V, H) and "bias" (V,) or None.
        ids: (N, K) int64, -1 for no entry; checked here, with `log_probabilities` (N, K).
        log_probabilities: (N, K) the teacher's.
        mask: (N,) bool or float weights, or None.
        options: what the student does after its head, the operands' dtype, and how much may be alive.
    """
    constants = {"topk_ids": ids, "topk_logprobs": log_probabilities, "mask": mask}
    logits: Tensor
    logits, *_ = _operator(*pack(student, constants, options.to_text(), deferred=True))
    return logits


class GatheredRows:
    """The rows of a head that tokens list, gathered and upcast for a few tokens at a time.

    Args:
        student: "hidden" (N, H), "weight" (V, H) and, if there is one, "bias" (V,).
        ids: (n, K) rows of the weight for the tokens that count; below zero: none, whose product is zero.
        valid: (n,) the tokens that count; None: all.
        options: as for `listed_logits`.
    """

    def __init__(self, student: Mapping[str, Tensor], ids: Tensor, valid: Tensor | None, options: LossOptions) -> None:
        self.weight, self.bias, self.ids = student["weight"], student.get("bias"), ids
        hidden = student["hidden"]
        self.dtype, self.operand = compute_dtype(hidden), options.operand or self.weight.dtype
        self.hidden = (hidden if valid is None else hidden.index_select(0, valid)).to(self.operand).to(self.dtype)
        token_bytes = ids.shape[1] * hidden.shape[1] * self.dtype.itemsize
        budget = options.memory_budget or default_budget(hidden.device)
        self.tokens = options.chunk_size or max(1, budget // max(1, token_bytes))

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Which tokens, which of their entries are missing (c, K), the rows that they read (c K,), and these (c, K, H)."""
        for part in slices(0, len(self.ids), self.tokens):
            missing = self.ids[part] < 0
            index = self.ids[part].clamp_min(0).view(-1)
            rows = self.weight.index_select(0, index).to(self.operand).to(self.dtype)
            yield part, missing, index, rows.view(*missing.shape, self.weight.shape[1])

    def products(self) -> Tensor:
        """What the head's GEMM and bias would give at the ids, (n, K)."""
        out = torch.empty(self.ids.shape, dtype=self.dtype, device=self.ids.device)
        for part, missing, index, rows in self._parts():
            # Into what is there: torch.autocast lets such products be.
            torch.bmm(rows, self.hidden[part, :, None], out=out[part, :, None])
            if self.bias is not None:
                out[part] += self.bias.index_select(0, index).to(self.dtype).view(missing.shape)
            out[part].masked_fill_(missing, 0.0)
        return out

    def gradients(self, upstream: Tensor, needs_grad: Mapping[str, bool]) -> dict[str, Tensor]:
        """The gradients of hidden (n, H), weight and bias by name, of `products` times `upstream` (n, K); empty where not wanted."""
        shapes = {"hidden": self.hidden.shape, "weight": self.weight.shape, "bias": self.weight.shape[:1]}
        made = {
            name: torch.zeros(shape if needs_grad.get(name) else 0, dtype=self.dtype, device=upstream.device)
            for name, shape in shapes.items()
        }
        for part, missing, index, rows in self._parts():
            gradient = upstream[part].masked_fill(missing, 0.0)
            if needs_grad["hidden"]:
                torch.bmm(gradient[:, None], rows, out=made["hidden"][part, None])
            if needs_grad["weight"]:
                torch.mul(gradient[..., None], self.hidden[part, None], out=rows)
                made["weight"].index_add_(0, index, rows.flatten(0, 1))
            if needs_grad.get("bias"):
                made["bias"].index_add_(0, index, gradient.view(-1))
        return made


def finished(products: Tensor, ids: Tensor, transform: LogitTransform) -> Tensor:
    """The logits (n, K) of a head's products, -inf where an entry is missing."""
    return transform.apply(products).masked_fill(ids < 0, -torch.inf)


def _make(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    """The logits; or with their gradient `upstream` (N, K) the student's."""
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options = LossOptions.from_text(inputs.options)
    tokens, valid = len(constants[0]), counted(inputs.constants.get("mask"))
    lists = read_lists(inputs.constants, valid, inputs.student["weight"].shape[0], options)
    rows = GatheredRows(inputs.student, lists.ids, valid, options)
    transform = options.student_transform
    if upstream is None:
        logits = finished(rows.products(), lists.ids, transform)
        if valid is not None:
            logits = logits.new_zeros(tokens, logits.shape[1]).index_copy_(0, valid, logits)
        return logits, _nothing(logits), _nothing(logits), [_nothing(logits) for _ in student]
    gradient = upstream.clone() if valid is None else upstream.index_select(0, valid)
    # Only a soft-cap's slope is read off the logits.
    gradient = chain_(gradient, gradient if transform.softcap is None else transform.apply(rows.products()), transform)
    kept = gradient_dtype(rows.weight, rows.operand, rows.dtype)
    made = spread_gradients(rows.gradients(gradient, inputs.needs_grad), valid, tokens, kept)
    return _nothing(gradient), _nothing(gradient), _nothing(gradient), [made[name] for name in inputs.student]


def _fake(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options, hidden = LossOptions.from_text(inputs.options), inputs.student["hidden"]
    dtype = compute_dtype(hidden)
    kept = gradient_dtype(hidden, options.operand or hidden.dtype, dtype)
    gradients = [x.new_empty(x.shape if inputs.needs_grad[name] else 0, dtype=kept) for name, x in inputs.student.items()]
    logits = hidden.new_empty(constants[0].shape if upstream is None else 0, dtype=dtype)
    return logits, _nothing(logits), _nothing(logits), gradients


def _nothing(like: Tensor) -> Tensor:
    """An empty tensor; an operator's results may not share one."""
    return like.new_empty(0)


_operator = register("listed_logits", _make, _fake)
