"""Which divergence between teacher and student is minimised, as one small value that every op and backend understands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_PLAIN = ("forward_kl", "reverse_kl", "tvd", "nla")
MIXING = {"mixed": "alpha", "jsd": "beta", "skew_kl": "alpha", "skew_rkl": "alpha"}
"""The kinds that have a mixing weight, and its name."""


@dataclass(frozen=True)
class Divergence:
    """A divergence D(p, q) between the teacher's distribution p and the student's q over the vocabulary.

    - `"forward_kl"`: KL(p || q)
    - `"reverse_kl"`: KL(q || p)
    - `"tvd"`: 1/2 sum |p - q|
    - `"nla"`: -log sum min(p, q) = -log(1 - tvd), the negative log acceptance of speculative decoding's drafts. Where the models share
      no token, in the precision of the arithmetic, it is infinite and its gradient NaN.
    - `mixed(alpha)`: alpha KL(p || q) + (1 - alpha) KL(q || p), in one pass
    - `jsd(beta)`: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    - `skew_kl(alpha)`: KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv:2402.03898)
    - `skew_rkl(alpha)`: KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv:2402.03898)

    The mixing weight lies strictly between 0 and 1: at the ends these are other divergences, or zero, so name the one you mean.

    Raises:
        ValueError: an unknown kind, a mixing weight that is missing or out of range, or one for a kind that takes none.
    """

    kind: str
    """A name of the list, without its argument."""
    mixing: float | None = None
    """alpha or beta; None for the first four."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise TypeError(f"kind is a {type(self.kind).__name__}; give a divergence's name.")
        if self.kind in MIXING:
            name = MIXING[self.kind]
            if isinstance(self.mixing, bool) or not isinstance(self.mixing, Real) or not 0.0 < self.mixing < 1.0:
                raise ValueError(
                    f"Divergence.{self.kind}({name}={self.mixing}) needs 0 < {name} < 1. At the ends it is another divergence "
                    "or zero: pass divergence='forward_kl' or 'reverse_kl' if that is what you mean."
                )
        elif self.kind not in _PLAIN:
            raise ValueError(
                f"divergence={self.kind!r} is not known. Use one of {', '.join(map(repr, _PLAIN))}, or "
                f"{', '.join(f'Divergence.{kind}({name})' for kind, name in MIXING.items())}."
            )
        elif self.mixing is not None:
            raise ValueError(f"divergence={self.kind!r} takes no mixing weight, but {self.mixing} was given. Leave it out.")

    @classmethod
    def mixed(cls, alpha: float) -> Divergence:
        """alpha KL(p || q) + (1 - alpha) KL(q || p), 0 < alpha < 1, for what one of them costs."""
        return cls("mixed", alpha)

    @classmethod
    def jsd(cls, beta: float) -> Divergence:
        """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1."""
        return cls("jsd", beta)

    @classmethod
    def skew_kl(cls, alpha: float) -> Divergence:
        """KL(p || alpha p + (1 - alpha) q), 0 < alpha < 1 (DistiLLM, arXiv:2402.03898)."""
        return cls("skew_kl", alpha)

    @classmethod
    def skew_rkl(cls, alpha: float) -> Divergence:
        """KL(q || alpha q + (1 - alpha) p), 0 < alpha < 1 (DistiLLM, arXiv:2402.03898)."""
        return cls("skew_rkl", alpha)

    @classmethod
    def parse(cls, value: str | Divergence) -> Divergence:
        """What a `divergence` argument means: a name of the list, its call form as configuration files write it (`"jsd(0.5)"`), or a
        Divergence.

        Raises:
            TypeError: neither a string nor a Divergence.
            ValueError: an unknown name, or a mixing weight that is out of range or no number.
        """
        if isinstance(value, Divergence):
            return value
        if not isinstance(value, str):
            raise TypeError(f"divergence is a {type(value).__name__}; give a name such as 'forward_kl' or a fastkd.Divergence.")
        kind, bracket, mixing = value.removesuffix(")").partition("(")
        if kind not in MIXING:
            return cls(value)
        try:
            return cls(kind, float(mixing) if bracket else None)
        except ValueError as error:
            raise ValueError(f"divergence={value!r}: {error}") from None

    def __str__(self) -> str:
        return self.kind if self.mixing is None else f"{self.kind}({self.mixing:g})"


def value_and_coefficient(
    divergence: Divergence, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """D(p, q) per row (C,), and c = dD / d log q (C, V) with log q treated as free: dD / dz = c - q sum(c) for q = softmax(z).

    p, q and their logarithms are (C, V). A token of zero probability adds nothing. rest: (C,) what p lacks of one, as one event where q
    is zero; no part of forward KL, where it would be infinite.
    """
    value, coefficient = column_sums(divergence, p, q, log_p, log_q, rest=rest)
    if rest is not None:
        value = value + _REST[divergence.kind](divergence.mixing) * rest
    return of_acceptance(acceptance(p, q), value, coefficient) if divergence.kind == "nla" else (value, coefficient)


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """sum min(p, q) (C,) of probabilities (C, V): the share of the student's tokens that speculative decoding accepts."""
    return torch.minimum(p, q).sum(-1)


def of_acceptance(accepted: Tensor, rejected: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """-log(accepted) (C,), and its c (C, V) in place of `coefficient`, of what `column_sums` gives for "nla".

    accepted and rejected sum to one; where little is rejected, the logarithm is as exact as `rejected` is.
    """
    return (rejected / accepted).log1p(), coefficient.div_(accepted[:, None])


_REST: dict[str, Callable[[Any], float]] = {
    "forward_kl": lambda _: 0.0,
    "reverse_kl": lambda _: 0.0,
    "mixed": lambda _: 0.0,
    "tvd": lambda _: 0.5,
    "nla": lambda _: 0.5,
    "jsd": lambda beta: -beta * math.log(beta),
    "skew_kl": lambda alpha: -math.log(alpha),
    "skew_rkl": lambda _: 0.0,
}
"""D of an event where q is zero, over its probability p; for "nla" it is part of tvd."""


def column_sums(
    divergence: Divergence, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, rest: Tensor | None = None, is_shard: bool = False
) -> tuple[Tensor, Tensor]:
    """What columns (C, V) add to D (C,), and c (C, V), as `value_and_coefficient` says; with is_shard there are other columns.

    Of "nla" it is what they add to tvd, and c times the acceptance.
    """
    kind, mixing = divergence.kind, divergence.mixing
    if kind == "forward_kl":
        return weighted(p, log_p - log_q).sum(-1), -p
    if kind == "reverse_kl":
        terms = weighted(q, log_q - log_p)
        return terms.sum(-1), terms + q
    if kind in ("tvd", "nla"):
        difference = q - p if is_shard else balance_(q - p, q, q.amax(-1) > 0.5, rest)
        # A multiple of q changes no gradient. The one of "nla" is that of sum min(p, q), which does not cancel where that is small.
        sign = difference.sign() if kind == "tvd" else difference.sign() - 1.0
        return 0.5 * difference.abs().sum(-1), 0.5 * q * sign
    assert mixing is not None
    if kind == "mixed":
        terms = weighted(q, log_q - log_p)
        value = mixing * weighted(p, log_p - log_q).sum(-1) + (1.0 - mixing) * terms.sum(-1)
        return value, terms.add_(q).mul_(1.0 - mixing).sub_(p, alpha=mixing)
    own, other = math.log(mixing), math.log1p(-mixing)
    if kind == "jsd":
        log_m = (log_p + own).logaddexp(log_q + other)
        student_terms = weighted(q, log_q - log_m)
        value = mixing * weighted(p, log_p - log_m).sum(-1) + (1.0 - mixing) * student_terms.sum(-1)
        return value, student_terms.mul_(1.0 - mixing)
    if kind == "skew_kl":
        log_m = (log_p + own).logaddexp(log_q + other)
        return weighted(p, log_p - log_m).sum(-1), -weighted(p, (log_q - log_m + other).exp())
    log_m = (log_q + own).logaddexp(log_p + other)
    terms = weighted(q, log_q - log_m)
    return terms.sum(-1), terms + weighted(q, 1.0 - (log_q - log_m + own).exp())


def balance_(terms: Tensor, student: Tensor, is_certain: Tensor, total: Tensor | None = None) -> Tensor:
    """Make a row's term at the student's largest entry its `total` minus the sum of the others where the student is certain.

    That term cancels where the student is nearly certain, and the others do not. terms, student: (C, V), logits or probabilities;
    is_certain: (C,) bool, whether more than half of the mass lies there; total: (C,) what the terms sum to, None for zero.
    """
    if not terms.shape[-1]:
        return terms
    peak = student.argmax(-1, keepdim=True)
    own = terms.gather(-1, peak)
    others = terms.scatter_(-1, peak, 0.0).sum(-1, keepdim=True).neg_()
    if total is not None:
        others += total[:, None]
    return terms.scatter_(-1, peak, others.where(is_certain[:, None], own))


def weighted(probability: Tensor, factor: Tensor) -> Tensor:
    """probability * factor, with 0 * (anything, infinite or undefined) = 0."""
    return (probability * factor).masked_fill_(probability == 0, 0.0)
