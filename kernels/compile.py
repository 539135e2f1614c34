"""Floor 1: `python -m fastkd.kernels.compile` compiles every Triton and CUDA kernel ahead of time, without a GPU: what does it take?

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

from ..csrc import nvcc
from . import gather, relation, rows, topk

ARCHITECTURES = (80, 90, 100)
CUDA_WARPS = 16  # `warps` of csrc/cuda/rows.cu


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
        numbers = [name for name, type_ in signature.items() if type_.startswith("i") and name not in self.kernel.do_not_specialize]
        aligned = [
            i for i, (name, type_) in enumerate(signature.items()) if type_.startswith("*") or (self.aligned and name in numbers)
        ]
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
    yield row_variant("forward_kl", gradient=None)
    yield row_variant("forward_kl", softcap=True)
    yield row_variant("forward_kl", stats=True)
    yield row_variant("forward_kl", logits="bf16", gradient="bf16")
    yield row_variant("forward_kl", gradient="bf16")
    yield row_variant("jsd", gradient="bf16")
    yield row_variant("forward_kl", logits="fp64", gradient="fp64")
    for is_rows, dtype in itertools.product((True, False), ("bf16", "fp32")):
        yield gather_variant(is_rows, dtype)
    yield from topk_variants()
    yield from relation_variants()


def row_variant(
    kind: str,
    *,
    logits: str = "fp32",
    label_weight: bool = False,
    softcap: bool = False,
    stats: bool = False,
    gradient: str | None = "fp32",
    aligned: bool = True,
) -> Variant:
    has_teacher = kind != "none"
    vectors = {"row_weight": True, "label_weight": label_weight, "divergence_out": has_teacher, "cross_entropy_out": label_weight}
    vectors |= dict.fromkeys(("student_entropy_out", "teacher_entropy_out", "agreement_out"), stats)
    scalars = ("temperature", "mixing", "student_scale", "student_softcap", "teacher_scale", "teacher_softcap")
    types = {"student": f"*{logits}", "vocabulary": "i32"}
    types |= dict.fromkeys(("student_stride", "teacher_stride", "gradient_stride"), "i32")
    types |= {name: "*fp64" if logits == "fp64" else "*fp32" for name, present in vectors.items() if present}
    types |= dict.fromkeys(scalars, "fp64")
    if has_teacher:
        types["teacher"] = f"*{logits}"
    if gradient is not None:
        types["gradient"] = f"*{gradient}"
    if label_weight:
        types["labels"] = "*i64"
    switches = {"labels": label_weight, "softcap": softcap, "stats": stats, "unaligned": not aligned}
    switches |= {"no gradient": gradient is None, f"{gradient} gradient": gradient not in (None, logits)}
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
            "WANTS_GRADIENT": gradient is not None,
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


def topk_variants() -> Iterator[Variant]:
    """Every tail bare and with labels and soft-cap; around the commonest, the longest lists and what else a call can change."""
    for tail in topk.TAILS:
        yield topk_variant(tail)
        yield topk_variant(tail, labels=True, softcap=True)
    yield topk_variant("bucket", labels=True)
    yield topk_variant("bucket", block_k=512)
    yield topk_variant("bucket", block_k=topk.LONGEST_LIST, labels=True, softcap=True)
    yield topk_variant("bucket", gradient=None)
    yield topk_variant("bucket", gradient="bf16")
    yield topk_variant("bucket", logits="bf16", gradient="bf16")
    yield topk_variant("bucket", logits="fp64", gradient="fp64", block_k=topk.LONGEST_LIST, labels=True, softcap=True)
    yield topk_variant("bucket", aligned=False)


def topk_variant(
    tail: str,
    *,
    logits: str = "fp32",
    gradient: str | None = "fp32",
    block_k: int = 64,
    labels: bool = False,
    softcap: bool = False,
    aligned: bool = True,
) -> Variant:
    accurate = "*fp64" if logits == "fp64" else "*fp32"
    strides = [name for name in topk.topk_divergence_kernel.arg_names if name.endswith("_stride")]
    types = {"student": f"*{logits}", "ids": "*i64", "log_probabilities": "*fp32", "row_weight": accurate, "divergence_out": accurate}
    types |= dict.fromkeys((*strides, "vocabulary", "entries"), "i32") | dict.fromkeys(("temperature", "scale", "softcap"), "fp64")
    if tail == "bucket":
        types["log_tail"] = "*fp32"
    if gradient is not None:
        types["gradient"] = f"*{gradient}"
    if labels:
        types |= {"labels": "*i64", "label_weight": accurate, "cross_entropy_out": accurate}
    switches = {"labels": labels, "softcap": softcap, "unaligned": not aligned}
    return Variant(
        name=" ".join(["topk", tail, f"K{block_k}", f"{logits}>{gradient}", *(name for name, on in switches.items() if on)]),
        kernel=topk.topk_divergence_kernel,
        types=types,
        constants={
            "TAIL": tail,
            "HAS_LABELS": labels,
            "HAS_LABEL_WEIGHT": labels,
            "SOFTCAP": softcap,
            "WANTS_GRADIENT": gradient is not None,
            "BLOCK_K": block_k,
            "BLOCK": topk.BLOCK,
        },
        options=topk.launch_options(block_k, double=logits == "fp64"),
        aligned=aligned,
    )


def relation_variants() -> Iterator[Variant]:
    """Each kernel at every width and dtype; at the commonest widths, what else a call can change.

    Not here: head sizes that are no multiples of 16. Their elements are loaded one by one, for which some registers spill.
    """
    for kernel in ("rows", "queries", "keys"):
        for size, dtype in itertools.product((16, 32, 64, 128), ("fp32", "bf16")):
            yield relation_variant(kernel, size, dtype)
        for size, dtype in itertools.product((64, 128), ("fp32", "bf16")):
            yield relation_variant(kernel, size, dtype, mask=False)
            yield relation_variant(kernel, size, dtype, cross_entropy=kernel == "rows", add=kernel != "rows")
        yield relation_variant(kernel, 64, "bf16", teacher="fp32")


def relation_variant(
    kernel: str,
    size: int,
    dtype: str,
    *,
    teacher: str | None = None,
    mask: bool = True,
    cross_entropy: bool = False,
    add: bool = False,
) -> Variant:
    """`kernel` "rows" fills the divergences, which may be cross-entropies; "queries" and "keys" make a gradient, which may be added."""
    is_rows, teacher = kernel == "rows", teacher or dtype
    function = relation.relation_rows_kernel if is_rows else relation.relation_gradient_kernel
    served, streamed = relation.tile("fp32" not in (dtype, teacher))
    numbers = [name for name in function.arg_names if name.endswith(("_stride", "_size")) or name in ("heads", "length")]
    vectors = ("row_statistics", "divergence") if is_rows else ("row_statistics", "row_weight", "gradient")
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("student_scale", "teacher_scale"), "fp32") | dict.fromkeys(vectors, "*fp32")
    types |= {name: f"*{dtype if name.startswith('student') else teacher}" for name in function.arg_names[:4]}
    if mask:
        types["key_mask"] = "*i1"
    constants = {"SERVED": served, "STREAMED": streamed, "SIZE": relation.width(size)}
    constants |= {"CROSS_ENTROPY": cross_entropy} if is_rows else {"OF_KEYS": kernel == "keys", "ADD": add}
    switches = {"no mask": not mask, "cross-entropy": cross_entropy, "add": add}
    dtypes = dtype if teacher == dtype else f"{dtype}/{teacher}"
    return Variant(
        name=" ".join([f"relation {kernel} d{size} {dtypes}", *(name for name, on in switches.items() if on)]),
        kernel=function,
        types=types,
        constants=constants,
        options=relation.launch_options(served),
    )


def cuda_resources(library: bytes) -> dict[str, Resources]:
    """The CUDA row kernel's instantiations in what nvcc built. Shared memory for the slices of a row comes on top."""
    took = {}
    for function, of_function in _resources_by_function(library).items():
        name = re.search(r"softmax_divergenceI(f|13__nv_bfloat16)LN\w+KindE(\d)ELb([01])E", function)
        assert name is not None, function
        logits = "fp32" if name[1] == "f" else "bf16"
        took[f"cuda rows {rows.KINDS[int(name[2])]} {logits}{' extras' if name[3] == '1' else ''}"] = of_function
    return took


def resources(cubin: bytes) -> Resources:
    """What a cubin of one kernel takes."""
    (took,) = _resources_by_function(cubin).values()
    return took


def _resources_by_function(binary: bytes) -> dict[str, Resources]:
    """What `cuobjdump --dump-resource-usage` says of compiled kernels; STACK and LOCAL are where spilled registers live."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels"
        path.write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    took = {}
    for function, line in re.findall(r"Function (\S+):\s+(REG:.*)", said):
        numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        took[function] = Resources(numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])
    return took


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
    if nvcc.find() is None:
        print("nvcc was not found: the CUDA row kernel is left out.")
    else:
        for name, took in cuda_resources(nvcc.build()).items():
            spilling += took.spills > 0
            print(f"{name:<44} {'sm_90a':>6} {CUDA_WARPS:>5} {took.registers:>9} {took.shared:>7} {took.spills:>6}", flush=True)
    if spilling:
        print(f"error: {spilling} variants spill registers; use more warps or a smaller block.", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
