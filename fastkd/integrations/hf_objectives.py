"""The objectives that KDTrainer makes by a method's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from ..methods.crild import LogitDistillation
from ..methods.finetune import FineTuning
from ..methods.glmd import GLMDOptions, WordPrediction
from ..methods.kd import KDOptions, KnowledgeDistillation
from ..methods.language_modeling import LanguageModeling
from ..methods.objective import Objective
from ..methods.registry import METHODS
from ..methods.teaching import Model
from ..models.language_model import LanguageModel
from ..models.load import check_same_tokenizer, load_frozen, load_tokenizer
from ..models.task_model import TaskHead, load_task_model
from .hf_models import as_fastkd_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_objective(
    student: PreTrainedModel | Model,
    teacher: PreTrainedModel | Model | str | os.PathLike[str] | None,
    method: str | None,
    options: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> Objective:
    """The objective of a method whose only stage, or last one, needs no other.

    Args:
        student: transformers' or fastkd's model.
        teacher: the same, or a folder or hub name from which it is loaded in float32. It is frozen, put in evaluation mode and moved to
            `device`. None for methods without one.
        method: its name.
        options: the method's, by name. `completion_only` of kd is True for decoders, as in TRL's trainers, unless it is given.
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
    if method == "kd":
        options = {"completion_only": isinstance(own, LanguageModel) and own.causal, **options}
    known = [field.name for field in fields(options_type)]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"options has {', '.join(unknown)}, which method {method} does not know; it has {', '.join(known) or 'none'}.")
    if (teacher is None) is (method in _WITH_TEACHER):
        raise ValueError(f"method={method!r} {'needs a teacher' if teacher is None else 'has no teacher; leave it out'}.")
    if isinstance(teacher, str | os.PathLike):
        teacher = _loaded(os.fspath(teacher), own)
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


def _loaded(name_or_path: str, student: Model) -> Model:
    """The teacher of that name, for what the student is for."""
    if isinstance(student, LanguageModel):
        return load_frozen(name_or_path)
    return load_task_model(name_or_path, TaskHead(student.kind, student.model.config.num_labels), seed=0, needs_head=True)


def check_vocabularies(student: Model, teacher: Model, tokenizer: Any = None) -> None:
    """Refuse (ValueError) models in which an id is not one and the same token.

    Args:
        student: the model that is trained.
        teacher: its teacher.
        tokenizer: of the rows of text; None: the one that was saved with the student. The teacher's is the one saved with it. What is
            not known is not compared.
    """
    if isinstance(student, LanguageModel) and isinstance(teacher, LanguageModel) and student.vocab_map is None:
        rows, taught = student.vocabulary, teacher.vocabulary
        if rows > taught:
            raise ValueError(
                f"The student has {rows} vocabulary rows and the teacher {taught}, which says nothing of ids from {taught} on. Give a "
                "teacher with the student's tokenizer; if it has it and those rows are padding, call "
                f"student.resize_token_embeddings({taught}) first."
            )
    own, other = tokenizer or _saved_tokenizer(student), _saved_tokenizer(teacher)
    if own is None or other is None:
        return
    tokens = {index: token for token, index in other.get_vocab().items()}
    if any(tokens.get(index, token) != token for token, index in own.get_vocab().items()):
        check_same_tokenizer(other, own)


def _saved_tokenizer(model: Model) -> Any:
    """The tokenizer in the folder, or of the hub name, that the model was loaded from; None if there is none."""
    source = model.model.config.name_or_path
    try:
        return load_tokenizer(source) if source else None
    except (OSError, ValueError):
        return None


def reads_labels(objective: Objective) -> bool:
    """Whether labels have a part in its loss."""
    options = getattr(objective, "options", None)
    if isinstance(options, KDOptions):
        return options.label_weight > 0 or options.completion_only
    return not isinstance(options, GLMDOptions) and getattr(options, "label_weight", 1.0) > 0
