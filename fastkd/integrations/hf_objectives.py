"""Floor 5, integrations: the objectives that KDTrainer makes by a method's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from ..methods.crild import LogitDistillation
from ..methods.finetune import FineTuning
from ..methods.glmd import GLMDOptions, WordPrediction
from ..methods.kd import KnowledgeDistillation
from ..methods.language_modeling import LanguageModeling
from ..methods.objective import Objective
from ..methods.registry import METHODS
from ..methods.teaching import Model
from ..models.language_model import LanguageModel
from .hf_models import as_fastkd_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_objective(
    student: PreTrainedModel | Model,
    teacher: PreTrainedModel | Model | None,
    method: str | None,
    options: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> Objective:
    """The objective of a method whose only stage, or last one, needs no other.

    Args:
        student: transformers' or fastkd's model.
        teacher: the same; it is frozen, put in evaluation mode and moved to `device`. None for methods without one.
        method: its name.
        options: the method's, by name.
        device: where training is.

    Raises:
        ValueError: a method or option that is not known here, a teacher that is missing or not needed, or models of two kinds.
        TypeError: an encoder-decoder, or a language model whose head is no plain nn.Linear.
    """
    own = as_fastkd_model(student)
    makers = _TEXT if isinstance(own, LanguageModel) else _TASKS
    what = "text" if isinstance(own, LanguageModel) else "a labelled task"
    if method is None or method not in makers:
        raise ValueError(
            f"method={method!r} is none of {', '.join(makers)}, which the student, a model for {what}, can be trained with here; give "
            "one of them, or an objective in place of the student."
        )
    maker, options_type = makers[method], METHODS[method].options
    known = [field.name for field in fields(options_type)]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"options has {', '.join(unknown)}, which method {method} does not know; it has {', '.join(known) or 'none'}.")
    if (teacher is None) is (method in _WITH_TEACHER):
        raise ValueError(f"method={method!r} {'needs a teacher' if teacher is None else 'has no teacher; leave it out'}.")
    other = None if teacher is None else as_fastkd_model(teacher)
    if other is not None:
        _check_pair(own, other)
        other.eval().requires_grad_(False).to(device)
    return maker(own, other, options_type(**options))


def _knowledge_distillation(student: Any, teacher: Any, options: Any) -> Objective:
    """Over the ids that the student has a row or a stand-in for."""
    tokens = student.vocabulary if student.vocab_map is None else student.vocab_map.vocab_size
    return KnowledgeDistillation(student, teacher, options, tokens)


_TEXT: dict[str, Callable[[Any, Any, Any], Objective]] = {
    "kd": _knowledge_distillation,
    "glmd": WordPrediction,
    "lm": lambda student, teacher, options: LanguageModeling(student),
}
_TASKS: dict[str, Callable[[Any, Any, Any], Objective]] = {
    "crild": LogitDistillation,
    "finetune": lambda student, teacher, options: FineTuning(student),
}
_WITH_TEACHER = ("kd", "glmd", "crild")


def _check_pair(student: Model, teacher: Model) -> None:
    if student.model is teacher.model:
        raise ValueError("The teacher and the student are one object; load them separately.")
    kinds = [
        f"a {'decoder' if model.causal else 'masked language model'}"
        if isinstance(model, LanguageModel)
        else f"a model for {model.kind}"
        for model in (student, teacher)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"The student is {kinds[0]} and the teacher {kinds[1]}; give two of one kind.")


def reads_labels(objective: Objective) -> bool:
    """Whether its loss has a term on labels."""
    options = getattr(objective, "options", None)
    return not isinstance(options, GLMDOptions) and getattr(options, "label_weight", 1.0) > 0
