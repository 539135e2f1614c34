"""The pass of projected_mse: the memory it takes, the products it makes, and what it never reads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd.ops.gemm import mm_
from tests.ops.test_projected_mse import MASK, NAMES, TOKENS, make_inputs, value_and_gradients

PROGRAM = """
import re, resource, sys, torch, fastkd
from pathlib import Path

LAYERS, TOKENS, WIDTH = 12, 4096, 512

def fused(states, weight, bias, target, target_weight):
    return fastkd.projected_mse(states, weight, target, target_weight, student_bias=bias)

def eager(states, weight, bias, target, target_weight):
    filtered = torch.nn.functional.linear(states, weight, bias)
    return torch.nn.functional.mse_loss(filtered, torch.nn.functional.linear(target, target_weight))

def step(loss, tokens, layers):
    teacher, teacher_weight = torch.randn(tokens, WIDTH), torch.randn(WIDTH, WIDTH)
    student = [torch.randn(tokens, WIDTH, requires_grad=True) for _ in range(layers)]
    filters = [(torch.randn(WIDTH, WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)) for _ in range(layers)]
    learned = [*student, *(x for pair in filters for x in pair)]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    sum(loss(states, *pair, teacher, teacher_weight) for states, pair in zip(student, filters)).backward()
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024  # unlike ru_maxrss not that of the process that started this one
    return peak - resident - sum(x.grad.nbytes for x in learned)

loss = {"fused": fused, "eager": eager}[sys.argv[1]]
step(loss, 64, 1)  # thread pools and GEMM workspaces exist from here on
print(step(loss, TOKENS, LAYERS) / 2**20)
"""


@pytest.fixture(autouse=True)
def backend():
    """No row kernel is involved: once is enough."""


def peak_megabytes(which: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM, which], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_peak_above_inputs_and_gradients_is_a_quarter_of_eagers_at_most():
    """Twelve layers alive until one backward: eager keeps two filtered states of 8 MB each, this op one chunk of 8 MB in all."""
    eager, fused = peak_megabytes("eager"), peak_megabytes("fused")
    assert fused > 8, f"{fused:.0f} MB is less than one chunk of the residual: the measurement is broken"
    assert fused <= eager / 4, f"{fused:.0f} MB above inputs and gradients; eager takes {eager:.0f} MB"


PRODUCTS = [
    pytest.param({}, NAMES, 4, id="all"),
    pytest.param({}, ["student_weight"], 3, id="weight"),
    pytest.param({}, ["student_states"], 3, id="states"),
    pytest.param({}, ["student_bias"], 2, id="bias"),
    pytest.param({}, [], 2, id="evaluation"),
    pytest.param({"teacher_weight": False}, NAMES, 3, id="no teacher filter"),
    pytest.param({"student_weight": False}, ["student_states"], 1, id="no student filter"),
    pytest.param({"student_weight": False, "teacher_weight": False}, ["student_states"], 0, id="no filter"),
]


@pytest.mark.parametrize(("sides", "names", "products"), PRODUCTS)
def test_what_is_frozen_makes_no_product(sides, names, products, monkeypatch):
    count = 0

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        return mm_(*arguments, **options)

    monkeypatch.setattr(sys.modules["fastkd.ops.projected_mse"], "mm_", counted)
    inputs = {name: x if x is None else x.detach().requires_grad_(name in names) for name, x in make_inputs(**sides).items()}
    loss = fastkd.projected_mse(**inputs, mask=MASK)
    if names:
        loss.backward()
    assert count == products


def test_what_is_masked_is_never_looked_at():
    inputs = make_inputs()
    with torch.no_grad():
        for name in ("student_states", "teacher_states"):
            inputs[name][~MASK] = torch.nan
    value, gradients = value_and_gradients(fastkd.projected_mse, inputs, mask=MASK)
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][~MASK] == 0).all()


@pytest.fixture
def poisoned_memory():
    """torch fills every fresh tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mask", [None, MASK, torch.zeros(TOKENS, dtype=torch.bool)], ids=["all rows", "mask", "nothing"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_fresh_memory_is_read(poisoned_memory, dtype, reduction, mask):
    assert torch.empty(3).isnan().all()
    value, gradients = value_and_gradients(fastkd.projected_mse, make_inputs(dtype), mask=mask, reduction=reduction, chunk_size=4)
    assert all(x.isfinite().all() for x in (value, *gradients))
