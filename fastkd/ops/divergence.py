"""Which divergence between teacher and student is minimised, as one small value that every op and backend understands."""

from __future__ import annotations

from dataclasses import dataclass

_PLAIN = ("forward_kl", "reverse_kl", "tvd")
_MIXED = {"jsd": "beta", "skew_kl": "alpha", "skew_rkl": "alpha"}


@dataclass(frozen=True)
class Divergence:
    """A divergence D(p, q) between the teacher's distribution p and the student's q over the vocabulary.

    - `"forward_kl"`: KL(p || q)
    - `"reverse_kl"`: KL(q || p)
    - `"tvd"`: 1/2 sum |p - q|
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
    """beta or alpha; None for the first three."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise TypeError(f"kind is a {type(self.kind).__name__}; give a divergence's name.")
        if self.kind in _MIXED:
            name = _MIXED[self.kind]
            if isinstance(self.mixing, bool) or not isinstance(self.mixing, (int, float)) or not 0.0 < self.mixing < 1.0:
                raise ValueError(
                    f"Divergence.{self.kind}({name}={self.mixing}) needs 0 < {name} < 1. At the ends it is another divergence "
                    "or zero: pass divergence='forward_kl' or 'reverse_kl' if that is what you mean."
                )
        elif self.kind not in _PLAIN:
            raise ValueError(
                f"divergence={self.kind!r} is not known. Use one of {', '.join(map(repr, _PLAIN))}, or Divergence.jsd(beta), "
                "Divergence.skew_kl(alpha), Divergence.skew_rkl(alpha)."
            )
        elif self.mixing is not None:
            raise ValueError(f"divergence={self.kind!r} takes no mixing weight, but {self.mixing} was given. Leave it out.")

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
        if kind not in _MIXED:
            return cls(value)
        try:
            return cls(kind, float(mixing) if bracket else None)
        except ValueError as error:
            raise ValueError(f"divergence={value!r}: {error}") from None

    def __str__(self) -> str:
        return self.kind if self.mixing is None else f"{self.kind}({self.mixing:g})"
