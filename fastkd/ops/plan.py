"""How many tokens are turned into logits at a time.

The chunk follows from a memory budget and from the hardware's knee, never from V / H: below about 512 rows the weight-gradient GEMM
is bound by reading and writing dW (the knee is where 4 flops-per-byte rows amortise it), above it more rows only cost memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KNEE_ROWS = 512
ROW_MULTIPLE = 128
CPU_BUDGET = 128 << 20
GPU_BUDGET_LIMIT = 1 << 30
GPU_BUDGET_SHARE = 0.02


@dataclass(frozen=True)
class Plan:
    """A chunking of `tokens` rows: `chunks` chunks of at most `chunk_rows` rows; `buffer_bytes` of logits alive at most."""

    tokens: int
    vocabulary: int
    chunk_rows: int
    chunks: int
    buffer_bytes: int

    def slices(self) -> list[slice]:
        return [slice(start, min(start + self.chunk_rows, self.tokens)) for start in range(0, self.tokens, self.chunk_rows)]

    def __str__(self) -> str:
        dense = self.buffer_bytes / max(1, self.chunk_rows) * self.tokens
        return (
            f"{self.tokens} tokens x {self.vocabulary} vocabulary in {self.chunks} chunk(s) of {self.chunk_rows} rows: "
            f"{self.buffer_bytes / 2**20:.1f} MiB of logits alive instead of {dense / 2**20:.1f} MiB"
        )


def default_budget(device: torch.device) -> int:
    """Bytes of logits that may be alive: 128 MiB on CPU; on a GPU 2 % of its memory, at most 1 GiB."""
    if device.type == "cuda":
        return min(GPU_BUDGET_LIMIT, int(GPU_BUDGET_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return CPU_BUDGET


def plan_chunks(
    tokens: int,
    vocabulary: int,
    *,
    device: torch.device | str = "cpu",
    element_size: int = 4,
    logit_buffers: int = 2,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Plan:
    """Plan `tokens` rows of `logit_buffers` (teacher and student) rows of `vocabulary` elements of `element_size` bytes.

    `chunk_size` (rows) decides alone if given. Otherwise as many rows as `memory_budget` bytes hold, at least the knee (512) unless the
    budget was given by the caller, at most `tokens`; chunks are then equalised so that no tiny one is left at the end.
    """
    row_bytes = logit_buffers * element_size * vocabulary
    if chunk_size is not None:
        rows = min(chunk_size, tokens)
    else:
        budget = default_budget(torch.device(device)) if memory_budget is None else memory_budget
        rows = min(max(budget // row_bytes, 1 if memory_budget is not None else KNEE_ROWS), tokens)
        if 0 < rows < tokens:
            even = -(-tokens // -(-tokens // rows))
            rounded = -(-even // ROW_MULTIPLE) * ROW_MULTIPLE
            rows = rounded if rounded <= rows else even
    rows = max(rows, 1)
    return Plan(tokens, vocabulary, rows, -(-tokens // rows), rows * row_bytes if tokens else 0)
