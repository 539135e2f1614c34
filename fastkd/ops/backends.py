"""Which row kernel serves a call. Every backend gives the torch backend's numbers to rounding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

from . import cpp, cuda, rows, topk_rows, triton

BACKENDS = ("auto", "torch", "cpp", "triton", "cuda")
RowKernel = Callable[..., None]
"""The signature of `fastkd.ops.rows.softmax_divergence_`."""


def row_kernel(backend: str, device: torch.device) -> RowKernel:
    """The kernel named, or for "auto" the fastest that was measured: C++ on the CPU if it is compiled, else torch.

    On CUDA "auto" is torch until a GPU run has checked and timed the others; backend="triton" and "cuda" take them.
    """
    if backend == "auto":
        backend = "cpp" if device.type == "cpu" and cpp.is_built() else "torch"
        if device.type == "cpu" and backend == "torch":
            _tell_once("Torch's row kernel serves: the C++ one, which is faster, is compiled by `python -m fastkd.ops.cpp`.")
    if backend == "torch":
        return rows.softmax_divergence_
    if backend == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend='cpp' runs on the CPU and the tensors are on {device}; use 'auto' or 'torch'.")
        cpp.extension(build=True)
        return cpp.softmax_divergence_
    if backend == "cuda":
        if not cuda.is_ready(device):
            raise ValueError(
                "backend='cuda' needs a GPU of compute capability 9.x, and the library compiled or nvcc to compile it; "
                f"the tensors are on {device}. Use 'auto', 'torch' or 'triton'."
            )
        return cuda.softmax_divergence_
    _check_triton(device)
    return triton.softmax_divergence_


def arithmetic(device: torch.device) -> str:
    """Which row kernel "auto" takes, and on a CPU which of its instructions: what decides the last bits of a loss."""
    kernel = row_kernel("auto", device).__module__.rpartition(".")[2]
    if device.type != "cpu":
        return kernel
    variant = f" {cpp.extension(build=False).variant()}" if kernel == "cpp" else ""
    return f"{kernel}{variant} on {torch.backends.cpu.get_cpu_capability()}"


def takes_bias(kernel: RowKernel) -> bool:
    """Whether a row kernel adds biases itself, `student_bias` and `teacher_bias`, which saves a pass over the logits."""
    return kernel is cpp.softmax_divergence_


def topk_kernel(backend: str, device: torch.device) -> RowKernel:
    """The same for a sparse teacher, whose kernels are torch's and Triton's."""
    if backend in ("auto", "torch"):
        return topk_rows.topk_divergence_
    if backend == "triton":
        _check_triton(device)
        return triton.topk_divergence_
    raise ValueError(f"backend={backend!r} has no kernel for a top-k teacher; use 'auto', 'torch' or 'triton'.")


@cache
def _tell_once(message: str) -> None:
    logging.getLogger("fastkd").info(message)


def _check_triton(device: torch.device) -> None:
    if not triton.is_ready(device):
        raise ValueError(
            f"backend='triton' needs triton and tensors on CUDA, or on the CPU with TRITON_INTERPRET=1 in the environment; "
            f"the tensors are on {device}. Install triton, move them, or use 'auto' or 'torch'."
        )
