"""What all tests share: relative errors against float64, what rounding explains of a loss, and the proof that a check can fail."""

from __future__ import annotations

import math

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


def loss_rounding(truth: Tensor, *logits: Tensor, dtype: torch.dtype) -> Tensor:
    """How far arithmetic in `dtype` may be from the loss `truth` (n,) of rows of `logits` (n, V), on any machine: (n,) float64.

    A divergence, entropy or cross-entropy is sum_j p_j x_j, where x_j is made of log-probabilities z_j - log sum_k exp z_k of one model
    or both, and z are logits over the temperature. In units of eps:

    * The sum of exponentials takes V roundings in an order of the machine's choosing, which wander by sqrt(V); so does its logarithm.
    * A log-probability is a difference of numbers as large as the log-sum, and is itself as large as log V.

    So x_j, and with it the loss, is off by u = eps (1 + log V + sqrt(V) + the log-sums' sizes). p_j is off by u times itself, and so is
    the loss once more: u (1 + loss). Where a loss carries temperature^2, so does this.
    """
    vocabulary = logits[0].shape[-1]
    log_sums = sum(rows.detach().double().logsumexp(-1).abs() for rows in logits)
    unit = torch.finfo(dtype).eps * (1 + math.log(vocabulary) + math.sqrt(vocabulary) + log_sums)
    return unit * (1 + truth.detach().double().abs())


def assert_within(value: Tensor, truth: Tensor, limit: Tensor, name: str = "value") -> None:
    """|value - truth| is at most `limit`, one by one."""
    error = (value.detach().double() - truth.detach().double()).abs()
    assert bool((error <= limit).all()), f"{name}: off by {error.tolist()}, and rounding explains {limit.tolist()}"


def wrong_gradients(truth: Tensor) -> dict[str, Tensor]:
    """Gradients, or losses of rows, that every check must refuse."""
    return {
        "zero": torch.zeros_like(truth),
        "scaled by 1 %": truth * 1.01,
        "sign-flipped": -truth,
        "row-shuffled": truth.roll(1, 0),
    }
