"""The first forward and backward of an op load nothing heavy: no compiler, no symbolic algebra."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
before = set(sys.modules)
import fastkd
head, states = torch.randn(50, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
teacher = torch.randn(50, 8)
calls = {
    "linear_kl_div": lambda: fastkd.linear_kl_div(states, head, torch.randn(2, 5, 8), teacher, mask=torch.rand(2, 5) > 0.2),
    "kl_div": lambda: fastkd.kl_div(states @ head.T, torch.randn(2, 5, 50), reduction="none").sum(),
    "topk_kl_div": lambda: fastkd.topk_kl_div(states, head, torch.zeros(2, 5, 1).long(), -torch.ones(2, 5, 1), tail="zero"),
    "linear_cross_entropy": lambda: fastkd.linear_cross_entropy(states, head, torch.zeros(2, 5).long()),
    "projected_mse": lambda: fastkd.projected_mse(states, head, torch.randn(2, 5, 50), None),
    "relation_kl": lambda: fastkd.relation_kl(*[states.view(1, 2, 5, 8)] * 2, *[torch.randn(1, 2, 5, 8)] * 2),
}
calls[sys.argv[1]]().backward()
heavy = {"sympy", "triton", "transformers", "torch._dynamo", "torch._inductor", "torch._functorch"}
print(sorted(name for name in set(sys.modules) - before if name in heavy))
"""


@pytest.fixture(autouse=True)
def backend():
    """Once, with the backend that "auto" takes."""


@pytest.mark.parametrize("op", ["linear_kl_div", "kl_div", "topk_kl_div", "linear_cross_entropy", "projected_mse", "relation_kl"])
def test_the_first_call_loads_no_compiler(op):
    done = subprocess.run([sys.executable, "-c", PROGRAM, op], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
