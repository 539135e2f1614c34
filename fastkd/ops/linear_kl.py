"""`linear_kl_div`: divergence between teacher and student straight from hidden states and heads, without the logits of all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .checks import check_denominators, check_teacher, check_teacher_mass, check_token_tensors, check_token_weight, leading_shape
from .divergence import Divergence
from .fused_loss import LossStats, TokenWeight, fused_loss
from .linear_logits import check_head
from .options import LossOptions, autocast_dtype, divergence_options, statistics_option

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    mask: Tensor | None = None,
    vocab_index: Tensor | None = None,
    teacher_mass: str = "renormalize",
    vocab_slots: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
    grad_filter: float | None = None,
    token_weight: TokenWeight | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(softmax(z_t / T), softmax(z_s / T)) per token, with z = softcap(scale (h W^T + b)), reduced over tokens.

    Only one chunk of logits exists at a time; gradients are made in the forward pass: four GEMMs in all (three student, one teacher).

    Args:
        student_hidden: (..., H_s) states before the head, any leading dims.
        student_weight: (V_s, H_s) head; outside autocast in the dtype of `student_hidden`.
        teacher_hidden: (..., H_t), same leading dims. No gradient ever flows to the teacher.
        teacher_weight: (V_t, H_t); None: the identity, and `teacher_hidden` holds the teacher's logits (..., V_t) already, in any
            floating dtype, from a cache or a service. They are read as they are, a chunk at a time.
        student_bias: (V_s,).
        teacher_bias: (V_t,); none without a teacher_weight.
        divergence: a name or a `Divergence`; p is the teacher, q the student.
        temperature: 1e-6 <= T <= 32. Value and gradient both carry T^2 (Hinton et al., arXiv:1503.02531). Above 32, T^2 times float32's
            rounding of the divergence, a few 1e-7 nats, is too much of the value.
        temperature_squared: whether value and gradient carry T^2; without it they are as Liger, TRL and unsloth have them.
        mask: (...) bool, or float token weights >= 0; masked rows are packed out before any GEMM.
        vocab_index: (V_s,) int64, the teacher row behind every student row: the teacher's softmax is taken over those rows alone.
            Each row at most once. None: same ids, a longer teacher is sliced to V_s rows.
        teacher_mass: what becomes of the teacher's tokens that the student does not have. "renormalize": its softmax is over the kept
            rows alone. "full": it is over all V_t rows; the dropped tokens are one event that the student never names, and forward KL
            counts the kept ones alone, sum_K p log(p / q). "slots": as "full", but a row of the student may stand for several tokens
            of the teacher, whose probabilities are added up.
        vocab_slots: (V_t,) int64, the student's row of every row of the teacher, -1 for a token that has none; with "slots" alone, and
            in place of vocab_index. Of a `VocabMap` it is `id_to_slot`.
        labels: (...) int64 student ids; adds label_weight times the cross-entropy of the same student logits at T = 1, averaged over
            its own unmasked labelled tokens (or over `denominator`).
        label_weight: finite, >= 0; above 0 it needs labels.
        ignore_index: the label of a token that has none.
        student_softcap: c > 0 where the student's model soft-caps its logits after the head, x -> c tanh(x / c); None: it does not.
        teacher_softcap: the teacher's.
        student_logit_scale: what the student's model multiplies its logits by after the head, before a soft-cap; not 0.
        teacher_logit_scale: the teacher's.
        reduction: "mean" over the unmasked weight, "sum", or "none" (one value per token in the shape of the leading dims).
        denominator: number, or tensor of shape (), that replaces the mean's denominator (global token count of an optimizer step).
        label_denominator: number, or tensor of shape (), that replaces the mean's of the labels' term alone (labelled tokens).
        chunk_size: rows of logits that are made at a time; None: planned (`fastkd.ops.plan.plan_chunks`).
        memory_budget: bytes of logits that may be alive, in place of chunk_size; None: planned.
        backend: "auto", or "torch", "cpp", "triton" or "cuda"; one that cannot serve here is refused.
        return_stats: also return `LossStats`, per token and without gradient; "losses": of it the divergence and the cross-entropy
            alone, which cost nothing.
        grad_filter: approximate, off by default, on a CPU alone. The two backward GEMMs run over those vocabulary columns alone in
            which the gradient of some token of the chunk exceeds this (before the division by the denominator); the others are replaced
            by their mean, token by token. `LossStats.columns_kept` and `.dropped_mass` say what it did. The value stays exact.
        token_weight: a function (losses, statistics) -> weights of the token's losses, all (C,), that is called for every chunk of C
            unmasked tokens, with T^2 D + label_weight CE and what is known of them by `LossStats`. The loss is then
            sum_i mask_i w_i loss_i over the same denominator; w is a constant: no gradient flows through it. It must look at no other
            token, for which tokens share a chunk is a matter of memory. Importance weights, clipping, focal losses, at four GEMMs.
            Not with reduction="none" or group; under `torch.compile` the graph breaks here.
        group: tensor-parallel heads. Every process of the group passes the same hidden states, mask and labels, and its own rows of
            both heads (with `teacher_weight=None` its own columns of the teacher's logits): the same ids in both, row by row. Shards
            may differ in size. The loss is that of the whole vocabulary, on every process. The gradient of `student_hidden` is summed
            over the group in the backward pass, so that it is complete, and equal, on every process: do not sum it again. Gradients of
            weight and bias are those of the shard. `labels` are positions in the shards as they stand one behind the other, in the
            order of ranks. A chunk of tokens takes two all-reduces (three for all but forward and reverse KL) of at most five numbers a
            token. All processes must call, and go backward, alike. Not with vocab_index, teacher_mass, return_stats,
            grad_filter or compiled backends; under `torch.compile` the graph breaks here.

    Returns:
        The loss, () or with reduction="none" (...), in float32 (float64 for float64 inputs); with return_stats the pair of it and
        `LossStats`. Logits and gradients accumulate in that dtype, and gradients come back in each input's own. No tokens, or all
        masked: exact zeros with the graph connected.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    is_shard = group is not None
    leading = check_head("student_", student_hidden, student_weight, student_bias, is_shard=is_shard)
    if _check_teacher_side(teacher_hidden, teacher_weight, teacher_bias, is_shard=is_shard) != leading:
        raise ValueError(
            f"student_hidden has leading dims {tuple(leading)} and teacher_hidden {tuple(teacher_hidden.shape[:-1])}; "
            "both models must have seen the same tokens."
        )
    device = student_hidden.device
    if teacher_hidden.device != device:
        raise ValueError(f"teacher_hidden is on {teacher_hidden.device} and student_hidden on {device}; move them together.")
    options = LossOptions(
        **divergence_options(divergence),
        teacher_mass=teacher_mass,
        temperature=temperature,
        temperature_squared=temperature_squared,
        label_weight=label_weight,
        ignore_index=ignore_index,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        reduction=reduction,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        backend=backend,
        statistics=statistics_option(return_stats),
        grad_filter=grad_filter,
        operand_dtype=autocast_dtype(device),
    )
    check_token_weight(token_weight, reduction)
    mask, labels = check_token_tensors(leading, device, options, mask, labels)
    denominator = check_denominators(denominator, label_denominator, reduction, device)
    student = {"hidden": student_hidden.reshape(-1, student_hidden.shape[-1]), "weight": student_weight, "bias": student_bias}
    teacher = {"teacher_hidden": teacher_hidden.flatten(0, -2), "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    if teacher_weight is None:
        teacher = {"teacher_logits": teacher_hidden.flatten(0, -2)}
    if group is not None:
        # Imports torch.distributed and torch._dynamo, for which nobody else should wait.
        from .vocab_parallel import check_group, vocab_parallel_loss
        from .vocab_parallel_dense import DENSE

        if token_weight is not None:
            raise ValueError("token_weight is not known to group=; leave one of them out.")
        check_group(group, vocab_index, options)
        loss, _ = vocab_parallel_loss(
            student, teacher, options, leading, group, DENSE, mask=mask, labels=labels, denominator=denominator
        )
        return loss
    teacher_vocabulary = teacher_hidden.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
    check_teacher_mass(
        teacher_mass,
        vocab_index,
        vocab_slots,
        student_weight.shape[0],
        teacher_vocabulary,
        device,
        has_head=teacher_weight is not None,
    )
    tokens = {"mask": mask, "labels": labels, "denominator": denominator}
    index = {"vocab_index": vocab_index, "vocab_slots": vocab_slots}
    return fused_loss(student, teacher, options, leading, **index, **tokens, token_weight=token_weight)


def _check_teacher_side(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, *, is_shard: bool) -> torch.Size:
    """Check a head with its hidden states, or logits that exist; return the leading dims."""
    if weight is not None:
        return check_head("teacher_", hidden, weight, bias, is_shard=is_shard)
    leading = leading_shape("teacher_hidden", hidden, may_be_empty=is_shard)
    check_teacher("teacher_hidden", hidden)
    if bias is not None:
        raise ValueError(
            "teacher_bias was given without a teacher_weight: teacher_hidden then holds finished logits. Add the bias to them."
        )
    return leading


class LinearKLDivLoss(torch.nn.Module):
    """Module form of `linear_kl_div`: options at construction, tensors (and per-batch mask, labels, denominator) at the call.

    Args:
        options: keyword arguments of `linear_kl_div`, checked when the module is called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        **per_batch: Any,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """`linear_kl_div` of these tensors, with the module's options and those of this call, which come first.

        Args:
            student_hidden: (..., H_s).
            student_weight: (V_s, H_s).
            teacher_hidden: (..., H_t), or logits (..., V_t) with teacher_weight None.
            teacher_weight: (V_t, H_t) or None.
            per_batch: keyword arguments of `linear_kl_div`: mask (...), labels (...), denominator and others.

        Returns:
            What `linear_kl_div` does.
        """
        return linear_kl_div(student_hidden, student_weight, teacher_hidden, teacher_weight, **{**self.options, **per_batch})

    def extra_repr(self) -> str:
        """The options, as the module's repr shows them."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
