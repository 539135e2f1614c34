"""What the stages of `gpu.py` do, each in its own process: a function of the settings and a name, whose rows follow one another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastkd.csrc import nvcc
from fastkd.ops import plan
from fastkd.ops.selfcheck import Problem, check_ops

from .checks import run_checks, training_plan
from .claim import Settings
from .environment import device_slug, stamp
from .implementations import (
    COMPILED,
    FLOOR,
    FLOOR_FLOAT32_LOGITS,
    Implementation,
    absent,
    eager,
    fused,
    gemms_alone,
    live_backends,
    peers,
    quack_cross_entropy,
    with_gradients,
)
from .memory import peak_bytes
from .problem import GPU_SHAPES, Inputs, Outcome, Shape, make_inputs
from .row_kernel import measure_rows
from .runner import Case, interleaved, stopwatch

Row = dict[str, Any]
FEW_TOKENS = 512
_FOUND = 99
"""The exit status of a sanitizer that found something."""
EAGER = "eager"
QUACK = "quack linear cross-entropy, no teacher"
PLANS = {
    "as planned": (plan.GPU_TILE, None),
    "parts of 512": (256, None),
    "parts of 128": (64, None),
    "chunks of 2048": (plan.GPU_TILE, 2048),
    "one chunk": (plan.GPU_TILE, 1 << 20),
}
"""Half of the tokens of a forward part, and the most tokens of a backward chunk."""


def environment(settings: Settings, _: str) -> Iterator[Row]:
    """One row: what the machine is, and why a backend does not run on it."""
    commands = {shutil.which("nvidia-smi"): ("-q", "-d", "CLOCK,POWER,TEMPERATURE"), nvcc.find(): ("--version",)}
    said = {
        Path(tool).name: subprocess.run([tool, *arguments], capture_output=True, text=True, check=False).stdout
        for tool, arguments in commands.items()
        if tool
    }
    yield {
        "slug": device_slug(settings.device),
        "environment": stamp(settings.device) | {"capability": _capability(settings.device), "tools": said},
        "left_out": live_backends(settings.device)[1],
    }


def sanitized(settings: Settings, name: str) -> Iterator[Row]:
    """What a tool of compute-sanitizer says of a backend's kernels, "TOOL BACKEND", on small vocabularies."""
    tool, backend = name.split()
    program = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--device", settings.device.type]
    program += ["--stage", f"ops: {backend}", os.devnull]
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), *program]
    # Inside torch's cached blocks an access out of bounds is in bounds.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    lines = (done.stdout + done.stderr).splitlines() or ["it said nothing"]
    print(*lines, sep="\n")
    if done.returncode not in (0, _FOUND):
        raise RuntimeError(f"{tool} ended with status {done.returncode}, which is no verdict: {lines[-1]}")
    yield {"check": name, "passed": done.returncode == 0, "seen": lines[-1]}


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or below $CUDA_HOME or the toolkit's usual place."""
    below = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{below}/bin{os.pathsep}{below}/compute-sanitizer"
    )


def ops(_: Settings, backend: str) -> Iterator[Row]:
    """The ops on a vocabulary of one block and one of several, which a sanitizer watches; wrong numbers raise."""
    for vocabulary in (301, 17_001):
        sizes = Problem(vocabulary=vocabulary, student_hidden=64, teacher_hidden=64, dtype="bfloat16", temperature=2.0, tokens=8)
        for check in check_ops(sizes, [backend]):
            if not check.passed:
                raise AssertionError(f"{check} at a vocabulary of {vocabulary}")
            yield {"op": check.op, "vocabulary": vocabulary}


def row_kernel(settings: Settings, backend: str) -> Iterator[Row]:
    """The row kernel alone, on as many rows as `linear_kl_div` calls it with, and on more than the second-level cache holds."""
    vocabularies = settings.choose(cpu=(30_522,), cuda=(128_256, 151_936, 30_522, 50_257), smoke=(500, 501))
    for vocabulary in vocabularies:
        for rows in settings.choose(cpu=(512,), cuda=(256, 2048), smoke=(8,)):
            measured = measure_rows(settings, rows, vocabulary, [backend], ("forward_kl", "reverse_kl", "jsd(0.5)", "tvd"))
            for row in measured["results"]:
                yield {**measured["shape"], **row, "copy_bytes_per_second": measured["copy"]["bytes_per_second"]}


def linear_kl(settings: Settings, backend: str) -> Iterator[Row]:
    """`linear_kl_div` under several plans, beside the products of all tokens at once."""
    for shape in _shapes(settings):
        runs = {name: partial(_planned, *PLANS[name], backend) for name in PLANS}
        for row in _beside_floors(settings, shape, runs):
            if row["implementation"] in PLANS:
                tile, chunk_size = PLANS[row["implementation"]]
                with mock.patch.object(plan, "GPU_TILE", tile):
                    row["plan"] = asdict(training_plan(shape, settings.device, chunk_size))
            yield {"backend": backend, **row}


def _planned(tile: int, chunk_size: int | None, backend: str, inputs: Inputs) -> Outcome:
    with mock.patch.object(plan, "GPU_TILE", tile):
        return with_gradients(partial(fused, backend=backend, chunk_size=chunk_size), inputs)


def peer(settings: Settings, name: str) -> Iterator[Row]:
    """Somebody else's implementation beside the floor: seconds, and bytes above inputs and gradients."""
    run = _implementation(name, settings.device)
    for shape in _shapes(settings):
        peak = peak_bytes(settings.device, build, name, shape, settings.device, own_process=False)
        for row in _beside_floors(settings, shape, {name: run}):
            yield {**row, "peak_bytes": peak if row["implementation"] == name else None}


def build(name: str, shape: Shape, device: torch.device) -> tuple[Callable[[], Outcome], Callable[[], Outcome]]:
    run, inputs = _implementation(name, device), make_inputs(shape, torch.bfloat16, device)
    return partial(run, inputs.first(FEW_TOKENS)), partial(run, inputs)


def others(settings: Settings) -> dict[str, str]:
    """The names that `peer` takes, and why it cannot run one here, or "". The one that compiles for longest is the last."""
    is_cuda = settings.device.type == "cuda"
    return {
        EAGER: "",
        **{name: why_not for name, (_, why_not) in peers(settings.device).items()},
        QUACK: absent("quack") or ("" if is_cuda else "it needs a GPU"),
        COMPILED: "it compiles for longer than a smoke run lasts" if settings.smoke else "",
    }


def _implementation(name: str, device: torch.device) -> Implementation:
    if name == COMPILED:
        return partial(with_gradients, torch.compile(eager, dynamic=False))
    own: dict[str, Implementation] = {EAGER: partial(with_gradients, eager), QUACK: quack_cross_entropy}
    return own.get(name) or peers(device)[name][0]


def _shapes(settings: Settings) -> tuple[Shape, ...]:
    return settings.choose(cpu=GPU_SHAPES[2:], cuda=GPU_SHAPES, smoke=(Shape(64, 500, 16, 24),))


def _beside_floors(settings: Settings, shape: Shape, runs: Mapping[str, Implementation]) -> Iterator[Row]:
    """Time each on `shape`, in the same rounds as the floors."""
    inputs = make_inputs(shape, torch.bfloat16, settings.device)
    floors = {FLOOR: gemms_alone}
    if settings.device.type == "cuda":
        floors[FLOOR_FLOAT32_LOGITS] = partial(gemms_alone, logits_dtype=torch.float32)
    cases = {name: Case(partial(run, inputs)) for name, run in (floors | dict(runs)).items()}
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    for name, timing in timings.items():
        ratio = timing.median / timings[FLOOR].median
        yield {**shape._asdict(), "implementation": name, "ratio_to_gemms": ratio, "seconds": asdict(timing)}


def _capability(device: torch.device) -> list[int] | None:
    return list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


WORK: dict[str, Callable[[Settings, str], Iterator[Row]]] = {
    "environment": environment,
    "checks": run_checks,
    "sanitizer": sanitized,
    "ops": ops,
    "row kernel": row_kernel,
    "linear_kl": linear_kl,
    "peer": peer,
}
"""By the first part of a stage's name, "WORK: NAME"."""
