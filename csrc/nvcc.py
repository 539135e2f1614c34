"""Floor 1: how nvcc compiles the CUDA sources of this folder, for use (`fastkd.ops.cuda`) and for a look (`fastkd.kernels.compile`)."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

_FOLDER = Path(__file__).parent / "cuda"
_SOURCE = _FOLDER / "rows.cu"
# Machine code alone: sm_90a runs on no later architecture, so that PTX would serve nobody.
_FLAGS = ("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC")


def find() -> str | None:
    """nvcc on PATH, or else below $CUDA_HOME or in the toolkit's usual place."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"))


def fingerprint() -> str:
    """Changes with the sources, the flags and the processor."""
    digest = hashlib.sha256(" ".join((platform.machine(), *_FLAGS)).encode())
    for path in sorted(_FOLDER.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> bytes:
    """The row kernel as a shared library. RuntimeError with the compiler's words if there is none or it fails."""
    nvcc = find()
    if nvcc is None:
        raise RuntimeError("nvcc was not found on PATH or below $CUDA_HOME. Install the CUDA toolkit 12 or newer.")
    with TemporaryDirectory() as folder:
        made = Path(folder) / "rows.so"
        done = subprocess.run([nvcc, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {_SOURCE.name}:\n{done.stdout}{done.stderr}")
        return made.read_bytes()
