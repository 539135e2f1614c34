"""Convert what transformers' Trainer handles, models and collated dicts, to fastkd's models and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.behaviour import base_model, uncompiled
from ..models.language_model import LanguageModel
from ..models.task_model import TaskModel
from ..tasks.encoded import TaskBatch
from ..tasks.text import IGNORE_INDEX, TextBatch, shifted

COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels", "shift_labels", "start_positions", "end_positions")
"""What is read of a collated dict."""
_ANSWERS = ("start_positions", "end_positions")


def as_fastkd_model(model: Any) -> LanguageModel | TaskModel:
    """A task model where the model's class, or one that it is derived from, is transformers' for that task; else a language model.

    Raises:
        TypeError: no model, an encoder-decoder, or one without a plain nn.Linear as its head.
        ValueError: a model for labels that do not exclude one another, or what `LanguageModel` refuses.
    """
    if isinstance(model, LanguageModel | TaskModel):
        return model
    if getattr(model, "config", None) is None:
        raise TypeError(f"{model!r} is a {type(model).__name__}; give a model, as transformers' from_pretrained returns it.")
    from transformers.models.auto import modeling_auto as auto

    model = uncompiled(model)
    name, config = type(model).__name__, model.config
    names = {kind.__name__ for kind in type(base_model(model)).__mro__}
    if names.intersection(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values()):
        return TaskModel(model, "question_answering")
    if not names.intersection(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()):
        return LanguageModel(model)
    if config.problem_type == "multi_label_classification":
        raise ValueError(f"{name} has problem_type multi_label_classification, whose labels exclude nothing; no method here is for it.")
    return TaskModel(model, "regression" if config.num_labels == 1 else "classification")


def batch_of(inputs: Mapping[str, Tensor], student: LanguageModel | TaskModel) -> TextBatch | TaskBatch:
    """A collated dict as `student` reads it. Without labels they are -100, or -1 for tasks.

    Args:
        inputs: `input_ids` (B, S), or for choices (B, C, S), perhaps `attention_mask` and `token_type_ids` of the same shape, and
            labels: of text (B, S), of tasks (B,) or `start_positions` and `end_positions` (B,).
        student: the model that reads it.

    Raises:
        ValueError: It holds what would be left out, such as position_ids of rows that are packed into one.
    """
    unknown = sorted(inputs.keys() - set(COLUMNS))
    if unknown:
        raise ValueError(f"The collator gives {', '.join(unknown)}, of which fastkd makes nothing; let it give {', '.join(COLUMNS)}.")
    ids, mask, types = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("token_type_ids")
    mask = torch.ones_like(ids) if mask is None else mask
    if isinstance(student, TaskModel):
        choices = ids.shape[1] if ids.dim() == 3 else 1
        types = None if types is None else types.flatten(0, -2)
        return TaskBatch(ids.flatten(0, -2), mask.flatten(0, -2), types, _task_labels(inputs, len(ids)), choices)
    if types is not None and types.any():
        raise ValueError("The collator gives token_type_ids other than 0, and word prediction reads none; leave them out.")
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else shifted(labels) if student.causal else labels
    return TextBatch(ids, mask, labels)


def labels_of(inputs: Any) -> Any:
    """The labels as the collator gives them; of questions a pair. None where there are none."""
    if not isinstance(inputs, Mapping):
        return inputs.labels
    return tuple(inputs[name] for name in _ANSWERS) if _ANSWERS[0] in inputs else inputs.get("labels")


def _task_labels(inputs: Mapping[str, Tensor], examples: int) -> Tensor:
    labels = labels_of(inputs)
    if labels is None:
        return torch.full((examples,), -1, device=inputs["input_ids"].device)
    return torch.stack(labels, 1) if isinstance(labels, tuple) else labels
