"""Speculators' per-token losses on fastkd: the values and gradients of a float64 formula, and of the installed speculators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.integrations import speculators as ours
from tests.integrations.peer_packages import DEVICE, speculators_losses
from tests.oracle import assert_close, assert_within, loss_rounding

TOKENS, VOCABULARY = 9, 43
LOSSES = ("kl_div_loss", "reverse_kl_div_loss", "js_div_loss", "ce_loss", "tv_loss", "neg_log_acceptance_loss", "lk_hybrid_loss")


def inputs_of(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The draft's logits and the target's (1, T, V), and an upstream gradient (1, T); scale: of the logits' distance."""
    generator = torch.Generator().manual_seed(0)
    targets = 2.0 * torch.randn(1, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    logits = targets + scale * torch.randn(1, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    upstream = torch.rand(1, TOKENS, generator=generator, dtype=torch.float64)
    upstream[0, 3] = 0.0
    return logits.to(DEVICE, dtype).requires_grad_(), targets.to(DEVICE, dtype), upstream.to(DEVICE, dtype)


def value_and_gradient(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    logits, targets, upstream = inputs
    value = loss(logits, targets, **options)
    (gradient,) = torch.autograd.grad(value, logits, upstream.to(value.dtype))
    return value.detach(), gradient


def oracle(name: str, eta: float = 3.0) -> Callable[[Tensor, Tensor], Tensor]:
    """(1, T) of logits (1, T, V), by the formulas of the functions' documentation."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        log_q, log_p = logits.log_softmax(-1), targets.log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        acceptance = torch.minimum(p, q).sum(-1)
        kl, middle = (p * (log_p - log_q)).sum(-1), ((p + q) / 2).log()
        match name:
            case "kl_div_loss":
                return kl
            case "reverse_kl_div_loss":
                return (q * (log_q - log_p)).sum(-1)
            case "js_div_loss":
                return 0.5 * (p * (log_p - middle) + q * (log_q - middle)).sum(-1)
            case "ce_loss":
                return -log_q.gather(-1, targets.argmax(-1, keepdim=True))[..., 0]
            case "tv_loss":
                return 1.0 - acceptance
            case "neg_log_acceptance_loss":
                return -acceptance.log()
            case _:
                weight = (-eta * acceptance.detach()).exp()
                return weight * kl + (1.0 - weight) * (1.0 - acceptance)

    return loss


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_formula(name: str, scale: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-5)):
        logits, targets, upstream = inputs_of(dtype, scale)
        value, gradient = value_and_gradient(
            oracle(name), (logits.detach().double().requires_grad_(), targets.double(), upstream.double())
        )
        found = value_and_gradient(getattr(ours, name), (logits, targets, upstream))
        assert found[0].shape == (1, TOKENS)
        assert_within(found[0][0], value[0], loss_rounding(value[0], logits[0], targets[0], dtype=dtype))
        assert_close(found[1], gradient, tolerance, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_speculators(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs computes in float32, but the eager cross-entropy in the logits' dtype. The fused losses need a GPU."""
    losses = speculators_losses(monkeypatch)
    theirs = getattr(losses if DEVICE.type == "cuda" else losses.eager, name)
    for scale in (0.3, 2.0):
        expected = value_and_gradient(theirs, inputs_of(dtype, scale))
        found = value_and_gradient(getattr(ours, name), inputs_of(dtype, scale))
        tolerance = 5e-3 if dtype == torch.bfloat16 else 5e-5
        assert_close(found[0], expected[0], tolerance)
        assert_close(found[1], expected[1], tolerance, "gradient")


@pytest.mark.parametrize("eta", [0.5, 10.0])
def test_eta_of_the_hybrid_loss(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = speculators_losses(monkeypatch).eager.lk_hybrid_loss
    expected = value_and_gradient(theirs, inputs_of(torch.float32), eta=eta)
    found = value_and_gradient(ours.lk_hybrid_loss, inputs_of(torch.float32), eta=eta)
    assert_close(found[0], expected[0], 2e-5)
    assert_close(found[1], expected[1], 2e-5, "gradient")


@pytest.mark.parametrize("name", LOSSES)
def test_the_signatures_are_speculators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, found = getattr(speculators_losses(monkeypatch), name), getattr(ours, name)
    expected, given = ({n: p.default for n, p in inspect.signature(function).parameters.items()} for function in (theirs, found))
    assert list(given.items()) == list(expected.items())


def test_they_serve_a_loss_config_of_speculators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked and decayed by speculators' own `compound_loss`, as its trainers call it."""
    theirs = speculators_losses(monkeypatch)
    logits, targets, _ = inputs_of(torch.float32)
    mask = torch.arange(TOKENS, device=DEVICE)[None] < 6
    position = torch.arange(TOKENS, device=DEVICE)[None] % 3
    weights = {"kl_div_loss": 0.3, "tv_loss": 0.7, "ce_loss": 0.1}

    def gradient_of(module: Any) -> tuple[Tensor, Tensor]:
        config = {name: (getattr(module, name), weight) for name, weight in weights.items()}
        loss, terms = theirs.compound_loss(logits, targets, mask, position, config, lambda at, **_: theirs.exp_loss_decay(at, 0.8))
        assert len(terms) == 3
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    for given, expected in zip(gradient_of(ours), gradient_of(theirs.eager), strict=True):
        assert_close(given, expected, 2e-5)


def test_the_target_may_require_a_gradient_and_gets_none() -> None:
    for name in LOSSES:
        logits, targets, _ = inputs_of(torch.float32)
        targets.requires_grad_()
        getattr(ours, name)(logits, targets).sum().backward()
        assert targets.grad is None and bool(logits.grad.isfinite().all())
