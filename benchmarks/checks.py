"""Is it right on this machine? Every live backend against float64, and what a GPU alone can show: no host sync, graph capture, memory.

They are the tests' questions asked where the tests do not run; `benchmarks/gpu.py` asks them before it times anything.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.ops.plan import plan_chunks
from fastkd.ops.selfcheck import Problem, check_ops

from .claim import Settings
from .implementations import fused, live_backends, with_gradients
from .memory import peak_bytes
from .problem import Inputs, Outcome, Shape, close_pair, exact, make_inputs, relative_error
from .row_kernel import DIVERGENCES

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""Relative L2 error of a gradient; in bfloat16 that of storing it."""
CLOSE = (4e-4, 4e-3, 3e-2)
CLOSE_FLOAT32 = 1e-3
"""Where a float32 gradient is what a cancellation of logits leaves: 1.4e-4 was seen at 3.6e-4 nats, of every implementation."""
Check = Callable[[], str]
"""Raises if something is wrong; returns what was seen."""


def run_checks(settings: Settings, backends: Sequence[str], tell: Callable[[dict[str, Any]], None]) -> None:
    """All of them for these backends, whichever fails; `tell` hears of each what it saw. A backend that is not live has failed."""
    live, left_out = live_backends(settings.device)
    for name in set(backends) - set(live):
        tell({"check": f"{name} is live", "passed": False, "seen": left_out.get(name, "it is not for this device")})
    for name, check in _checks(settings, tuple(name for name in backends if name in live)):
        try:
            passed, seen = True, check()
        except Exception as error:  # one broken backend must not hide what the others do
            traceback.print_exc()
            passed, seen = False, f"{type(error).__name__}: {error}"
        tell({"check": name, "passed": passed, "seen": seen})
        print(f"  {'ok    ' if passed else 'FAILED'} {name}: {seen.splitlines()[0] if seen else ''}", flush=True)


def _checks(settings: Settings, backends: tuple[str, ...]) -> Iterator[tuple[str, Check]]:
    shape = settings.choose(cpu=Shape(512, 5003, 64, 96), cuda=Shape(1536, 50_257, 256, 384), smoke=Shape(24, 301, 16, 24))
    for backend in backends:
        for dtype in TOLERANCE:
            for target in CLOSE:
                yield (
                    f"{backend}, {dtype}, gradients at {target:g} nats",
                    partial(close_gradients, backend, target, shape, dtype, settings),
                )
        for vocabulary in (shape.vocabulary, -(-shape.vocabulary // 16) * 16):
            for divergence in DIVERGENCES:
                wide = shape._replace(vocabulary=vocabulary)
                yield (
                    f"{backend}, {divergence} with every option, V = {vocabulary}",
                    partial(every_option, backend, divergence, wide, settings),
                )
        for dtype in TOLERANCE:
            yield f"{backend}, {dtype}, every op of the doctor", partial(every_op, backend, shape, dtype)
        if settings.device.type == "cuda":
            yield f"{backend}, no host sync", partial(no_host_sync, backend, shape, settings)
            yield f"{backend}, CUDA graph", partial(cuda_graph, backend, shape, settings)
            yield f"{backend}, peak memory", partial(peak_memory, backend, settings)


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


def every_op(backend: str, shape: Shape, dtype: torch.dtype) -> str:
    """What `fastkd doctor` checks: every op that the backend serves, values and gradients."""
    widths = {"student_hidden": shape.student_width, "teacher_hidden": shape.teacher_width}
    name = str(dtype).removeprefix("torch.")
    problem = Problem(vocabulary=shape.vocabulary, **widths, dtype=name, temperature=2.0, tokens=min(shape.tokens, 256))
    found = [check for check in check_ops(problem) if check.backend == backend]
    wrong = [f"{check.op}: {check.failure or check.wrong}" for check in found if not check.passed]
    if wrong or not found:
        raise AssertionError("; ".join(wrong) or "no op was checked")
    return f"{len(found)} ops"


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


def peak_memory(backend: str, settings: Settings) -> str:
    """Above inputs and gradients at most: what the plan has alive, and the head's float32 gradient where several chunks add to it."""
    shape = Shape(8192, 128_256, 2048, 4096)
    counts = (shape.tokens // 2, shape.tokens)
    peaks = [peak_bytes(settings.device, build, backend, shape._replace(tokens=count), settings.device) for count in counts]
    plan = plan_chunks(shape.tokens, shape.vocabulary, device=settings.device, gradient_size=2, hidden_size=shape.student_width)
    sums = 4 * shape.student_width * shape.vocabulary if plan.chunks > 1 else 0
    limit = 1.05 * (plan.buffer_bytes + sums) + (64 << 20)
    seen = f"{peaks[0] / 1e6:.0f} MB at {counts[0]} tokens, {peaks[1] / 1e6:.0f} MB at {counts[1]}; at most {limit / 1e6:.0f} MB"
    if peaks[1] > limit:
        raise AssertionError(seen)
    return seen


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
