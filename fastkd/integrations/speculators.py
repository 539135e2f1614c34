"""The losses of vLLM's speculators 0.9 on `fastkd.kl_div`: import a function from here in place of `speculators.losses`'.

Each takes the draft's and the target's logits over the draft's vocabulary, (1, T, V) or with any leading dims, and returns one value a
token, in float32 (float64 for float64 logits). Speculators' `loss_function` and `compound_loss` take them as they are. The target gets
no gradient. They run on CPUs too, and beside logits and gradient a chunk of both is alive.

p, the target, is renormalised over the draft's tokens, as in speculators, which cuts the target's head to them.
`fastkd.linear_kl_div` makes no logits, and with `teacher_mass="full"` counts the tokens that the draft lacks.
"""

from __future__ import annotations

from torch import Tensor

from ..ops.checks import leading_shape
from ..ops.divergence import Divergence
from ..ops.fused_loss import fused_loss
from ..ops.kl import kl_div
from ..ops.options import LossOptions


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(p || q) of each token: logits (..., V), targets (..., V) to (...)."""
    return _per_token(logits, targets, "forward_kl")


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(q || p) of each token: logits (..., V), targets (..., V) to (...)."""
    return _per_token(logits, targets, "reverse_kl")


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """JSD(1/2) of each token: logits (..., V), targets (..., V) to (...)."""
    return _per_token(logits, targets, Divergence.jsd(0.5))


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q at the target's first largest logit, of each token: logits (..., V), targets (..., V) to (...)."""
    leading = leading_shape("logits", logits)
    options = LossOptions(label_weight=1.0, reduction="none")
    loss = fused_loss({"logits": logits.flatten(0, -2)}, {}, options, leading, labels=targets.argmax(-1).flatten())
    assert isinstance(loss, Tensor)
    return loss


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1/2 sum |p - q|, one minus the rate of acceptance, of each token: logits (..., V), targets (..., V) to (...)."""
    return _per_token(logits, targets, "tvd")


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log sum min(p, q) of each token: logits (..., V), targets (..., V) to (...).

    Speculators has no less than 1e-5 in the logarithm, and no gradient below.
    """
    return _per_token(logits, targets, "nla")


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """w KL(p || q) + (1 - w) TVD of each token (arXiv:2602.23881): logits (..., V), targets (..., V) to (...).

    w = exp(-eta a), with a = sum min(p, q) the rate of acceptance, through which no gradient flows.
    """
    distance = tv_loss(logits, targets)
    weight = (-eta * (1.0 - distance.detach())).exp()
    return weight * kl_div_loss(logits, targets) + (1.0 - weight) * distance


def _per_token(logits: Tensor, targets: Tensor, divergence: str | Divergence) -> Tensor:
    loss = kl_div(logits, targets.detach(), divergence=divergence, reduction="none")
    assert isinstance(loss, Tensor)
    return loss
