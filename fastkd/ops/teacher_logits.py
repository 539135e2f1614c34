"""The teacher of a logit loss, as its pass reads it: logits over the student's vocabulary, a chunk at a time, or lists."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import backend_cpp
from .backends import wished
from .checks import check_index_values, check_slot_values
from .given_logits import GivenLogits
from .linear_logits import LinearLogits
from .options import LossOptions
from .plan import Plan
from .row_call import TopK
from .teacher_mass import SLOT_TOKENS, DroppedTokens, KeptTokens, SlotLogits, dropped_rows
from .topk_lists import read_lists

Teacher = LinearLogits | GivenLogits | SlotLogits | TopK | None


def make_teacher(
    constants: Mapping[str, Tensor],
    valid: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    options: LossOptions,
    told: tuple[Tensor, Tensor] | None,
) -> tuple[Teacher, KeptTokens | None]:
    """The teacher over the student's vocabulary: what it lists, its slots, the rows that `vocab_index` names, or the first V.

    told: (n,) `kept_mass` and `teacher_top1_kept`, if they are wanted; slots fill them in, and for the others what is returned beside
    them does.
    """
    if "topk_ids" in constants:
        return read_lists(constants, valid, plan.vocabulary, options), None
    if "vocab_slots" in constants:
        return _slots(constants, valid, plan, dtype, options, told), None
    index, teacher = constants.get("vocab_index"), _kept_rows(constants, valid, plan, dtype, options)
    is_full = options.teacher_mass == "full"
    if teacher is None or not (is_full or (told is not None and index is not None)):
        return teacher, None
    log_sums = torch.full((plan.tokens,), -torch.inf, dtype=dtype, device=teacher.buffer.device)
    dropped = DroppedTokens(log_sums, options.teacher_transform, options.temperature, ranks=told is not None)
    kept = plan.vocabulary if index is None else index
    if isinstance(teacher, GivenLogits):
        logits = constants["teacher_logits"]
        dropped.add_given(logits, valid, plan.teacher_tokens, dropped_rows(logits.shape[1], kept))
    else:
        weight, bias = constants["teacher_weight"], constants.get("teacher_bias")
        dropped.add_head(teacher, weight, bias, dropped_rows(weight.shape[0], kept))
    if is_full:
        teacher.rest = dropped.log_sum
    return teacher, None if told is None else KeptTokens(dropped, index, *told)


def _kept_rows(
    constants: Mapping[str, Tensor], valid: Tensor | None, plan: Plan, dtype: torch.dtype, options: LossOptions
) -> LinearLogits | GivenLogits | None:
    """A dense teacher over the student's vocabulary, if there is one."""
    index, vocabulary = constants.get("vocab_index"), plan.vocabulary
    if "teacher_logits" in constants:
        logits = constants["teacher_logits"]
        check_index_values(index, logits.shape[1])
        return GivenLogits(logits if index is not None else logits[:, :vocabulary], valid, plan.teacher_tokens, columns=index)
    if "teacher_hidden" not in constants:
        return None
    weight, bias = constants["teacher_weight"], constants.get("teacher_bias")
    check_index_values(index, weight.shape[0])

    def over_student_vocabulary(x: Tensor) -> Tensor:
        return x[:vocabulary] if index is None else x.index_select(0, index)

    kept, kept_bias = over_student_vocabulary(weight), None if bias is None else over_student_vocabulary(bias)
    return LinearLogits(constants["teacher_hidden"], kept, kept_bias, valid, plan.teacher_tokens, dtype, options.operand)


def _slots(
    constants: Mapping[str, Tensor],
    valid: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    options: LossOptions,
    told: tuple[Tensor, Tensor] | None,
) -> SlotLogits:
    slots, tokens = constants["vocab_slots"], min(plan.teacher_tokens, SLOT_TOKENS)
    check_slot_values(slots, plan.vocabulary)
    source: LinearLogits | GivenLogits
    if "teacher_logits" in constants:
        source = GivenLogits(constants["teacher_logits"], valid, tokens)
    else:
        weight, bias = constants["teacher_weight"], constants.get("teacher_bias")
        source = LinearLogits(constants["teacher_hidden"], weight, bias, valid, tokens, dtype, options.operand)
    wish = wished() if options.backend == "auto" else options.backend
    compiled = slots.device.type == "cpu" and wish in ("auto", "cpp") and backend_cpp.is_built()
    return SlotLogits(
        source,
        slots,
        plan.tokens,
        plan.teacher_tokens,
        plan.vocabulary,
        options.teacher_transform,
        options.temperature,
        dtype,
        compiled=compiled,
        told=told,
    )
