"""`topk_kl_div`: divergence from a cached teacher: of each token its K largest log-probabilities and the mass of the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_denominator, check_plain, check_tail, check_teacher, check_tensor, check_token_tensors
from .fused_loss import LossStats, fused_loss
from .linear_logits import check_head
from .options import LossOptions, autocast_dtype, statistics_option


def topk_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprob: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
    grad_filter: float | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(teacher, student) per token, forward KL of what is known of the teacher, reduced over tokens.

    With p the listed probabilities of the token, S the listed ids, q = softmax(z_s / T), p_tail and q_tail the mass outside of S:

        tail="bucket"       sum_S p (log p - log q) + p_tail (log p_tail - log q_tail): exact for K + 1 events, never above the full KL
        tail="renormalize"  sum_S p' (log p' - log q), p' = p / sum_S p: pulls mass onto S that the teacher has elsewhere
        tail="zero"         sum_S p (log p - log q): may be negative

    Three GEMMs, all of them the student's.

    Args:
        student_hidden: (..., H) states before the head, any leading dims.
        student_weight: (V, H) head; outside autocast in the dtype of `student_hidden`.
        topk_ids: (..., K) int64 student ids, each at most once a token; -1 where a token has fewer than K.
        topk_logprobs: (..., K) the teacher's log-probabilities of them, any floating dtype, AT temperature T. Above 0, or of more mass
            than 1 with the tail, by more than rounding (0.01), they are refused on the CPU.
        tail_logprob: (...) log of the mass of all other ids at temperature T, -inf for none; `tail="bucket"` needs it.
        student_bias: (V,).
        tail: "bucket", "renormalize" or "zero": what stands for the ids that are not listed.
        temperature: 1e-6 <= T <= 32. Value and gradient both carry T^2.
        mask: (...) bool, or float token weights >= 0; masked rows are packed out before any GEMM.
        labels: (...) int64 student ids of a cross-entropy at T = 1, as in `linear_kl_div`.
        label_weight: of that cross-entropy.
        ignore_index: the label of a token that has none.
        student_softcap: what the student's model does after its head, as in `linear_kl_div`.
        student_logit_scale: the same, a factor before the soft-cap.
        reduction: "mean", "sum" or "none".
        denominator: number, or tensor of shape (), that replaces the mean's.
        chunk_size: rows of logits that are made at a time; None: planned.
        memory_budget: bytes of logits that may be alive, in place of chunk_size; None: planned.
        backend: "auto", "torch" or "triton".
        return_stats: also return `LossStats`, without entropies and agreement; "losses": nor what grad_filter did.
        grad_filter: approximate, off by default; as in `linear_kl_div`.

    Returns:
        The loss, () or with reduction="none" (...), in float32 (float64 for float64 states); with return_stats the pair of it and
        `LossStats`. Gradients come back in each input's own dtype.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    leading = check_head("student_", student_hidden, student_weight, student_bias)
    device = student_hidden.device
    check_tail(tail, has_log_tail=tail_logprob is not None)
    check_tensor("topk_ids", topk_ids)
    if topk_ids.dtype != torch.int64 or topk_ids.shape[:-1] != leading or topk_ids.dim() < 2 or topk_ids.shape[-1] == 0:
        raise ValueError(
            f"topk_ids has dtype {topk_ids.dtype} and shape {tuple(topk_ids.shape)}; give torch.int64 of shape (..., K), K >= 1, with "
            f"the leading dims {tuple(leading)} of student_hidden."
        )
    known = {"topk_logprobs": (topk_logprobs, topk_ids.shape)}
    if tail_logprob is not None:
        known["tail_logprob"] = tail_logprob, leading
    for name, (tensor, shape) in known.items():
        check_plain(name, tensor)
        check_teacher(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, as topk_ids says.")
    for name, (tensor, _) in {"topk_ids": (topk_ids, leading), **known}.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the student is on {device}; move it there.")
    options = LossOptions(
        tail=tail,
        temperature=temperature,
        label_weight=label_weight,
        ignore_index=ignore_index,
        student_softcap=student_softcap,
        student_logit_scale=student_logit_scale,
        reduction=reduction,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        backend=backend,
        statistics=statistics_option(return_stats),
        grad_filter=grad_filter,
        operand_dtype=autocast_dtype(device),
    )
    mask, labels = check_token_tensors(leading, device, options, mask, labels)
    return fused_loss(
        {"hidden": student_hidden.reshape(-1, student_hidden.shape[-1]), "weight": student_weight, "bias": student_bias},
        {
            "topk_ids": topk_ids.reshape(-1, topk_ids.shape[-1]),
            "topk_logprobs": topk_logprobs.reshape(-1, topk_ids.shape[-1]),
            "tail_logprob": None if tail_logprob is None else tail_logprob.reshape(-1),
        },
        options,
        leading,
        mask=mask,
        labels=labels,
        denominator=check_denominator(denominator, reduction, device),
    )
