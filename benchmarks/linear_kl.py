"""Claim: `linear_kl_div` is exact, keeps one chunk of logits, and costs little above the four GEMMs that no exact method can avoid.

Forward and backward of forward KL from hidden states and heads, every implementation in one run: interleaved, medians, ratio to the
GEMMs alone; peak memory above inputs and gradients, each in a process of its own; relative L2 error of the student's gradient against
float64 where student and teacher are close. `python benchmarks/linear_kl.py` writes benchmarks/results/linear_kl_<device>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import stamp
from torch import Tensor

import fastkd

TOKENS, VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 4096, 30_522, 384, 768
CHUNK = 512
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def gemms_alone(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
    """The four dense products in chunks into preallocated buffers: the floor."""
    with torch.no_grad():
        logits, other = student.new_empty(CHUNK, VOCABULARY), student.new_empty(CHUNK, VOCABULARY)
        grad_hidden, grad_head = torch.empty_like(student), torch.zeros_like(head)
        for start in range(0, len(student), CHUNK):
            rows = slice(start, start + CHUNK)
            torch.mm(student[rows], head.T, out=logits)
            torch.mm(teacher[rows], teacher_head.T, out=other)
            torch.mm(logits, head, out=grad_hidden[rows])
            grad_head.addmm_(logits.T, student[rows])


def eager(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
    """What one writes first: all logits, float32 softmax."""
    log_q = F.linear(student, head).float().log_softmax(-1)
    log_p = F.linear(teacher, teacher_head).float().log_softmax(-1)
    F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()


def fused(backend: str) -> Callable[..., None]:
    def run(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
        loss = fastkd.linear_kl_div(student, head, teacher, teacher_head, backend=backend)
        assert isinstance(loss, Tensor)
        loss.backward()

    return run


def liger(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
    """Liger's chunked loss at beta = 0, forward KL alone, as TRL called it (not compiled)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    loss(student, head, teacher, teacher_head, torch.zeros(len(student), dtype=torch.int64)).backward()


def trl(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
    """TRL's chunked divergence; without a GPU its pure torch twin."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, 0.0)[0].mean().backward()


def torch_cross_entropy(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
    """torch's chunked linear cross-entropy with the teacher's probabilities, all of them, as targets: the same gradient."""
    with torch.no_grad():
        targets = F.linear(teacher, teacher_head).float().softmax(-1).to(student.dtype)
    F.linear_cross_entropy(student, head, targets, options=torch.nn.LinearCrossEntropyOptions()).backward()


def implementations() -> dict[str, Callable[..., None]]:
    """Those that this machine has; the floor first."""
    found = {"GEMMs alone": gemms_alone, "eager": eager, "fastkd torch": fused("torch"), "fastkd cpp": fused("cpp")}
    for module, name, run in (("liger_kernel", "Liger chunked JSD", liger), ("trl", "TRL chunked divergence", trl)):
        if importlib.util.find_spec(module):
            found[name] = run
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch linear_cross_entropy"] = torch_cross_entropy
    return found


IMPLEMENTATIONS = implementations()


def make_inputs(dtype: torch.dtype, tokens: int = TOKENS) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    student, head = normal(tokens, STUDENT_WIDTH), normal(VOCABULARY, STUDENT_WIDTH, scale=0.05)
    return student.requires_grad_(), head.requires_grad_(), normal(tokens, TEACHER_WIDTH), normal(VOCABULARY, TEACHER_WIDTH, scale=0.05)


def times(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of each implementation, interleaved, after one warm-up each."""
    inputs = make_inputs(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for round_number in range(repeats + 1):
        for name, run in IMPLEMENTATIONS.items():
            inputs[0].grad = inputs[1].grad = None
            started = time.perf_counter()
            run(*inputs)
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(name: str, dtype: torch.dtype) -> float:
    """MB above inputs and the two gradients, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--peak", name, str(dtype)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_peak(name: str, dtype: torch.dtype) -> float:
    run = IMPLEMENTATIONS[name]
    small = make_inputs(dtype, tokens=CHUNK)
    run(*small)  # thread pools and GEMM workspaces exist from here on
    del small
    inputs = make_inputs(dtype)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run(*inputs)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    return (int(peak.split()[1]) * 1024 - resident - gradients) / 1e6


def gradient_error(name: str, dtype: torch.dtype, noise: float) -> tuple[float, float]:
    """(true KL, relative L2 error of the gradient of the student's hidden states); student = teacher + noise, one head."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(512, STUDENT_WIDTH, generator=generator).to(dtype)
    head = (torch.randn(VOCABULARY, STUDENT_WIDTH, generator=generator) * 0.3).to(dtype)
    student = (hidden + noise * torch.randn(512, STUDENT_WIDTH, generator=generator)).to(dtype)
    exact = student.double().requires_grad_()
    truth = fastkd.reference.linear_kl_div(exact, head.double(), hidden.double(), head.double())
    assert isinstance(truth, Tensor)
    truth.backward()
    student.requires_grad_()
    IMPLEMENTATIONS[name](student, head.requires_grad_(), hidden, head.detach())
    assert student.grad is not None and exact.grad is not None
    return float(truth.detach()), float((student.grad.double() - exact.grad).norm() / exact.grad.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["torch.float32", "torch.bfloat16"])
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "DTYPE"), help=argparse.SUPPRESS)
    known = parser.parse_args()
    dtypes = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    if known.peak:
        print(measure_peak(known.peak[0], dtypes[known.peak[1]]))
        return
    results: list[dict[str, Any]] = []
    for dtype in (dtypes[name] for name in known.dtypes):
        seconds = times(dtype, known.repeats)
        for name in IMPLEMENTATIONS:
            row: dict[str, Any] = {"implementation": name, "dtype": str(dtype), "seconds": seconds[name]}
            row["ratio_to_gemms"] = seconds[name] / seconds["GEMMs alone"]
            row["peak_mb"] = peak_memory(name, dtype)
            if name != "GEMMs alone":
                row["gradient_error"] = [
                    dict(zip(("kl", "error"), gradient_error(name, dtype, n), strict=True)) for n in (2e-3, 6e-3, 2e-2)
                ]
            results.append(row)
            print(json.dumps(row), flush=True)
    shape = {"tokens": TOKENS, "vocabulary": VOCABULARY, "student_width": STUDENT_WIDTH, "teacher_width": TEACHER_WIDTH}
    out = Path(__file__).parent / "results" / "linear_kl_cpu.json"
    out.write_text(json.dumps({"environment": stamp(), "shape": shape, "repeats": known.repeats, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
