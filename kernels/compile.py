"""`python -m fastkd.kernels.compile` compiles every Triton and CUDA kernel ahead of time, without a GPU: what does it take?

One line a variant and architecture: registers a thread, shared memory, spilled bytes and, for the row kernels, the instructions an
element over the main loops of all passes. Exits with 1 if a variant spills, a main loop holds a barrier or loads fewer than 16 bytes at
once, or there are more instructions than `instruction_counts.json` says. `--write` writes that table anew.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.language as tl
from triton import compile as compile_
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..csrc import nvcc
from . import relation, rows, sass, topk
from .sass import Resources, resources

ARCHITECTURES = (80, 90, 100)
MAIN_ARCHITECTURE = 90
CUDA_WARPS = 16  # `warps` of csrc/cuda/rows.cu
TABLE = Path(__file__).with_name("instruction_counts.json")
"""Instructions an element by variant and architecture."""

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Variant:
    """One compilation: types of the arguments that are pointers or numbers, values of those that are compile-time constants."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    element_bytes: int = 0
    """What a pass loads for one element; 0: its instructions are not counted."""
    vector: int = 1
    """How many elements a 16-byte load brings; 1 where rows are not aligned."""

    def compile(self, architecture: int) -> Any:
        """Triton's compiled kernel for sm_`architecture`: `.asm` has every stage from "ttir" to "cubin"."""
        # Triton knows a kernel's arguments by position; one that is absent is the constant None.
        constants = {name: self.constants.get(name) for name in self.kernel.arg_names if name not in self.types}
        signature = {name: self.types.get(name, "constexpr") for name in self.kernel.arg_names}
        aligned = [
            i
            for i, (name, type_) in enumerate(signature.items())
            if type_.startswith(("*", "i")) and name not in self.kernel.do_not_specialize
        ]
        source = ASTSource(self.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
        return compile_(source, target=GPUTarget("cuda", architecture, 32), options=dict(self.options))


def variants() -> Iterator[tuple[Variant, int]]:
    """What dispatch launches, and for which architecture: the commonest for all, around it on one what else a call can change."""
    commonest = [row_variant(kind, labels=kind == "none") for kind in rows.KINDS] + [topk_variant("bucket")]
    yield from itertools.product(commonest, ARCHITECTURES)
    rarer = itertools.chain(row_variants(), topk_variants(), relation_variants())
    yield from ((variant, MAIN_ARCHITECTURE) for variant in rarer)


def row_variants() -> Iterator[Variant]:
    """Around the commonest kind from float32 logits to a bfloat16 gradient, what else a call can change."""
    yield row_variant("forward_kl", labels=True)
    yield row_variant("forward_kl", labels=True, statistics=True, softcap=True, bias=True)
    yield row_variant("forward_kl", gradient=None)
    yield row_variant("forward_kl", aligned=False)
    yield row_variant("forward_kl", student="bf16", teacher="bf16")
    yield row_variant("forward_kl", student="bf16")
    yield row_variant("forward_kl", student="fp64", teacher="fp64", gradient="fp64")


def row_variant(
    kind: str,
    *,
    student: str = "fp32",
    teacher: str = "fp32",
    gradient: str | None = "bf16",
    labels: bool = False,
    statistics: bool = False,
    softcap: bool = False,
    bias: bool = False,
    aligned: bool = True,
) -> Variant:
    has_teacher = kind != "none"
    logits = [student, teacher] if has_teacher else [student]
    arithmetic = "fp64" if student == "fp64" else "fp32"
    vectors = {"row_weight": True, "label_weight": labels, "divergence_out": has_teacher, "cross_entropy_out": labels}
    vectors |= dict.fromkeys(("student_entropy_out", "teacher_entropy_out", "agreement_out", "acceptance_out"), statistics)
    vectors |= {"student_bias": bias, "teacher_bias": bias and has_teacher}
    types = _number_types(rows.softmax_divergence_kernel) | {"student": f"*{student}"}
    types |= {name: f"*{arithmetic}" for name, present in vectors.items() if present}
    if has_teacher:
        types["teacher"] = f"*{teacher}"
    if gradient is not None:
        types["gradient"] = f"*{gradient}"
    if labels:
        types["labels"] = "*i64"
    switches = {"labels": labels, "statistics": statistics, "softcap": softcap, "bias": bias, "unaligned": not aligned}
    vector = 16 // min(_BYTES[name] for name in logits) if aligned else 1
    counted = sum(_BYTES[name] + bias * _BYTES[arithmetic] for name in logits)
    return Variant(
        name=" ".join(["rows", kind, f"{'/'.join(dict.fromkeys(logits))}>{gradient}", *(name for name, on in switches.items() if on)]),
        kernel=rows.softmax_divergence_kernel,
        types=types,
        constants={
            "KIND": kind,
            "STUDENT_SOFTCAP": softcap,
            "TEACHER_SOFTCAP": softcap and has_teacher,
            "VECTOR": vector,
            "BLOCK": rows.BLOCK,
        },
        options=rows.launch_options(kind, arithmetic == "fp64", extras=softcap or bias),
        element_bytes=counted if arithmetic == "fp32" else 0,
        vector=vector,
    )


def topk_variants() -> Iterator[Variant]:
    """The other tails and divergences, and around the commonest what else a call can change."""
    for tail in topk.TAILS[1:]:
        yield topk_variant(tail)
    for kind in rows.KINDS[2:]:
        yield topk_variant("bucket", kind=kind)
    yield topk_variant("bucket", block_k=topk.LONGEST_LIST, labels=True, softcap=True, bias=True)
    yield topk_variant("bucket", kind="skew_rkl", block_k=topk.LONGEST_LIST, labels=True, softcap=True, bias=True)
    yield topk_variant("bucket", gradient=None)
    yield topk_variant("bucket", aligned=False)
    yield topk_variant("bucket", logits="fp64", gradient="fp64", block_k=topk.LONGEST_LIST)
    yield topk_variant("bucket", kind="skew_rkl", logits="fp64", gradient="fp64", block_k=topk.LONGEST_LIST)


def topk_variant(
    tail: str,
    *,
    kind: str = "forward_kl",
    logits: str = "fp32",
    gradient: str | None = "bf16",
    block_k: int = 64,
    labels: bool = False,
    softcap: bool = False,
    bias: bool = False,
    aligned: bool = True,
) -> Variant:
    arithmetic = "fp64" if logits == "fp64" else "fp32"
    vectors = {"row_weight": True, "divergence_out": True, "label_weight": labels, "cross_entropy_out": labels, "student_bias": bias}
    types = _number_types(topk.topk_divergence_kernel) | {"student": f"*{logits}", "ids": "*i64", "log_probabilities": "*fp32"}
    types |= {name: f"*{arithmetic}" for name, present in vectors.items() if present}
    if tail == "bucket":
        types["log_tail"] = "*fp32"
    if gradient is not None:
        types["gradient"] = f"*{gradient}"
    if labels:
        types["labels"] = "*i64"
    switches = {"labels": labels, "softcap": softcap, "bias": bias, "unaligned": not aligned}
    other = [kind] if kind != "forward_kl" else []
    vector = 16 // _BYTES[logits] if aligned else 1
    return Variant(
        name=" ".join(["topk", tail, *other, f"K{block_k}", f"{logits}>{gradient}", *(name for name, on in switches.items() if on)]),
        kernel=topk.topk_divergence_kernel,
        types=types,
        constants={"KIND": kind, "TAIL": tail, "SOFTCAP": softcap, "BLOCK_K": block_k, "VECTOR": vector, "BLOCK": topk.BLOCK},
        options=topk.launch_options(block_k, arithmetic == "fp64"),
        element_bytes=_BYTES[logits] + bias * _BYTES[arithmetic] if arithmetic == "fp32" else 0,
        vector=vector,
    )


def _number_types(kernel: Any) -> dict[str, str]:
    """The types that a kernel annotates its numbers with."""
    short = {"int32": "i32", "int64": "i64", "fp64": "fp64"}
    return {name: short[type_.name] for name, type_ in kernel.fn.__annotations__.items() if isinstance(type_, tl.dtype)}


def relation_variants() -> Iterator[Variant]:
    """Each kernel at every width and dtype; at the commonest, what else a call can change.

    Not here: head sizes that are no multiples of 16. Their elements are loaded one by one, for which some registers spill.
    """
    for kernel in ("rows", "queries", "keys"):
        for size, dtype in itertools.product((16, 32, 64, 128), ("fp32", "bf16")):
            yield relation_variant(kernel, size, dtype)
        yield relation_variant(kernel, 64, "bf16", mask=False)
        yield relation_variant(kernel, 64, "bf16", cross_entropy=kernel == "rows", add=kernel != "rows")


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


def cuda_kernels(cubin: bytes) -> dict[str, tuple[Resources, float]]:
    """The CUDA row kernels of a cubin: what each takes beside the slices of a row, and its instructions an element."""
    counted = sass.cuda_instructions(cubin)
    return {f"cuda {name}": (took, counted[name]) for name, took in sass.resources_by_function(cubin).items()}


def count(variant: Variant, cubin: bytes) -> tuple[float, list[str]]:
    """Instructions an element over the main loops of all passes, and what is wrong with these loops, in words."""
    total, faults = 0.0, []
    for loop in sass.main_loops(cubin):
        total += loop.instructions / (sum(loop.load_bytes) / variant.element_bytes)
        if loop.barriers:
            faults.append(f"a main loop holds {loop.barriers} barriers; lanes meet after the loop")
        if variant.vector > 1 and min(loop.load_bytes) < 16:
            faults.append(f"a main loop loads {min(loop.load_bytes)} bytes at once; 16 are possible")
    return round(total, 2), faults


def main(arguments: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to compile.", file=sys.stderr)
        return 2
    known = {} if "--write" in arguments else json.loads(TABLE.read_text())
    counts: dict[str, dict[str, float]] = {}
    faults = []

    def note_count(name: str, arch: str, now: float) -> None:
        counts.setdefault(name, {})[arch] = now
        before = known.get(name, {}).get(arch)
        if before is not None and now > before:
            faults.append(f"{name} on {arch} takes {now} instructions an element, {before} before")
        if before is None and "--write" not in arguments:
            faults.append(f"{name} on {arch} is not in {TABLE.name}; add it with --write")

    print(f"{'kernel':<56} {'arch':>6} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6} {'instructions':>12}")
    for variant, architecture in variants():
        compiled = variant.compile(architecture)
        took = resources(compiled.asm["cubin"])
        name, arch = variant.name, f"sm_{architecture}"
        shown = ""
        if took.spills:
            faults.append(
                f"{name} on {arch} spills {took.spills} bytes; use fewer elements a thread or fewer programs a multiprocessor"
            )
        if variant.element_bytes:
            now, wrong = count(variant, compiled.asm["cubin"])
            faults += [f"{name} on {arch}: {words}" for words in wrong]
            note_count(name, arch, now)
            shown = f"{now:.1f}"
        shared = max(took.shared, compiled.metadata.shared)
        head = f"{name:<56} {arch:>6} {variant.options['num_warps']:>5}"
        print(f"{head} {took.registers:>9} {shared:>7} {took.spills:>6} {shown:>12}", flush=True)
    code = nvcc.shipped() if nvcc.find() is None else nvcc.build()
    if code is None:
        print("nvcc was not found: the CUDA row kernel is left out.")
    else:
        for name, (took, now) in cuda_kernels(code).items():
            if took.spills:
                faults.append(f"{name} spills {took.spills} bytes")
            note_count(name, "sm_90a", now)
            head = f"{name:<56} {'sm_90a':>6} {CUDA_WARPS:>5}"
            print(f"{head} {took.registers:>9} {took.shared:>7} {took.spills:>6} {now:>12.1f}", flush=True)
    for words in faults:
        print(f"error: {words}.", file=sys.stderr)
    if "--write" in arguments and not faults:
        TABLE.write_text(json.dumps(counts, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
