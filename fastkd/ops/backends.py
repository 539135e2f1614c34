"""Which row kernel serves a call. Every backend gives the torch backend's numbers to rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import cpp, rows, triton

BACKENDS = ("auto", "torch", "cpp", "triton", "cuda")
RowKernel = Callable[..., None]
"""The signature of `fastkd.ops.rows.softmax_divergence_`."""


def row_kernel(backend: str, device: torch.device) -> RowKernel:
    """The kernel named, or for "auto" the fastest that was measured: C++ on the CPU if it is compiled, else torch.

    On CUDA "auto" is torch until a GPU run has checked and timed the Triton kernel; backend="triton" takes it.
    """
    if backend == "auto":
        backend = "cpp" if device.type == "cpu" and cpp.is_built() else "torch"
    if backend == "torch":
        return rows.softmax_divergence_
    if backend == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend='cpp' runs on the CPU and the tensors are on {device}; use 'auto' or 'torch'.")
        cpp.extension(build=True)
        return cpp.softmax_divergence_
    if backend == "triton":
        if not triton.is_ready(device):
            raise ValueError(
                f"backend='triton' needs triton and tensors on CUDA, or on the CPU with TRITON_INTERPRET=1 in the environment; "
                f"the tensors are on {device}. Install triton, move them, or use 'auto' or 'torch'."
            )
        return triton.softmax_divergence_
    raise ValueError(f"backend={backend!r} is not available in this build; use 'auto', 'torch', 'cpp' or 'triton'.")
