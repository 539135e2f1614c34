"""`topk_kl_div`: divergence from a teacher of which each token's K largest log-probabilities, and the mass of the rest, are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .checks import check_denominators, check_plain, check_tail, check_teacher, check_tensor, check_token_tensors
from .divergence import Divergence
from .fused_loss import LossStats, fused_loss
from .linear_logits import check_head
from .listed_logits import listed_logits
from .options import LossOptions, autocast_dtype, divergence_options, statistics_option

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def topk_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprob: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    tail: str = "bucket",
    divergence: str | Divergence = "forward_kl",
    student_support: str = "full",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    topk_temperature: float | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    return_stats: bool | Literal["losses"] = False,
    grad_filter: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """T^2 D(teacher, student) per token, of what is known of the teacher, reduced over tokens.

    With p the listed probabilities of the token, S the listed ids, q = softmax(z_s / T), p_tail and q_tail the mass outside of S, D is
    over K + 1 events, the listed ids and any other:

        tail="bucket"       D((p, p_tail), (q, q_tail)): never above that of the whole distributions
        tail="renormalize"  D((p', 0), (q, q_tail)), p' = p / sum_S p: pulls mass onto S that the teacher has elsewhere
        tail="zero"         sum_S p (log p - log q), forward KL alone: may be negative

    With student_support="listed" it is D(p', q'), q' = q / sum_S q. Three GEMMs, all of them the student's; with "listed" none.

    Args:
        student_hidden: (..., H) states before the head, any leading dims.
        student_weight: (V, H) head; outside autocast in the dtype of `student_hidden`.
        topk_ids: (..., K) int64 student ids, each at most once a token; -1 where a token has fewer than K.
        topk_logprobs: (..., K) the teacher's log-probabilities of them, any floating dtype, AT `topk_temperature`. Above 0, or of more
            mass than 1 with the tail, by more than rounding (0.01), they are refused on the CPU.
        tail_logprob: (...) log of the mass of all other ids at temperature T, -inf for none; `tail="bucket"` needs it.
        student_bias: (V,).
        tail: "bucket", "renormalize" or "zero": what stands for the ids that are not listed.
        divergence: a name or a `Divergence`, as in `linear_kl_div`. Reverse KL is infinite with "renormalize" over the full support.
        student_support: "full": the student's softmax is over its vocabulary. "listed", with "renormalize": it is over the list, too,
            and says nothing of other ids. Then K rows of the head are gathered for every token, and no others take part or get a
            gradient. On a GPU their gradients are added in no fixed order, so that last bits may differ from run to run.
        temperature: 1e-6 <= T <= 32. Value and gradient both carry T^2.
        temperature_squared: whether they do.
        topk_temperature: the temperature that the lists were made at; None: `temperature`. Another one goes with "renormalize" alone,
            where p' is proportional to p^(topk_temperature / T): the mass of the others does not follow.
        mask: (...) bool, or float token weights >= 0; masked rows are packed out before any GEMM.
        labels: (...) int64 student ids of a cross-entropy at T = 1 over the whole vocabulary, as in `linear_kl_div`; with "listed" it
            takes a pass, and three GEMMs, of its own.
        label_weight: of that cross-entropy.
        ignore_index: the label of a token that has none.
        student_softcap: what the student's model does after its head, as in `linear_kl_div`.
        student_logit_scale: the same, a factor before the soft-cap.
        reduction: "mean", "sum" or "none".
        denominator: number, or tensor of shape (), that replaces the mean's.
        label_denominator: number, or tensor of shape (), that replaces the mean's of the labels' term alone.
        chunk_size: rows of logits that are made at a time; None: planned.
        memory_budget: bytes of logits that may be alive, in place of chunk_size; None: planned.
        backend: "auto", "torch", "cpp" or "triton"; with "listed" "cuda", too.
        return_stats: also return `LossStats`: the student's mass on the list and its overlap with the student's own largest, or with
            "listed" the entropies and the agreement of the distributions over the list; "losses": neither, nor what grad_filter did.
        grad_filter: approximate, off by default; as in `linear_kl_div`. Not with "listed".
        group: the head is split by vocabulary rows over its processes, as in `linear_kl_div`: each passes the same hidden states,
            lists, mask and labels, and its own rows of weight and bias. Ids and labels are positions in the shards as they stand one
            behind the other, in the order of ranks. A chunk of tokens takes two all-reduces, of 1 and of K + 1 numbers a token (K + 3
            with labels); the overlap, if it is asked for, an all-gather of K. "listed" takes one all-reduce of K numbers a token in
            all, and with labels those of every chunk, too. Backward takes that of the hidden states' gradient. Not with grad_filter
            or compiled backends; under `torch.compile` the graph breaks here.

    Returns:
        The loss, () or with reduction="none" (...), in float32 (float64 for float64 states); with return_stats the pair of it and
        `LossStats`. Gradients come back in each input's own dtype.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what would do.
    """
    leading = check_head("student_", student_hidden, student_weight, student_bias, is_shard=group is not None)
    device = student_hidden.device
    kind = Divergence.parse(divergence)
    check_tail(tail, tail_logprob is not None, kind, student_support, temperature, topk_temperature)
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
    if student_support == "listed" and grad_filter is not None:
        raise ValueError(f"grad_filter={grad_filter} leaves out columns of the vocabulary, and 'listed' has K alone; leave it out.")
    options = LossOptions(
        **divergence_options(kind),
        tail=tail,
        temperature=temperature,
        temperature_squared=temperature_squared,
        topk_temperature=topk_temperature,
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
    denominator = check_denominators(denominator, label_denominator, reduction, device)
    student = {"hidden": student_hidden.reshape(-1, student_hidden.shape[-1]), "weight": student_weight, "bias": student_bias}
    teacher = {
        "topk_ids": topk_ids.reshape(-1, topk_ids.shape[-1]),
        "topk_logprobs": topk_logprobs.reshape(-1, topk_ids.shape[-1]),
        "tail_logprob": None if tail_logprob is None else tail_logprob.reshape(-1),
    }
    call: dict[str, Any] = {"leading": leading, "group": group, "mask": mask, "denominator": denominator}
    if student_support == "full":
        return _over_vocabulary(student, teacher, options, labels=labels, **call)
    loss = _over_lists(student, teacher, options, **call)
    if labels is None:
        return loss
    # A label may be any id, and needs the logits of all.
    of_labels = replace(options, divergence=None, mixing=None, statistics=options.statistics and "losses")
    if label_weight == 0:
        student = {name: None if x is None else x.detach() for name, x in student.items()}
    return _sum(loss, _over_vocabulary(student, teacher, of_labels, labels=labels, **call))


_Tensors = Mapping[str, Tensor | None]
_Loss = Tensor | tuple[Tensor, LossStats]


def _over_vocabulary(
    student: _Tensors,
    teacher: _Tensors,
    options: LossOptions,
    *,
    leading: torch.Size,
    group: ProcessGroup | None,
    **tokens: Any,
) -> _Loss:
    """The loss by logits of the whole vocabulary; without a divergence that of the labels alone."""
    if group is None:
        return fused_loss(student, teacher if options.divergence else {}, options, leading, **tokens)
    # Imports torch.distributed and torch._dynamo, for which nobody else should wait.
    from .vocab_parallel import check_group
    from .vocab_parallel_topk import topk_vocab_parallel_loss

    check_group(group, None, options)
    return topk_vocab_parallel_loss(student, teacher, options, leading, group, **tokens)


def _over_lists(
    student: _Tensors,
    teacher: _Tensors,
    options: LossOptions,
    *,
    leading: torch.Size,
    group: ProcessGroup | None,
    mask: Tensor | None,
    denominator: Tensor | None,
) -> _Loss:
    """The divergence of both models' distributions over the lists, as if each list were the vocabulary."""
    ids, log_probabilities = teacher["topk_ids"], teacher["topk_logprobs"]
    assert ids is not None and log_probabilities is not None
    if group is None:
        logits = listed_logits(student, ids, log_probabilities, mask, options)
    else:
        from .vocab_parallel import check_group
        from .vocab_parallel_topk import sharded_listed_logits

        check_group(group, None, options)
        logits = sharded_listed_logits(student, ids, log_probabilities, mask, options, group)
    made_at = options.topk_temperature or options.temperature
    teacher_logits = (log_probabilities.to(logits.dtype) * made_at).masked_fill(ids < 0, -torch.inf)
    # The logits are finished.
    of_lists = replace(options, tail=None, topk_temperature=None, student_softcap=None, student_logit_scale=1.0, operand_dtype=None)
    of_lists = replace(of_lists, label_weight=0.0)
    return fused_loss({"logits": logits}, {"teacher_logits": teacher_logits}, of_lists, leading, mask=mask, denominator=denominator)


def _sum(divergence: _Loss, labels: _Loss) -> _Loss:
    """Both parts of a loss, each with or without its statistics, as one."""
    if isinstance(divergence, tuple) and isinstance(labels, tuple):
        return divergence[0] + labels[0], replace(divergence[1], cross_entropy=labels[1].cross_entropy)
    assert not isinstance(divergence, tuple) and not isinstance(labels, tuple)
    return divergence + labels
