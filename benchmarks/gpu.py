"""The whole GPU proof in a bare checkout: `python benchmarks/gpu.py` needs torch, triton and numpy, and installs nothing.

First whether every backend is right on this GPU, then how fast, then how fast others are: one JSON file, gpu_NAME.json, in at most
eight minutes. Each backend has a process of its own for each part, so that one that hangs or crashes costs its own rows alone. Exit
code 1 if a check fails, or cannot end, whatever the times are.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkd.benchmarks.claim import Settings
    from fastkd.benchmarks.stages import Stage

LIMIT = 480.0
"""Seconds for everything."""
BUDGET = 15.0
REPEATS = 10
LIMITS = {"environment": 60, "checks": 150, "row kernel": 40, "linear_kl": 60, "sanitizer": 25, "peer": 60}
"""Seconds of a stage, by the first part of its name. Triton compiles for more than a minute before its checks are through."""
MEASURED = ("checks", "row kernel", "linear_kl")
"""What is done for every backend, in this order."""
SANITIZERS = ("memcheck", "racecheck", "synccheck")


def main(argv: Sequence[str] | None = None) -> int:
    from fastkd.benchmarks import claim
    from fastkd.benchmarks.stages import Run, run_stages

    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description="Check, then time, every GPU backend.")
    claim.add_arguments(parser)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("part", nargs="?", help=argparse.SUPPRESS)
    parser.set_defaults(budget=BUDGET)
    arguments = parser.parse_args(argv)
    if arguments.repeats is None and not arguments.smoke:
        arguments.repeats = REPEATS
    settings = claim.read_settings(arguments)
    if arguments.stage:
        return _run_alone(arguments.stage, settings, Path(arguments.part))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is killed, not left alone with the GPU
    first = Run(_stage("environment", settings), LIMITS["environment"])
    rows = list(first.rows())
    if first.ended:
        print(f"The machine could not be asked what it is: that process {first.ended}", *first.log, sep="\n    ", file=sys.stderr)
        return 1
    [machine] = rows
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / f"gpu_{machine['slug']}.json"
    head = {
        "claim": "gpu",
        "device": settings.device.type,
        "smoke": settings.smoke,
        "repeats": settings.repeats,
        "budget_seconds": settings.budget,
        "environment": machine["environment"],
    }
    passed = run_stages(_stages(settings, machine["left_out"]), path, head, started + LIMIT)
    print(f"{path}: {'no check failed' if passed else 'A CHECK FAILED'}, {time.monotonic() - started:.0f} s in all", flush=True)
    return 0 if passed else 1


def _stages(settings: Settings, left_out: Mapping[str, str]) -> list[Stage]:
    """All of them in order. `left_out`: why a backend does not run here."""
    from fastkd.benchmarks.gpu_stages import find_sanitizer, others
    from fastkd.benchmarks.implementations import BACKENDS

    backends = {name: left_out.get(name, "") for name in BACKENDS[settings.device.type]}
    no_sanitizer = "" if find_sanitizer() else "compute-sanitizer is not on PATH, nor below $CUDA_HOME"
    sanitized = {name: backends[name] or no_sanitizer for name in ("cuda", "triton") if name in backends}
    return [
        *(_stage(f"{work}: {name}", settings, reason) for work in MEASURED for name, reason in backends.items()),
        *(_stage(f"sanitizer: {tool} {name}", settings, reason) for name, reason in sanitized.items() for tool in SANITIZERS),
        *(_stage(f"peer: {name}", settings, reason) for name, reason in others(settings).items()),
    ]


def _stage(name: str, settings: Settings, why_not: str = "") -> Stage:
    from fastkd.benchmarks.stages import Stage

    work = name.partition(":")[0]
    command = [sys.executable, str(Path(__file__).resolve()), "--device", settings.device.type, "--output", str(settings.output)]
    command += ["--repeats", str(settings.repeats), "--budget", str(settings.budget), *(["--smoke"] if settings.smoke else [])]
    return Stage(name, [*command, "--stage", name], LIMITS[work], is_check=work == "checks", why_not=why_not)


def _run_alone(name: str, settings: Settings, part: Path) -> int:
    """Do the work of one stage in this process, and append its rows to `part`."""
    from fastkd.benchmarks.gpu_stages import WORK

    work, _, argument = name.partition(": ")
    with part.open("a", encoding="utf-8", buffering=1) as file:
        for row in WORK[work](settings, argument):
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[0] = root  # it was this folder
    import fastkd

    # An installed fastkd has `kernels`, `csrc` and `benchmarks` below it; here it finds them beside it, and nobody else as his own.
    sys.path.remove(root)
    fastkd.__path__.append(root)
    sys.exit(main())
