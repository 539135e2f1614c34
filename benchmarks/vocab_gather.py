"""Claim: gathers over a vocabulary map run at the speed of memory.

Half of a head's rows, and half of the columns of logits: torch's `index_select` and, on a GPU, the Triton kernel, beside a plain copy
of as many bytes in the same rounds.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .claim import Settings, main
from .runner import Case, interleaved, stopwatch


def measure(settings: Settings) -> dict[str, Any]:
    tokens, vocabulary, width = settings.choose(cpu=(1024, 30_522, 768), cuda=(4096, 128_256, 4096), smoke=(8, 500, 16))
    dtype = settings.choose(cpu=torch.float32, cuda=torch.bfloat16, smoke=torch.float32)
    kept = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: vocabulary // 2].sort().values.to(settings.device)
    head = torch.randn(vocabulary, width, device=settings.device, dtype=dtype)
    logits = torch.randn(tokens, vocabulary, device=settings.device, dtype=dtype)
    # The copies allocate their results as the gathers do, and move as many bytes: those of half of the source.
    cases = {
        "rows, copy": Case(head[: vocabulary // 2].clone),
        "rows, index_select": Case(partial(head.index_select, 0, kept)),
        "columns, copy": Case(logits[: tokens // 2].clone),
        "columns, index_select": Case(partial(logits.index_select, 1, kept)),
    }
    if settings.device.type == "cuda":
        from fastkd.kernels.gather import gather_columns, gather_rows

        cases["rows, Triton"] = Case(partial(gather_rows, head, kept))
        cases["columns, Triton"] = Case(partial(gather_columns, logits, kept))
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    results = []
    for name, timing in timings.items():
        what, _, how = name.partition(", ")
        source = head if what == "rows" else logits
        moved = source.numel() * source.element_size()  # half of it read, as much written
        results.append(
            {
                "what": what,
                "how": how,
                "seconds": asdict(timing),
                "bytes_per_second": moved / timing.median,
                "share_of_copy": timings[f"{what}, copy"].median / timing.median,
            }
        )
        print(f"  {name}: {results[-1]['share_of_copy']:.2f} of a copy's bandwidth", flush=True)
    shape = {"tokens": tokens, "vocabulary": vocabulary, "kept": len(kept), "width": width}
    return {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "results": results}


if __name__ == "__main__":
    sys.exit(main("vocab_gather"))
