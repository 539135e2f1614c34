"""Claim: `linear_kl_div` is exact, keeps one chunk of logits, and costs little above the four GEMMs that no exact method can avoid.

Forward and backward of forward KL from hidden states and heads, every implementation in one run: time interleaved, peak memory above
inputs and gradients each on its own, relative L2 error of both gradients against float64 where student and teacher are close.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .claim import Settings, main
from .implementations import COMPILED, FLOOR, FLOOR_FLOAT32_LOGITS, Implementation, implementations
from .memory import peak_bytes
from .problem import Outcome, Shape, close_pair, exact, make_inputs, relative_error
from .runner import Case, interleaved, stopwatch

FLOOR_FLOAT32 = "GEMMs alone, float32"
"""Beside the floor in 16 bits: a CPU without 16-bit units multiplies float32 faster."""
FLOORS = (FLOOR, FLOOR_FLOAT32, FLOOR_FLOAT32_LOGITS)
CLOSE = (4e-4, 4e-3, 3e-2)
"""Nats between teacher and student at which gradients are judged."""
FEW_TOKENS = 512


def measure(settings: Settings) -> dict[str, Any]:
    shape = settings.choose(cpu=Shape(4096, 30_522, 384, 768), cuda=Shape(8192, 128_256, 2048, 4096), smoke=Shape(96, 500, 16, 24))
    pair_shape = settings.choose(cpu=Shape(512, 30_522, 512, 512), cuda=Shape(512, 128_256, 2048, 2048), smoke=Shape(16, 500, 16, 16))
    dtypes = settings.choose(cpu=(torch.float32, torch.bfloat16), cuda=(torch.bfloat16,), smoke=(torch.bfloat16,))
    found, left_out = implementations(settings.device, compiles=not settings.smoke)
    for name, reason in left_out.items():
        print(f"  left out: {name}: {reason}", flush=True)
    results = []
    for dtype in dtypes:
        slow = _over_budget(settings, found, shape, dtype)
        peaks, failed = _peaks(settings, {name: run for name, run in found.items() if name not in slow}, shape, dtype)
        left_out |= {f"{name}, {dtype}": reason for name, reason in (slow | failed).items()}
        usable = {name: run for name, run in found.items() if name in peaks}
        timings = _timings(settings, usable, shape, dtype)
        errors = _gradient_errors(settings, usable, pair_shape, dtype)
        for name, timing in timings.items():
            results.append(
                {
                    "implementation": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "seconds": asdict(timing),
                    "ratio_to_gemms": timing.median / timings[FLOOR].median,
                    "peak_bytes": peaks.get(name),
                    "gradient_error": errors.get(name),
                }
            )
            print(f"  {dtype} {name}: {timing.median:.4g} s, {results[-1]['ratio_to_gemms']:.2f} x GEMMs alone", flush=True)
    return {"shape": shape._asdict(), "pair_shape": pair_shape._asdict(), "results": results, "left_out": left_out}


def _over_budget(settings: Settings, found: Mapping[str, Implementation], shape: Shape, dtype: torch.dtype) -> dict[str, str]:
    """Peers of which one run would take more than the budget, by a run over few tokens; torch's own 16-bit GEMMs on an older CPU."""
    few = make_inputs(shape._replace(tokens=min(FEW_TOKENS, shape.tokens)), dtype, settings.device)
    reasons, clock = {}, stopwatch(settings.device)
    for name, run in found.items():
        if name in FLOORS or name.startswith("fastkd"):
            continue
        seconds = 0.0
        with suppress(Exception):  # `_peaks` runs it again and says what is wrong
            seconds = min(clock(partial(run, few)) for _ in range(2 if name == COMPILED else 1)) * shape.tokens / len(few.student)
        if seconds > settings.budget:
            reasons[name] = f"about {seconds:.0f} s a run, judged by {len(few.student)} tokens; the budget is {settings.budget:.0f} s"
            print(f"  left out: {name}, {dtype}: {reasons[name]}", flush=True)
    return reasons


def _peaks(
    settings: Settings, found: Mapping[str, Implementation], shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of each; and, since this runs each for the first time, why a peer fails here. A failure of ours is a bug and raises."""
    peaks, failed = {}, {}
    for name in found:
        try:
            peaks[name] = peak_bytes(settings.device, build, name, shape, dtype, settings.device, own_process=not settings.smoke)
        except Exception as error:
            if name.startswith("fastkd") or name in FLOORS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'the process was killed'}"
            print(f"  left out: {name}: {failed[name]}", flush=True)
    return peaks, failed


def build(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Outcome], Callable[[], Outcome]]:
    run = implementations(device, compiles=name == COMPILED)[0][name]
    inputs = make_inputs(shape, dtype, device)
    return partial(run, inputs.first(FEW_TOKENS)), partial(run, inputs)


def _timings(settings: Settings, found: Mapping[str, Implementation], shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    inputs = make_inputs(shape, dtype, settings.device)
    cases = {name: Case(partial(run, inputs)) for name, run in found.items()}
    if settings.device.type == "cpu" and dtype != torch.float32:
        cases[FLOOR_FLOAT32] = Case(partial(found[FLOOR], make_inputs(shape, torch.float32, settings.device)))
    return interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)


def _gradient_errors(
    settings: Settings, found: Mapping[str, Implementation], shape: Shape, dtype: torch.dtype
) -> dict[str, list[dict[str, float]]]:
    """Measure the errors of every implementation at every divergence of `CLOSE`."""
    errors: dict[str, list[dict[str, float]]] = {name: [] for name in found if name not in FLOORS}
    for target in CLOSE:
        pair = close_pair(target, shape, dtype, settings.device)
        truth = exact(pair)
        assert truth.loss is not None
        for name, rows in errors.items():
            made = found[name](pair)
            rows.append(
                {
                    "kl": float(truth.loss),
                    "student": relative_error(made.student_gradient, truth.student_gradient),
                    "head": relative_error(made.head_gradient, truth.head_gradient),
                }
            )
    return errors


if __name__ == "__main__":
    sys.exit(main("linear_kl"))
