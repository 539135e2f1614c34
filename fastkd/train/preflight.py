"""Estimate what a stage needs of memory and disk before its first step, and refuse one that cannot have it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..methods.objective import Objective
from ..models.language_model import LanguageModel
from ..models.task_model import TaskModel
from ..ops.plan import plan_chunks
from .checkpoint import list_checkpoints
from .config import StageArguments

log = logging.getLogger("fastkd")

Doing = Literal["training", "evaluation"]
DOINGS: tuple[Doing, ...] = ("training", "evaluation")
_NUMBERS_PER_STATE = 17
"""Activations that a transformer layer keeps for backward, per token and per unit of its width: 34 bytes in 16 bits, attention's scores
left out because fused attention does not keep them (Korthikanti et al., arXiv:2205.05198, equation 1)."""
_TRAINING_KNOBS = (
    "per_device_train_batch_size (raise gradient_accumulation_steps by as much, and a step is the same), or max_length; or set bf16"
)
_EVALUATION_KNOBS = "per_device_eval_batch_size or max_length; or set bf16"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device during a stage's training or evaluation (`doing`).

    Attributes:
        certain: Tensors whose number and size are known.
        rough: What else there will be, to a factor of about two: the logits of a chunk, and activations.
        knobs: Which keys make it smaller, as the end of a sentence.
    """

    doing: str
    certain: dict[str, int]
    rough: dict[str, int]
    knobs: str

    @property
    def total(self) -> int:
        return sum(self.certain.values()) + sum(self.rough.values())

    def __str__(self) -> str:
        lines = [*self.certain.items(), *((f"{part} (roughly)", size) for part, size in self.rough.items()), ("together", self.total)]
        width = max(len(part) for part, _ in lines)
        return "\n".join(f"  {part:<{width}}  {_gib(size):>12}" for part, size in lines if size)


def memory_estimate(
    doing: Doing,
    objective: Objective,
    teacher: nn.Module | None,
    arguments: StageArguments,
    longest: int,
    device: torch.device,
    *,
    sequences: int = 1,
    shards: int = 1,
    teacher_shards: int = 1,
) -> MemoryEstimate:
    """What a step, or an evaluation (no gradients, and one layer's activations at a time), needs on `device`.

    Args:
        teacher: The frozen model beside the student; None where there is none, or where its words are cached.
        longest: Tokens of the longest row.
        sequences: Sequences that a row is at most: as many as a question has candidates.
        shards: Ranks that the student, its gradients and its optimizer are split over.
        teacher_shards: Ranks that the teacher is split over.
    """
    trains, student, half = doing == "training", objective.student, arguments.bf16 or arguments.fp16
    rows = arguments.per_device_train_batch_size if trains else arguments.per_device_eval_batch_size
    tokens = rows * sequences * longest
    trained = [p for p in objective.parameters() if p.requires_grad]
    return MemoryEstimate(
        doing,
        {
            **_weights(objective, teacher, shards, teacher_shards),
            "gradients": _bytes(trained) // shards * trains,
            "moments of AdamW": 2 * _bytes(trained) // shards,
        },
        {
            "weights in 16 bits, for autocast": sum(p.numel() for p in trained if p.dim() > 1) * 2 * half,
            "logits of a chunk": _logits(student, tokens, device, has_teacher=trains and teacher is not None),
            "activations": _kept_states(student, tokens, half, all_layers=trains),
        },
        _TRAINING_KNOBS if trains else _EVALUATION_KNOBS,
    )


def check_memory(estimate: MemoryEstimate, stage: str, device: torch.device) -> None:
    """Refuse, by a ValueError, what is sure not to fit into the memory of `device`; warn of what probably does not."""
    available = device_memory(device)
    sizes = f"{_gib(available)} that {device} has:\n{estimate}\n"
    if sum(estimate.certain.values()) > available:
        raise ValueError(
            f"Stage {stage} needs more for the weights of its models and their optimizer than the {sizes}Take smaller models, split "
            f"them over more devices by fsdp, or free memory elsewhere. Of the rest, lower {estimate.knobs}."
        )
    if estimate.total > available:
        log.warning(
            "Stage %s may need more in %s than the %sIf it runs out of memory, lower %s.", stage, estimate.doing, sizes, estimate.knobs
        )


@contextmanager
def explaining_shortage(estimate: MemoryEstimate, stage: str) -> Iterator[None]:
    """Around work that may run out of the device's memory: `MemoryError` then says what was needed and what would help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(out_of_memory_message(estimate, stage, error)) from error


def out_of_memory_message(estimate: MemoryEstimate, stage: str, error: torch.OutOfMemoryError) -> str:
    return (
        f"Stage {stage} ran out of memory in {estimate.doing}: {str(error).splitlines()[0]} Lower {estimate.knobs}. "
        f"This was expected to be needed:\n{estimate}"
    )


def device_memory(device: torch.device) -> int:
    """All of a device's memory, whoever uses it now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def checkpoint_bytes(objective: Objective, *, keeps_best: bool) -> int:
    """The tensors of one checkpoint: what is trained and kept beside it, AdamW's moments, and where wanted the best weights so far."""
    student = _bytes(_tensors(objective.student))
    trained = _bytes(p for p in objective.parameters() if p.requires_grad)
    return _bytes(_tensors(objective)) + 2 * trained + student * keeps_best


def check_disk(folder: Path, objective: Objective, *, save_total_limit: int, keeps_best: bool) -> None:
    """Refuse, by a ValueError, a stage whose checkpoints and finished model do not fit beside what is in its `folder`, which exists.

    One checkpoint more than `save_total_limit` is there while the oldest waits for the newest to be whole.
    """
    one, student = checkpoint_bytes(objective, keeps_best=keeps_best), _bytes(_tensors(objective.student))
    missing = max(0, save_total_limit + 1 - len(list_checkpoints(folder)))
    needed, free = missing * one + student, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} has {_gib(free)} of free disk, and stage {folder.name} needs {_gib(needed)}: {missing} more checkpoints of "
            f"{_gib(one)} (save_total_limit={save_total_limit}, and one while it is written), and {_gib(student)} for the finished "
            "model. Free space, lower save_total_limit, or choose an output_dir on another disk."
        )


def _weights(objective: Objective, teacher: nn.Module | None, shards: int, teacher_shards: int) -> dict[str, int]:
    own = list(_tensors(objective))
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    kept = {id(tensor) for tensor in own}
    of_teacher = [] if teacher is None else [tensor for tensor in _tensors(teacher) if id(tensor) not in kept]
    return {
        "weights that are trained": _bytes(tensor for tensor in own if id(tensor) in trained) // shards,
        "copies, frozen weights and buffers beside them": _bytes(tensor for tensor in own if id(tensor) not in trained) // shards,
        "teacher": _bytes(of_teacher) // teacher_shards,
    }


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _logits(student: Any, tokens: int, device: torch.device, *, has_teacher: bool) -> int:
    if not isinstance(student, LanguageModel):
        return 0
    return plan_chunks(tokens, student.vocabulary, device=device, has_teacher=has_teacher).buffer_bytes


def _kept_states(student: Any, tokens: int, half: bool, *, all_layers: bool) -> int:
    """What one layer, or all of them, keep for backward; nothing for a module that is no transformer."""
    if not isinstance(student, LanguageModel | TaskModel):
        return 0
    config = student.model.config.get_text_config()
    return _NUMBERS_PER_STATE * tokens * config.hidden_size * (2 if half else 4) * (config.num_hidden_layers if all_layers else 1)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
