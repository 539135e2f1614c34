"""What a frozen teacher says of a batch: asked on the spot, or read from a cache for which it was asked once.

An objective with a teacher begins its forward with `batch, taught = self.taught(batch)`, and is the same in both cases. Online,
`taught` holds a head and what enters it; from a cache, logits or the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..models.capture import Captured, capture
from ..models.language_model import LanguageModel, head_rows
from ..models.task_model import TaskModel
from ..ops.fused_loss import LossStats
from ..ops.linear_kl import linear_kl_div
from ..ops.row_call import LogitTransform
from ..ops.topk_kl import topk_kl_div

Model = TaskModel | LanguageModel
Device = torch.device | str
Scorer = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class DenseWords:
    """Logits of every position over the compared vocabulary, by a head and what enters it; or as they are, with weight None."""

    hidden: Tensor
    """(B, S, H), or logits (B, S, V)."""
    weight: Tensor | None = None
    """(V, H)."""
    bias: Tensor | None = None
    """(V,)."""
    transform: LogitTransform = LogitTransform()
    """What the teacher does after its head."""

    def divergence(self, student_hidden: Tensor, student_weight: Tensor, **options: Any) -> tuple[Tensor, LossStats]:
        """`linear_kl_div` with this as the teacher's side.

        Args:
            student_hidden: (B, S, H_s).
            student_weight: (V, H_s), rows of the compared vocabulary.
            options: keyword arguments of `linear_kl_div` but the teacher's.

        Returns:
            The loss, and of the statistics the divergence and the cross-entropy of every token.
        """
        result = linear_kl_div(
            student_hidden,
            student_weight,
            self.hidden,
            self.weight,
            teacher_bias=self.bias,
            teacher_softcap=self.transform.softcap,
            teacher_logit_scale=self.transform.scale,
            return_stats="losses",
            **options,
        )
        assert isinstance(result, tuple)
        return result

    def to(self, device: Device) -> DenseWords:
        """The same with the hidden states on `device`; the head stays where it is."""
        return replace(self, hidden=self.hidden.to(device))


@dataclass(frozen=True, eq=False)
class TopKWords:
    """Every position's K largest log-probabilities at the temperature of the loss, and the log of the others' mass."""

    ids: Tensor
    """(B, S, K) integers, rows of the compared vocabulary, -1 at pads."""
    logprobs: Tensor
    """(B, S, K), any floating dtype."""
    tail_logprob: Tensor
    """(B, S)."""
    tail: str
    """What becomes of the others: see `topk_kl_div`."""

    def divergence(
        self, student_hidden: Tensor, student_weight: Tensor, *, divergence: str = "forward_kl", **options: Any
    ) -> tuple[Tensor, LossStats]:
        """`topk_kl_div` with this as the teacher's side.

        Args:
            student_hidden: (B, S, H_s).
            student_weight: (V, H_s), rows of the compared vocabulary.
            divergence: "forward_kl"; a ValueError else, because the others need all logits.
            options: keyword arguments of `topk_kl_div` but the teacher's.

        Returns:
            The loss, and of the statistics the divergence and the cross-entropy of every token.
        """
        if divergence != "forward_kl":
            raise ValueError(f"divergence={divergence!r} needs all logits, and the cache has the largest: take forward_kl.")
        teacher = self.ids.long(), self.logprobs, self.tail_logprob
        result = topk_kl_div(student_hidden, student_weight, *teacher, tail=self.tail, return_stats="losses", **options)
        assert isinstance(result, tuple)
        return result

    def to(self, device: Device) -> TopKWords:
        """The same with all tensors on `device`."""
        ids, logprobs, tail = (x.to(device) for x in (self.ids, self.logprobs, self.tail_logprob))
        return TopKWords(ids, logprobs, tail, self.tail)


@dataclass(frozen=True, eq=False)
class Taught:
    """What the teacher says of one batch, as far as the stage asks."""

    words: DenseWords | TopKWords | None = None
    scores: Tensor | None = None
    """Scores of a task, in the shape of the student's."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """(B, S, H) by layer."""

    def to(self, device: Device) -> Taught:
        """On `device`; states, which a cache may hold in 16 bits, in float32."""
        return Taught(
            None if self.words is None else self.words.to(device),
            None if self.scores is None else self.scores.to(device),
            {layer: state.to(device).float() for layer, state in self.states.items()},
        )


@dataclass(frozen=True, eq=False)
class TaughtBatch:
    """A batch, and what its teacher has said of it."""

    batch: Any
    taught: Taught

    @property
    def input_ids(self) -> Tensor:
        """(B, S) int64."""
        ids: Tensor = self.batch.input_ids
        return ids

    @property
    def attention_mask(self) -> Tensor:
        """(B, S) of ones, and zeros at pads."""
        mask: Tensor = self.batch.attention_mask
        return mask

    def to(self, device: Device) -> TaughtBatch:
        """Batch and lesson on `device`; see `Taught.to`."""
        return TaughtBatch(self.batch.to(device), self.taught.to(device))


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a stage asks of its teacher: words or scores or neither, and states."""

    words: Tensor | slice | None = None
    """The rows of its head whose logits are compared."""
    scores: Scorer | None = None
    """(model, batch) -> scores."""
    layers: tuple[int, ...] = ()
    """Whose hidden states are compared, counted from 1; 0 is what enters the first."""

    @property
    def predictions(self) -> str:
        """What is asked beside states: "words", "scores" or "none"."""
        return "words" if self.words is not None else "scores" if self.scores is not None else "none"


class Teacher:
    """A frozen model that gives a lesson. Rows of its head are gathered once."""

    def __init__(self, model: Model, lesson: Lesson) -> None:
        self.model, self.lesson = model, lesson
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.gather()

    def gather(self) -> None:
        """Take the rows of the head where it is now."""
        if self.lesson.words is not None:
            assert isinstance(self.model, LanguageModel)
            self.weight, self.bias = head_rows(self.model, self.lesson.words)

    @torch.no_grad()
    def __call__(self, batch: Any) -> Taught:
        model, lesson = self.model, self.lesson
        words = scores = None
        stop = lesson.predictions == "none"
        if stop and not lesson.layers:
            return Taught()
        reads: Any = capture(model.model, hidden=lesson.layers, stop=stop) if lesson.layers else nullcontext(Captured())
        with reads as seen:
            if lesson.scores is not None:
                scores = lesson.scores(model, batch)
            elif isinstance(model, LanguageModel):
                hidden = model(batch.input_ids, batch.attention_mask, lambda hidden, weight, bias: hidden)
                if lesson.words is not None:
                    words = DenseWords(hidden, self.weight, self.bias, model.transform)
            else:
                model(batch)
        return Taught(words, scores, seen.hidden)


def plain(batch: Any) -> Any:
    """The batch as the student reads it."""
    return batch.batch if isinstance(batch, TaughtBatch) else batch


def task_scores(model: TaskModel, batch: Any) -> Tensor:
    """Scores as a model with a task's head gives them: the `Lesson.scores` of labelled tasks."""
    return model(batch)
