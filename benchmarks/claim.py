"""What the claims share: their command line, and the record that each writes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastkd.cli.arguments import path
from fastkd.store import write_json_atomic

from . import CLAIMS

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Settings:
    """How a claim is measured."""

    device: torch.device
    repeats: int
    """Timed rounds."""
    budget: float
    """Seconds an implementation may take over all rounds; see `runner.interleaved`."""
    smoke: bool
    """Tiny shapes: to see that it works, not how fast it is."""
    output: Path
    pair: Path | None
    """What `fastkd quickstart` left: a trained teacher and student."""

    def choose(self, *, cpu: T, cuda: T, smoke: T) -> T:
        if self.smoke:
            return smoke
        return cuda if self.device.type == "cuda" else cpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it works; written to a temporary folder")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: 5 on a CPU, 20 on a GPU, 1 with --smoke)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds an implementation may take in all rounds (default: 60)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--output", type=path, help=f"folder of the JSON files (default: {RESULTS})")
    parser.add_argument("--pair", type=path, help="output folder of `fastkd quickstart`, whose models grad_filter measures")


def read_settings(known: argparse.Namespace) -> Settings:
    import torch

    kind = known.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu.")
    if known.repeats is not None and known.repeats < 1:
        raise ValueError(f"--repeats {known.repeats} must be at least 1.")
    default_repeats = 1 if known.smoke else 5 if kind == "cpu" else 20
    output = known.output or (Path(tempfile.mkdtemp(prefix="fastkd-smoke-")) if known.smoke else RESULTS)
    return Settings(torch.device(kind), known.repeats or default_repeats, known.budget, known.smoke, output, known.pair)


def default_claims(settings: Settings) -> list[str]:
    """All that can be measured: grad_filter needs a trained pair, but for a smoke run."""
    return [name for name in CLAIMS if name != "grad_filter" or settings.pair is not None or settings.smoke]


def run_claims(names: Iterable[str], settings: Settings) -> list[Path]:
    """Measure each; every record is on the disk before the next one begins."""
    written = []
    for name in names:
        print(f"{name}: {CLAIMS[name]}", flush=True)
        written.append(write_record(name, settings, import_module(f"fastkd.benchmarks.{name}").measure(settings)))
        print(f"  {written[-1]}", flush=True)
    return written


def write_record(name: str, settings: Settings, measured: dict[str, Any]) -> Path:
    """`measured` with what it was measured on and how, as NAME_DEVICE.json; return the file."""
    from .environment import device_slug, stamp

    record = {
        "claim": name,
        "device": settings.device.type,
        "smoke": settings.smoke,
        "repeats": settings.repeats,
        "budget_seconds": settings.budget,
        "environment": stamp(settings.device),
        **measured,
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / f"{name}_{device_slug(settings.device)}.json"
    write_json_atomic(path, record)
    return path


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """One claim as a program of its own: `python -m fastkd.benchmarks.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m fastkd.benchmarks.{name}", description=CLAIMS[name])
    add_arguments(parser)
    try:
        run_claims([name], read_settings(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
