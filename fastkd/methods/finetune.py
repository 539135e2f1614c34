"""Fine-tuning on a task's labels: how a teacher is made, stage 0 of CR-ILD and TED, and the student that is trained alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from ..models.deberta import zero_context_at_pads
from ..models.task_model import TaskModel
from ..tasks.encoded import TaskBatch
from .objective import Objective
from .task_losses import label_loss


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """Method `finetune` has no options."""


class FineTuning(Objective):
    """mean over examples of the task's own loss: cross-entropy, or squared error for regression."""

    student: TaskModel

    def __init__(self, student: TaskModel, *, zero_context: bool = False) -> None:
        """zero_context: DeBERTa's pads, which are in the softmax of questions, get no attention context; see `zero_context_at_pads`."""
        super().__init__()
        self.student, self.zero_context = student, zero_context

    def weight(self, batch: TaskBatch) -> float:
        """How many examples the batch has."""
        return float(batch.num_examples)

    def forward(self, batch: TaskBatch, denominator: float) -> Tensor:
        """(): the task's loss summed over examples, divided by the step's number of them."""
        with zero_context_at_pads(self.student) if self.zero_context else nullcontext():
            scores = self.student(batch)
        return label_loss(self.student.kind, scores, batch.labels).sum() / denominator
