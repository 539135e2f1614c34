"""Claim: masked tokens cost nothing, because they are packed out before any GEMM."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .claim import Settings, main
from .implementations import eager, fused, with_gradients
from .problem import Shape, make_inputs
from .runner import Case, interleaved, stopwatch

MASKED_SHARE = 0.5


def measure(settings: Settings) -> dict[str, Any]:
    shape = settings.choose(cpu=Shape(4096, 30_522, 384, 768), cuda=Shape(8192, 128_256, 2048, 4096), smoke=Shape(64, 500, 16, 24))
    dtype = settings.choose(cpu=torch.float32, cuda=torch.bfloat16, smoke=torch.float32)
    inputs = make_inputs(shape, dtype, settings.device)
    order = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(2))
    mask = (order >= MASKED_SHARE * shape.tokens).to(settings.device)
    cases = {
        "fastkd": Case(partial(with_gradients, fused, inputs)),
        "fastkd, half masked": Case(partial(with_gradients, partial(fused, mask=mask), inputs)),
        "eager": Case(partial(with_gradients, eager, inputs)),
    }
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    unmasked = timings["fastkd"].median
    results = [
        {"implementation": name, "seconds": asdict(timing), "ratio_to_unmasked": timing.median / unmasked}
        for name, timing in timings.items()
    ]
    return {"shape": shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "masked_share": MASKED_SHARE, "results": results}


if __name__ == "__main__":
    sys.exit(main("masked"))
