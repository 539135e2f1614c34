"""relation_kl's pass as one operator: its derivatives, compiled whole for any length, and its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd import RelationTarget
from fastkd.ops.relation_pass import RelationOptions
from tests.ops.test_relation_kl import (
    KEY_MASK,
    MASKS,
    NAMES,
    QUERY_MASK,
    REDUCTIONS,
    make_inputs,
    make_targets,
    normal,
    value_and_gradients,
)
from tests.oracle import assert_close


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused_clearly(reduction):
    inputs = make_inputs()
    loss = fastkd.relation_kl(**inputs, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, inputs["student_k"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_under_retain_graph(reduction):
    inputs = make_inputs()
    loss = -3.5 * fastkd.relation_kl(**inputs, reduction=reduction).sum()
    first = torch.autograd.grad(loss, [inputs[n] for n in NAMES], retain_graph=True)
    second = torch.autograd.grad(loss, [inputs[n] for n in NAMES])
    truth = value_and_gradients(fastkd.reference.relation_kl, inputs, reduction=reduction)[1]
    for one, two, exact in zip(first, second, truth, strict=True):
        assert torch.equal(one, two)
        assert_close(one, -3.5 * exact, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", NAMES)
def test_only_what_needs_a_gradient_gets_one(trained, reduction):
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    truth = value_and_gradients(fastkd.reference.relation_kl, make_inputs(), reduction=reduction)[1]
    inputs[trained].requires_grad_()
    loss = fastkd.relation_kl(**inputs, reduction=reduction)
    assert_close(torch.autograd.grad(loss.sum(), inputs[trained])[0], truth[NAMES.index(trained)], 1e-11)
    with torch.no_grad():
        assert torch.equal(fastkd.relation_kl(**inputs, reduction=reduction), loss.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_and_only_once_for_every_length(reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q, k, teacher, clean, mask, weight):
        targets = [RelationTarget(clean, clean, weight, mask), RelationTarget(clean, teacher[..., :4], 1 - weight, query_mask=~mask)]
        return fastkd.relation_kl(q, k, teacher, teacher, query_mask=mask, targets=targets, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((3, 11), (2, 16), (5, 30), (4, 5)):
        q, k, clean = (normal(batch, 2, length, 4, seed=seed).requires_grad_(seed < 2) for seed in range(3))
        arguments = (q, k, normal(batch, 2, length, 6, seed=4), clean, torch.rand(batch, length) > 0.3, torch.rand(()))
        expected, value = loss(*arguments), compiled(*arguments)
        assert_close(value, expected, 1e-12)
        truth = torch.autograd.grad(expected.sum(), [q, k])
        for gradient, true_gradient in zip(torch.autograd.grad(value.sum(), [q, k]), truth, strict=True):
            assert_close(gradient, true_gradient, 1e-12)
        if length == 11:
            first = counter.frame_count
    assert counter.frame_count == first


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_shapes_and_dtypes_that_are_promised_to_the_compiler_are_kept(reduction):
    inputs = make_inputs(torch.bfloat16)
    pair = {"q": inputs["teacher_q"], "k": inputs["teacher_k"]}
    targets = [pair | {"key_mask": KEY_MASK}, pair | {"query_mask": QUERY_MASK.flip(0)}]
    constants = {f"{index}.{name}": x for index, target in enumerate(targets) for name, x in target.items()}
    constants |= {"query_mask": QUERY_MASK, "weights": torch.ones(2, dtype=torch.float64)}
    call = repr((("q", "k"), tuple(constants), reduction == "none", RelationOptions(2, "kl", reduction, 5, None, "auto").to_text()))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = [inputs[n] for n in NAMES], list(constants.values()), None, [True, True], call
    torch.library.opcheck(torch.ops.fastkd.relation_kl.default, arguments, test_utils=checks)


@pytest.fixture
def poisoned_memory():
    """torch fills every fresh tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_fresh_memory_is_read(poisoned_memory, dtype, reduction):
    assert torch.empty(3).isnan().all()
    options = {**MASKS["both masks"], "targets": make_targets(dtype), "chunk_size": 4, "reduction": reduction, "form": "cross_entropy"}
    value, gradients = value_and_gradients(fastkd.relation_kl, make_inputs(dtype), **options)
    assert all(x.isfinite().all() for x in (value, *gradients))


PROGRAM = """
import torch, fastkd
from torch.nn.functional import kl_div, log_softmax, softmax
torch.manual_seed(0)

def eager(q, k, teacher_q, teacher_k):
    log_q, p = log_softmax(q @ k.mT / 8, -1), softmax(teacher_q @ teacher_k.mT / 8, -1)
    return kl_div(log_q, p, reduction="sum") / (q.numel() // 64)

def fused(*tensors):
    return fastkd.relation_kl(*tensors, backend="{backend}")

q, k, teacher_q, teacher_k = (torch.randn(2, 12, 2048, 64) for _ in range(4))
tensors = q.requires_grad_(), k.requires_grad_(), teacher_q, teacher_k
small = {loss}(*(x[:, :, :64] for x in tensors))   # thread pools and GEMM workspaces exist from here on
torch.autograd.grad(small, [q, k]); del small
resident = int(open("/proc/self/statm").read().split()[1]) * 4
open("/proc/self/clear_refs", "w").write("5")   # the peak counts from here; getrusage's begins with the parent's
{loss}(*tensors).backward()
print((int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) - resident) / 1024)
"""


def peak_megabytes(loss: str, backend: str = "auto") -> float:
    """Above the inputs, both gradients (25 MB) among it, in a process of its own."""
    program = PROGRAM.replace("{loss}", loss).replace("{backend}", backend)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.fixture(scope="module")
def eager_megabytes() -> float:
    return peak_megabytes("eager")


def test_peak_memory_is_a_tenth_of_eagers(eager_megabytes, backend):
    assert eager_megabytes > 3 * 24 * 2048 * 2048 * 4 / 2**20, "eager holds three S x S tensors at least: the measurement is broken"
    megabytes = peak_megabytes("fused", backend)
    assert 24 < megabytes < eager_megabytes / 10, f"{megabytes:.0f} MB against eager's {eager_megabytes:.0f}"
