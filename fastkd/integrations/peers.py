"""What the drop-ins for other libraries' losses share."""

from __future__ import annotations

from ..ops.divergence import Divergence


def divergence_of_beta(beta: float) -> str | Divergence:
    """The divergence that Liger and TRL mean by `beta`: JSD(beta); at 0 and 1 not its limits, but forward and reverse KL."""
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return ends.get(beta) or Divergence.jsd(beta)
