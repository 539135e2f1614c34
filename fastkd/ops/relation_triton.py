"""The relation pass in Triton kernels that hold no scores in memory (`kernels/relation.py`), on CUDA; under the interpreter in tests.

Nothing here imports triton before a kernel is asked for. The interpreter multiplies bfloat16's bits as if they were integers, so that
only tests which mend it can use it with bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def has_kernel(dtype: torch.dtype, queries: Sequence[Tensor]) -> bool:
    """Whether a pass of these queries, of both models, that computes in `dtype` has one."""
    from ..kernels.relation import LARGEST_HEAD

    return dtype == torch.float32 and all(q.shape[-1] <= LARGEST_HEAD for q in queries)


def fill(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Sequence[Tensor],
    target_k: Sequence[Tensor],
    key_masks: Sequence[Tensor | None],
    row_weights: Tensor,
    values: Tensor,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    *,
    cross_entropy: bool,
) -> None:
    """What `fastkd.ops.relation_pass` says of its own: one target after the other, of which all but the first add to the gradients."""
    from ..kernels.relation import relation

    student = _operands(student_q, student_k)
    row_statistics = None if grad_q is None and grad_k is None else values.new_empty(4, *values.shape[1:])
    targets = zip(target_q, target_k, key_masks, row_weights, values, strict=True)
    for index, (q, k, key_mask, row_weight, value) in enumerate(targets):
        relation(
            *student,
            *_operands(q, k),
            key_mask=None if key_mask is None else key_mask.contiguous(),
            row_weight=row_weight,
            divergence=value,
            cross_entropy=cross_entropy,
            row_statistics=row_statistics,
            gradient_q=grad_q,
            gradient_k=grad_k,
            add=index > 0,
        )


def _operands(q: Tensor, k: Tensor) -> list[Tensor]:
    """The tensors in one dtype, contiguous along the head size as views of a projection are: most models need no copy."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (q.to(dtype), k.to(dtype))]
