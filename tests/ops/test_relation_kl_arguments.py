"""relation_kl's refusals: every wrong argument, by name and with a remedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import RelationTarget
from tests.ops.test_relation_kl import BATCH, HEADS, KEY_MASK, LENGTH, STUDENT_SIZE, TEACHER_SIZE, make_inputs

STUDENT = (BATCH, HEADS, LENGTH, STUDENT_SIZE)
TEACHER = (BATCH, HEADS, LENGTH, TEACHER_SIZE)


def zeros(*shape: int, **options) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


def both(tensor: Tensor | None) -> dict[str, Tensor | None]:
    return {"teacher_q": tensor, "teacher_k": tensor}


def target(shape: tuple[int, ...] = TEACHER, *rest, **options) -> dict[str, list[RelationTarget]]:
    return {"targets": [RelationTarget(zeros(*shape), zeros(*shape)), RelationTarget(zeros(*shape), zeros(*shape), *rest, **options)]}


BAD = {
    "not a tensor": ({"student_q": [[1.0]]}, TypeError, "student_q is a list"),
    "integers": ({"teacher_k": zeros(*TEACHER, dtype=torch.int64)}, TypeError, "teacher_k has dtype torch.int64"),
    "three dims": ({"student_q": zeros(2, 3, 4)}, ValueError, "student_q has shape (2, 3, 4)"),
    "no head size": ({"student_k": zeros(BATCH, HEADS, LENGTH, 0)}, ValueError, "student_k has shape"),
    "grouped keys": ({"student_k": zeros(BATCH, 1, LENGTH, STUDENT_SIZE)}, ValueError, "Repeat grouped keys"),
    "teacher's q and k": ({"teacher_k": zeros(*STUDENT)}, ValueError, "teacher_k has shape"),
    "heads": (both(zeros(BATCH, 4, LENGTH, 6)), ValueError, "teacher_q has number of heads 4"),
    "batch": (both(zeros(1, HEADS, LENGTH, 6)), ValueError, "teacher_q has batch size 1"),
    "length": (both(zeros(BATCH, HEADS, 5, 6)), ValueError, "teacher_q has sequence length 5"),
    "target's heads": (target((BATCH, 4, LENGTH, 6)), ValueError, "targets[0].q has number of heads 4"),
    "teacher's gradient": ({"teacher_q": zeros(*TEACHER).requires_grad_()}, ValueError, "teacher_q requires a gradient"),
    "target's gradient": (
        {"targets": [RelationTarget(zeros(*TEACHER), zeros(*TEACHER).requires_grad_())]},
        ValueError,
        "targets[0].k requires a gradient",
    ),
    "half a teacher": ({"teacher_k": None}, ValueError, "teacher_k is None"),
    "no target": (both(None), ValueError, "nothing to compare with"),
    "mask of no teacher": ({**both(None), **target(), "key_mask": KEY_MASK}, ValueError, "their own key_mask"),
    "not a target": ({"targets": [(0.5, zeros(*TEACHER), zeros(*TEACHER))]}, TypeError, "targets[0] is a tuple"),
    "mask dtype": ({"key_mask": KEY_MASK.long()}, TypeError, "key_mask has dtype torch.int64"),
    "mask shape": ({"query_mask": KEY_MASK[:, :5]}, ValueError, "query_mask has shape (3, 5)"),
    "mask type": ({"query_mask": [True]}, TypeError, "query_mask has type list"),
    "target's mask": (target(key_mask=KEY_MASK[:1]), ValueError, "targets[1].key_mask has shape (1, 11)"),
    "target's query mask": (target(query_mask=KEY_MASK[:, :5]), ValueError, "targets[1].query_mask has shape (3, 5)"),
    "target's query mask type": (target(query_mask=[True]), TypeError, "targets[1].query_mask has type list"),
    "target's mask dtype": (target(key_mask=KEY_MASK.double()), TypeError, "targets[1].key_mask has dtype"),
    "weight": (target(weight=-0.5), ValueError, "targets[1].weight=-0.5"),
    "weight is not finite": (target(weight=float("nan")), ValueError, "targets[1].weight=nan"),
    "weight shape": (target(weight=torch.ones(2)), ValueError, "targets[1].weight has shape (2,)"),
    "weight of a tensor": (target(weight=torch.tensor(-1.0)), ValueError, "[1.0, 1.0, -1.0]"),
    "form": ({"form": "jsd"}, ValueError, "form='jsd'"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction='batchmean'"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    "budget": ({"memory_budget": 0.5}, ValueError, "memory_budget=0.5"),
    "backend": ({"backend": "metal"}, ValueError, "backend='metal'"),
    "student device": ({"student_k": zeros(*STUDENT, device="meta")}, ValueError, "student_k is on meta"),
    "teacher device": (both(zeros(*TEACHER, device="meta")), ValueError, "teacher_q is on meta"),
    "mask device": ({"key_mask": KEY_MASK.to("meta")}, ValueError, "key_mask is on meta"),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD.values(), ids=BAD.keys())
def test_wrong_arguments_are_refused_with_a_sentence(options, error, text):
    with pytest.raises(error) as caught:
        fastkd.relation_kl(**{**make_inputs(), **options})
    assert text in str(caught.value)
