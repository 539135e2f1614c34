"""What every token counts in a loss, from mask, labels, reduction and denominator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .options import LossOptions


@dataclass(frozen=True)
class TokenWeights:
    """loss = scale * sum_i (token_i T^2 D_i + label_i CE_i) over the `valid` tokens, (n,) indices; None: all tokens.

    Weights (n,) are of order one and 1 / denominator stands in `scale` (), so that 16-bit gradients do not underflow.
    """

    valid: Tensor | None
    token: Tensor
    labels: Tensor | None
    label: Tensor | None
    scale: Tensor

    def times(self, upstream: Tensor, *, linear: bool) -> TokenWeights:
        """Fold `upstream`, () or (N,), and the scale into the weights.

        linear: but for their largest value, which stays in `scale`: it would take 16-bit gradients of logits below what they can hold.
        """
        if upstream.dim() and self.valid is not None:
            upstream = upstream[self.valid]
        factor = upstream * self.scale
        scale = torch.ones_like(self.scale)
        if linear and factor.numel():
            scale = factor.abs().amax().clamp_min(torch.finfo(factor.dtype).tiny)
            factor = factor / scale
        return replace(self, token=self.token * factor, label=None if self.label is None else self.label * factor, scale=scale)

    def with_exact_scale(self) -> TokenWeights:
        """With a power of two as `scale`, by which 16-bit gradients are multiplied without rounding again."""
        mantissa, exponent = torch.frexp(self.scale)
        label = None if self.label is None else self.label * mantissa
        return replace(self, token=self.token * mantissa, label=label, scale=torch.ldexp(torch.ones_like(self.scale), exponent))

    def total(self, divergence: Tensor | None, cross_entropy: Tensor | None) -> Tensor:
        """token_i T^2 D_i + label_i CE_i, (n,)."""
        total = torch.zeros_like(self.token)
        if divergence is not None:
            total += self.token * divergence
        if cross_entropy is not None and self.label is not None:
            total += self.label * cross_entropy
        return total

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """(..., n) values of the valid tokens as (..., tokens), zero elsewhere."""
        if self.valid is None:
            return values
        return values.new_zeros(*values.shape[:-1], tokens).index_copy_(-1, self.valid, values)


def token_weights(
    options: LossOptions,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    mask: Tensor | None,
    labels: Tensor | None,
    denominator: Tensor | None,
) -> TokenWeights:
    """The weights of a call with these options.

    Args:
        options: of which label_weight, ignore_index and reduction are read.
        tokens: N.
        dtype: float32 or float64, of the weights.
        device: of the weights.
        mask: (N,) bool or float weights; None: all ones. Tokens of weight zero are left out of `valid`.
        labels: (N,) int64, or None.
        denominator: () float64, in place of the mean's; (2,) those of the divergence and of the labels, zero where that term has its
            own; None: the unmasked weight.
    """
    valid = counted(mask)
    token = torch.ones(tokens, dtype=dtype, device=device) if mask is None else mask.to(dtype)
    if valid is not None:
        token = token[valid]
    scale = torch.ones((), dtype=dtype, device=device)
    of_labels: Tensor | None = None
    if denominator is not None and denominator.dim():
        denominator, of_labels = denominator.where(denominator != 0, token.sum()).unbind()
    if options.reduction == "mean":
        scale = _inverse_or_zero(token.sum() if denominator is None else denominator.to(dtype))
    # The row kernels' T^2 is taken back here, where it is not wanted.
    divergence = token if options.temperature_squared else token / options.temperature**2
    if labels is None:
        return TokenWeights(valid, divergence, None, None, scale)
    labels = torch.where(labels == options.ignore_index, -1, labels)
    labels = labels if valid is None else labels[valid]
    if options.label_weight == 0:
        return TokenWeights(valid, divergence, labels, None, scale)
    label = token * (labels >= 0) * options.label_weight
    if options.reduction == "mean" and (denominator is None or of_labels is not None):
        # Cross-entropy has a denominator of its own: undo the divergence's, which `scale` applies to all.
        of_labels = label.sum() / options.label_weight if of_labels is None else of_labels.to(dtype)
        label = label * (_inverse_or_zero(of_labels) * _inverse_or_zero(scale))
    return TokenWeights(valid, divergence, labels, label, scale)


def counted(mask: Tensor | None) -> Tensor | None:
    """(n,) which tokens of a mask (N,), bool or float, count; None: all, or a CUDA graph is captured, where nothing can be read."""
    if mask is None or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return mask.nonzero()[:, 0]


def _inverse_or_zero(total: Tensor) -> Tensor:
    """1 / total, 0 for 0. Of a NaN it is NaN: on a GPU nothing else tells of it."""
    return torch.where(total <= 0, 0.0, 1.0 / total.clamp_min(torch.finfo(total.dtype).tiny))
