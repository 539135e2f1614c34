"""The CUDA row kernel on NVIDIA Hopper (`csrc/cuda/rows.cu`): compiled by nvcc once per source, found again in later processes.

A cluster of up to 16 thread blocks keeps a row of both models in shared memory, so that each logit is read from global memory once.
`python -m fastkd.ops.cuda` compiles it ahead of time, on any machine that has nvcc.
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
from .rows import RowLosses, RowOptions

DTYPES = (torch.float32, torch.bfloat16)
"""Of the logits, one for both models, and of the gradient."""

CLUSTER_SIZES = (1, 2, 4, 8, 16)
SLICE_BYTES = 200 * 1024
"""Shared memory for a block's slice of both rows; sm_90 gives a block 227 KiB in all."""


def softmax_divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    options: RowOptions,
    out: RowLosses,
    *,
    row_weight: Tensor,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """`fastkd.ops.rows.softmax_divergence_` with one thread-block cluster a row; weights and losses in float32, logits as in `DTYPES`.

    Neither block of logits is changed but where `gradient` lies over it. A cluster has read its row before it writes any of it, so
    `gradient` may lie over either block, row over row. It never waits for the device, and CUDA graphs may capture it once it has run.
    """
    cluster = _check(student_logits, teacher_logits, gradient)
    assert teacher_logits is not None and out.divergence is not None and (labels is None or out.cross_entropy is not None)
    rows, vocabulary = student_logits.shape
    device = student_logits.device
    # Named, so that what .contiguous() may have made lives until the launch.
    row_weight = row_weight.contiguous()
    labels = None if labels is None else labels.contiguous()
    label_weight = None if label_weight is None else label_weight.contiguous()
    for name, vector in {"row_weight": row_weight, "label_weight": label_weight, **vars(out)}.items():
        if vector is not None and (vector.dtype != torch.float32 or not vector.is_contiguous()):
            raise TypeError(f"{name} is {vector.dtype} with strides {vector.stride()}; backend='cuda' needs contiguous float32.")
    launch = _library.get(build=True)
    with torch.cuda.device(device):
        error = launch.fastkd_softmax_divergence(
            student_logits.data_ptr(),
            teacher_logits.data_ptr(),
            _pointer(gradient),
            rows,
            vocabulary,
            student_logits.stride(0),
            teacher_logits.stride(0),
            0 if gradient is None else gradient.stride(0),
            student_logits.dtype == torch.bfloat16,
            gradient is not None and gradient.dtype == torch.bfloat16,
            *kind_and_mixing(options.divergence),
            options.temperature,
            *scale_and_softcap(options.student),
            *scale_and_softcap(options.teacher),
            row_weight.data_ptr(),
            _pointer(labels),
            _pointer(label_weight),
            out.divergence.data_ptr(),
            _pointer(out.cross_entropy),
            _pointer(out.student_entropy),
            _pointer(out.teacher_entropy),
            _pointer(out.top1_agreement),
            cluster,
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    if error:
        words = launch.fastkd_cuda_error(error).decode()
        raise RuntimeError(f"The CUDA row kernel could not be launched: {words}. Use backend='triton' or 'torch'.")


def is_ready(device: torch.device) -> bool:
    """Whether `device` is a Hopper GPU and the kernel is compiled or can be."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return is_built() or nvcc.find() is not None


def is_built() -> bool:
    """Whether the library for this source and these flags is there and can be used; never compiles."""
    return _library.get(build=False) is not None


def fits(vocabulary: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes rows of so many logits of this dtype: it does up to 409 600 in float32 and 819 200 in bf16."""
    return dtype in DTYPES and cluster_size(vocabulary, dtype) is not None


def cluster_size(vocabulary: int, dtype: torch.dtype) -> int | None:
    """The fewest blocks that keep a row of both models in shared memory, in slices of a multiple of 8 columns; None if 16 cannot."""
    for size in CLUSTER_SIZES:
        columns = 8 * -(-vocabulary // (8 * size))
        if 2 * columns * dtype.itemsize <= SLICE_BYTES:
            return size
    return None


def _check(student: Tensor, teacher: Tensor | None, gradient: Tensor | None) -> int:
    """Refuse what the kernel does not do; return the cluster size."""
    if teacher is None:
        raise ValueError("backend='cuda' has no loss of labels alone; use backend='triton' or 'torch'.")
    if student.dtype not in DTYPES or teacher.dtype != student.dtype or (gradient is not None and gradient.dtype not in DTYPES):
        raise TypeError(
            "backend='cuda' takes float32 or bfloat16 logits of one dtype and writes a gradient in either; student, teacher and "
            f"gradient are {student.dtype}, {teacher.dtype} and {None if gradient is None else gradient.dtype}. "
            "Use backend='triton' or 'torch'."
        )
    size = cluster_size(student.shape[1], student.dtype)
    if size is None:
        raise ValueError(
            f"a vocabulary of {student.shape[1]} in {student.dtype} does not fit into the shared memory of {CLUSTER_SIZES[-1]} thread "
            "blocks, as backend='cuda' needs it; use backend='triton' or a smaller vocabulary."
        )
    for name, block in (("student_logits", student), ("teacher_logits", teacher), ("gradient", gradient)):
        if block is None:
            continue
        if block.device.type != "cuda" or block.device != student.device:
            raise ValueError(f"{name} is on {block.device}; backend='cuda' needs all tensors on one CUDA device. Use backend='auto'.")
        if block.shape != student.shape or (block.shape[1] > 1 and block.stride(1) != 1):
            raise ValueError(
                f"{name} has shape {tuple(block.shape)} and strides {block.stride()}; backend='cuda' needs {tuple(student.shape)} with "
                "stride 1 along the vocabulary: .contiguous()."
            )
    for name, block in (("student_logits", student), ("teacher_logits", teacher)):
        if gradient is not None and not _lies_safely(gradient, block):
            raise ValueError(
                f"gradient overlaps {name} but not row over row: rows would be overwritten before they are read. Let each of its rows "
                "begin where a row of logits begins, or give it memory of its own."
            )
    return size


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


_library = CompiledLibrary("CUDA row kernels", "fastkd.ops.cuda", stem=_stem, compile_=_compile, load=_load)


if __name__ == "__main__":
    _library.get(build=True)
    if not _library.is_kept:
        sys.exit(1)
    print("fastkd: the CUDA row kernel is compiled.")
