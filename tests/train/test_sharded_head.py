"""However FSDP2 has wrapped the LM head, a loss that runs inside the head's own forward gives it the gradient of one process.

The table of wrappings is that of the study of peers: owned by the root, a unit of its own, in one unit with the final norm, tied to the
embedding. Reading the weight outside, by a bare `full_tensor()`, goes wrong without a word, which is why the ops refuse a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastkd.models.language_model import LossHead
from fastkd.ops.linear_kl import linear_kl_div
from tests.ranks import spawn

WIDTH, VOCABULARY, TOKENS = 8, 24, 12


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = LossHead(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, at_head: Callable[..., Tensor]) -> Tensor:
        self.head.at_head = at_head
        self.head(self.norm(self.body(self.embedding(ids)).tanh()))
        return self.head.result


def own_unit(model: Model) -> None:
    fully_shard(model.head, reshard_after_forward=False)


WRAPPINGS: dict[str, tuple[bool, Callable[[Model], object]]] = {
    "owned by the root": (False, lambda model: None),
    "own unit": (False, own_unit),
    "grouped with the final norm": (False, lambda model: fully_shard([model.norm, model.head], reshard_after_forward=False)),
    "tied, owned by the root": (True, lambda model: None),
}


def loss(model: nn.Module, rank: int, ranks: int, *, bare: bool = False) -> Tensor:
    """This rank's part of the mean over all tokens, of which rank 0 has a third."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    teacher, teacher_weight = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(VOCABULARY, WIDTH, generator=generator)
    own = slice(None) if ranks == 1 else (slice(0, 4), slice(4, None))[rank]

    def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_kl_div(hidden, weight, teacher[own], teacher_weight, denominator=TOKENS)  # type: ignore[return-value]

    if bare:
        hidden = model.norm(model.body(model.embedding(ids[own])).tanh())
        return at_head(hidden, model.head.weight.full_tensor(), None)
    return model(ids[own], at_head)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    whole = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()}
    return {name: gradient.double() for name, gradient in whole.items()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> float:
    return float((found[name] - expected[name]).norm() / expected[name].norm())


def work(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    with mesh:
        for name, (tied, wrap) in WRAPPINGS.items():
            alone = Model(tied=tied)
            loss(alone, 0, 1).backward()
            model = Model(tied=tied)
            wrap(model)
            fully_shard(model)
            (2 * loss(model, rank, 2)).backward()  # FSDP averages, and the sum is wanted
            expected, found = gradients(alone), gradients(model)
            for parameter in expected:
                assert error(found, expected, parameter) < 1e-6, (name, parameter, error(found, expected, parameter))


def silently_wrong(rank: int) -> None:
    alone, model = Model(tied=False), Model(tied=False)
    loss(alone, 0, 1).backward()
    fully_shard(model.head)
    (2 * loss(model, rank, 2, bare=True)).backward()
    assert error(gradients(model), gradients(alone), "head.weight") > 1e-2


def test_the_head_has_the_gradient_of_one_process_however_it_is_wrapped():
    spawn(work)


def test_a_bare_full_tensor_loses_the_other_ranks_gradients():
    """Should torch change this one day, the refusal of DTensors can go."""
    spawn(silently_wrong)
