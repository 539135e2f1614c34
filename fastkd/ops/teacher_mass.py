"""What the teacher's tokens weigh that the student has not one by one: those it dropped, and those that share one of its slots."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend_cpp
from .backend_torch import blocks, transformed
from .gemm import mm_, row_buffer
from .given_logits import GivenLogits
from .linear_logits import LinearLogits
from .plan import slices
from .row_call import LogitTransform

_TILE_ROWS = 4096
SLOT_TOKENS = 256
"""Tokens whose logits over the teacher's whole vocabulary are alive at a time."""


def dropped_rows(vocabulary: int, kept: Tensor) -> Tensor:
    """The rows of `vocabulary` that `kept` (V,), without repetitions, does not name, in order; the host waits for nothing."""
    is_kept = torch.zeros(vocabulary, dtype=torch.uint8, device=kept.device).index_fill_(0, kept, 1)
    return is_kept.argsort(stable=True)[: vocabulary - kept.numel()]


def head_rest(
    source: LinearLogits, weight: Tensor, bias: Tensor | None, dropped: Tensor | None, transform: LogitTransform, temperature: float
) -> Tensor:
    """log sum exp(z / T) of every token over rows of a head, (n,), a tile of rows at a time in the memory of the source's logits.

    Args:
        source: whose hidden states are taken, as it multiplies them.
        weight: (V, H).
        bias: (V,) or None.
        dropped: (D,) the rows that are meant; None: all.
        transform: what the model does to the head's output.
        temperature: T.
    """
    dtype, memory = source.dtype, source.buffer.view(-1)
    rest = torch.full((len(source.hidden),), -torch.inf, dtype=dtype, device=weight.device)
    count = weight.shape[0] if dropped is None else dropped.numel()
    # As many tokens as the memory holds, so that a tile is read from the head but once or twice.
    width = min(_TILE_ROWS, count, memory.numel())
    for rows in slices(0, count, max(width, 1)):
        index = rows if dropped is None else dropped[rows]
        tile = weight[index].to(source.operand)
        tile = tile.to(dtype) if source.upcasts else tile
        tile_bias = None if bias is None else bias[index].to(dtype)
        for tokens in slices(0, len(rest), memory.numel() // len(tile)):
            logits = memory[: (tokens.stop - tokens.start) * len(tile)].view(-1, len(tile))
            mm_(logits, source.hidden[tokens], tile.T)
            rest[tokens] = rest[tokens].logaddexp(_log_sum(logits, tile_bias, transform, temperature, dtype))
    return rest


def given_rest(
    source: GivenLogits, tokens: int, at_a_time: int, transform: LogitTransform, temperature: float, dtype: torch.dtype
) -> Tensor:
    """log sum exp(z / T) of each of `tokens` over the columns of `source`, (tokens,)."""
    rest = torch.empty(tokens, dtype=dtype, device=source.source.device)
    for part in slices(0, tokens, at_a_time):
        rest[part] = _log_sum(source.logits(part), None, transform, temperature, dtype)
    return rest


def _log_sum(raw: Tensor, bias: Tensor | None, transform: LogitTransform, temperature: float, dtype: torch.dtype) -> Tensor:
    """(C,) of raw logits (C, V), whose temporaries stay in the cache."""
    return torch.cat([(transformed(raw[block], bias, transform, dtype) / temperature).logsumexp(-1) for block in blocks(raw)])


class SlotLogits:
    """The teacher's logits over the student's slots: T log sum exp(z / T) over the tokens that a slot stands for.

    Softmaxes of them at the temperature T are sums of the teacher's probabilities. `rest` has the log-sum of the tokens without a slot,
    of those whose logits were made.

    Args:
        source: of the teacher's own logits, at least `SLOT_TOKENS` at a time, or all of `at_a_time`.
        slots: (V_t,) int64 the slot of every token of the teacher; -1: none.
        tokens: how many count.
        at_a_time: how many tokens' logits are made at a time.
        vocabulary: how many slots there are, V_s.
        transform: what the teacher does to its head's output.
        temperature: T.
        dtype: of the logits.
        compiled: whether the C++ kernel serves.
    """

    bias: Tensor | None = None

    def __init__(
        self,
        source: LinearLogits | GivenLogits,
        slots: Tensor,
        tokens: int,
        at_a_time: int,
        vocabulary: int,
        transform: LogitTransform,
        temperature: float,
        dtype: torch.dtype,
        *,
        compiled: bool,
    ) -> None:
        self.source, self.transform, self.temperature, self.compiled = source, transform, temperature, compiled
        self.buffer = row_buffer(at_a_time, vocabulary, dtype, slots.device)[:, :vocabulary]
        self.rest: Tensor | None = torch.empty(tokens, dtype=dtype, device=slots.device)
        # Tokens without a slot are one slot more.
        self.slots = slots.where(slots >= 0, vocabulary)
        if compiled:
            self.order = self.slots.argsort(stable=True)
            self.ends = torch.zeros(vocabulary + 1, dtype=torch.int64).index_add_(0, self.slots, torch.ones_like(slots)).cumsum(0)

    def logits(self, part: slice) -> Tensor:
        """The slots' logits of these tokens, (tokens, V_s), in a buffer that the next call overwrites."""
        assert self.rest is not None
        for tokens in slices(part.start, part.stop, SLOT_TOKENS):
            out, raw = self.buffer[tokens.start - part.start : tokens.stop - part.start], self.source.logits(tokens)
            if self.compiled:
                backend_cpp.slot_logits_(
                    raw, self.source.bias, self.order, self.ends, out, self.rest[tokens], self.transform, self.temperature
                )
            else:
                self._reduce(raw, out, self.rest[tokens])
        return self.buffer[: part.stop - part.start]

    def _reduce(self, raw: Tensor, out: Tensor, rest: Tensor) -> None:
        """Do in plain torch what `backend_cpp.slot_logits_` does."""
        for block in blocks(raw):
            z = transformed(raw[block], self.source.bias, self.transform, out.dtype) / self.temperature
            index = self.slots.expand_as(z)
            largest = z.new_full((len(z), out.shape[1] + 1), -torch.inf).scatter_reduce(1, index, z, "amax")
            # Where all of a slot's logits are -inf, its distance to them is to be, too.
            center = largest.clamp_min(torch.finfo(z.dtype).min)
            log_sum = center + torch.zeros_like(center).scatter_add(1, index, (z - center.gather(1, index)).exp()).log()
            out[block] = log_sum[:, :-1] * self.temperature
            rest[block] = log_sum[:, -1]
