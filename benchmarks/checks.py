"""Is a backend right on this machine? Against float64, and what a GPU alone can show: no host sync, graph capture, memory.

They are the tests' questions asked where the tests do not run; `benchmarks/gpu.py` asks them before it times anything.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.ops.backend_torch import GPU_BLOCK_ELEMENTS
from fastkd.ops.backends import MODULES
from fastkd.ops.plan import Plan, plan_chunks
from fastkd.ops.row_check import CallKind
from fastkd.ops.row_check import check as check_rows
from fastkd.ops.selfcheck import Problem, check_ops

from .claim import Settings
from .implementations import fused, with_gradients
from .memory import peak_bytes
from .problem import GPU_SHAPES, Inputs, Outcome, Shape, close_pair, exact, make_inputs, relative_error
from .row_kernel import DIVERGENCES, production_call

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""Relative L2 error of a gradient; in bfloat16 that of storing it."""
CLOSE = (4e-4, 4e-3, 3e-2)
CLOSE_FLOAT32 = 1e-3
"""Where a float32 gradient is what a cancellation of logits leaves: 1.4e-4 was seen at 3.6e-4 nats, of every implementation."""
VOCABULARIES = (1000, 50_257, 50_304)
_TORCH_BLOCK_BYTES = 48 * GPU_BLOCK_ELEMENTS
"""Bytes of the torch backend's temporaries: a dozen float32 arrays of a block."""
Check = Callable[[], str]
"""Raises if something is wrong; returns what was seen."""


def run_checks(settings: Settings, backend: str) -> Iterator[dict[str, Any]]:
    """All checks of `backend`, whichever fails: the name of each, whether it passed, and what it saw."""
    for name, check in _checks(settings, backend):
        try:
            passed, seen = True, check()
        except Exception as error:  # a broken kernel must not hide what is right
            traceback.print_exc()
            passed, seen = False, f"{type(error).__name__}: {error}"
        yield {"check": f"{backend}, {name}", "passed": passed, "seen": seen}


def _checks(settings: Settings, backend: str) -> Iterator[tuple[str, Check]]:
    device = settings.device
    shape = settings.choose(cpu=Shape(512, 5003, 64, 96), cuda=Shape(1536, 50_257, 256, 384), smoke=Shape(24, 301, 16, 24))
    for dtype in TOLERANCE:
        for target in CLOSE:
            yield f"{dtype}, gradients at {target:g} nats", partial(close_gradients, backend, target, shape, dtype, settings)
    for divergence in DIVERGENCES:
        yield f"{divergence} with every option", partial(every_option, backend, divergence, shape, settings)
    for vocabulary in settings.choose(cpu=VOCABULARIES, cuda=VOCABULARIES, smoke=VOCABULARIES[:1]):
        for dtype in TOLERANCE:
            yield f"all ops, {dtype}, V = {vocabulary}", partial(all_ops, backend, vocabulary, dtype)
    if backend != "torch":  # whose arithmetic in float64 is the others' truth
        for name, kind in row_kinds(backend, device):
            yield f"rows in frames, {name}", partial(framed_rows, backend, kind, device)
    if device.type == "cuda":
        yield "no host sync", partial(no_host_sync, backend, shape, settings)
        yield "CUDA graph", partial(cuda_graph, backend, shape, settings)
        for large in GPU_SHAPES:
            yield f"peak memory, {large}", partial(peak_memory, backend, large, device)


def all_ops(backend: str, vocabulary: int, dtype: torch.dtype) -> str:
    """Value and gradients of every public op that `backend` serves, as `fastkd doctor` checks them."""
    name = str(dtype).removeprefix("torch.")
    problem = Problem(vocabulary=vocabulary, student_hidden=64, teacher_hidden=96, dtype=name, temperature=2.0, tokens=64)
    checks = list(check_ops(problem, [backend]))
    failed = [f"{check.op}: {check.failure or {key: check.errors[key] for key in check.wrong}}" for check in checks if not check.passed]
    if failed:
        raise AssertionError("; ".join(failed))
    return f"{', '.join(check.op for check in checks)}: relative error at most {max(max(c.errors.values()) for c in checks):.1e}"


def row_kinds(backend: str, device: torch.device) -> Iterator[tuple[str, CallKind]]:
    """Calls with everything of every divergence, of a top-k teacher, and with 16-bit logits, of vocabularies that 16 divides or not."""
    for vocabulary in (4096, 4113):
        side = "16 divides V" if vocabulary % 16 == 0 else "16 does not divide V"
        for divergence in DIVERGENCES:
            plain = CallKind.of(production_call(1, vocabulary, divergence, device))
            everything: dict[str, Any] = dict.fromkeys(("labels", "label_gradient", "student_bias", "teacher_bias", "statistics"), True)
            yield f"{divergence} with everything, {side}", replace(plain, **everything)
            if backend == "triton":
                yield f"{divergence} from a top-k teacher, {side}", replace(plain, tail="bucket", entries=64)
        plain = CallKind.of(production_call(1, vocabulary, "forward_kl", device))
        yield f"16-bit logits, {side}", replace(plain, student="bfloat16", teacher="bfloat16", gradient="bfloat16", in_place=False)


def framed_rows(backend: str, kind: CallKind, device: torch.device) -> str:
    """Every output of a row kernel, and nothing written outside of its rows."""
    wrong = check_rows(MODULES[backend].run, kind, device)
    if wrong:
        raise AssertionError(wrong)
    return "right"


def close_gradients(backend: str, target: float, shape: Shape, dtype: torch.dtype, settings: Settings) -> str:
    """Both gradients where student and teacher are close."""
    pair = close_pair(target, shape, dtype, settings.device)
    tolerance = CLOSE_FLOAT32 if dtype == torch.float32 else TOLERANCE[dtype]
    return compare(with_gradients(partial(fused, backend=backend), pair)[1:], exact(pair)[1:], tolerance)


def every_option(backend: str, divergence: str, shape: Shape, settings: Settings) -> str:
    """Loss and gradients with biases, soft-caps, scale, temperature, labels and a mask together, against the reference on the CPU."""
    inputs = make_inputs(shape._replace(tokens=max(8, shape.tokens // 8)), torch.float32, settings.device)
    tokens, vocabulary = len(inputs.student), len(inputs.head)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "student_bias": torch.randn(vocabulary, generator=generator),
        "teacher_bias": torch.randn(vocabulary, generator=generator),
        "mask": torch.rand(tokens, generator=generator) < 0.7,
        "labels": torch.randint(vocabulary, (tokens,), generator=generator),
    }
    numbers: dict[str, Any] = {
        "divergence": divergence,
        "temperature": 2.0,
        "label_weight": 0.3,
        "student_softcap": 20.0,
        "teacher_softcap": 30.0,
        "student_logit_scale": 0.7,
    }
    on_device = {name: x.to(settings.device) for name, x in tensors.items()}
    made = with_gradients(partial(fused, backend=backend, chunk_size=max(3, tokens // 3), **on_device, **numbers), inputs)
    wide = Inputs(*(x.detach().cpu().double() for x in inputs))
    wide.student.requires_grad_(), wide.head.requires_grad_()
    exactly = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    truth = with_gradients(partial(_reference, **exactly, **numbers), wide)
    return compare(made, truth, TOLERANCE[torch.float32])


def no_host_sync(backend: str, shape: Shape, settings: Settings) -> str:
    """Forward and backward never wait for the device."""
    inputs = make_inputs(shape, torch.bfloat16, settings.device)
    step = partial(with_gradients, partial(fused, backend=backend), inputs)
    step()  # compilers and libraries may wait the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def cuda_graph(backend: str, shape: Shape, settings: Settings) -> str:
    """Captured once and replayed on other inputs, forward and backward give what a plain call gives."""
    inputs = make_inputs(shape, torch.bfloat16, settings.device)
    step = partial(with_gradients, partial(fused, backend=backend), inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs.student.copy_(inputs.student.roll(1, 0) * 0.5)
    graph.replay()
    return compare(captured, [None if x is None else x.double() for x in step()], 1e-3)


def peak_memory(backend: str, shape: Shape, device: torch.device) -> str:
    """Above inputs and gradients at most what the plan says: its buffers, and a float32 dW where several chunks add to it."""
    peak = peak_bytes(device, build, backend, shape, device)
    plan = training_plan(shape, device)
    sums = 4 * shape.student_width * shape.vocabulary if plan.chunks > 1 else 0
    temporaries = _TORCH_BLOCK_BYTES if backend == "torch" else 0
    limit = 1.05 * (plan.buffer_bytes + sums + temporaries) + (64 << 20)
    seen = f"{peak / 1e6:.0f} MB, at most {limit / 1e6:.0f} MB is right: {plan}"
    if peak > limit:
        raise AssertionError(seen)
    return seen


def training_plan(shape: Shape, device: torch.device, chunk_size: int | None = None) -> Plan:
    """The plan of `linear_kl_div` for bfloat16 tensors that all take gradients."""
    size = 2 if device.type == "cuda" else 4
    return plan_chunks(
        shape.tokens,
        shape.vocabulary,
        device=device,
        gradient_size=size,
        hidden_size=shape.student_width,
        chunk_size=chunk_size,
    )


def build(backend: str, shape: Shape, device: torch.device) -> tuple[Callable[[], Outcome], Callable[[], Outcome]]:
    inputs = make_inputs(shape, torch.bfloat16, device)
    run = partial(with_gradients, partial(fused, backend=backend))
    return partial(run, inputs.first(512)), partial(run, inputs)


def _reference(*inputs: Tensor, **options: Any) -> Tensor:
    loss = fastkd.reference.linear_kl_div(*inputs, **options)
    assert isinstance(loss, Tensor)
    return loss


def compare(made: Any, truth: Any, tolerance: float) -> str:
    """The largest relative L2 error of each, which must not pass `tolerance`."""
    errors = [relative_error(x.detach().cpu(), y.detach().cpu()) for x, y in zip(made, truth, strict=True) if x is not None]
    seen = "relative error " + ", ".join(f"{error:.1e}" for error in errors)
    if not all(error <= tolerance for error in errors):
        raise AssertionError(f"{seen}; at most {tolerance:g} is right")
    return seen
