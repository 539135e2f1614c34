"""`VocabMap`, a student's pruned vocabulary and the way between its slots and the teacher's ids.

Vocabulary pruning after GLMD (arXiv:2306.06625): keep the most frequent ids of a corpus, and let every other id be read
as the kept id most similar to it. A *slot* is an id of the pruned vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.vocab.count import TokenCounts
from fastkd.vocab.stand_ins import Similarity, nearest_kept
from fastkd.vocab.storage import load_record, save_record

_KIND = "vocab_map"


@dataclass(frozen=True, eq=False)
class VocabMap:
    """Which ids of a vocabulary of V are kept, as V_k slots, and the slot by which every id is read.

    Kept ids and slots are inverse to each other: `id_to_slot[kept_ids] == arange(V_k)`. Dropped ids have slot -1 until
    `assign_stand_ins` gives them the slot of a kept id. Maps with equal tensors have equal `fingerprint`s.
    """

    kept_ids: Tensor
    """(V_k,) int64: the id behind every slot."""
    id_to_slot: Tensor
    """(V,) int64: the slot of every id; -1: dropped, without a stand-in."""

    def __post_init__(self) -> None:
        kept_ids, id_to_slot = self.kept_ids, self.id_to_slot
        for name, tensor in (("kept_ids", kept_ids), ("id_to_slot", id_to_slot)):
            if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.numel() == 0:
                raise ValueError(f"{name} must be a non-empty int64 tensor of one dimension, got {tuple(tensor.shape)} {tensor.dtype}.")
        slots = torch.arange(kept_ids.numel(), device=kept_ids.device)
        consistent = (
            int(kept_ids.min()) >= 0
            and int(kept_ids.max()) < id_to_slot.numel()
            and int(id_to_slot.min()) >= -1
            and int(id_to_slot.max()) < kept_ids.numel()
            and torch.equal(id_to_slot[kept_ids], slots)
        )
        if not consistent:
            raise ValueError(
                "kept_ids and id_to_slot do not belong together: id_to_slot[kept_ids] must be 0, 1, ..., V_k - 1 and "
                "every other entry -1 or a slot; build the map with VocabMap.from_counts or VocabMap.identity."
            )
        _ = self.has_stand_ins  # computed now, because map_ids must not wait for the device

    @classmethod
    def from_counts(
        cls,
        counts: TokenCounts | Tensor,
        keep: float,
        protected: Iterable[int] = (),
        multiple_of: int = 128,
        requires: Mapping[int, Sequence[int]] | None = None,
        vocab_size: int | None = None,
        exclude: Iterable[int] = (),
    ) -> VocabMap:
        """Keep the `protected` ids and the most frequent others.

        Slots are in the order: protected ids, then the rest, each by falling frequency, equal frequencies by rising id.
        V_k is the number to keep, rounded up to `multiple_of`; where that reaches the number n of ids that may be kept, all
        of them are (V_k = n), in the same order.

        Args:
            counts: frequencies of the tokenizer's ids, `TokenCounts` or (highest id + 1,) integers.
            keep: a ratio of n (0 < keep < 1, floor(keep * n) ids) or a number of ids (an int >= 1).
            protected: ids kept whatever their frequency (special tokens, verbalizers).
            multiple_of: V_k is rounded up to a multiple of it.
            requires: ids that must be kept whenever the key is (for BPE the two parents of a merge), applied
                transitively. Down the order above, a token enters together with what it still requires if all of it
                fits, else it is passed over, until V_k is full.
            vocab_size: V, the rows of the teacher; ids behind those that were counted are dropped. An id that was counted has
                to have a row unless its count is 0.
            exclude: ids that are not kept, nor anything that requires them: numbers that name no token, ids that the teacher
                itself has dropped. Ids without a row are such without being named.

        Raises:
            ValueError: an argument out of range, or more protected ids (and what they require) than V_k.
        """
        frequencies = _frequencies(counts)
        num_tokens = frequencies.numel()
        vocab_size = num_tokens if vocab_size is None else vocab_size
        if len(rowless := frequencies[vocab_size:].nonzero()):
            number = vocab_size + int(rowless[0])
            raise ValueError(
                f"Id {number} was counted {int(frequencies[number])} times and vocab_size is {vocab_size}: it has no row in the model. "
                "Count text without that token, or give the model a row for it."
            )
        protected, requires = set(protected), requires or {}
        _require_ids("protected", protected, num_tokens)
        _require_ids("requires", {*requires, *chain.from_iterable(requires.values())}, num_tokens)
        excluded = _with_requiring({*exclude, *range(vocab_size, num_tokens)}, requires)
        _require_ids("exclude", excluded, num_tokens)
        if refused := sorted(protected & excluded):
            raise ValueError(
                f"protected names id {refused[0]}, which cannot be kept: it has no row in the model, is excluded, or requires an "
                "id that is. Give the model a row for it, or do not protect it."
            )

        may_be_kept = torch.ones(num_tokens, dtype=torch.bool)
        may_be_kept[sorted(excluded)] = False
        is_protected = torch.zeros(num_tokens, dtype=torch.bool)
        is_protected[sorted(protected)] = True
        by_frequency = frequencies.argsort(descending=True, stable=True)
        by_frequency = by_frequency[may_be_kept[by_frequency]]
        order = torch.cat([by_frequency[is_protected[by_frequency]], by_frequency[~is_protected[by_frequency]]])
        num_kept = _num_kept(keep, len(order), multiple_of)
        kept = _choose(order.tolist(), len(protected), num_kept, requires)

        is_kept = torch.zeros(num_tokens, dtype=torch.bool)
        is_kept[sorted(kept)] = True
        kept_ids = order[is_kept[order]]
        return cls._of_kept(kept_ids, vocab_size)

    @classmethod
    def identity(cls, vocab_size: int) -> VocabMap:
        """Every id kept as its own slot."""
        return cls(torch.arange(vocab_size), torch.arange(vocab_size))

    @classmethod
    def from_t2d(cls, t2d: Tensor) -> VocabMap:
        """The vocabulary of a speculative draft from its mask over the target's, as vLLM's speculators and SpecForge store it.

        t2d: (V,) bool, which of the target's ids the draft has; its own follow their order.
        """
        if t2d.dim() != 1 or t2d.dtype != torch.bool:
            raise ValueError(f"t2d has shape {tuple(t2d.shape)} and dtype {t2d.dtype}; give a bool for each id of the target, (V,).")
        return cls._of_kept(t2d.nonzero()[:, 0], t2d.numel())

    @classmethod
    def from_d2t(cls, d2t: Tensor, vocab_size: int) -> VocabMap:
        """The vocabulary of a speculative draft from its offsets to the target's, stored beside `t2d`.

        d2t: (V_k,) integers, what is added to an id of the draft to have the target's. vocab_size: V, the target's ids.
        """
        if d2t.dim() != 1 or d2t.is_floating_point() or d2t.dtype == torch.bool:
            raise ValueError(
                f"d2t has shape {tuple(d2t.shape)} and dtype {d2t.dtype}; give an integer for each id of the draft, (V_k,)."
            )
        kept_ids = torch.arange(d2t.numel(), device=d2t.device) + d2t.long()
        if d2t.numel() and not 0 <= int(kept_ids.min()) <= int(kept_ids.max()) < vocab_size:
            raise ValueError(
                f"d2t leads to ids from {int(kept_ids.min())} to {int(kept_ids.max())}, and the target has {vocab_size}; d2t holds the "
                "differences of the target's ids and the draft's, and vocab_size is the target's."
            )
        return cls._of_kept(kept_ids, vocab_size)

    @classmethod
    def _of_kept(cls, kept_ids: Tensor, vocab_size: int) -> VocabMap:
        slots = torch.arange(kept_ids.numel(), device=kept_ids.device)
        return cls(kept_ids, torch.full((vocab_size,), -1, device=kept_ids.device).index_copy(0, kept_ids, slots))

    @property
    def num_kept(self) -> int:
        """V_k, the number of slots."""
        return self.kept_ids.numel()

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return self.id_to_slot.numel()

    @cached_property
    def is_kept(self) -> Tensor:
        """(V,) bool: whether the id has a slot of its own."""
        return torch.zeros_like(self.id_to_slot, dtype=torch.bool).index_fill_(0, self.kept_ids, True)

    @property
    def d2t(self) -> Tensor:
        """(V_k,) int64: what is added to a slot to have its id, as trainers of speculative drafts store it; their t2d is `is_kept`."""
        return self.kept_ids - torch.arange(self.num_kept, device=self.kept_ids.device)

    @cached_property
    def has_stand_ins(self) -> bool:
        """Whether every id has a slot."""
        return int(self.id_to_slot.min()) >= 0

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over both tensors, the same on every device."""
        digest = hashlib.sha256(f"{self.num_kept},{self.vocab_size};".encode())
        for tensor in (self.kept_ids, self.id_to_slot):
            digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def assign_stand_ins(
        self,
        embedding: Tensor | None,
        similarity: Similarity | Literal["unk"] = "dot",
        *,
        unk_id: int | None = None,
        exclude: Iterable[int] = (),
    ) -> VocabMap:
        """A new map in which every dropped id has the slot of its most similar kept id (ties: the lowest slot).

        Args:
            embedding: (V, H), rows of the teacher's embedding in any floating dtype, on any device; not used by "unk", which takes
                None.
            similarity: "dot" (GLMD's), "cosine" or "euclidean", as in `fastkd.vocab.stand_ins.nearest_kept`; "unk":
                every dropped id is read as `unk_id`.
            unk_id: used by "unk" only; a kept id.
            exclude: ids that may not stand in for another. Default none, as in the authors' code: a dropped id may be
                read as a special token.

        Raises:
            ValueError: an unknown similarity, an embedding of another length or with values that are not finite, an `unk_id` that is
                not kept, or no kept id left to stand in.
        """
        if similarity not in (*get_args(Similarity), "unk"):
            raise ValueError(f"similarity must be 'dot', 'cosine', 'euclidean' or 'unk', got {similarity!r}.")
        dropped_ids = (~self.is_kept).nonzero().squeeze(1)
        if similarity == "unk":
            stand_ins = torch.full_like(dropped_ids, self._slot_of_unk(unk_id))
        else:
            if embedding is None or embedding.dim() != 2 or len(embedding) != self.vocab_size:
                given = None if embedding is None else tuple(embedding.shape)
                raise ValueError(
                    f"embedding must have one row for each of the {self.vocab_size} ids of the map, got {given}; pass "
                    "the teacher's whole (V, H) embedding, and its padded V as vocab_size to VocabMap.from_counts."
                )
            excluded = torch.tensor(sorted(set(exclude)), dtype=torch.int64, device=self.kept_ids.device)
            candidates = (~torch.isin(self.kept_ids, excluded)).nonzero().squeeze(1)
            if candidates.numel() == 0:
                raise ValueError("exclude names every kept id, so no id is left to stand in; exclude fewer ids.")
            device = embedding.device
            nearest = nearest_kept(embedding, dropped_ids.to(device), self.kept_ids[candidates].to(device), similarity)
            stand_ins = candidates[nearest.to(candidates.device)]
        return VocabMap(self.kept_ids, self.id_to_slot.index_copy(0, dropped_ids, stand_ins))

    def pin(self, slots: Mapping[int, int]) -> VocabMap:
        """A new map in which the kept ids that `slots` names have these slots; each changes places with the id that was there.

        Some architectures compute with the number of an id: RoBERTa counts positions from its padding id, 1, so that
        `pin({1: 1})` lets it go on as before.

        Raises:
            ValueError: an id that is not kept, or a slot that is not below V_k.
        """
        order = self.kept_ids.tolist()
        for number, slot in slots.items():
            if number not in order:
                raise ValueError(f"pin names id {number}, which is not kept; name it in protected when the map is built.")
            if not 0 <= slot < len(order):
                raise ValueError(f"pin gives id {number} slot {slot} of {len(order)}; keep more than {slot} ids.")
            here = order.index(number)
            order[here], order[slot] = order[slot], number
        kept_ids = torch.tensor(order, device=self.kept_ids.device)
        moved = torch.empty_like(kept_ids).index_copy_(0, self.id_to_slot[kept_ids], torch.arange(len(order), device=kept_ids.device))
        return VocabMap(kept_ids, torch.where(self.id_to_slot < 0, -1, moved[self.id_to_slot]))

    def map_ids(self, ids: Tensor, ignore_index: int | None = None) -> Tensor:
        """The slots by which ids are read.

        Args:
            ids: (...) integers in [0, V), on the map's device. CPU tensors are checked; elsewhere the check is the device's own
                assertion, because reading the result back would make every step wait for the device.
            ignore_index: a value of `ids` that stays as it is (the -100 of labels); None: there is none.

        Returns:
            (...) int64 slots.

        Raises:
            TypeError: ids that are no integers.
            ValueError: an id out of range, another device, or dropped ids without a stand-in.
        """
        if not self.has_stand_ins:
            missing = int((self.id_to_slot < 0).sum())
            raise ValueError(f"{missing} dropped ids have no stand-in yet; call assign_stand_ins before map_ids.")
        if ignore_index is None:
            return _look_up(self.id_to_slot, ids, "ids")
        ignored = ids == ignore_index
        return _look_up(self.id_to_slot, ids.masked_fill(ignored, 0), "ids").masked_fill(ignored, ignore_index)

    def decode_ids(self, slots: Tensor) -> Tensor:
        """(...) int64, the ids behind `slots` (...), integers in [0, V_k); checked as `map_ids` does."""
        return _look_up(self.kept_ids, slots, "slots")

    def shard(self, rank: int, world_size: int) -> Tensor:
        """(n,) int64, the slots of process `rank` of `world_size`: rank, rank + world_size, ..., its rows of a student's head.

        `from_counts` puts slots in the order of falling frequency, so every process gets frequent and rare tokens alike, and shards
        differ by at most one slot; split by contiguous original ids, most kept tokens would often fall to one process. The rows of the
        teacher's head beside them are `kept_ids[shard]`.

        `linear_kl_div` with a `group` counts labels through the shards one behind the other. Of a slot that position is
        `torch.cat([m.shard(r, world_size) for r in range(world_size)]).argsort()[slot]`.

        Raises:
            ValueError: no such rank, or more processes than slots.
        """
        if not 0 <= rank < world_size <= self.num_kept:
            raise ValueError(
                f"shard({rank}, {world_size}) of {self.num_kept} slots: give 0 <= rank < world_size, and no more processes than slots."
            )
        return torch.arange(rank, self.num_kept, world_size, device=self.kept_ids.device)

    def to(self, device: torch.device | str) -> VocabMap:
        """The same map with both tensors on `device`."""
        return VocabMap(self.kept_ids.to(device), self.id_to_slot.to(device))

    def save(self, directory: str | Path) -> None:
        """Write `vocab_map.json` and the tensors it names, atomically."""
        metadata = {"vocab_size": self.vocab_size, "num_kept": self.num_kept, "fingerprint": self.fingerprint}
        save_record(directory, _KIND, {"kept_ids": self.kept_ids, "id_to_slot": self.id_to_slot}, metadata)

    @classmethod
    def load(cls, directory: str | Path) -> VocabMap:
        """The map that `save` wrote to `directory`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a file that was changed since it was saved.
        """
        tensors, _ = load_record(directory, _KIND)
        return cls(tensors["kept_ids"], tensors["id_to_slot"])

    def _slot_of_unk(self, unk_id: int | None) -> int:
        if unk_id is None or not 0 <= unk_id < self.vocab_size or not bool(self.is_kept[unk_id]):
            raise ValueError(
                f"similarity='unk' needs a kept id as unk_id, got {unk_id}; name the tokenizer's unk_token_id in "
                "protected when the map is built."
            )
        return int(self.id_to_slot[unk_id])


def _frequencies(counts: TokenCounts | Tensor) -> Tensor:
    frequencies = counts.counts if isinstance(counts, TokenCounts) else counts.cpu()
    if frequencies.dim() != 1 or frequencies.numel() == 0 or not _is_integer(frequencies):
        raise ValueError(f"counts must be TokenCounts or one integer per token, got {tuple(frequencies.shape)} {frequencies.dtype}.")
    return frequencies


def _num_kept(keep: float, num_tokens: int, multiple_of: int) -> int:
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}.")
    if isinstance(keep, Integral) and not isinstance(keep, bool) and keep >= 1:
        wanted = int(keep)
    elif isinstance(keep, Real) and 0 < keep < 1:
        wanted = max(1, math.floor(keep * num_tokens))
    else:
        raise ValueError(
            f"keep={keep!r} must be a ratio between 0 and 1 (both excluded) or a whole number of tokens, an int of at "
            f"least 1; to keep all tokens give their number, keep={num_tokens}."
        )
    return min(num_tokens, math.ceil(wanted / multiple_of) * multiple_of)


def _choose(order: list[int], num_protected: int, num_kept: int, requires: Mapping[int, Sequence[int]]) -> set[int]:
    """Exactly `num_kept` ids, closed under `requires`; the first `num_protected` of `order` are among them."""
    kept: set[int] = set()
    for token in order[:num_protected]:
        kept |= _missing(token, kept, requires)
    if len(kept) > num_kept:
        raise ValueError(
            f"{num_protected} protected tokens need {len(kept)} kept tokens, with what they require, but keep leaves "
            f"room for {num_kept}; use keep={len(kept)} or more, or protect fewer."
        )
    for token in order[num_protected:]:
        if len(kept) == num_kept:
            break
        group = _missing(token, kept, requires)
        if len(kept) + len(group) <= num_kept:
            kept |= group
    # Without cycles one pass fills V_k: a dropped token whose requirements are all kept was passed over when they did
    # not fit together with it, so their later entry filled the rest.
    if len(kept) < num_kept:
        raise ValueError("requires has a cycle: some ids require each other, so they cannot be kept one by one.")
    return kept


def _with_requiring(excluded: set[int], requires: Mapping[int, Sequence[int]]) -> set[int]:
    """`excluded` and every id that requires one of them, transitively."""
    found = excluded
    while found:
        found = {token for token, needed in requires.items() if token not in excluded and not found.isdisjoint(needed)}
        excluded = excluded | found
    return excluded


def _missing(token: int, kept: set[int], requires: Mapping[int, Sequence[int]]) -> set[int]:
    """The token and everything it requires, transitively, less what is kept."""
    missing: set[int] = set()
    stack = [token]
    while stack:
        candidate = stack.pop()
        if candidate not in kept and candidate not in missing:
            missing.add(candidate)
            stack.extend(requires.get(candidate, ()))
    return missing


def _require_ids(name: str, ids: set[int], num_tokens: int) -> None:
    outside = sorted(token for token in ids if not 0 <= token < num_tokens)
    if outside:
        raise ValueError(f"{name} names id {outside[0]}; the ids that were counted are 0 to {num_tokens - 1}.")


def _look_up(table: Tensor, index: Tensor, name: str) -> Tensor:
    if not _is_integer(index):
        raise TypeError(f"{name} must be integers, got {index.dtype}.")
    if index.device != table.device:
        raise ValueError(f"{name} are on {index.device} and the map on {table.device}; move it with VocabMap.to.")
    if index.device.type == "cpu":
        outside = ((index < 0) | (index >= table.numel())).nonzero()
        if len(outside):
            position = tuple(outside[0].tolist())
            hint = "; labels with an ignored value need ignore_index" if name == "ids" and index[position] < 0 else ""
            raise ValueError(f"{name} must lie in [0, {table.numel()}), got {int(index[position])} at position {position}{hint}.")
    return table.gather(0, index.long().flatten()).view(index.shape)  # gather, because indexing accepts negative ids


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
