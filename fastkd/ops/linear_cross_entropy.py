"""`linear_cross_entropy`: negative log-likelihood of labels straight from hidden states and head, without the logits of all tokens."""

from __future__ import annotations

from torch import Tensor

from .checks import check_denominator, check_tensor, check_token_tensors, check_token_weight, check_transform
from .fused_loss import TokenWeight, fused_loss
from .linear_logits import check_head
from .options import LossOptions, autocast_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    token_weight: TokenWeight | None = None,
) -> Tensor:
    """-log softmax(z)[label] per token, with z = softcap(logit_scale (h W^T + b)), reduced over labelled tokens.

    Only one chunk of logits exists at a time; gradients are made in the forward pass: three GEMMs in all.

    Args:
        hidden: (..., H) states before the head, any leading dims.
        weight: (V, H) head; outside autocast in the dtype of `hidden`.
        labels: (...) int64 ids below V.
        bias: (V,).
        ignore_index: the label of a token that has none; those rows are packed out before any GEMM.
        softcap: c > 0 where the model soft-caps its logits, x -> c tanh(x / c); None: it does not.
        logit_scale: what the model multiplies its logits by, before a soft-cap; not 0.
        reduction: "mean" over labelled tokens, "sum", or "none" (one value per token, zero where there is no label).
        denominator: number, or tensor of shape (), that replaces the mean's denominator.
        chunk_size: rows of logits that are made at a time; None: planned (`fastkd.ops.plan.plan_chunks`).
        memory_budget: bytes of logits that may be alive, in place of chunk_size; None: planned.
        backend: "auto", "torch", "cpp" or "triton".
        token_weight: a function (losses, statistics) -> weights (C,), as in `linear_kl_div`; the losses are cross-entropies.

    Returns:
        The loss, () or with reduction="none" (...), in float32 (float64 for float64 inputs). Gradients accumulate in that dtype and
        come back in each input's own. No labelled token: exact zeros with the graph connected.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    leading = check_head("", hidden, weight, bias)
    check_tensor("labels", labels)
    check_transform("", logit_scale, softcap)
    check_token_weight(token_weight, reduction)
    device = hidden.device
    options = LossOptions(
        label_weight=1.0,
        ignore_index=ignore_index,
        student_softcap=softcap,
        student_logit_scale=logit_scale,
        reduction=reduction,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        backend=backend,
        operand_dtype=autocast_dtype(device),
    )
    _, flat_labels = check_token_tensors(leading, device, options, None, labels)
    assert flat_labels is not None
    loss = fused_loss(
        {"hidden": hidden.reshape(-1, hidden.shape[-1]), "weight": weight, "bias": bias},
        {},
        options,
        leading,
        mask=flat_labels != ignore_index,
        labels=flat_labels,
        denominator=check_denominator(denominator, reduction, device),
        token_weight=token_weight,
    )
    assert not isinstance(loss, tuple)
    return loss
