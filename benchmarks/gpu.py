"""The whole GPU proof in a bare checkout: `python benchmarks/gpu.py` needs torch, triton and numpy, and installs nothing.

Whether every backend is right on this GPU, and then how fast: at most eight minutes. Every stage is a process of its own with a limit,
so that a kernel that hangs or crashes costs its own rows alone; a backend that was not right is not timed. One JSON file, gpu.json, is
whole after every stage. Exit code 1 if a check fails, whatever the times are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DEADLINE = 480.0
BACKENDS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton", "cuda")}
CLAIMS = {"row_kernel": 90, "linear_kl": 150, "relation_kl": 40, "projected_mse": 30, "masked": 30, "scaling": 40, "accuracy": 40}
"""Those that need no trained pair, the most telling first, with their limits in seconds."""
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Stage:
    """What one process does: `checks BACKEND`, or a claim's name; under a tool of compute-sanitizer if `tool` names one."""

    name: str
    limit: float
    tool: str | None = None


def stages(device: str) -> list[Stage]:
    """In the order of what is lost least willingly."""
    checks = [Stage(f"checks {backend}", 90) for backend in BACKENDS[device]]
    sanitized = [Stage("checks cuda", 40, tool) for tool in SANITIZERS] if device == "cuda" else []
    return [*checks, *sanitized, *(Stage(name, limit) for name, limit in CLAIMS.items())]


def run_all(
    wanted: Sequence[Stage], command: Callable[[Stage, Path, list[str]], list[str] | str], report: Path, deadline: float
) -> bool:
    """Run the stages and keep what each has said in `report`; whether no check failed.

    command: what runs a stage that is to write its rows, one JSON value a line, to a file, without the backends that were wrong; or, as
    one word, why it cannot be run.
    """
    started = time.monotonic()
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for stage in wanted:
        row: dict[str, Any] = {"stage": stage.name, "tool": stage.tool, "rows": []}
        left = deadline - (time.monotonic() - started)
        with TemporaryDirectory() as folder:
            rows = Path(folder) / "rows"
            how = command(stage, rows, wrong)
            if isinstance(how, str):
                row["ended"] = f"not measured: {how}"
            elif left <= 0:
                row["ended"] = "not measured: the time is up"
            else:
                row |= _run(how, min(stage.limit, left))
                row["rows"] = _read(rows)
        kind, _, backend = stage.name.partition(" ")
        if kind == "checks":
            row["passed"] = row["ended"] == "0" and all(check["passed"] for check in row["rows"])
            if "seconds" in row and not row["passed"] and backend not in wrong:
                wrong.append(backend)
        found.append(row)
        print(f"{stage.name}{f' under {stage.tool}' if stage.tool else ''}: {row['ended']}", flush=True)
        text = json.dumps({"stages": found, "wrong_backends": wrong, "seconds": time.monotonic() - started}, indent=1)
        report.with_suffix(".new").write_text(text)
        report.with_suffix(".new").replace(report)
    return not wrong


def _run(command: list[str], limit: float) -> dict[str, Any]:
    """Run it in a group of its own, which is killed as a whole at the limit: its exit status, its time, and its last words."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=limit)
        ended = str(process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        ended = f"killed after {limit:.0f} s"
    return {"ended": ended, "seconds": time.monotonic() - started, "output": said[-4000:]}


def _read(rows: Path) -> list[Any]:
    """The whole lines of the file; a killed process may have left half of one."""
    lines = rows.read_text().splitlines(keepends=True) if rows.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_stage(name: str, rows: Path, known: argparse.Namespace) -> int:
    """Be the process of a stage."""
    from fastkd.benchmarks import checks, claim
    from fastkd.benchmarks.environment import stamp
    from fastkd.ops import probe

    settings = claim.read_settings(known)
    for backend in known.without:
        probe.demote(backend, RuntimeError("its checks failed in this proof"))

    def write(row: dict[str, Any]) -> None:
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    kind, _, backend = name.partition(" ")
    if kind == "checks":
        checks.run_checks(settings, [backend], write)
    else:
        from importlib import import_module

        write({"environment": stamp(settings.device), **import_module(f"fastkd.benchmarks.{name}").measure(settings)})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    from fastkd.benchmarks import claim

    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description="Check, then time, every GPU backend.")
    claim.add_arguments(parser)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.set_defaults(budget=15.0)
    known = parser.parse_args(argv)
    if known.stage:
        return run_stage(known.stage, known.rows, known)
    settings = claim.read_settings(known)
    device = settings.device.type
    own = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--budget", str(settings.budget)]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")

    def command(stage: Stage, rows: Path, wrong: list[str]) -> list[str] | str:
        is_small = settings.smoke or stage.tool is not None
        how = [*own, "--repeats", str(settings.repeats), *(["--smoke"] if is_small else [])]
        how += ["--stage", stage.name, "--rows", str(rows), "--without", *wrong]
        if stage.tool is None:
            return how
        return (
            "compute-sanitizer is not installed"
            if sanitizer is None
            else [sanitizer, "--tool", stage.tool, "--error-exitcode", "3", *how]
        )

    settings.output.mkdir(parents=True, exist_ok=True)
    report = settings.output / "gpu.json"
    passed = run_all(stages(device), command, report, DEADLINE)
    print(report)
    return 0 if passed else 1


if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[0] = root  # it was this folder
    import fastkd

    # An installed fastkd has `kernels`, `csrc` and `benchmarks` below it; here it finds them beside it, and nobody else as his own.
    sys.path.remove(root)
    fastkd.__path__.append(root)
    sys.exit(main())
