"""Claim: the cost of a token and the peak of memory do not depend on the number of tokens, nor memory on the size of the vocabulary.

Forward and backward of `linear_kl_div` from 1k to 32k tokens, and the peak of one step over a vocabulary of 262144.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .claim import Settings, main
from .implementations import fused, with_gradients
from .memory import peak_bytes
from .problem import Outcome, Shape, make_inputs
from .runner import Case, interleaved, stopwatch

FEW_TOKENS = 512


def measure(settings: Settings) -> dict[str, Any]:
    shape = settings.choose(cpu=Shape(32_768, 30_522, 384, 768), cuda=Shape(32_768, 128_256, 2048, 4096), smoke=Shape(512, 500, 16, 24))
    large = settings.choose(cpu=Shape(1024, 262_144, 2304, 2304), cuda=Shape(8192, 262_144, 2304, 2304), smoke=Shape(64, 5000, 16, 16))
    dtype = settings.choose(cpu=torch.float32, cuda=torch.bfloat16, smoke=torch.float32)
    counts = [shape.tokens >> halvings for halvings in reversed(range(6))]
    inputs = make_inputs(shape, dtype, settings.device)
    cases = {str(count): Case(partial(run, inputs.first(count))) for count in counts}
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    del inputs, cases
    results = []
    for count in counts:
        timing = timings[str(count)]
        peak = _peak(settings, shape._replace(tokens=count), dtype)
        results.append(
            {"tokens": count, "seconds": asdict(timing), "microseconds_per_token": 1e6 * timing.median / count, "peak_bytes": peak}
        )
        print(f"  {count} tokens: {results[-1]['microseconds_per_token']:.4g} us a token, {peak} bytes", flush=True)
    return {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "results": results,
        "large_vocabulary": {"shape": large._asdict(), "peak_bytes": _peak(settings, large, dtype)},
    }


def _peak(settings: Settings, shape: Shape, dtype: torch.dtype) -> int | None:
    """None where the machine has not the memory for the inputs and gradients, and its kernel ended the process."""
    try:
        return peak_bytes(settings.device, build, shape, dtype, settings.device, own_process=not settings.smoke)
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        print(f"  not measured: {shape}: {type(error).__name__}", flush=True)
        return None


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Outcome], Callable[[], Outcome]]:
    inputs = make_inputs(shape, dtype, device)
    return partial(run, inputs.first(FEW_TOKENS)), partial(run, inputs)


run = partial(with_gradients, fused)


if __name__ == "__main__":
    sys.exit(main("scaling"))
