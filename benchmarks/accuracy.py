"""Claim: gradients stay exact when the student is close to its teacher, because logits are never rounded to 16 bits.

Relative L2 error against float64 of the loss and of both gradients, from a divergence of 1e-4 to 10 nats, for fastkd's backends and for
the peers, on the same rounded inputs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from .claim import Settings, main
from .implementations import FLOOR, FLOOR_FLOAT32_LOGITS, implementations
from .problem import Shape, close_pair, exact, relative_error

DIVERGENCES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Nats between teacher and student."""


def measure(settings: Settings) -> dict[str, Any]:
    shape = settings.choose(cpu=Shape(256, 30_522, 512, 512), cuda=Shape(512, 128_256, 1024, 1024), smoke=Shape(16, 500, 16, 16))
    divergences = settings.choose(cpu=DIVERGENCES, cuda=DIVERGENCES, smoke=(1e-3, 1.0))
    found, left_out = implementations(settings.device, compiles=False)
    judged = {name: run for name, run in found.items() if name not in (FLOOR, FLOOR_FLOAT32_LOGITS)}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for target in divergences:
            pair = close_pair(target, shape, dtype, settings.device)
            truth = exact(pair)
            assert truth.loss is not None
            for name, run in judged.items():
                made = run(pair)
                results.append(
                    {
                        "implementation": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "kl": float(truth.loss),
                        "value": None if made.loss is None else relative_error(made.loss, truth.loss),
                        "student": relative_error(made.student_gradient, truth.student_gradient),
                        "head": relative_error(made.head_gradient, truth.head_gradient),
                    }
                )
            print(f"  {dtype}, {float(truth.loss):.2g} nats", flush=True)
    return {"shape": shape._asdict(), "results": results, "left_out": left_out}


if __name__ == "__main__":
    sys.exit(main("accuracy"))
