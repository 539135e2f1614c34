"""`topk_kl_div`: divergence from a cached teacher: of each token its K largest log-probabilities and the mass of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import LossOptions, check_denominator, check_plain, check_row_tensors, check_teacher
from .chunked import LossStats
from .linear_logits import autocast_dtype, check_head, flatten_head
from .operator import chunked_loss
from .topk_rows import TopK, check_tail, topk_kl_reference


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
    return_stats: bool = False,
    grad_filter: float | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(teacher, student) per token, forward KL of what is known of the teacher, reduced over tokens.

    With p the listed probabilities of the token, S the listed ids, q = softmax(z_s / T), p_tail and q_tail the mass outside of S:

        tail="bucket"       sum_S p (log p - log q) + p_tail (log p_tail - log q_tail): exact for K + 1 events, never above the full KL
        tail="renormalize"  sum_S p' (log p' - log q), p' = p / sum_S p: pulls mass onto S that the teacher has elsewhere
        tail="zero"         sum_S p (log p - log q): may be negative

    Args:
        student_hidden, student_weight, student_bias: (..., H), (V, H), (V,), as in `linear_kl_div`.
        topk_ids: (..., K) int64 student ids, each at most once a token; -1 where a token has fewer than K.
        topk_logprobs: (..., K) the teacher's log-probabilities of them, any floating dtype, AT temperature T.
        tail_logprob: (...) log of the mass of all other ids at temperature T, -inf for none; `tail="bucket"` needs it.
        grad_filter and all else: as in `linear_kl_div`; three GEMMs, and one row of statistics less a model.

    Returns and raises what `linear_kl_div` does; `LossStats` without entropies and agreement.
    """
    leading = check_head("student", student_hidden, student_weight, student_bias)
    device = student_hidden.device
    check_tail(tail, has_log_tail=tail_logprob is not None)
    if topk_ids.dtype != torch.int64 or topk_ids.shape[:-1] != leading or topk_ids.dim() < 2:
        raise ValueError(
            f"topk_ids has dtype {topk_ids.dtype} and shape {tuple(topk_ids.shape)}; give torch.int64 of shape (..., K) with the "
            f"leading dims {tuple(leading)} of student_hidden."
        )
    shapes = (("topk_logprobs", topk_logprobs, topk_ids.shape), ("tail_logprob", tail_logprob, leading))
    for name, tensor, shape in shapes:
        if tensor is None:
            continue
        check_plain(name, tensor)
        check_teacher(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, as topk_ids says.")
    for name, tensor in (("topk_ids", topk_ids), ("topk_logprobs", topk_logprobs), ("tail_logprob", tail_logprob)):
        if tensor is not None and tensor.device != device:
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
        return_stats=return_stats,
        grad_filter=grad_filter,
        operand_dtype=autocast_dtype(device),
    )
    mask, labels = check_row_tensors(leading, device, options, mask, labels)
    teacher = [x.reshape(-1, x.shape[-1]) for x in (topk_ids, topk_logprobs)]
    return chunked_loss(
        flatten_head(student_hidden, student_weight, student_bias),
        teacher if tail_logprob is None else [*teacher, tail_logprob.reshape(-1)],
        options,
        leading,
        mask=mask,
        labels=labels,
        denominator=check_denominator(denominator, reduction, device),
    )


def topk_kl_div_reference(
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
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The same value by plain torch in the inputs' dtype, all logits at once, without labels: the oracle in float64."""
    logits = torch.nn.functional.linear(student_hidden, student_weight, student_bias)
    teacher = TopK(topk_ids.flatten(0, -2), topk_logprobs.flatten(0, -2), None if tail_logprob is None else tail_logprob.flatten())
    values = topk_kl_reference(logits.flatten(0, -2), teacher, tail, temperature=temperature).view(topk_ids.shape[:-1])
    weight = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    if reduction == "none":
        return weight * values
    total = (weight * values).sum()
    return total if reduction == "sum" else total / (weight.sum() if denominator is None else denominator)
