"""The C++ row kernel on the CPU (`csrc/cpu/rows.cpp`): compiled once per source and torch version, found again in later processes.

`python -m fastkd.ops.cpp` compiles it ahead of time; `backend="cpp"` does when it has to; `backend="auto"` takes it if it is there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..files import write_bytes_atomic
from .rows import LogitTransform, RowLosses, RowOptions

_KINDS = {"forward_kl": 1, "reverse_kl": 2, "tvd": 3, "jsd": 4, "skew_kl": 5, "skew_rkl": 6}
# __FAST_MATH__ alone makes glibc declare the vector forms of exp, log and tanh; infinities and NaN keep their meaning.
_COMPILE_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-D__FAST_MATH__=1"]
_LINK_FLAGS = ["-lmvec", "-lm"] if platform.system() == "Linux" and platform.machine() == "x86_64" else []


def softmax_divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    options: RowOptions,
    out: RowLosses,
    *,
    row_weight: Tensor,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    gradient: bool = True,
) -> None:
    """`fastkd.ops.rows.softmax_divergence_` in one compiled pass a row; the teacher's logits are scratch afterwards."""
    divergence = options.divergence
    extension(build=True).softmax_divergence_(
        student_logits,
        teacher_logits,
        0 if divergence is None else _KINDS[divergence.kind],
        0.5 if divergence is None or divergence.mixing is None else divergence.mixing,
        options.temperature,
        *_transform(options.student),
        *_transform(options.teacher),
        row_weight,
        labels,
        label_weight,
        [out.divergence, out.cross_entropy, out.student_entropy, out.teacher_entropy, out.top1_agreement],
        gradient,
    )


def is_built() -> bool:
    """Whether the extension for this source, compiler flags, Python and torch is there; never compiles."""
    return extension(build=False) is not None


@functools.cache
def extension(build: bool) -> Any:
    """The compiled module; None if it is not there and not to be built. RuntimeError with the compiler's words if it cannot be."""
    name = f"fastkd_cpu_{_fingerprint()}"
    library = _cache_folder() / f"{name}.so"
    if library.is_file():
        loader = importlib.machinery.ExtensionFileLoader(name, str(library))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    return _compile(name, library) if build else None


def _compile(name: str, library: Path) -> Any:
    """Compile in a folder of our own, so that no killed process's lock is ever waited for, and put the library in place whole."""
    from torch.utils.cpp_extension import load

    try:
        with TemporaryDirectory() as folder:
            module = load(name, [str(_source())], extra_cflags=_COMPILE_FLAGS, extra_ldflags=_LINK_FLAGS, build_directory=folder)
            library.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(library, (Path(folder) / library.name).read_bytes())
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"The C++ row kernel could not be compiled: {error} Use backend='torch', or install a compiler.") from error
    return module


def _source() -> Path:
    from .. import csrc

    return Path(csrc.__path__[0]) / "cpu" / "rows.cpp"


def _fingerprint() -> str:
    stamp = f"{torch.__version__} {sys.implementation.cache_tag} {_COMPILE_FLAGS} {_LINK_FLAGS}"
    return hashlib.sha256(_source().read_bytes() + stamp.encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd"


def _transform(transform: LogitTransform) -> tuple[float, float]:
    return transform.scale, transform.softcap or 0.0


if __name__ == "__main__":
    extension(build=True)
    print("fastkd: the C++ row kernel is compiled.")
