"""What the claims about losses inside the models share: rows of implementations beside eager torch and the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .claim import Settings
from .implementations import COMPILED, FLOOR
from .memory import peak_bytes
from .problem import relative_error
from .runner import Case, interleaved, stopwatch

EAGER = "eager"

Outcome = Sequence[Tensor | None]
"""The loss, None where it is no loss, and the gradients."""
Implementation = Callable[[Any], Outcome]


def beside_eager(
    settings: Settings,
    found: Mapping[str, Implementation],
    build: Callable[..., Any],
    inputs: Any,
    errors: Callable[[Implementation], dict[str, float]],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each of `found`, the floor and eager torch among them; and why a peer has none. A failure of ours is a bug and raises.

    build(name) makes the steps that `peak_bytes` takes; errors(implementation) judges what is not the floor.
    """
    peaks, failed = {}, {}
    for name in found:
        try:
            peaks[name] = peak_bytes(settings.device, build, name, own_process=not settings.smoke)
        except Exception as error:
            if name not in (EAGER, COMPILED):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'the process was killed'}"
            print(f"  left out: {name}: {failed[name]}", flush=True)
    cases = {name: Case(partial(found[name], inputs)) for name in peaks}
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "implementation": name,
                "seconds": asdict(timing),
                "ratio_to_gemms": timing.median / timings[FLOOR].median,
                "ratio_to_eager": timing.median / timings[EAGER].median if EAGER in timings else None,
                "peak_bytes": peaks[name],
                "errors": None if name == FLOOR else errors(found[name]),
            }
        )
        print(f"  {name}: {timing.median:.4g} s, {rows[-1]['ratio_to_gemms']:.2f} x GEMMs alone, {peaks[name]} bytes", flush=True)
    return rows, failed


def worst_errors(names: Sequence[str], inputs: Any, truth: Outcome, run: Implementation) -> dict[str, float]:
    """The largest relative L2 error of what `run` makes of the inputs, under each name; NaN if one is."""
    errors: dict[str, list[float]] = {name: [] for name in names}
    for name, value, true_value in zip(names, run(inputs), truth, strict=True):
        assert value is not None and true_value is not None
        errors[name].append(relative_error(value, true_value))
    return {name: float(torch.tensor(values).max()) for name, values in errors.items()}
