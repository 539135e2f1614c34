"""Estimate what distilling one model into another needs of memory, and how fast it goes on this machine.

`fastkd doctor` shows it. Shapes decide both, so no weight is loaded: memory is counted on models without any (the meta device), and
speed is measured on random ones. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..methods.objective import Objective
from ..models.language_model import LanguageModel
from ..models.load import auto_class, check_row_length, load_config
from ..models.truncate import keep_layers
from ..ops.linear_kl import linear_kl_div
from ..ops.plan import plan_chunks
from ..ops.selfcheck import main_device
from .config import StageArguments
from .preflight import MemoryEstimate, device_memory, memory_estimate

PROBE_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Teacher and student, each a folder or the name of a hub model that is on this machine, and the micro-batch to train on."""

    teacher: str
    student: str
    student_layers: str | None
    batch_size: int
    length: int
    dtype: str
    temperature: float

    def __post_init__(self) -> None:
        for name in ("batch_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for model, role in zip(self.models("meta"), ("student", "teacher"), strict=True):  # refuses what cannot be built
            check_row_length(model, self.length, role, "--length")

    def models(self, device: str) -> tuple[LanguageModel, LanguageModel]:
        """Student and frozen teacher with random weights on `device`; without weights on "meta"."""
        configs = [load_config(_local_folder(name)) for name in (self.student, self.teacher)]
        with torch.device(device):
            student, teacher = (auto_class(config).from_config(config, dtype=torch.float32) for config in configs)
        if self.student_layers is not None:
            student = keep_layers(student, self.student_layers)
        kind = _Skeleton if device == "meta" else LanguageModel
        return kind(student).train(), kind(teacher).eval().requires_grad_(False)


@dataclass(frozen=True)
class Outlook:
    """Bytes that a training step would need and that the device has; tokens a second of the head's loss, and of a step of so many rows
    without its optimizer (0: not measured, because a step would not fit)."""

    memory: MemoryEstimate
    available: int
    head_rate: float
    step_rows: int
    step_rate: float


class _Skeleton(LanguageModel):
    def _check_head(self) -> None:
        """Without weights there are no logits to compare."""


def outlook(pair: Pair) -> Outlook:
    """Memory by `fastkd.train.preflight`; rates are measured, within a minute but for models of which one row takes longer."""
    device, tokens = main_device(), pair.batch_size * pair.length
    arguments = StageArguments(per_device_train_batch_size=pair.batch_size, bf16=pair.dtype == "bfloat16", fp16=pair.dtype == "float16")
    objective = Objective()
    objective.student, teacher = pair.models("meta")
    memory = memory_estimate("training", objective, teacher, arguments, pair.length, device)
    available = device_memory(device)
    rows = plan_chunks(tokens, objective.student.vocabulary, device=device).backward_tokens  # every chunk takes as long
    head_rate = rows / _seconds(_head_step(pair, objective.student, teacher, rows, device), device)
    if memory.total > available:
        return Outlook(memory, available, head_rate, 0, 0.0)
    step = _whole_step(pair, device)
    step_rows = max(1, min(pair.batch_size, int(PROBE_SECONDS / _seconds(partial(step, 1), device))))
    return Outlook(memory, available, head_rate, step_rows, step_rows * pair.length / _seconds(partial(step, step_rows), device))


def _head_step(pair: Pair, student: LanguageModel, teacher: LanguageModel, rows: int, device: torch.device) -> Callable[[], None]:
    shapes = [(count, model.head.in_features) for model in (student, teacher) for count in (rows, model.vocabulary)]
    hidden, weight, *of_teacher = (torch.randn(shape, device=device, dtype=getattr(torch, pair.dtype)) for shape in shapes)
    learned = (hidden.requires_grad_(), weight.requires_grad_())

    def step() -> None:
        loss: Any = linear_kl_div(*learned, *of_teacher, temperature=pair.temperature)
        torch.autograd.grad(loss, learned)

    return step


def _whole_step(pair: Pair, device: torch.device) -> Callable[[int], None]:
    """What runs so many rows of the batch, from ids to gradients."""
    student, teacher = pair.models(device.type)
    ids = torch.randint(min(student.vocabulary, teacher.vocabulary), (pair.batch_size, pair.length), device=device)
    options = {"temperature": pair.temperature, **student.logit_options("student"), **teacher.logit_options("teacher")}

    def step(rows: int) -> None:
        mask = torch.ones_like(ids[:rows])
        with torch.autocast(device.type, getattr(torch, pair.dtype), enabled=pair.dtype != "float32"):
            with torch.no_grad():
                states, head, head_bias = teacher(ids[:rows], mask, lambda *at_head: at_head)

            def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
                return linear_kl_div(hidden, weight, states, head, student_bias=bias, teacher_bias=head_bias, **options)

            student(ids[:rows], mask, loss).backward()
        student.zero_grad()

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """The fastest of at most five; none begins after `PROBE_SECONDS`."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < PROBE_SECONDS:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _local_folder(name: str) -> str:
    """The folder itself, or of a hub name the one that an earlier download has left; ValueError if there is none."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return name
    found = try_to_load_from_cache(name, "config.json") if name.count("/") <= 1 else None
    if not isinstance(found, str):
        raise ValueError(
            f"{name} is no folder, and no hub model that is on this machine, and doctor downloads nothing. Give a folder made by "
            "save_pretrained, or download the model first."
        )
    return str(Path(found).parent)
