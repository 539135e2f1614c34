"""Claim: the row kernels run at the speed of memory.

Two rows of float32 logits in, their divergence out, and the gradient as `linear_kl_div` has it written: nanoseconds an element and
bytes a second of every backend and divergence, beside a plain copy in the same rounds. Bytes are those that the kernel asks for by its
design: three accesses an element where a row stays on the chip between the passes, more where it is read again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.backends import choose
from fastkd.ops.divergence import Divergence
from fastkd.ops.gemm import row_buffer
from fastkd.ops.row_call import RowCall, RowOptions, RowOutputs

from .claim import Settings, main
from .implementations import live_backends
from .runner import Case, interleaved, stopwatch

DIVERGENCES = ("forward_kl", "reverse_kl", "tvd", "jsd(0.5)", "skew_kl(0.1)", "skew_rkl(0.1)")
COPY = "copy"


def measure(settings: Settings) -> dict[str, Any]:
    rows, vocabulary = settings.choose(cpu=(512, 30_522), cuda=(1024, 128_256), smoke=(8, 500))
    backends, left_out = live_backends(settings.device)
    return {**measure_rows(settings, rows, vocabulary, backends, DIVERGENCES), "left_out": left_out}


def measure_rows(settings: Settings, rows: int, vocabulary: int, backends: Sequence[str], divergences: Sequence[str]) -> dict[str, Any]:
    """Time every backend and divergence on `rows` of logits, in the same rounds as a copy of as many."""
    generator = torch.Generator(settings.device).manual_seed(0)
    source = 3 * torch.randn(2, rows, vocabulary, generator=generator, device=settings.device)
    spare = torch.empty_like(source[0])
    cases = {COPY: Case(partial(spare.copy_, source[0]))}
    named = {f"{backend} {divergence}": (backend, divergence) for divergence in divergences for backend in backends}
    call = production_call(rows, vocabulary, DIVERGENCES[0], settings.device)
    assert call.gradient is not None
    for name, (backend, divergence) in named.items():
        own = replace(call, options=RowOptions(Divergence.parse(divergence)))
        cases[name] = Case(partial(choose(backend, own), own), partial(_restore, call, source))
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    elements = rows * vocabulary
    copy_speed = 2 * 4 * elements / timings[COPY].median
    results = []
    for name, (backend, divergence) in named.items():
        seconds, accesses = timings[name].median, _accesses(backend, divergence)
        speed = (4 * (accesses - 1) + call.gradient.itemsize) * elements / seconds
        results.append(
            {
                "backend": backend,
                "divergence": divergence,
                "seconds": asdict(timings[name]),
                "nanoseconds_per_element": 1e9 * seconds / elements,
                "accesses_per_element": accesses,
                "bytes_per_second": speed,
                "share_of_copy": speed / copy_speed,
            }
        )
        print(f"  {name}: {1e9 * seconds / elements:.4g} ns an element, {speed / copy_speed:.2f} of a copy's bandwidth", flush=True)
    return {
        "shape": {"rows": rows, "vocabulary": vocabulary},
        "copy": {"seconds": asdict(timings[COPY]), "bytes_per_second": copy_speed},
        "results": results,
    }


def production_call(rows: int, vocabulary: int, divergence: str, device: torch.device) -> RowCall:
    """The call that `linear_kl_div` makes: uninitialised float32 logits, and on a GPU a bfloat16 gradient in memory of its own."""

    def block(dtype: torch.dtype) -> Tensor:
        return row_buffer(rows, vocabulary, dtype, device)[:, :vocabulary]

    student = block(torch.float32)
    ones = torch.ones(rows, device=device)
    return RowCall(
        student=student,
        teacher=block(torch.float32),
        options=RowOptions(Divergence.parse(divergence)),
        outputs=RowOutputs(divergence=torch.empty_like(ones)),
        row_weight=ones,
        gradient=block(torch.bfloat16) if device.type == "cuda" else student,
    )


def _restore(call: RowCall, source: Tensor) -> None:
    """Write the logits again, over which the gradient may lie."""
    call.student.copy_(source[0])
    assert isinstance(call.teacher, Tensor)
    call.teacher.copy_(source[1])


def _accesses(backend: str, divergence: str) -> int:
    """Two reads and a write; Triton reads both rows once a pass: twice for the two Kullback-Leibler divergences, else three times."""
    if backend != "triton":
        return 3
    return 5 if divergence in ("forward_kl", "reverse_kl") else 7


if __name__ == "__main__":
    sys.exit(main("row_kernel"))
