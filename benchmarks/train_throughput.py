"""Training from end to end: fastkd's driver beside transformers' Trainer with eager losses, and beside the authors' own loops.

    python -m fastkd.benchmarks.train_throughput [--output DIR] [--device cpu|cuda] [--only CASE ...] [--quick]

Both sides of a case begin from the same weights and take the same optimizer steps: rows, masks, learning rates, AdamW and clipping. In
interleaved rounds each trains in a fresh process, so that its peak of memory is its own. `train_setup.py` makes models and rows, and
`trainer_baseline.py` and `authors_loops.py` are the other sides; the authors' repositories are not run, but rewritten.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastkd.methods.objective import Stage
from fastkd.store import write_json_atomic
from fastkd.train.config import RunConfig
from fastkd.train.loop import StageTrainer
from fastkd.train.parallel import place
from fastkd.train.profile import SHARES_FILE
from fastkd.train.ranks import Ranks

from .claim import RESULTS
from .environment import device_slug, stamp
from .runner import Timing
from .train_setup import CASES, QUICK, Clock, Size, Training, prepare

OURS = "fastkd"
PEERS = {"Trainer, eager losses": "trainer_baseline", "authors' loop": "authors_loops"}
"""Modules of this folder whose `train` is the other side."""


def train(training: Training, clock: Clock) -> list[Tensor]:
    """Every step's loss of the loop that `fastkd train` runs."""
    losses: list[Tensor] = []
    stage = training.built()
    stage.objective.register_forward_hook(lambda module, inputs, loss: losses.append(loss.detach()))
    with TemporaryDirectory() as folder, clock:
        _run_stage(training, stage, training.config, Path(folder))
    return losses


def shares(folder: Path, name: str, size: Size, device: str, threads: int) -> dict[str, Any]:
    """Where the time of our steps goes, as `profile_steps` shows it; in this process."""
    torch.set_num_threads(threads)
    training = Training(folder, name, size, torch.device(device))
    with TemporaryDirectory() as output:
        _run_stage(training, training.built(), replace(training.config, profile_steps=size.steps), Path(output))
        found: dict[str, Any] = json.loads((Path(output) / "profile" / SHARES_FILE).read_text())
    return found


def _run_stage(training: Training, stage: Stage, config: RunConfig, folder: Path) -> None:
    with Ranks.join(use_cpu=config.use_cpu) as ranks:
        place(stage.objective, ranks, fsdp=False, fsdp_teacher=False)
        StageTrainer(stage, config, folder, seed=config.seed, ranks=ranks).run()


def run(implementation: str, folder: Path, name: str, size: Size, device: str, threads: int) -> dict[str, Any]:
    """One training, measured, in this process."""
    torch.set_num_threads(threads)
    training = Training(folder, name, size, torch.device(device))
    clock = Clock(training)
    side = train if implementation == OURS else import_module(f"{__package__}.{PEERS[implementation]}").train
    losses = [float(loss) for loss in side(training, clock)]
    return {
        "losses": losses,
        "seconds": clock.seconds,
        "tokens": training.timed_tokens,
        "peak_bytes": clock.peak,
        "bytes_before": clock.before,
    }


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`function` in a process that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.{name}" for name in ("train_setup", *PEERS.values())])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure(names: Iterable[str], size: Size, device: torch.device) -> dict[str, Any]:
    """What the JSON file holds beside the environment."""
    names, threads = list(names), torch.get_num_threads()
    results = []
    with TemporaryDirectory() as folder:
        prepare(Path(folder), names, size)
        for name in names:
            print(f"{name}: {CASES[name].title}", flush=True)
            runs: dict[str, list[dict[str, Any]]] = {implementation: [] for implementation in (OURS, CASES[name].peer)}
            for _ in range(size.rounds):
                for implementation, done in runs.items():
                    done.append(in_fresh_process(run, implementation, Path(folder), name, size, device.type, threads))
            results.append(compared(name, runs))
            print("".join(f"  {line}\n" for line in in_words(results[-1])), end="", flush=True)
        profile = {"case": names[0], **in_fresh_process(shares, Path(folder), names[0], size, device.type, threads)}
    return {"shape": size.in_words(), "results": results, "profile": profile}


def compared(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """One case: ours beside its peer."""
    (tokens,) = {done["tokens"] for side in runs.values() for done in side}
    sides = []
    for implementation, side in runs.items():
        timing = Timing.of([done["seconds"] for done in side])
        peaks = [statistics.median(done[key] for done in side) for key in ("peak_bytes", "bytes_before")]
        sides.append(
            {
                "implementation": implementation,
                "tokens_per_second": tokens / timing.median,
                "seconds": asdict(timing),
                "peak_bytes": peaks[0],
                "peak_bytes_above": peaks[0] - peaks[1],
                "losses": side[0]["losses"],
            }
        )
    ours, peer = sides
    differences = [abs(own / other - 1.0) for own, other in zip(ours["losses"], peer["losses"], strict=True)]
    case = CASES[name]
    return {
        "case": name,
        "title": case.title,
        "stage": case.stage,
        "options": dict(case.options),
        "tokens": tokens,
        "sides": sides,
        "speedup": ours["tokens_per_second"] / peer["tokens_per_second"],
        "peak_ratio": ours["peak_bytes"] / peer["peak_bytes"],
        "peak_ratio_above": ours["peak_bytes_above"] / peer["peak_bytes_above"],
        "first_loss_difference": differences[0],
        "loss_difference": max(differences),
    }


def in_words(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{side['implementation']}: {side['tokens_per_second']:.0f} tokens/s, peak {side['peak_bytes'] / 1e6:.0f} MB, "
        f"{side['peak_bytes_above'] / 1e6:.0f} MB above what was there before the first step, last loss {side['losses'][-1]:.5g}"
        for side in result["sides"]
    ]
    return [
        *lines,
        f"{result['speedup']:.2f} x the speed, {result['peak_ratio']:.2f} x the peak ({result['peak_ratio_above']:.2f} x above what "
        f"was there); losses differ by {result['loss_difference']:.1e} at most, the first by {result['first_loss_difference']:.1e}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.train_throughput", description="Training from end to end.")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the JSON file (default: {RESULTS})")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it works, and roughly how the ratios are")
    known = parser.parse_args(argv)
    device = torch.device(known.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = QUICK if known.quick else Size()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # for both sides: `fastkd train` sets it
    try:
        record = {
            "claim": "train_throughput",
            "device": device.type,
            "smoke": known.quick,
            "repeats": size.rounds,
            "environment": stamp(device),
            **measure(known.only or CASES, size, device),
        }
        known.output.mkdir(parents=True, exist_ok=True)
        write_json_atomic(known.output / f"train_throughput_{device_slug(device)}.json", record)
    except (ValueError, OSError, ImportError) as error:
        print(f"train_throughput: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
