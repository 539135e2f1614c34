"""Floor 1: `python -m fastkd.kernels.compile` compiles every Triton kernel ahead of time, without a GPU, and reports what it takes.

One line a variant and architecture: registers a thread, shared memory and spilled bytes. Exits with 1 if any variant spills.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gather, rows

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Variant:
    """One compilation: types of the arguments that are pointers or numbers, values of those that are compile-time constants."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: bool = True
    """Whether pointers, sizes and strides are known to be multiples of 16, as for a padded vocabulary."""

    def compile(self, architecture: int) -> Any:
        """Triton's compiled kernel for sm_`architecture`: `.asm` has every stage from "ttir" to "cubin"."""
        # Triton knows a kernel's arguments by position; one that is absent is the constant None.
        constants = {name: self.constants.get(name) for name in self.kernel.arg_names if name not in self.types}
        signature = {name: self.types.get(name, "constexpr") for name in self.kernel.arg_names}
        aligned = [i for i, type_ in enumerate(signature.values()) if type_.startswith("*") or (self.aligned and type_.startswith("i"))]
        source = ASTSource(self.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(self.options))


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of shared memory a block, bytes of spills and stack a thread."""

    registers: int
    shared: int
    spills: int


def variants() -> Iterator[Variant]:
    """What dispatch launches: every kind bare, with labels and with everything; around the commonest, what else a call can change."""
    for kind in rows.KINDS:
        if kind != "none":
            yield row_variant(kind)
        yield row_variant(kind, label_weight=True)
        yield row_variant(kind, label_weight=True, softcap=True, stats=kind != "none")
    yield row_variant("forward_kl", aligned=False)
    yield row_variant("forward_kl", gradient=False)
    yield row_variant("forward_kl", softcap=True)
    yield row_variant("forward_kl", stats=True)
    yield row_variant("forward_kl", logits="bf16")
    yield row_variant("forward_kl", logits="fp64")
    for is_rows, dtype in itertools.product((True, False), ("bf16", "fp32")):
        yield gather_variant(is_rows, dtype)


def row_variant(
    kind: str,
    *,
    logits: str = "fp32",
    label_weight: bool = False,
    softcap: bool = False,
    stats: bool = False,
    gradient: bool = True,
    aligned: bool = True,
) -> Variant:
    has_teacher = kind != "none"
    vectors = {"row_weight": True, "label_weight": label_weight, "divergence_out": has_teacher, "cross_entropy_out": label_weight}
    vectors |= dict.fromkeys(("student_entropy_out", "teacher_entropy_out", "agreement_out"), stats)
    scalars = ("temperature", "mixing", "student_scale", "student_softcap", "teacher_scale", "teacher_softcap")
    types = {"student": f"*{logits}", "student_stride": "i32", "teacher_stride": "i32", "vocabulary": "i32"}
    types |= {name: "*fp64" if logits == "fp64" else "*fp32" for name, present in vectors.items() if present}
    types |= dict.fromkeys(scalars, "fp64")
    if has_teacher:
        types["teacher"] = f"*{logits}"
    if label_weight:
        types["labels"] = "*i64"
    switches = {"labels": label_weight, "softcap": softcap, "stats": stats, "no gradient": not gradient, "unaligned": not aligned}
    return Variant(
        name=" ".join(["rows", kind, logits, *(name for name, on in switches.items() if on)]),
        kernel=rows.softmax_divergence_kernel,
        types=types,
        constants={
            "KIND": kind,
            "HAS_LABELS": label_weight,
            "HAS_LABEL_WEIGHT": label_weight,
            "STUDENT_SOFTCAP": softcap,
            "TEACHER_SOFTCAP": softcap and has_teacher,
            "WANTS_GRADIENT": gradient,
            "WANTS_STATS": stats,
            "BLOCK": rows.BLOCK,
        },
        options=rows.launch_options(bare=not (label_weight or softcap or stats)),
        aligned=aligned,
    )


def gather_variant(is_rows: bool, dtype: str) -> Variant:
    sizes = ("source_row_stride", "vocabulary", "out_row_stride", "out_columns")
    return Variant(
        name=f"gather {'rows' if is_rows else 'columns'} {dtype}",
        kernel=gather.vocab_gather_kernel,
        types={"source": f"*{dtype}", "index": "*i64", "out": f"*{dtype}"} | dict.fromkeys(sizes, "i32"),
        constants={"source_column_stride": 1, "ROWS": is_rows, "BLOCK": gather.BLOCK},
        options={"num_warps": gather.WARPS},
    )


def resources(cubin: bytes) -> Resources:
    """What `cuobjdump --dump-resource-usage` says of a compiled kernel; STACK and LOCAL are where spilled registers live."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    return Resources(numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to compile.", file=sys.stderr)
        return 2
    print(f"{'kernel':<44} {'arch':>6} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6}")
    spilling = 0
    for variant, architecture in itertools.product(variants(), ARCHITECTURES):
        compiled = variant.compile(architecture)
        took = resources(compiled.asm["cubin"])
        spilling += took.spills > 0
        shared = max(took.shared, compiled.metadata.shared)
        head = f"{variant.name:<44} {f'sm_{architecture}':>6} {variant.options['num_warps']:>5}"
        print(f"{head} {took.registers:>9} {shared:>7} {took.spills:>6}", flush=True)
    if spilling:
        print(f"error: {spilling} variants spill registers; use more warps or a smaller block.", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
