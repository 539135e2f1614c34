"""The CUDA row kernel on NVIDIA Hopper (`csrc/cuda/rows.cu`): compiled by nvcc once per source, found again in later processes.

A cluster of up to 16 thread blocks keeps a row of both models in shared memory, so that each logit is read from global memory once.
`python -m fastkd.ops.backend_cuda` compiles it ahead of time, on any machine that has nvcc.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..csrc import nvcc
from .compiled import CompiledLibrary, kind_and_mixing, scale_and_softcap
from .row_call import RowCall

DTYPES = (torch.float32, torch.bfloat16)
"""Of the logits, one for both models, and of the gradient."""

CLUSTER_SIZES = (1, 2, 4, 8, 16)
SLICE_BYTES = 110 * 1024
"""Shared memory for a block's slice of both rows; of the 227 KiB that sm_90 has, two blocks of a multiprocessor take one half each."""


def run(call: RowCall) -> None:
    """Do what `RowCall` says with one thread-block cluster a row; the logits stay what they are, but where the gradient lies over them.

    It never waits for the device, and CUDA graphs may capture it once it has run.
    """
    student, teacher, gradient, options, out = call.student, call.teacher, call.gradient, call.options, call.outputs
    assert isinstance(teacher, Tensor)
    vocabulary, device = student.shape[1], student.device
    launch = _library.get(build=True)
    with torch.cuda.device(device):
        error = launch.fastkd_softmax_divergence(
            student.data_ptr(),
            teacher.data_ptr(),
            _pointer(gradient),
            len(student),
            vocabulary,
            student.stride(0),
            teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            student.dtype == torch.bfloat16,
            gradient is not None and gradient.dtype == torch.bfloat16,
            *kind_and_mixing(options.divergence),
            options.temperature,
            *scale_and_softcap(options.student),
            *scale_and_softcap(options.teacher),
            call.row_weight.data_ptr(),
            _pointer(call.labels),
            _pointer(call.label_weight),
            _pointer(out.divergence),
            _pointer(out.cross_entropy),
            _pointer(out.student_entropy),
            _pointer(out.teacher_entropy),
            _pointer(out.top1_agreement),
            cluster_size(vocabulary, student.dtype),
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    if error:
        raise RuntimeError(f"The CUDA row kernel could not be launched: {launch.fastkd_cuda_error(error).decode()}.")


def why_not(call: RowCall) -> str | None:
    """Why `run` cannot take this call, with the remedy; None: it can."""
    student, teacher, gradient = call.student, call.teacher, call.gradient
    if student.device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, and the logits are on {student.device}: move them."
    if torch.cuda.get_device_capability(student.device)[0] != 9:
        return "it is for GPUs of compute capability 9.x (Hopper), and this is none: triton serves here."
    if not is_built() and nvcc.find() is None:
        return "it is not compiled: run `python -m fastkd.ops.backend_cuda`, which needs nvcc (CUDA toolkit 12 or newer)."
    if not isinstance(teacher, Tensor):
        return f"it has no kernel for {'labels alone' if teacher is None else 'a top-k teacher'}: triton has."
    return _why_not_blocks(call, student, teacher, gradient)


def _why_not_blocks(call: RowCall, student: Tensor, teacher: Tensor, gradient: Tensor | None) -> str | None:
    if call.student_bias is not None or call.teacher_bias is not None:
        return "it adds no bias to the logits: triton does."
    if call.row_weight.dtype != torch.float32:
        return f"it computes in float32, and the row weights are {call.row_weight.dtype}: triton has float64."
    if student.dtype not in DTYPES or teacher.dtype != student.dtype or (gradient is not None and gradient.dtype not in DTYPES):
        given = f"{student.dtype}, {teacher.dtype} and {None if gradient is None else gradient.dtype}"
        return (
            "it takes float32 or bfloat16 logits of one dtype and writes a gradient in either; "
            f"student, teacher and gradient are {given}: triton takes them."
        )
    if cluster_size(student.shape[1], student.dtype) is None:
        return (
            f"a vocabulary of {student.shape[1]} in {student.dtype} does not fit into the shared memory of {CLUSTER_SIZES[-1]} thread "
            "blocks: triton takes it."
        )
    for name, block in (("student", student), ("teacher", teacher), ("gradient", gradient)):
        if block is not None and block.shape[1] > 1 and block.stride(1) != 1:
            return f"{name} has strides {block.stride()}; it needs stride 1 along the vocabulary: .contiguous()."
    for name, block in (("student", student), ("teacher", teacher)):
        if gradient is not None and not _lies_safely(gradient, block):
            return (
                f"the gradient overlaps {name} but not row over row, so that rows would be overwritten before they are read: give it "
                "memory of its own."
            )
    return None


def is_built() -> bool:
    """Whether the library for this source and these flags is there and can be used; never compiles."""
    return _library.get(build=False) is not None


def cluster_size(vocabulary: int, dtype: torch.dtype) -> int | None:
    """The fewest blocks that keep a row of both models in shared memory, in slices of a multiple of 8 columns; None if 16 cannot."""
    for size in CLUSTER_SIZES:
        columns = 8 * -(-vocabulary // (8 * size))
        if 2 * columns * dtype.itemsize <= SLICE_BYTES:
            return size
    return None


def _lies_safely(gradient: Tensor, logits: Tensor) -> bool:
    """Whether no row of `gradient` lies over any but its own row of logits."""
    begins = [(block.data_ptr(), block.stride(0) * block.element_size()) for block in (gradient, logits)]
    ends = [
        begin + (block.shape[0] - 1) * step + block.shape[1] * block.element_size()
        for block, (begin, step) in zip((gradient, logits), begins, strict=True)
    ]
    apart = ends[0] <= begins[1][0] or ends[1] <= begins[0][0]
    return apart or (begins[0] == begins[1] and gradient.element_size() <= logits.element_size()) or gradient.shape[0] == 1


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    # Three blocks; rows, vocabulary, three strides; two dtypes and the kind; six options; eight vectors; cluster size, device, stream.
    library.fastkd_softmax_divergence.argtypes = [*[pointer] * 3, *[size] * 5, *[integer] * 3, *[real] * 6, *[pointer] * 8]
    library.fastkd_softmax_divergence.argtypes += [integer, integer, pointer]
    library.fastkd_softmax_divergence.restype = integer
    library.fastkd_cuda_error.argtypes = [integer]
    library.fastkd_cuda_error.restype = ctypes.c_char_p
    return library


def _compile() -> bytes:
    try:
        content: bytes = nvcc.build()
        return content
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"The CUDA row kernel could not be compiled: {error} Use backend='triton' or 'torch'.") from error


@functools.cache
def _stem() -> str:
    return f"fastkd_cuda_{nvcc.fingerprint()}"


_library = CompiledLibrary("CUDA row kernels", "fastkd.ops.backend_cuda", stem=_stem, compile_=_compile, load=_load)


if __name__ == "__main__":
    _library.get(build=True)
    if not _library.is_kept:
        sys.exit(1)
    print("fastkd: the CUDA row kernel is compiled.")
