"""How many tokens are turned into logits at a time.

The chunk follows from a memory budget and from the hardware's knee, never from V / H: below about 512 rows the weight-gradient GEMM
is bound by reading and writing dW (the knee is where 4 flops-per-byte rows amortise it), above it more rows only cost memory. The
teacher has no weight gradient, so its logits can be made a quarter of a chunk at a time: always on a GPU; on a CPU, where smaller
products are slower (by 8 % of the whole loss, measured), only where the budget does not hold two chunks at the knee.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

KNEE_ROWS = 512
ROW_MULTIPLE = 128
TEACHER_PARTS = 4
CPU_BUDGET = 160 << 20
CPU_ROWS = 1024
GPU_BUDGET_LIMIT = 1 << 30
GPU_BUDGET_SHARE = 0.02


@dataclass(frozen=True)
class Plan:
    """A chunking of `tokens` rows: chunks of at most `chunk_rows` student rows, each in parts of at most `teacher_rows` rows.

    `teacher_rows` is 0 where no teacher logits are made. `buffer_bytes` of logits are alive at most.
    """

    tokens: int
    vocabulary: int
    chunk_rows: int
    teacher_rows: int
    buffer_bytes: int

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.tokens // self.chunk_rows)

    def slices(self) -> Iterator[slice]:
        """The chunks, in order."""
        return _slices(0, self.tokens, self.chunk_rows)

    def parts(self, chunk: slice) -> Iterator[slice]:
        """The parts of a chunk, as rows of the whole."""
        return _slices(chunk.start, chunk.stop, self.teacher_rows or self.chunk_rows)

    def __str__(self) -> str:
        dense = self.buffer_bytes / (self.chunk_rows + self.teacher_rows) * self.tokens * (2 if self.teacher_rows else 1)
        return (
            f"{self.tokens} tokens x {self.vocabulary} vocabulary in {self.chunks} chunk(s) of {self.chunk_rows} rows: "
            f"{self.buffer_bytes / 2**20:.1f} MiB of logits alive instead of {dense / 2**20:.1f} MiB"
        )


def default_budget(device: torch.device) -> int:
    """Bytes of logits that may be alive: 160 MiB on CPU; on a GPU 2 % of its memory, at most 1 GiB."""
    if device.type == "cuda":
        return min(GPU_BUDGET_LIMIT, int(GPU_BUDGET_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return CPU_BUDGET


def plan_chunks(
    tokens: int,
    vocabulary: int,
    *,
    device: torch.device | str = "cpu",
    element_size: int = 4,
    has_teacher: bool = True,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Plan:
    """Plan `tokens` rows of logits, with or without a teacher's beside them.

    Chunks are equalised so that no tiny one is left at the end.

    Args:
        tokens: rows.
        vocabulary: elements of a row.
        device: where the logits are made; the default budget and the number of parts depend on it.
        element_size: bytes of an element.
        has_teacher: whether a teacher's logits are made beside the student's.
        chunk_size: rows of a chunk; if given, it decides alone.
        memory_budget: bytes that may be alive: as many rows as they hold. None: `default_budget`, and then at least the knee (512
            rows), and on a CPU at most 1024.

    Returns:
        The plan; printed, it says what is alive instead of what.
    """
    device, row_bytes = torch.device(device), max(1, element_size * vocabulary)
    budget = default_budget(device) if memory_budget is None else memory_budget
    parts = TEACHER_PARTS if device.type == "cuda" or budget < 2 * KNEE_ROWS * row_bytes else 1
    if chunk_size is not None:
        rows = min(chunk_size, tokens)
    else:
        fitting = budget // row_bytes
        if has_teacher:
            fitting -= -(-fitting // (parts + 1))
        if memory_budget is None:
            # On a CPU a larger chunk of a small vocabulary would only leave the cache.
            fitting = max(fitting if device.type == "cuda" else min(fitting, CPU_ROWS), KNEE_ROWS)
        rows = min(max(fitting, 1), tokens)
        if 0 < rows < tokens:
            even = -(-tokens // -(-tokens // rows))
            rounded = -(-even // ROW_MULTIPLE) * ROW_MULTIPLE
            rows = rounded if rounded <= rows else even
    rows = max(rows, 1)
    teacher_rows = -(-rows // parts) if has_teacher else 0
    return Plan(tokens, vocabulary, rows, teacher_rows, (rows + teacher_rows) * row_bytes if tokens else 0)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
