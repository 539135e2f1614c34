"""Claim: the row kernels run at the speed of memory.

Two rows of float32 logits in, their divergence out, the gradient written over the student's: nanoseconds an element and bytes a second
of every backend and divergence, beside a plain copy in the same rounds. Bytes are those that the kernel asks for by its design: three
accesses an element where a row stays on the chip between the passes, more where it is read again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.backends import choose
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import RowCall, RowOptions, RowOutputs

from .claim import Settings, main
from .implementations import live_backends
from .runner import Case, interleaved, stopwatch

DIVERGENCES = ("forward_kl", "reverse_kl", "tvd", "jsd(0.5)", "skew_kl(0.1)", "skew_rkl(0.1)")
COPY = "copy"


def measure(settings: Settings) -> dict[str, Any]:
    rows, vocabulary = settings.choose(cpu=(512, 30_522), cuda=(1024, 128_256), smoke=(8, 500))
    generator = torch.Generator(settings.device).manual_seed(0)
    source = 3 * torch.randn(2, rows, vocabulary, generator=generator, device=settings.device)
    student, teacher = logits = torch.empty_like(source)
    # As the losses have it: over the student's logits on a CPU, in 16 bits beside them on a GPU.
    gradient = student if settings.device.type == "cpu" else torch.empty_like(student, dtype=torch.bfloat16)
    backends, left_out = live_backends(settings.device)
    cases = {COPY: Case(partial(student.copy_, source[0]))}
    named = {f"{backend} {divergence}": (backend, divergence) for divergence in DIVERGENCES for backend in backends}
    for name, (backend, divergence) in named.items():
        cases[name] = Case(
            run=partial(_run, backend, RowOptions(Divergence.parse(divergence)), student, teacher, gradient),
            prepare=partial(logits.copy_, source),
        )
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    elements, copied = rows * vocabulary, 2 * source[0].numel() * source.element_size()
    copy_speed = copied / timings[COPY].median
    results = []
    for name, (backend, divergence) in named.items():
        # A gradient of half the size is half an access.
        seconds, accesses = timings[name].median, _reads(backend, divergence) + gradient.element_size() / source.element_size()
        speed = accesses * elements * source.element_size() / seconds
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
        "left_out": left_out,
    }


def _run(backend: str, options: RowOptions, student: Tensor, teacher: Tensor, gradient: Tensor) -> None:
    ones = student.new_ones(len(student))
    outputs = RowOutputs(divergence=torch.empty_like(ones))
    call = RowCall(student=student, teacher=teacher, options=options, outputs=outputs, row_weight=ones, gradient=gradient)
    choose(backend, call)(call)


def _reads(backend: str, divergence: str) -> int:
    """Of both rows once; Triton reads them once a pass: twice for the two Kullback-Leibler divergences, else three times."""
    if backend != "triton":
        return 2
    return 4 if divergence in ("forward_kl", "reverse_kl") else 6


if __name__ == "__main__":
    sys.exit(main("row_kernel"))
