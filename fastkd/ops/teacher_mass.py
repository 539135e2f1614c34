"""What the teacher's tokens weigh that the student has not one by one: those it dropped, and those that share one of its slots."""

from __future__ import annotations

from dataclasses import dataclass

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
_BEHIND = torch.iinfo(torch.int64).max
SLOT_TOKENS = 256
"""Tokens whose logits over the teacher's whole vocabulary are alive at a time."""


def dropped_rows(vocabulary: int, kept: Tensor | int) -> Tensor | slice:
    """The rows of `vocabulary` that are not `kept`, in order; the host waits for nothing.

    kept: (V,) without repetitions, or how many of the first.
    """
    if isinstance(kept, int):
        return slice(kept, vocabulary)
    is_kept = torch.zeros(vocabulary, dtype=torch.uint8, device=kept.device).index_fill_(0, kept, 1)
    return is_kept.argsort(stable=True)[: vocabulary - kept.numel()]


class DroppedTokens:
    """What the teacher gives to its tokens without a column, of which a tile is seen at a time.

    Args:
        log_sum: (n,) of -inf; takes log sum exp(z / T) of the n tokens that count.
        transform: what the teacher does to its head's output, which makes its logits z.
        temperature: T.
        ranks: whether the largest logit is asked for.
    """

    largest: Tensor | None = None
    """(n,) the largest z; -inf for none."""
    largest_row: Tensor | None = None
    """(n,) int64, the first row of the teacher that has it; behind all rows for none."""

    def __init__(self, log_sum: Tensor, transform: LogitTransform, temperature: float, *, ranks: bool) -> None:
        self.log_sum, self.transform, self.temperature = log_sum, transform, temperature
        if ranks:
            self.largest = log_sum.clone()
            self.largest_row = torch.full_like(log_sum, _BEHIND, dtype=torch.int64)

    def add(self, tokens: slice, raw: Tensor, bias: Tensor | None, rows: Tensor | slice) -> None:
        """Count raw logits (C, D) of some tokens. Later tiles have later rows.

        bias: (D,) or None. rows: (D,) of the teacher, rising. Temporaries stay in the cache.
        """
        if not raw.shape[1]:
            return
        for block in blocks(raw):
            at = slice(tokens.start + block.start, tokens.start + block.stop)
            z = transformed(raw[block], bias, self.transform, self.log_sum.dtype)
            self.log_sum[at] = self.log_sum[at].logaddexp((z / self.temperature).logsumexp(-1))
            if self.largest is None or self.largest_row is None:
                continue
            largest, column = z.max(-1)
            row = column + rows.start if isinstance(rows, slice) else rows[column]
            is_above = largest > self.largest[at]
            self.largest[at] = largest.where(is_above, self.largest[at])
            self.largest_row[at] = row.where(is_above, self.largest_row[at])

    def add_head(self, source: LinearLogits, weight: Tensor, bias: Tensor | None, rows: Tensor | slice) -> None:
        """Count these rows of a head, a tile of them at a time in the memory of the source's logits.

        Args:
            source: whose hidden states are taken, as it multiplies them.
            weight: (V, H).
            bias: (V,) or None.
            rows: (D,) of them.
        """
        dtype, memory = self.log_sum.dtype, source.buffer.view(-1)
        first, count = (rows.start, rows.stop - rows.start) if isinstance(rows, slice) else (0, rows.numel())
        # As many tokens as the memory holds, so that a tile is read from the head but once or twice.
        width = min(_TILE_ROWS, count, memory.numel())
        for part in slices(first, first + count, max(width, 1)):
            index = part if isinstance(rows, slice) else rows[part]
            tile = weight[index].to(source.operand)
            tile = tile.to(dtype) if source.upcasts else tile
            tile_bias = None if bias is None else bias[index].to(dtype)
            for tokens in slices(0, len(self.log_sum), memory.numel() // len(tile)):
                logits = memory[: (tokens.stop - tokens.start) * len(tile)].view(-1, len(tile))
                mm_(logits, source.hidden[tokens], tile.T)
                self.add(tokens, logits, tile_bias, index)

    def add_given(self, logits: Tensor, valid: Tensor | None, at_a_time: int, rows: Tensor | slice) -> None:
        """Count these columns of logits that exist.

        Args:
            logits: (N, V).
            valid: (n,) the tokens that count; None: all.
            at_a_time: how many tokens are copied at a time.
            rows: (D,) columns.
        """
        if isinstance(rows, slice):
            source = GivenLogits(logits[:, rows], valid, at_a_time)
        else:
            source = GivenLogits(logits, valid, at_a_time, columns=rows)
        for part in slices(0, len(self.log_sum), at_a_time):
            self.add(part, source.logits(part), None, rows)


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Makes the statistics `kept_mass` and `teacher_top1_kept` from the teacher's logits over the kept tokens, beside the others'."""

    dropped: DroppedTokens
    rows: Tensor | None
    """(V,) the teacher's row behind every column; None: the column's own number."""
    mass: Tensor
    """(n,) takes the mass."""
    has_top1: Tensor
    """(n,) takes 1 where the teacher's first largest logit is that of a kept token, else 0."""

    def tell(self, tokens: slice, raw: Tensor, bias: Tensor | None) -> None:
        """Fill in some tokens from their raw logits (C, V). bias: (V,) or None."""
        dropped = self.dropped
        assert dropped.largest is not None and dropped.largest_row is not None
        rows = torch.arange(raw.shape[1], device=raw.device) if self.rows is None else self.rows
        for block in blocks(raw):
            at = slice(tokens.start + block.start, tokens.start + block.stop)
            z = transformed(raw[block], bias, dropped.transform, self.mass.dtype)
            self.mass[at] = kept_mass(z / dropped.temperature, dropped.log_sum[at])
            largest = z.amax(-1, keepdim=True)
            row = rows.where(z == largest, _BEHIND).amin(-1)
            theirs, is_first = dropped.largest[at], row < dropped.largest_row[at]
            self.has_top1[at] = ((largest[:, 0] > theirs) | ((largest[:, 0] == theirs) & is_first)).to(self.mass.dtype)


def kept_mass(kept: Tensor, log_rest: Tensor) -> Tensor:
    """(C,) the softmax's mass on tempered logits `kept` (C, V), where the others' log-sum is `log_rest` (C,)."""
    return (kept.logsumexp(-1) - log_rest).sigmoid()


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
        told: (tokens,) each, of `dtype`: take the mass on the slots, and 1 where the first largest logit is a slot's, else 0.
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
        told: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.source, self.transform, self.temperature, self.compiled, self.told = source, transform, temperature, compiled, told
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
            if self.told is not None:
                self.told[1][tokens] = self._has_top1(raw, out.dtype)
            if self.compiled:
                backend_cpp.slot_logits_(
                    raw, self.source.bias, self.order, self.ends, out, self.rest[tokens], self.transform, self.temperature
                )
            else:
                self._reduce(raw, out, self.rest[tokens])
            if self.told is not None:
                self.told[0][tokens] = kept_mass(out / self.temperature, self.rest[tokens])
        return self.buffer[: part.stop - part.start]

    def _has_top1(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """(C,) 1 where the first largest logit is a token's that has a slot, else 0."""
        z = (transformed(raw[block], self.source.bias, self.transform, dtype) for block in blocks(raw))
        top = torch.cat([block.argmax(-1) for block in z])
        return (self.slots[top] < self.buffer.shape[1]).to(dtype)

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
