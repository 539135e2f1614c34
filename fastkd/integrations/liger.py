"""Liger's distillation losses on fastkd's ops: import a class from here in place of liger-kernel 0.8.5's.

Names, arguments and values are Liger's, without T^2. What differs in all of them:

- 16-bit hidden states and heads make float32 logits, which are not rounded; 16-bit losses come back in float32, too.
- Tokens without a label are left out before any product, and no token with a label is no error.
- Ids, weights and temperatures are checked, and refused in a sentence; so is a teacher with more rows than the student.
- Biases, soft-caps, per-token values and statistics are `fastkd.linear_kl_div`'s and `fastkd.kl_div`'s own arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_choice, check_number
from ..ops.kl import kl_div
from ..ops.linear_kl import linear_kl_div
from .peers import divergence_of_beta

_REDUCTIONS = ("batchmean", "mean", "sum")


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss CE + weight_soft_loss D(p_T, q_T), each the mean over labelled tokens (`liger_kernel.chunked_loss`).

    Nothing is compiled, and the rows of a chunk are planned where `chunk_size` does not say them.

    Args:
        weight_hard_loss: >= 0, of the labels' cross-entropy at temperature 1.
        weight_soft_loss: > 0, of the divergence.
        beta: 0: forward KL; 1: reverse KL; between: JSD(beta).
        ignore_index: the label of a token that counts in neither.
        temperature: of the divergence, which does not carry its square.
        compiled: no effect.
        chunk_size: tokens whose logits exist at a time; None: planned.
        return_soft_hard_loss: return (loss, divergence, cross-entropy); the latter two without weights and gradients.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = None,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        check_number("weight_hard_loss", weight_hard_loss, may_be_zero=True)
        if weight_soft_loss == 0:
            raise ValueError("weight_soft_loss=0 leaves the labels alone; take fastkd.linear_cross_entropy, times weight_hard_loss.")
        check_number("weight_soft_loss", weight_soft_loss)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.divergence, self.ignore_index, self.temperature = divergence_of_beta(beta), ignore_index, temperature
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, ().

        Args:
            student_input: (N, H_s).
            student_weight: (V, H_s).
            teacher_input: (N, H_t).
            teacher_weight: (V, H_t); the teacher gets no gradient.
            true_labels: (N,) int64.
            student_bias: (V,).
            teacher_bias: (V,).
        """
        _check_vocabularies(student_weight, teacher_weight)
        is_labelled = true_labels != self.ignore_index
        loss, stats = linear_kl_div(
            student_input,
            student_weight,
            teacher_input.detach(),
            teacher_weight.detach(),
            student_bias=student_bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            divergence=self.divergence,
            temperature=self.temperature,
            temperature_squared=False,
            mask=is_labelled,
            labels=true_labels,
            label_weight=self.weight_hard_loss / self.weight_soft_loss,
            ignore_index=self.ignore_index,
            chunk_size=self.chunk_size,
            return_stats="losses",
        )
        loss = self.weight_soft_loss * loss
        if not self.return_soft_hard_loss:
            return loss
        assert stats.divergence is not None and stats.cross_entropy is not None
        count = is_labelled.sum().clamp_min(1)
        return loss, stats.divergence.sum() / count, stats.cross_entropy.sum() / count


class LigerFusedLinearJSD(nn.Module):
    """The mean of D(p_T, q_T) over labelled tokens, from hidden states and heads (`liger_kernel.transformers`).

    Args:
        jsd_beta: 0: forward KL; 1: reverse KL; between: JSD(beta).
        ignore_index: the label of a token that does not count.
        temperature: of both softmaxes; the value does not carry its square.
        accum_dtype: no effect; gradients add up in float32, and in float64 for float64 inputs.
    """

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, accum_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.divergence, self.ignore_index, self.temperature = divergence_of_beta(jsd_beta), ignore_index, temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """The loss, ().

        Args:
            student_input: (N, H_s).
            student_weight: (V, H_s).
            teacher_input: (N, H_t).
            teacher_weight: (V, H_t); the teacher gets no gradient.
            shift_labels: (N,) int64, of which only `ignore_index` is read; None: all tokens count.
        """
        _check_vocabularies(student_weight, teacher_weight)
        loss = linear_kl_div(
            student_input,
            student_weight,
            teacher_input.detach(),
            teacher_weight.detach(),
            divergence=self.divergence,
            temperature=self.temperature,
            temperature_squared=False,
            mask=_counted(shift_labels, self.ignore_index),
        )
        assert isinstance(loss, Tensor)
        return loss


class LigerFusedLinearKLDivLoss(nn.Module):
    """KL(target || q_T) from hidden states, head and the target's probabilities (`liger_kernel.transformers`).

    The target is read as logits: a copy of it exists during the call. Where you store targets, store logits, log-probabilities or the
    top k, for `fastkd.linear_kl_div(teacher_weight=None)` and `fastkd.topk_kl_div`, which make none.

    Args:
        reduction: "batchmean" (over labelled tokens), "mean" (over their entries) or "sum".
        ignore_index: the label of a token that does not count.
        temperature: of the student's softmax alone.
        eps: no effect; a probability of 0 adds exactly nothing.
        accum_dtype: no effect; gradients add up in float32, and in float64 for float64 inputs.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature

    def forward(self, student_input: Tensor, student_weight: Tensor, target: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss, ().

        Args:
            student_input: (N, H).
            student_weight: (V, H).
            target: (N, V) probabilities; a row's sum counts as its weight.
            shift_labels: (N,) int64, of which only `ignore_index` is read; None: all tokens count.
        """
        counted = _counted(shift_labels, self.ignore_index)
        denominator = _denominator(self.reduction, counted, target)
        weight = _wide(target.detach()).sum(-1)
        if counted is not None:
            weight = weight * counted
        loss = linear_kl_div(
            student_input,
            student_weight,
            _wide(target.detach()).log().mul_(self.temperature),
            None,
            temperature=self.temperature,
            temperature_squared=False,
            mask=weight,
            denominator=denominator,
        )
        assert isinstance(loss, Tensor)
        return loss + _mass_term(weight) / denominator


class LigerJSD(nn.Module):
    """The mean of D(p, q) over labelled tokens, from log-probabilities (`liger_kernel.transformers`).

    The gradient is that of the logits which log-probabilities are: behind a `log_softmax` it is Liger's, at the log-probabilities
    themselves it differs from it by a multiple of q.

    Args:
        beta: 0: forward KL; 1: reverse KL; between: JSD(beta).
        ignore_index: the label of a token that does not count.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.divergence, self.ignore_index = divergence_of_beta(beta), ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss, ().

        Args:
            log_q: (N, V) the student's log-probabilities; of anything else, such as logits, those that a softmax gives.
            log_p: (N, V) the teacher's, which gets no gradient.
            shift_labels: (N,) int64, of which only `ignore_index` is read; None: all tokens count.
        """
        loss = kl_div(log_q, log_p.detach(), divergence=self.divergence, mask=_counted(shift_labels, self.ignore_index))
        assert isinstance(loss, Tensor)
        return loss


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL(y_true || y_pred), with the arguments of `torch.nn.KLDivLoss` behind `eps` (`liger_kernel.transformers`).

    The gradient is that of the logits which log-probabilities are: behind a `log_softmax` it is Liger's.

    Args:
        eps: no effect; a probability of 0 adds exactly nothing.
        args: those of `torch.nn.KLDivLoss`: size_average, reduce, reduction ("batchmean", "sum" or, by default, "mean", which divides
            by tokens and vocabulary) and log_target.
        kwargs: the same by name.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_reduction(self.reduction)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss, ().

        Args:
            y_pred: (N, V) the student's log-probabilities.
            y_true: (N, V) the teacher's probabilities, with log_target their logarithms; a row's sum counts as its weight.
        """
        target = _wide(y_true.detach())
        weight = target.logsumexp(-1).exp() if self.log_target else target.sum(-1)
        logits = y_true.detach() if self.log_target else target.log()
        denominator = _denominator(self.reduction, None, target)
        loss = kl_div(y_pred, logits, mask=weight, denominator=denominator)
        assert isinstance(loss, Tensor)
        return loss + _mass_term(weight) / denominator


class LigerTVDLoss(nn.Module):
    """1/2 sum |p - q| from probabilities, the student's first (`liger_kernel.transformers`).

    Both are read as softmaxes, by their logarithms: copies exist during the call, which `fastkd.kl_div(divergence="tvd")` does not make
    of logits. The gradient is Liger's behind a softmax, and zero at a probability that has underflowed.

    Args:
        reduction: "batchmean" (over labelled tokens), "mean" (over their entries) or "sum".
        ignore_index: the label of a token that does not count.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss, ().

        Args:
            p: (N, V) the student's probabilities; rows are normalised.
            q: (N, V) the teacher's, which gets no gradient.
            shift_labels: (N,) int64, of which only `ignore_index` is read; None: all tokens count.
        """
        counted = _counted(shift_labels, self.ignore_index)
        student = _wide(p)
        # Of a probability that has underflowed to zero, the logarithm's derivative is no number.
        student = student.clamp_min(torch.finfo(student.dtype).tiny).log()
        denominator = _denominator(self.reduction, counted, p)
        loss = kl_div(student, _wide(q.detach()).log(), divergence="tvd", mask=counted, denominator=denominator)
        assert isinstance(loss, Tensor)
        return loss


def _check_vocabularies(student_weight: Tensor, teacher_weight: Tensor) -> None:
    """Refuse (ValueError) heads (V, H_s) and (V_t, H_t) with V_t > V; a shorter teacher is refused by the op."""
    kept = len(student_weight)
    if len(teacher_weight) > kept:
        raise ValueError(
            f"teacher_weight has {len(teacher_weight)} rows and student_weight {kept}. Liger gives the student logits of zero for the "
            f"others, which take probability from its tokens. If they are padding, pass teacher_weight[:{kept}] and "
            f"teacher_bias[:{kept}]; for a pruned student call fastkd.linear_kl_div(vocab_index=...)."
        )


def _check_reduction(reduction: str) -> None:
    if reduction == "none":
        raise ValueError(
            "reduction='none' has a value for every token and id in Liger, and fastkd never makes those; call "
            "fastkd.kl_div(reduction='none') for one value a token."
        )
    check_choice("reduction", reduction, _REDUCTIONS)


def _counted(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """(N,) bool, the tokens that have a label; None: all."""
    return None if labels is None else labels != ignore_index


def _denominator(reduction: str, counted: Tensor | None, rows: Tensor) -> float | Tensor:
    """What Liger divides the sum over the tokens of `rows` (N, V) by, of which `counted` (N,) count. One for none."""
    if reduction == "sum":
        return 1.0
    count = max(rows[..., 0].numel(), 1) if counted is None else counted.sum().clamp_min(1)
    return count * rows.shape[-1] if reduction == "mean" else count


def _wide(x: Tensor) -> Tensor:
    """`x` of any shape in float32, or float64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mass_term(mass: Tensor) -> Tensor:
    """What sum y log(y / q) has beside m KL(y / m || q), in all tokens: m log m, with m = sum y (N,) a target's mass."""
    return torch.xlogy(mass, mass).sum()
