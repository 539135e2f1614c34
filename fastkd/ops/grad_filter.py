"""Backward GEMMs on fewer vocabulary columns: those in which the gradient of some token of the chunk exceeds a threshold."""

from __future__ import annotations

import torch
from torch import Tensor


class GradFilter:
    """Splits a chunk's logit gradient (C, V) into the columns where some entry exceeds `threshold` and the mean of the others.

    Gradients are compared before the loss is divided by its denominator and multiplied by the upstream gradient: those of a token's
    own T^2 D, at most T for a token weight of 1, so that the threshold means the same for every batch. Replacing the small columns by
    their mean, row by row, keeps the sum of each row. Cut Cross-Entropy (arXiv:2411.09009) skips small blocks without that correction.
    `statistics`: columns kept (n,) and mass dropped (n,), to be filled for the tokens that pass through; None: not asked for.
    """

    def __init__(self, threshold: float, statistics: tuple[Tensor, Tensor] | None) -> None:
        self.threshold, self.statistics = threshold, statistics

    def split(self, rows: slice, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Kept columns (K,), their gradient (C, K), and the mean of the other columns (C,) in `dtype`.

        The host waits for K here.
        """
        # Two passes; on a CPU the norm over the first dim, and aminmax, are ten times slower than they.
        largest = torch.maximum(gradient.amax(0), -gradient.amin(0))
        # Not (largest <= threshold), so that a NaN is kept and shows.
        kept = (~(largest <= self.threshold)).nonzero()[:, 0]
        compact = gradient.index_select(1, kept)
        dropped = gradient.shape[1] - kept.numel()
        tail = (gradient.sum(1, dtype=dtype) - compact.sum(1, dtype=dtype)) / max(dropped, 1)
        if self.statistics is not None:
            total, remains = (torch.linalg.vector_norm(x, 1, dim=1, dtype=dtype) for x in (gradient, compact))
            self.statistics[0][rows] = kept.numel() / gradient.shape[1]
            self.statistics[1][rows] = torch.where(total > 0, (1 - remains / total).clamp_min(0), 0.0)
        return kept, compact, tail if dropped else torch.zeros_like(tail)
