"""The whole GPU proof in a bare checkout: `python benchmarks/gpu.py` needs torch, triton and numpy, and installs nothing.

First whether every backend is right on this GPU, then how fast: a JSON file for each claim and one for the checks. About five minutes;
no claim is begun after the seventh. Exit code 1 if a check fails, whatever the times are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DEADLINE = 420.0
BUDGET = 15.0
CLAIMS = ("linear_kl", "row_kernel", "relation_kl", "projected_mse", "masked", "scaling", "accuracy")
"""What needs no trained pair, the most telling first."""


def main(argv: Sequence[str] | None = None) -> int:
    from fastkd.benchmarks import checks, claim

    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description="Check, then time, every GPU backend.")
    claim.add_arguments(parser)
    parser.set_defaults(budget=BUDGET)
    settings = claim.read_settings(parser.parse_args(argv))
    started = time.monotonic()
    print("checks", flush=True)
    checked = checks.run_checks(settings)
    print(f"  {claim.write_record('checks', settings, checked)}", flush=True)
    for name in CLAIMS:
        if time.monotonic() - started > DEADLINE:
            print(f"{name}: not measured, the time is up.", flush=True)
        else:
            claim.run_claims([name], settings)
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    return 0 if all(result["passed"] for result in checked["results"]) else 1


if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[0] = root  # it was this folder
    import fastkd

    # An installed fastkd has `kernels`, `csrc` and `benchmarks` below it; here it finds them beside it, and nobody else as his own.
    sys.path.remove(root)
    fastkd.__path__.append(root)
    sys.exit(main())
