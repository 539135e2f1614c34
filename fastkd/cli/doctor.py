"""`fastkd doctor`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..store import write_json_atomic
from .arguments import Parser, path, source
from .table import print_table

PACKAGES = ("fastkd", "torch", "triton", "transformers", "tokenizers", "datasets", "safetensors")
DESCRIPTION = """Which backends are live here, and whether every op is right in each of them: value and gradients against float64, on
the sizes that are given. With --teacher, also what distilling it would need of memory and how fast it would go. Downloads nothing.
Exit code 0: healthy; 1: a check failed; 2: bad input."""


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd doctor", description=DESCRIPTION)
    problem = parser.add_argument_group("the problem that the ops are checked on")
    problem.add_argument("--vocabulary", type=int, default=30_522, help="rows of both heads (default: 30522)")
    problem.add_argument("--student_hidden", type=int, default=384, help="width of the student's states (default: 384)")
    problem.add_argument("--teacher_hidden", type=int, default=768, help="width of the teacher's states (default: 768)")
    problem.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    problem.add_argument("--temperature", type=float, default=2.0, help="of both softmaxes (default: 2)")
    problem.add_argument("--tokens", type=int, default=256, help="default: 256")
    pair = parser.add_argument_group("a pair whose memory and speed are estimated")
    pair.add_argument("--teacher", type=source, help="folder, or name of a hub model that is on this machine")
    pair.add_argument("--student", type=source, help="the same (default: what --teacher names)")
    pair.add_argument("--student_layers", help="layers of it that the student keeps: first:6, every:2")
    pair.add_argument("--batch_size", type=int, default=16, help="rows of a micro-batch (default: 16)")
    pair.add_argument("--length", type=int, default=128, help="tokens of a row (default: 128)")
    parser.add_argument("--json", type=path, help="write everything to this file too")
    known = parser.parse_args(argv)
    if known.teacher is None and (known.student or known.student_layers):
        raise ValueError("--student and --student_layers belong to a pair; name its --teacher too.")
    if known.json is not None and not known.json.absolute().parent.is_dir():
        raise ValueError(f"--json {known.json}: there is no folder {known.json.absolute().parent}; make it first.")
    from ..ops.selfcheck import Problem, backends, check_ops, tolerance
    from ..train.doctor import Pair, outlook

    settings = {**vars(known), "student": known.student or known.teacher}
    chosen = Problem(**{name: settings[name] for name in Problem.__annotations__})
    models = None if known.teacher is None else Pair(**{name: settings[name] for name in Pair.__annotations__})
    found: dict[str, Any] = {"machine": _machine(), "backends": backends(), "problem": asdict(chosen)}
    print_table(["machine", ""], list(found["machine"].items()))
    print()
    print_table(["backend", ""], [[name, why_not or "live"] for name, why_not in found["backends"].items()])
    print(f"\nRelative L2 errors against float64, with {', '.join(f'{name} {value}' for name, value in found['problem'].items())}.")
    found["tolerances"] = {name: tolerance(name, known.dtype) for name in ("value", "gradient")}
    print(f"Right are at most {', '.join(f'{limit:g} of a {name}' for name, limit in found['tolerances'].items())}:\n")
    checks = list(check_ops(chosen))
    print_table(["op", "backend", "", "value", "gradients"], [_row(check) for check in checks])
    for check in checks:
        if check.failure:
            print(f"\n{check.op} in {check.backend}: {check.failure}")
    found["checks"] = [asdict(check) | {"passed": check.passed, "errors": _finite(check.errors)} for check in checks]
    found["healthy"] = all(check.passed for check in checks)
    if models is not None:
        seen = outlook(models)
        _show_outlook(seen)
        found["pair"] = {**asdict(models), **asdict(seen), "total": seen.memory.total}
    print("\nHealthy." if found["healthy"] else "\nA check FAILED: choose another backend= than the one marked, and report this table.")
    if known.json is not None:
        write_json_atomic(known.json, found)
    return 0 if found["healthy"] else 1


def _machine() -> dict[str, str]:
    from importlib import metadata

    from ..benchmarks.environment import stamp
    from ..ops.backend_cpp import sixteen_bit_dtypes
    from ..ops.selfcheck import main_device
    from ..train.preflight import device_memory

    device = main_device()
    seen = stamp(device)
    narrow = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in sixteen_bit_dtypes()))
    products = "as they are" if device.type == "cuda" else f"as they are: {narrow}" if narrow else "upcast, a tile at a time"
    installed = {found.name: found.version for found in metadata.distributions()}
    return {
        "device": f"{seen['device']}, {device_memory(device) / 2**30:.1f} GiB of memory",
        "system": f"{seen['machine']}, {seen['threads']} threads",
        "python": seen["python"],
        **{package: installed.get(package, "not installed") for package in PACKAGES},
        "cuda of torch": seen["cuda"] or "none",
        "16-bit heads": f"multiplied {products}",
    }


def _row(check: Any) -> list[str]:
    marked = {name: f"{error:.1e}{' (!)' if name in check.wrong else ''}" for name, error in check.errors.items()}
    value = marked.pop("value", "")
    gradients = ", ".join(f"{name} {error}" for name, error in marked.items())
    return [check.op, check.backend, "ok" if check.passed else "FAILED", value, gradients]


def _show_outlook(seen: Any) -> None:
    fits = "fits into" if seen.memory.total <= seen.available else "does NOT fit into"
    print(f"\nA training step {fits} the {seen.available / 2**30:.1f} GiB of the device:\n{seen.memory}")
    print(f"The head's loss and its gradients: {seen.head_rate:.0f} tokens/s.")
    step = f"{seen.step_rate:.0f} tokens/s, on {seen.step_rows} rows" if seen.step_rows else "not measured"
    print(f"The whole step, from ids to gradients, without the optimizer: {step}.")


def _finite(errors: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity."""
    return {name: error if math.isfinite(error) else None for name, error in errors.items()}
