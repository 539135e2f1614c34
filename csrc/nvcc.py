"""How nvcc compiles the CUDA sources of this folder. `python -m fastkd.csrc.nvcc` makes the machine code that is shipped with them."""

import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "cuda" / "rows.cu"
CODE, STAMP = _FOLDER / "cuda" / "rows.sm_90a.cubin.gz", _FOLDER / "cuda" / "rows.sm_90a.json"
"""The machine code that is shipped, and what it was made from and by."""
# sm_90a runs on no later architecture, so that PTX would serve nobody.
_FLAGS = ("-std=c++17", "-O3", "-arch=sm_90a", "-cubin")


def find() -> str | None:
    """nvcc on PATH, or else below $CUDA_HOME or in the toolkit's usual place."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"))


def fingerprint() -> str:
    """Changes with the sources and the flags."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("cuda/*.cu"), *_FOLDER.glob("cuda/*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> bytes:
    """The row kernel as a cubin. RuntimeError with the compiler's words if there is none or it fails."""
    with TemporaryDirectory() as folder:
        made = Path(folder) / "rows.cubin"
        _run(*_FLAGS, str(_SOURCE), "-o", str(made))
        return made.read_bytes()


@functools.cache
def shipped() -> bytes | None:
    """The cubin that lies beside the sources; None if it is missing, damaged or of other sources."""
    try:
        code, stamp = gzip.decompress(CODE.read_bytes()), json.loads(STAMP.read_text())
        is_whole = stamp["cubin"] == hashlib.sha256(code).hexdigest() and stamp["sources"] == fingerprint()
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return code if is_whole else None


def ship() -> None:
    """Compile the cubin and put it beside the sources."""
    code = build()
    version = re.search(r"release [\d.]+, V([\d.]+)", _run("--version"))
    stamp = {
        "sources": fingerprint(),
        "flags": " ".join(_FLAGS),
        "nvcc": version[1] if version else "unknown",
        "cubin": hashlib.sha256(code).hexdigest(),
    }
    CODE.write_bytes(gzip.compress(code, mtime=0))
    STAMP.write_text(json.dumps(stamp, indent=2) + "\n")


def _run(*arguments: str) -> str:
    """What nvcc says."""
    nvcc = find()
    if nvcc is None:
        raise RuntimeError("nvcc was not found on PATH or below $CUDA_HOME. Install the CUDA toolkit 12 or newer.")
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {_SOURCE.name}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    ship()
    print(f"fastkd: wrote {CODE.name}, {CODE.stat().st_size // 1024} KiB.")
