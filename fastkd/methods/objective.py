"""What a method hands to the driver: an objective, which is one module whose forward is the whole student side of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..models.teacher_cache import CachedTeacher
from .teaching import Lesson, Model, Taught, TaughtBatch, Teacher

T = TypeVar("T")
R = TypeVar("R")


class Batch(Protocol):
    """Tensors of one micro-batch, with the two that every batch has."""

    @property
    def input_ids(self) -> Tensor:
        """(B, S) int64."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, S) of ones, and zeros at pads."""

    def to(self, device: torch.device | str) -> Any:
        """The batch with its tensors on `device`."""


@dataclass(frozen=True)
class Position:
    """Where an optimizer step stands in its stage. Steps and epochs are counted from 0."""

    step: int
    total_steps: int
    epoch: int
    total_epochs: float


class Objective(nn.Module):
    """Exactly one loss.

    Registered submodules other than the student are auxiliary: trained where they require gradients, in every checkpoint and beside the
    finished model, and no part of it.
    """

    __call__: Callable[..., Tensor]  # nn.Module's own says nothing of what it returns
    student: Any
    """The model that is trained and saved."""
    teach: Teacher | None = None
    """Asks the teacher; None without one, and where every batch comes with what it has said."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, nn.Module] = {}
        """Frozen modules beside the student that are no part of its state, by name."""
        self.terms: dict[str, Tensor] = {}
        """What the parts of the loss have come to since the driver emptied it, where `forward` tells them apart: see `term`."""

    def weight(self, batch: Any) -> float | np.ndarray:
        """What this batch adds to the denominator of its optimizer step (tokens, or examples).

        Args:
            batch: as `prepare` gives it, still on the CPU.

        Returns:
            A number; an array (n,) where a loss has several denominators.
        """
        raise NotImplementedError

    def forward(self, batch: Any, denominator: Any) -> Tensor:
        """The batch's part of the step's loss.

        Args:
            batch: as `prepare` gives it, on the student's device.
            denominator: the summed `weight` of the step's batches, over all ranks.

        Returns:
            (), sums over the batch divided by `denominator`.
        """
        raise NotImplementedError

    def prepare(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch with what the objective draws for it, from a generator that depends on the micro-batch's number alone."""
        return batch

    def term(self, name: str, value: Tensor) -> Tensor:
        """`value`, a 0-dim part of this batch's loss, which the log shows under `loss_name`, summed over the step's batches."""
        seen = value.detach()
        self.terms[name] = self.terms[name] + seen if name in self.terms else seen
        return value

    def begin_step(self, at: Position) -> None:
        """Called before every optimizer step: schedules read it."""

    def end_step(self) -> None:
        """Called after every optimizer step: running averages of weights are made here."""

    def auxiliary(self) -> dict[str, nn.Module]:
        """What is trained or kept beside the student, by name."""
        return {name: module for name, module in self.named_children() if name != "student"}

    def learn_from(self, teacher: Model | CachedTeacher, lesson: Lesson) -> None:
        """Keep a frozen teacher, from which `taught` has its lesson; of a cached one there is nothing to keep."""
        if not isinstance(teacher, CachedTeacher):
            self.hold("teacher", teacher)
            self.teach = Teacher(teacher, lesson)

    def taught(self, batch: Any) -> tuple[Any, Taught]:
        """The batch as the student reads it, and what the teacher says of it."""
        if isinstance(batch, TaughtBatch):
            return batch.batch, batch.taught
        assert self.teach is not None
        return batch, self.teach(batch)

    def hold(self, name: str, module: nn.Module) -> None:
        """Keep a frozen module (the teacher) as attribute `name` without registering it: it is no part of the student's state.

        Raises:
            ValueError: it is in training mode, has a parameter that requires gradients, or is the student.
        """
        if any(p.requires_grad for p in module.parameters()) or module.training:
            raise ValueError(f"The {name} must be frozen: call .eval().requires_grad_(False) on it.")
        if module is self.student:
            raise ValueError(f"The {name} and the student are one object; load them separately.")
        object.__setattr__(self, name, module)
        self.held[name] = module

    def moved(self) -> None:
        """Called once everything is on its device: what was gathered of the teacher is gathered there."""
        if self.teach is not None:
            self.teach.gather()


@dataclass(frozen=True)
class Share:
    """This process's part of an evaluation: batch i is that of process i modulo `world_size`, and all see all results."""

    rank: int = 0
    world_size: int = 1
    poll: Callable[[], None] = lambda: None
    """Called before every batch: signals are heard there."""
    gather: Callable[[list[Any]], list[list[Any]]] = lambda own: [own]
    """What every process has, by rank."""

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`work` of every item, in their order, on any number of processes. What it returns must be what JSON can hold."""
        own = []
        for first in range(self.rank, len(items) + self.rank, self.world_size):
            self.poll()
            # A model in pieces runs on all processes at once: who has no item left runs one whose result nobody asks for.
            own.append(work(items[min(first, len(items) - 1)]))
        parts = self.gather(own)
        return [parts[i % self.world_size][i // self.world_size] for i in range(len(items))]


@dataclass(frozen=True)
class Stage:
    """One stage of a method, ready to be trained: what is minimised, on which rows, and how it is judged."""

    name: str
    objective: Objective
    lengths: np.ndarray
    """(N,) length of every training row, for bucketing."""
    make_batch: Callable[[Sequence[int], torch.Generator], Batch]
    """(row indices, generator for masking) -> batch on the CPU."""
    evaluate: Callable[[Share], dict[str, float]] | None
    """Scores of the student as it is now on held-out rows, if there are any; batches go through its argument."""
    metric: str
    """The score that selects the best weights."""
    higher_is_better: bool
    evaluate_first: bool = False
    """Score the student before the first step, so that the stage can never hand over worse weights than it was given."""
    keep: str = "best"
    """Which weights go on: the "best" by `metric`, or the "last"."""
    captures: bool = False
    """Whether the loss reads states inside of layers."""
    fingerprint: str = ""
    """Another one for other training rows, or another order of them."""
    events: str | None = None
    """What the perplexity among the scores is over, if there is one."""
