"""How many tokens are turned into logits, and into gradients, at a time.

The sizes follow from a memory budget and from the hardware, never from V / H.

On a CPU one chunk serves for both: the gradient lies over the student's logits, which a row kernel has just had in its cache. Below
about 512 tokens the weight-gradient GEMM is bound by reading and writing dW; above 1024 more tokens only leave the cache. The teacher
has no weight gradient: where the budget does not hold two such chunks, its logits are made a quarter of a chunk at a time.

On a GPU the row kernel needs float32 logits of both models for a few tokens only, and the products that take a gradient back want many:
a forward part is a multiple of the GEMM's tile, a backward chunk as many parts as the budget holds. Where the gradient of all tokens
takes no more than the budget and what a float32 dW would, one backward chunk holds them: dW is then a single product, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

KNEE_TOKENS = 512
CPU_MULTIPLE = 128
CPU_TEACHER_PARTS = 4
CPU_BUDGET = 160 << 20
CPU_TOKENS = 1024
GPU_TILE = 128
"""Rows of a GEMM's tile; two of them where the budget has room."""
GPU_BUDGET_LIMIT = 1 << 30
GPU_BUDGET_SHARE = 0.02


@dataclass(frozen=True)
class Plan:
    """Backward chunks of at most `backward_tokens`, whose student logits are made `forward_tokens` at a time.

    The teacher's are made `teacher_tokens` at a time, 0 where there is no teacher. `in_place`: the gradient of a chunk lies over its
    student logits; else it has a buffer of its own. At most `buffer_bytes` of logits and gradient are alive.
    """

    tokens: int
    vocabulary: int
    backward_tokens: int
    forward_tokens: int
    teacher_tokens: int
    in_place: bool
    buffer_bytes: int
    dense_bytes: int
    """What the logits of all tokens and their gradient would take."""

    @property
    def chunks(self) -> int:
        """How many backward chunks there are."""
        return -(-self.tokens // self.backward_tokens)

    def backward_chunks(self) -> Iterator[slice]:
        """The backward chunks, in order."""
        return slices(0, self.tokens, self.backward_tokens)

    def forward_parts(self, chunk: slice) -> Iterator[slice]:
        """The forward parts of a backward chunk, as tokens of the whole."""
        return slices(chunk.start, chunk.stop, self.forward_tokens)

    def teacher_parts(self, part: slice) -> Iterator[slice]:
        """The teacher's parts of a forward part, as tokens of the whole."""
        return slices(part.start, part.stop, self.teacher_tokens or self.forward_tokens)

    def __str__(self) -> str:
        forward = "" if self.in_place else f", logits made {self.forward_tokens} tokens at a time"
        return (
            f"{self.tokens} tokens x {self.vocabulary} vocabulary in {self.chunks} chunk(s) of {self.backward_tokens} tokens{forward}: "
            f"{self.buffer_bytes / 2**20:.1f} MiB alive instead of {self.dense_bytes / 2**20:.1f} MiB"
        )


def default_budget(device: torch.device) -> int:
    """Bytes of logits and gradient that may be alive: 160 MiB on a CPU; on a GPU 2 % of its memory, at most 1 GiB."""
    if device.type == "cuda":
        return min(GPU_BUDGET_LIMIT, int(GPU_BUDGET_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return CPU_BUDGET


def plan_chunks(
    tokens: int,
    vocabulary: int,
    *,
    device: torch.device | str = "cpu",
    element_size: int = 4,
    gradient_size: int | None = None,
    hidden_size: int = 0,
    has_teacher: bool = True,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Plan:
    """Plan the logits of `tokens`, with or without a teacher's beside them.

    Chunks are equalised so that no tiny one is left at the end.

    Args:
        tokens: how many.
        vocabulary: logits of a token.
        device: where they are made.
        element_size: bytes of a logit.
        gradient_size: bytes of an element of the gradient; None: those of a logit.
        hidden_size: width of the student's head, where its weight takes a gradient; 0: it does not.
        has_teacher: whether a teacher's logits are made beside the student's.
        chunk_size: tokens of a backward chunk; if given, it decides alone.
        memory_budget: bytes that may be alive: as many tokens as they hold. None: `default_budget`, and then at least 512 tokens.

    Returns:
        The plan; printed, it says what is alive instead of what.
    """
    device = torch.device(device)
    logit_bytes, gradient_bytes = (max(1, size * vocabulary) for size in (element_size, gradient_size or element_size))
    budget = default_budget(device) if memory_budget is None else memory_budget
    least = 1 if memory_budget is not None else KNEE_TOKENS
    if device.type == "cuda":
        models = 2 if has_teacher else 1
        forward = min(_gpu_part(budget, models * logit_bytes, gradient_bytes), max(tokens, 1))
        if chunk_size is None:
            saved = 4 * vocabulary * hidden_size
            if tokens * gradient_bytes <= budget + saved:
                backward = tokens
            else:
                fitting = max((budget - models * forward * logit_bytes) // gradient_bytes, least)
                backward = _even(tokens, fitting // forward * forward or fitting, forward)
        else:
            backward = min(chunk_size, tokens)
        backward = max(backward, 1)
        forward = min(forward, backward)
        teacher = forward if has_teacher else 0
        alive = models * forward * logit_bytes + backward * gradient_bytes
    else:
        parts = CPU_TEACHER_PARTS if budget < 2 * KNEE_TOKENS * logit_bytes else 1
        if chunk_size is None:
            fitting = budget // logit_bytes
            if has_teacher:
                fitting -= -(-fitting // (parts + 1))
            if memory_budget is None:
                fitting = max(min(fitting, CPU_TOKENS), least)
            backward = _even(tokens, fitting, CPU_MULTIPLE)
        else:
            backward = min(chunk_size, tokens)
        forward = backward = max(backward, 1)
        teacher = -(-backward // parts) if has_teacher else 0
        alive = (backward + teacher) * logit_bytes
    dense = tokens * ((1 + has_teacher) * logit_bytes + (gradient_bytes if device.type == "cuda" else 0))
    return Plan(tokens, vocabulary, backward, forward, teacher, device.type != "cuda", alive if tokens else 0, dense)


def _gpu_part(budget: int, token_bytes: int, gradient_bytes: int) -> int:
    """Tokens of a forward part: two tiles where they leave the budget as many for the gradient again, else one."""
    part = 2 * GPU_TILE
    return part if part * (token_bytes + 2 * gradient_bytes) <= budget else GPU_TILE


def _even(tokens: int, fitting: int, multiple: int) -> int:
    """Tokens of a chunk: at most `fitting`, of nearly one size, and a multiple of `multiple` if such a one fits."""
    size = min(max(fitting, 1), tokens)
    if not 0 < size < tokens:
        return size
    even = -(-tokens // -(-tokens // size))
    rounded = -(-even // multiple) * multiple
    return rounded if rounded <= size else even


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` from `start` to `stop`."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
