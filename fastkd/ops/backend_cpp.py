"""The C++ kernels on the CPU (`csrc/cpu`): the row kernel, and products of 16-bit matrices.

They are compiled once per source and torch version and found again in later processes. `python -m fastkd.ops.backend_cpp` compiles
them ahead of time; `backend="cpp"` does when it has to; `backend="auto"` takes them if they are there. The row kernel is compiled for
several processors: FASTKD_CPU_VARIANT in the environment, avx512, avx2 or baseline, takes the place of the best that the CPU has.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .compiled import CompiledLibrary, kind_and_mixing, scale_and_softcap
from .row_call import LogitTransform, RowCall, TopK

# __FAST_MATH__ alone makes glibc declare the vector forms of exp, log and tanh; infinities and NaN keep their meaning.
_COMPILE_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-falign-loops=64", "-D__FAST_MATH__=1"]
_LINK_FLAGS = ["-lmvec", "-lm"] if platform.system() == "Linux" and platform.machine() == "x86_64" else []


_HAS_TILES = {torch.bfloat16: torch.cpu._is_amx_tile_supported, torch.float16: torch.cpu._is_amx_fp16_supported}


def run(call: RowCall) -> None:
    """Fill the call's outputs in one compiled pass a row; compiles first if need be.

    Raises:
        RuntimeError: the kernels cannot be compiled, or the call's tensors are not what `RowCall` says.
    """
    options, out, dtype = call.options, call.outputs, call.row_weight.dtype
    lists: list[Tensor | None] = [None, None, None]
    if isinstance(call.teacher, TopK):
        log_tail = call.teacher.log_tail if options.tail == "bucket" else None
        known = (call.teacher.log_probabilities, log_tail)
        lists = [call.teacher.ids.contiguous(), *(None if x is None else x.to(dtype).contiguous() for x in known)]
    extension(build=True).softmax_divergence_(
        call.student,
        None if isinstance(call.teacher, TopK) else call.teacher,
        *kind_and_mixing(options.divergence),
        options.temperature,
        *scale_and_softcap(options.student),
        *scale_and_softcap(options.teacher),
        call.student_bias,
        call.teacher_bias,
        call.teacher_rest,
        call.row_weight,
        call.labels,
        call.label_weight,
        [out.divergence, out.cross_entropy, out.student_entropy, out.teacher_entropy, out.top1_agreement, out.acceptance],
        call.gradient,
        call.keeps_logits,
        lists,
        options.tail == "renormalize",
    )


def why_not(call: RowCall, *, build: bool = False) -> str | None:
    """Why `run` cannot serve this call, or None. With `build`, that nothing is compiled yet is no reason: `run` compiles it."""
    if call.student.device.type != "cpu":
        return f"it runs on the CPU, and the logits are on {call.student.device}."
    if not build and not is_built():
        return "it is not compiled: run `python -m fastkd.ops.backend_cpp`, which needs a C++20 compiler."
    return None


def mm_16bit_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out (M, N) float32 = a (M, K) b (K, N), both bfloat16 or both float16 as `sixteen_bit_dtypes` says, or out += a b.

    Products are exact and sums in float32. a and b have unit stride along one dimension (transposed views do), out along its rows.
    """
    extension(build=True).mm_16bit_(out, a, b, accumulate, multiplier(a.dtype) == "fastkd")


def slot_logits_(
    raw: Tensor,
    bias: Tensor | None,
    order: Tensor,
    ends: Tensor,
    out: Tensor,
    rest: Tensor,
    transform: LogitTransform,
    temperature: float,
) -> None:
    """out (C, S) = T log sum exp(z / T) over the columns of each slot, and rest (C,) the log-sum of the columns behind the last slot.

    Args:
        raw: (C, V) any floating dtype, unit stride along V; stays what it is.
        bias: (V,) in the dtype of `out`, or None.
        order: (V,) int64 the columns, slot after slot.
        ends: (S + 1,) int64 where each slot ends in `order`, and at last V.
        out: float32 or float64, unit stride along S.
        rest: contiguous, in the dtype of `out`.
        transform: makes z of raw + bias.
        temperature: T.
    """
    extension(build=True).slot_logits_(raw, bias, order, ends, out, rest, *scale_and_softcap(transform), temperature)


def sixteen_bit_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that are multiplied as they are here, because that is faster than upcasting them; none where nothing is compiled.

    What decides is what the CPU has, and no clock: equal machines are to give equal bits.
    """
    return frozenset(dtype for dtype in _HAS_TILES if multiplier(dtype) is not None)


def multiplier(dtype: torch.dtype) -> str | None:
    """Whose product of 16-bit matrices is faster than that of upcast ones: "mkl", where the CPU has tiles (AMX), or "fastkd"; or None.

    Without tiles MKL needs 1.2 times (bfloat16) to 1.8 times (float16) as long as for float32 on an EPYC with AVX512-BF16, and 1.7
    times on a Xeon. `csrc/cpu/gemm_bf16.cpp` is for those: their vectors multiply bfloat16 twice as fast as float32.
    """
    module = extension(build=False)
    if module is None or dtype not in _HAS_TILES:
        return None
    if module.has_mm_16bit() and _HAS_TILES[dtype]():
        return "mkl"
    return "fastkd" if dtype == torch.bfloat16 and module.variant() == "avx512" and module.has_bf16_gemm() else None


def is_built() -> bool:
    """Whether the extension for these sources, compiler flags, Python and torch is there; never compiles."""
    return extension(build=False) is not None


def extension(build: bool) -> Any:
    """The compiled module; None if there is none that can be used and none is to be built.

    RuntimeError with the compiler's words if it cannot be built, ValueError for a FASTKD_CPU_VARIANT that this CPU does not have.
    """
    module = _library.get(build=build)
    if module is not None:
        _choose_variant(module)
    return module


@functools.cache
def _choose_variant(module: Any) -> None:
    """Let FASTKD_CPU_VARIANT, if it is set, choose the row kernel's variant, once a process; else it is the best that the CPU has."""
    name, known = os.environ.get("FASTKD_CPU_VARIANT"), module.variants()
    if name and name not in known:
        raise ValueError(f"FASTKD_CPU_VARIANT is {name!r}, and this CPU has {', '.join(known)}; choose one of these or unset it.")
    module.choose_variant(name or known[0])


def _load(library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(_stem(), str(library))
    spec = importlib.util.spec_from_loader(_stem(), loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile() -> bytes:
    """The library's content, made in a folder of our own, so that no killed process's lock is ever waited for."""
    from torch.utils.cpp_extension import get_cxx_compiler, load

    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise RuntimeError(
            f"The C++ kernels could not be compiled: there is no {compiler} here. Install a C++20 compiler (g++ 12 or newer), or "
            "name it by CXX; until then backend='torch' serves, with the same numbers."
        )
    try:
        with TemporaryDirectory() as folder:
            load(
                _stem(),
                [str(source) for source in _sources()],
                extra_cflags=_COMPILE_FLAGS,
                extra_ldflags=_LINK_FLAGS,
                build_directory=folder,
            )
            return (Path(folder) / f"{_stem()}.so").read_bytes()
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"The C++ kernels could not be compiled: {error} Use backend='torch', or install a compiler.") from error


def _sources(pattern: str = "cpu/*.cpp") -> list[Path]:
    from .. import csrc

    return sorted(Path(csrc.__path__[0]).glob(pattern))


@functools.cache
def _stem() -> str:
    """The module's name, which changes with the sources, the compiler's flags, the processor, Python and torch."""
    stamp = f"{torch.__version__} {sys.implementation.cache_tag} {platform.machine()} {_COMPILE_FLAGS} {_LINK_FLAGS}"
    files = [*_sources("cpu/*.*"), *_sources("*.h")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + stamp.encode())
    return f"fastkd_cpu_{digest.hexdigest()[:16]}"


_library = CompiledLibrary("C++ kernels", "fastkd.ops.backend_cpp", stem=_stem, compile_=_compile, load=_load)


if __name__ == "__main__":
    try:
        extension(build=True)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"fastkd: {error}")
    if not _library.is_kept:
        sys.exit(1)
    print("fastkd: the C++ kernels are compiled.")
