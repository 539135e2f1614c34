"""Which row kernel serves a call. Every backend gives the torch backend's numbers to rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import cpp, rows

BACKENDS = ("auto", "torch", "cpp", "triton", "cuda")
RowKernel = Callable[..., None]
"""The signature of `fastkd.ops.rows.softmax_divergence_`."""


def row_kernel(backend: str, device: torch.device) -> RowKernel:
    """The kernel named, or for "auto" the fastest that is ready: C++ on the CPU if it is compiled, else torch."""
    if backend == "torch" or (backend == "auto" and not (device.type == "cpu" and cpp.is_built())):
        return rows.softmax_divergence_
    if backend in ("auto", "cpp"):
        if device.type != "cpu":
            raise ValueError(f"backend='cpp' runs on the CPU and the tensors are on {device}; use 'auto' or 'torch'.")
        cpp.extension(build=True)
        return cpp.softmax_divergence_
    raise ValueError(f"backend={backend!r} is not available in this build; use 'auto', 'torch' or 'cpp'.")
