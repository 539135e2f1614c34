"""The pass itself: what it allocates, and that its loop allocates nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd.ops.options import LossOptions
from fastkd.ops.token_weights import token_weights
from tests.ops.test_linear_kl import MASK, NAMES, make_inputs


class Allocations(TorchDispatchMode):
    """Counts the operations that return memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        fresh = [r for r in returns if r.alias_info is None and str(r.type) == "Tensor"]
        self.count += bool(fresh)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all rows", "masked"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loop_allocates_nothing(dtype, needs, mask, backend):
    if backend == "torch":
        pytest.skip("The torch row kernel is the reference: it takes temporaries of a block.")
    inputs = make_inputs(dtype=dtype)
    for name, needed in zip(NAMES, needs, strict=True):
        inputs[name] = inputs[name].detach().requires_grad_(needed)
    counts = []
    for chunk_size in (12, 2):
        with Allocations() as allocations:
            fastkd.linear_kl_div(**inputs, mask=mask, chunk_size=chunk_size)
        counts.append(allocations.count)
    assert counts[0] == counts[1]


def test_a_denominator_that_could_not_be_read_shows_in_the_loss():
    """On a GPU, where its value is not looked at."""
    for value, scale in ((float("nan"), float("nan")), (4.0, 0.25), (0.0, 0.0)):
        denominator = torch.tensor(value, dtype=torch.float64)
        weights = token_weights(LossOptions(), 3, torch.float32, torch.device("cpu"), None, None, denominator)
        torch.testing.assert_close(weights.scale, torch.tensor(scale), equal_nan=True)
