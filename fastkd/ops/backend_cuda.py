"""The CUDA row kernel on NVIDIA Hopper (`csrc/cuda/rows.cu`), launched through the driver: nothing is needed but the driver itself.

A cluster of up to 16 thread blocks keeps a row of both models in shared memory, so that each logit is read from global memory once. The
machine code that comes with fastkd serves unless the sources were changed; then `python -m fastkd.ops.backend_cuda` compiles them, on
any machine that has nvcc.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char, c_float, c_int, c_int64, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..csrc import nvcc
from .compiled import CompiledLibrary, kind_and_mixing, scale_and_softcap
from .row_call import RowCall, TopK

CLUSTER_SIZES = (1, 2, 4, 8, 16)
SLICE_BYTES, LARGEST_SLICE_BYTES = 110 * 1024, 220 * 1024
"""Shared memory for a block's slice of both rows: half of a multiprocessor's, so that two blocks share it, and all of it."""
_THREADS = 512  # `threads` of rows.cu
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Type` of row_math.h
_DYNAMIC_SHARED_MEMORY, _LARGE_CLUSTERS, _CLUSTER_DIMENSION = 8, 14, 4  # of CUfunction_attribute, twice, and CUlaunchAttributeID


class _Transform(ctypes.Structure):
    _fields_ = [("scale", c_float), ("softcap", c_float)]


class _Mixing(ctypes.Structure):
    _fields_ = [("own", c_float), ("other", c_float), ("log_own", c_float), ("log_other", c_float)]


class _Call(ctypes.Structure):
    """`Call` of csrc/cuda/row_math.h, the kernel's one parameter."""

    _fields_ = [
        *((name, c_void_p) for name in ("student", "teacher", "gradient", "student_bias", "teacher_bias")),
        *((name, c_void_p) for name in ("teacher_rest", "row_weight", "labels", "label_weight")),
        *(
            (name, c_void_p)
            for name in ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement", "acceptance")
        ),
        *((name, c_int64) for name in ("student_stride", "teacher_stride", "gradient_stride")),
        *((name, c_int) for name in ("student_type", "teacher_type", "gradient_type", "vocabulary", "slice")),
        *((name, c_float) for name in ("temperature", "rate")),
        ("student_transform", _Transform),
        ("teacher_transform", _Transform),
        ("mixing", _Mixing),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, whose value is a union of 64 bytes."""

    _fields_ = [("id", c_int), ("padding", c_char * 4), ("value", c_uint * 16)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", c_uint),
    ]


def run(call: RowCall) -> None:
    """Do what `RowCall` says with one thread-block cluster a row; logits stay what they are, but where the gradient lies over them.

    It never waits for the device, and CUDA graphs may capture it once it has run.

    Raises:
        RuntimeError: the driver refuses the machine code or the launch; says why.
    """
    rows, vocabulary = call.student.shape
    if rows == 0:
        return
    student, teacher, gradient, options, outputs = call.student, call.teacher, call.gradient, call.options, call.outputs
    assert not isinstance(teacher, TopK)
    blocks = cluster_size(vocabulary, has_teacher=teacher is not None)
    assert blocks is not None
    _, own = kind_and_mixing(options.divergence)
    names = ("student_bias", "teacher_bias", "teacher_rest", "row_weight", "labels", "label_weight")
    vectors = {name: getattr(call, name) for name in names}
    parameter = _Call(
        **{name: None if x is None else x.data_ptr() for name, x in {**vectors, **vars(outputs)}.items()},
        student=student.data_ptr(),
        teacher=None if teacher is None else teacher.data_ptr(),
        gradient=None if gradient is None else gradient.data_ptr(),
        student_stride=student.stride(0),
        teacher_stride=0 if teacher is None else teacher.stride(0),
        gradient_stride=0 if gradient is None else gradient.stride(0),
        student_type=_TYPES[student.dtype],
        teacher_type=0 if teacher is None else _TYPES[teacher.dtype],
        gradient_type=0 if gradient is None else _TYPES[gradient.dtype],
        vocabulary=vocabulary,
        slice=_slice(vocabulary, blocks),
        temperature=options.temperature,
        rate=math.log2(math.e) / options.temperature,
        student_transform=_Transform(*scale_and_softcap(options.student)),
        teacher_transform=_Transform(*scale_and_softcap(options.teacher)),
        mixing=_Mixing(own, 1 - own, math.log(own), math.log1p(-own)),
    )
    is_lean = teacher is not None and call.labels is None and not call.wants_statistics and options.student.softcap is None
    name = f"rows_{'none' if options.divergence is None else options.divergence.kind}{'' if is_lean else '_extras'}"
    _launch(student.device, name, parameter, rows, blocks, has_teacher=teacher is not None)


def why_not(call: RowCall) -> str | None:
    """Why `run` cannot serve this call, with the remedy; None: it can."""
    device = call.student.device
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, and the logits are on {device}: move them."
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "it is for GPUs of compute capability 9.x (Hopper), and this is none: triton serves here."
    if isinstance(call.teacher, TopK):
        return "it has no kernel for a top-k teacher: triton has."
    return _why_not_blocks(call) or _why_no_code()


def _why_not_blocks(call: RowCall) -> str | None:
    assert not isinstance(call.teacher, TopK)
    blocks = {"student": call.student, "teacher": call.teacher, "gradient": call.gradient}
    given = {name: block for name, block in blocks.items() if block is not None}
    if call.row_weight.dtype != torch.float32:
        return f"it computes in float32, and the row weights are {call.row_weight.dtype}: triton has float64."
    for name, block in given.items():
        if block.dtype not in _TYPES:
            return f"it takes float32, bfloat16 and float16, and {name} is {block.dtype}: triton takes that."
        if block.shape[1] > 1 and block.stride(1) != 1:
            return f"{name} has strides {block.stride()}, and it needs stride 1 along the vocabulary: .contiguous()."
    rows, vocabulary = call.student.shape
    if cluster_size(vocabulary, has_teacher=call.teacher is not None) is None:
        return f"a vocabulary of {vocabulary} does not fit into the shared memory of {CLUSTER_SIZES[-1]} blocks: triton takes it."
    if rows * CLUSTER_SIZES[-1] >= 2**31:
        return f"{rows} rows are more than one launch has room for: call it with fewer."
    for name in given.keys() - {"gradient"}:
        if call.gradient is not None and not _lies_safely(call.gradient, given[name]):
            return f"the gradient overlaps {name} and is not the same memory, so that rows are lost unread: give it memory of its own."
    return None


def _why_no_code() -> str | None:
    """Why there is no machine code to launch."""
    if nvcc.shipped() is not None or nvcc.find() is not None or _library.get(build=False) is not None:
        return None
    return "its sources were changed: compile them by `python -m fastkd.ops.backend_cuda`, which needs nvcc (CUDA 12 or newer)."


def cluster_size(vocabulary: int, *, has_teacher: bool = True) -> int | None:
    """The fewest blocks whose slices of a row leave room for a second block; 16 if only the first has room; None if not even that."""
    row_bytes = 4 * (1 + has_teacher)
    for size in CLUSTER_SIZES:
        if _slice(vocabulary, size) * row_bytes <= SLICE_BYTES:
            return size
    return CLUSTER_SIZES[-1] if _slice(vocabulary, CLUSTER_SIZES[-1]) * row_bytes <= LARGEST_SLICE_BYTES else None


def _slice(vocabulary: int, blocks: int) -> int:
    """Columns of a block: a multiple of 8, so that slices of rows that begin at 16 bytes do so too."""
    return 8 * -(-vocabulary // (8 * blocks))


def _lies_safely(gradient: Tensor, logits: Tensor) -> bool:
    """Whether `gradient` is the same memory as `logits`, or shares none with it."""
    begins = [block.data_ptr() for block in (gradient, logits)]
    ends = [
        begin + ((block.shape[0] - 1) * block.stride(0) + block.shape[1]) * block.element_size()
        for block, begin in zip((gradient, logits), begins, strict=True)
    ]
    is_same = begins[0] == begins[1] and gradient.stride(0) == logits.stride(0) and gradient.dtype == logits.dtype
    return is_same or ends[0] <= begins[1] or ends[1] <= begins[0]


def _launch(device: torch.device, name: str, parameter: _Call, rows: int, blocks: int, *, has_teacher: bool) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    dimension = _Attribute(id=_CLUSTER_DIMENSION)
    dimension.value[:3] = [blocks, 1, 1]
    config = _Launch(rows * blocks, 1, 1, _THREADS, 1, 1)
    config.shared_bytes = parameter.slice * 4 * (1 + has_teacher)
    config.stream = torch.cuda.current_stream(device).cuda_stream
    config.attributes, config.attribute_count = ctypes.pointer(dimension), 1
    parameters = (c_void_p * 1)(ctypes.addressof(parameter))
    with _context(index):
        _ask("cuLaunchKernelEx", ctypes.byref(config), _function(index, name), parameters, None)


@functools.cache
def _function(index: int, name: str) -> c_void_p:
    """The kernel `name` on a device, whose context is current, ready for large clusters and slices."""
    function = c_void_p()
    _ask("cuModuleGetFunction", ctypes.byref(function), _module(index), name.encode())
    _ask("cuFuncSetAttribute", function, c_int(_DYNAMIC_SHARED_MEMORY), c_int(LARGEST_SLICE_BYTES))
    _ask("cuFuncSetAttribute", function, c_int(_LARGE_CLUSTERS), c_int(1))
    return function


@functools.cache
def _module(index: int) -> c_void_p:
    code = nvcc.shipped() or _library.get(build=True)
    module = c_void_p()
    _ask("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(code))
    return module


@contextmanager
def _context(index: int) -> Iterator[None]:
    """Make a device's primary context, which is torch's, the thread's own; autograd's threads may have none."""
    _ask("cuCtxPushCurrent_v2", _primary_context(index))
    try:
        yield
    finally:
        _ask("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))


@functools.cache
def _primary_context(index: int) -> c_void_p:
    device, context = c_int(), c_void_p()
    _ask("cuDeviceGet", ctypes.byref(device), c_int(index))
    _ask("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def _ask(function: str, *arguments: Any) -> None:
    """Call the driver. RuntimeError with its words if it refuses."""
    driver = _driver()
    error = getattr(driver, function)(*arguments)
    if error:
        words = ctypes.c_char_p()
        driver.cuGetErrorString(c_int(error), ctypes.byref(words))
        said = (words.value or b"unknown error").decode()
        raise RuntimeError(f"The CUDA row kernel was not launched: {function} says {said} ({error}). Use backend='triton' or 'torch'.")


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _compile() -> bytes:
    try:
        content: bytes = nvcc.build()
        return content
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"The CUDA row kernel could not be compiled: {error} Use backend='triton' or 'torch'.") from error


def _stem() -> str:
    return f"fastkd_cuda_{nvcc.fingerprint()}"


_library = CompiledLibrary("CUDA row kernels", "fastkd.ops.backend_cuda", stem=_stem, compile_=_compile, load=Path.read_bytes)


if __name__ == "__main__":
    _library.get(build=True)
    if not _library.is_kept:
        sys.exit(1)
    print("fastkd: the CUDA row kernel is compiled.")
