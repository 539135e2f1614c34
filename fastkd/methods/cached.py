"""The teacher's lesson as tensors of a cache, and back: what `fastkd cache` writes and what a run with a cached teacher reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..models.teacher_cache import TeacherCache
from ..ops.backend_torch import transformed
from ..ops.linear_logits import LinearLogits
from ..ops.options import LossOptions, autocast_dtype
from .teaching import DenseWords, Lesson, Taught, TopKWords

Kind = Literal["dense", "topk"]
Tail = Literal["bucket", "renormalize", "zero"]
LOGITS, TOPK = "token.logits", ("token.topk_ids", "token.topk_logprobs", "token.tail_logprob")
SCORES = ("row.scores", "token.scores")
_STATE = "token.state."
_LOGIT_ROWS = 256


@dataclass(frozen=True)
class CacheForm:
    """How words and states are stored. Scores of tasks are float32 in any form."""

    kind: Kind = "dense"
    """dense: all logits. topk: the `k` largest log-probabilities at `temperature`, and the log of the others' mass."""
    dtype: torch.dtype = torch.bfloat16
    k: int = 0
    temperature: float = 1.0


def to_cache(taught: Taught, attention_mask: Tensor, form: CacheForm) -> dict[str, Tensor]:
    """Tensors for a cache, with the entries of all of the batch's tokens (`token.*`), row after row, or of its rows (`row.*`).

    Dense logits are less the token's largest one, which changes no softmax at any temperature and keeps the likely tokens exact in 16
    bits.

    Args:
        taught: what the teacher said of the batch, with words by a head.
        attention_mask: (B, S), zero at pads, whose entries are left out.
        form: how words and states are stored.

    Returns:
        With N tokens: `token.logits` (N, V), or `token.topk_ids` (N, k) int32, `token.topk_logprobs` (N, k) and `token.tail_logprob`
            (N,)
        float32; `token.state.<layer>` (N, H); scores as `row.scores` (B, C), or of questions `token.scores` (N, 2), float32.
    """
    tokens = attention_mask.bool()
    tensors = {f"{_STATE}{layer}": state[tokens].to(form.dtype) for layer, state in taught.states.items()}
    if isinstance(taught.words, DenseWords):
        tensors |= _words(taught.words, tokens, form)
    if taught.scores is not None and taught.scores.dim() == 3:  # question answering: (B, 2, S)
        tensors["token.scores"] = taught.scores.mT[tokens].float()
    elif taught.scores is not None:
        tensors["row.scores"] = taught.scores.reshape(len(tokens), -1).float()
    return tensors


def from_cache(tensors: Mapping[str, Tensor], tail: Tail) -> Taught:
    """The reverse of `to_cache`.

    Args:
        tensors: `token.*` padded to (B, S, ...), and `row.*` (B, ...), as `TeacherCache.outputs` gives them.
        tail: what becomes of words that a top-k cache does not list: see `fastkd.topk_kl_div`.
    """
    words: DenseWords | TopKWords | None = None
    if LOGITS in tensors:
        words = DenseWords(tensors[LOGITS])
    elif TOPK[0] in tensors:
        ids, logprobs, tail_logprob = (tensors[name] for name in TOPK)
        words = TopKWords(ids, logprobs, tail_logprob, tail)
    scores = tensors["token.scores"].mT if "token.scores" in tensors else tensors.get("row.scores")
    states = {int(name.removeprefix(_STATE)): state for name, state in tensors.items() if name.startswith(_STATE)}
    return Taught(words, scores, states)


@dataclass(frozen=True, eq=False)
class CachedLesson:
    """What a cache holds of a lesson."""

    cache: TeacherCache
    lesson: Lesson
    tail: Tail = "bucket"

    def __call__(self, rows: Sequence[int] | np.ndarray, width: int) -> Taught:
        """The cached outputs for the rows of a batch, by their numbers."""
        predictions = {"words": (LOGITS, *TOPK), "scores": SCORES, "none": ()}[self.lesson.predictions]
        wanted = {*predictions, *(f"{_STATE}{layer}" for layer in self.lesson.layers)}
        return from_cache(self.cache.outputs([name for name in self.cache.names if name in wanted], rows, width), self.tail)


def _words(words: DenseWords, tokens: Tensor, form: CacheForm) -> dict[str, Tensor]:
    """A few rows of float32 logits at a time, by the GEMM that makes them online."""
    assert words.weight is not None
    hidden = words.hidden[tokens]
    dtype = torch.promote_types(words.weight.dtype, torch.float32)
    operand = LossOptions(operand_dtype=autocast_dtype(hidden.device)).operand
    source = LinearLogits(hidden, words.weight, words.bias, None, _LOGIT_ROWS, dtype, operand)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(hidden), _LOGIT_ROWS):
        raw = source.logits(slice(start, min(start + _LOGIT_ROWS, len(hidden))))
        logits = transformed(raw, source.bias, words.transform, dtype)
        for name, part in (_dense(logits, form) if form.kind == "dense" else _topk(logits, form)).items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(part) for name, part in parts.items()}


def _dense(logits: Tensor, form: CacheForm) -> dict[str, Tensor]:
    return {LOGITS: (logits - logits.amax(-1, keepdim=True)).to(form.dtype)}


def _topk(logits: Tensor, form: CacheForm) -> dict[str, Tensor]:
    logprobs = (logits / form.temperature).log_softmax(-1)
    largest, ids = logprobs.topk(form.k)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return dict(zip(TOPK, (ids.int(), largest.to(form.dtype), tail.float()), strict=True))
