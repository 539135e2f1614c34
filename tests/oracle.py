"""What all tests share: relative errors against float64, and the proof that the check can fail."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth||_2 / ||truth||_2 in float64; the plain norm of `value` where the truth is zero."""
    value, truth = value.detach().double(), truth.detach().double()
    difference = (value - truth).norm()
    size = truth.norm()
    return float(difference / size) if size > 0 else float(value.norm())


def assert_close(value: Tensor, truth: Tensor, tolerance: float, name: str = "value") -> None:
    error = relative_error(value, truth)
    assert error <= tolerance, f"{name}: relative L2 error {error:.3g} > {tolerance:g}"


def wrong_gradients(truth: Tensor) -> dict[str, Tensor]:
    """Gradients that every check must refuse."""
    return {
        "zero": torch.zeros_like(truth),
        "scaled by 1 %": truth * 1.01,
        "sign-flipped": -truth,
        "row-shuffled": truth.roll(1, 0),
    }
