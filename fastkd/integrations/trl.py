"""fastkd under the trainers of TRL 1.16: `patch_trainers`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ops.kl import kl_div
from ..ops.linear_kl import linear_kl_div
from ..ops.options import autocast_dtype
from .peers import divergence_of_beta


@contextmanager
def patch_trainers() -> Iterator[None]:
    """Let TRL's `DistillationTrainer` and `GKDTrainer` make their losses by fastkd inside of the `with` block.

    `DistillationTrainer` distils by `linear_kl_div`: gradients are made in the forward pass, in four products in place of six (of eight
    for a JSD), and tokens outside of completions are in none of them. `GKDTrainer` makes the logits of both models itself; `kl_div`
    replaces what it makes of them. Values and gradients are TRL's, without T^2, and so is the entropy that it logs. Trainers of other
    classes stay as they are.

    Raises:
        RuntimeError: TRL has no such losses, or with other arguments: it is another version.
    """
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer import distillation_trainer

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (distillation_trainer, "_chunked_divergence_loss", chunked_divergence_loss),
        (GKDTrainer, "generalized_jsd_loss", generalized_jsd_loss),
    ]
    for owner, name, loss in places:
        _check_signature(owner, name, loss)
    originals = [vars(owner)[name] for owner, name, _ in places]
    try:
        for (owner, name, loss), original in zip(places, originals, strict=True):
            setattr(owner, name, type(original)(loss) if isinstance(original, staticmethod) else loss)
        yield
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _check_signature(owner: Any, name: str, loss: Callable[..., Any]) -> None:
    import trl

    theirs, ours = (inspect.signature(x).parameters if x else {} for x in (getattr(owner, name, None), loss))
    if [(p.name, p.default) for p in theirs.values()] != [(p.name, p.default) for p in ours.values()]:
        raise RuntimeError(
            f"{owner.__name__}.{name} of TRL {trl.__version__} takes ({', '.join(theirs)}), and fastkd knows TRL 1.16, where it takes "
            f"({', '.join(ours)}). Install trl==1.16.0, or call fastkd.linear_kl_div in a compute_loss of your own."
        )


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What TRL's `_chunked_divergence_loss` returns: the loss (), the sum of the student's entropies (), and the number of tokens ().

    Heads that FSDP2 or ZeRO-3 have split are gathered, as TRL does it.

    Args:
        student_hidden_states: (B, K, H_s), aligned with the completions' tokens.
        teacher_hidden_states: (B, K, H_t).
        student_lm_head_weight: (V, H_s).
        teacher_lm_head_weight: (V, H_t).
        completion_mask: (B, K), other than 0 where a token counts.
        beta: 0: forward KL; 1: reverse KL; between: JSD(beta).
        num_items_in_batch: tokens of the whole step, the denominator; None: those of this call.
        student_lm_head_bias: (V,).
        teacher_lm_head_bias: (V,).
        student_logit_scale: what the student's model multiplies its logits by.
        teacher_logit_scale: the same of the teacher.
        student_final_logit_softcapping: c of c tanh(z / c), after the scale.
        teacher_final_logit_softcapping: the same of the teacher.
        temperature: of both softmaxes; the value does not carry its square.
    """
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    student_weight, student_bias = _whole(student_lm_head_weight), _whole(student_lm_head_bias)
    teacher_weight, teacher_bias = _whole(teacher_lm_head_weight), _whole(teacher_lm_head_bias)
    counts = completion_mask != 0
    with maybe_gather_lm_head_ctx(student_weight, student_bias), maybe_gather_lm_head_ctx(teacher_weight, teacher_bias):
        loss, stats = linear_kl_div(
            student_hidden_states,
            _in_dtype_of(student_hidden_states, student_weight),
            teacher_hidden_states.detach(),
            _in_dtype_of(teacher_hidden_states, teacher_weight.detach()),
            student_bias=student_bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            divergence=divergence_of_beta(beta),
            temperature=temperature,
            temperature_squared=False,
            mask=counts,
            student_softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            denominator=num_items_in_batch,
            return_stats=True,
        )
    assert stats.student_entropy is not None
    return loss, stats.student_entropy.sum(), counts.sum()


def _whole(parameter: Any) -> Any:
    """A head's weight or bias, of which this rank may hold a shard; None stays None."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _in_dtype_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """A head (V, H) in the dtype of hidden states (..., H), unless autocast sees to it: mixed precision gathers a float32 master."""
    return weight if autocast_dtype(hidden.device) else weight.to(hidden.dtype)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """What `GKDTrainer.generalized_jsd_loss` returns, ().

    Args:
        student_logits: (B, S, V).
        teacher_logits: (B, S, V).
        labels: (B, S) int64, -100 where a token does not count; None: all count.
        beta: 0: forward KL; 1: reverse KL; between: JSD(beta).
        temperature: of both softmaxes; the value does not carry its square.
        reduction: "batchmean": over tokens that count, without labels over sequences; "mean": over their entries; "sum".
        num_items_in_batch: tokens of the whole step, the denominator in place of the reduction's.
    """
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(
            f"reduction={reduction!r} has a value for every token and id in TRL, and fastkd never makes those; use 'batchmean', 'mean' "
            "or 'sum', or fastkd.kl_div(reduction='none') for one value a token."
        )
    counts = None if labels is None else labels != -100
    denominator: Tensor | float | None = num_items_in_batch
    if denominator is None:
        tokens = torch.as_tensor(student_logits[..., 0].numel()) if counts is None else counts.sum()
        sequences = len(student_logits) if counts is None else tokens
        denominator = {"batchmean": sequences, "mean": tokens * student_logits.shape[-1], "sum": 1.0}[reduction]
    loss = kl_div(
        student_logits,
        teacher_logits.detach(),
        divergence=divergence_of_beta(beta),
        temperature=temperature,
        temperature_squared=False,
        mask=counts,
        denominator=denominator,
    )
    assert isinstance(loss, Tensor)
    return loss
