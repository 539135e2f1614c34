"""The task-aware filters of TED (arXiv:2210.01351) and the heads by which its first stage trains them.

A filter is a small map of a layer's hidden state, one a chosen layer. Filters stand beside a model and never inside it: whoever
captures the state gives it to them, and a saved model knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..tasks.text import IGNORE_INDEX
from ..vocab.storage import load_record, save_record
from .language_model import LanguageModel
from .load import is_decoder
from .task_model import TaskModel
from .teacher_cache import CachedTeacher

T = TypeVar("T", bound=nn.Module)
_KIND = "filters"
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_DROPOUTS = ("cls_dropout", "classifier_dropout", "hidden_dropout_prob", "resid_pdrop")


@dataclass(frozen=True)
class FilterShape:
    """What a bank of filters belongs to and what it is made of."""

    layers: tuple[int, ...]
    """The model's layers, from 1, each with a filter of its own."""
    width: int
    """d, of the model's hidden states."""
    filter_width: int
    """d_f, of the filtered states."""
    nonlinear: bool = False
    """Linear(d, d) and an activation before the last Linear(d, d_f)."""
    activation: str = "gelu"
    """By transformers' name; of nonlinear filters alone."""


class FilterBank(nn.Module):
    """K filters: k is a position in `shape.layers`. Its numbers are those of no model until they are drawn or loaded."""

    def __init__(self, shape: FilterShape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.shape = shape
        self.first = nn.ModuleList()
        self.last = nn.ModuleList()
        for _ in shape.layers:
            inner = [empty_linear(shape.width, shape.width, dtype), ACT2FN[shape.activation]] if shape.nonlinear else []
            self.first.append(nn.Sequential(*inner))
            self.last.append(empty_linear(shape.width, shape.filter_width, dtype))

    @classmethod
    def of(
        cls,
        model: TaskModel | LanguageModel,
        layers: Sequence[int],
        generator: torch.Generator,
        *,
        filter_width: int | None = None,
        nonlinear: bool = False,
    ) -> FilterBank:
        """New filters for layers of `model`, where its parameters are and in their dtype.

        Args:
            model: whose hidden states (..., d) they take.
            layers: from 1; each gets a filter of its own.
            generator: weights are N(0, initializer_range) from it, biases zero.
            filter_width: d_f; None: d.
            nonlinear: Linear(d, d) and the model's activation before the last Linear.
        """
        config, width = _config(model), hidden_width(model)
        shape = FilterShape(tuple(layers), width, filter_width or width, nonlinear, _setting(config, *_ACTIVATIONS, default="gelu"))
        return _drawn(cls(shape), config, generator).to(model.device, model.model.dtype)

    def features(self, k: int, states: Tensor) -> Tensor:
        """(..., d) `states` -> (..., d): what enters the last Linear of filter k. It is the state itself in a linear filter."""
        features: Tensor = self.first[k](states)
        return features

    def last_linear(self, k: int) -> nn.Linear:
        """(d_f, d) weight and bias of filter k's last Linear, for ops that take it together with what follows."""
        linear = self.last[k]
        assert isinstance(linear, nn.Linear)
        return linear

    def filtered(self, k: int, states: Tensor) -> Tensor:
        """(..., d) states -> (..., d_f)."""
        filtered: Tensor = self.last_linear(k)(self.features(k, states))
        return filtered

    def save(self, folder: str | Path) -> None:
        """Write filters.json and a safetensors file, so that a kill leaves what `folder` held before or all of the new."""
        save_record(folder, _KIND, self.state_dict(), asdict(self.shape))

    @classmethod
    def load(cls, folder: str | Path, *, layers: Sequence[int] | None = None, width: int | None = None) -> FilterBank:
        """The filters in `folder`, on the CPU in the dtype they were saved with.

        Args:
            folder: where `save` put them.
            layers: of the model, if they are to be those the filters were made for.
            width: of the model's states, if it is to be that of the filters.

        Raises:
            FileNotFoundError: there are none.
            ValueError: a file that was changed, or other `layers` or another `width`.
        """
        tensors, metadata = load_record(folder, _KIND)
        shape = FilterShape(**{**metadata, "layers": tuple(metadata["layers"])})
        for name, found, wanted in (
            ("layers", list(shape.layers), None if layers is None else list(layers)),
            ("width", shape.width, width),
        ):
            if wanted is not None and found != wanted:
                raise ValueError(
                    f"The filters in {folder} are for {name} {found}, and {name} {wanted} is needed: they belong to another model or "
                    "layer map. Train them again, or give the folder of those that belong here."
                )
        bank = cls(shape, next(iter(tensors.values())).dtype)
        bank.load_state_dict(tensors)
        return bank


class FilterHeads(nn.ModuleList):
    """A head of its own for every filter, by which the filter is trained to keep what the task needs.

    Question answering: Linear(d_f, 2) on every token. Other tasks: a `SequenceHead` on one token. Language models, which is our
    extension: Linear(d_f, d) to what the model's own output embedding takes, so that a head has d_f * d weights and not V * d_f.
    """

    def __init__(self, model: TaskModel | LanguageModel, shape: FilterShape, generator: torch.Generator) -> None:
        """Drawn from `generator` as the filters are, and put where the model's parameters are."""
        super().__init__(_head(model, shape.filter_width) for _ in shape.layers)
        self.kind = model.kind if isinstance(model, TaskModel) else None
        self.last_token = reads_last_token(model)
        _drawn(self, _config(model), generator).to(model.device, model.model.dtype)

    def positions(self, batch: Any) -> Tensor | None:
        """Which of a batch's R * S positions the heads read. Filters work on single tokens: the others need none.

        Text: tokens with a label. Questions: all. Other tasks: the first token of every row, or a decoder's last.

        Args:
            batch: attention_mask (R, S); of text also labels (R, S).

        Returns:
            (n,) int64 positions of the flattened batch; None for all.
        """
        if self.kind is None:
            labels: Tensor = batch.token_labels
            return (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        if self.kind == "question_answering":
            return None
        mask: Tensor = batch.attention_mask
        first = torch.arange(len(mask), device=mask.device) * mask.shape[1]
        return first + mask.sum(-1) - 1 if self.last_token else first

    def scores(self, k: int, filtered: Tensor, num_choices: int = 1) -> Tensor:
        """What head k says of filtered states.

        Args:
            k: position in `shape.layers`.
            filtered: (n, d_f) at `positions`; of questions (B, S, d_f).
            num_choices: of a multiple choice, whose candidates are rows.

        Returns:
            Scores in the shape of `TaskModel`'s; of text (n, d), which enters the model's own head.
        """
        output: Tensor = self[k](filtered)
        if self.kind == "question_answering":
            return output.mT
        if self.kind == "regression":
            return output.squeeze(-1)
        return output.view(-1, num_choices) if self.kind == "multiple_choice" else output


class SequenceHead(nn.Module):
    """(R, d_f) filtered token -> (R, C) scores: dropout, dense, activation, dropout, Linear, as DeBERTa's pooler and classifier."""

    def __init__(self, filter_width: int, num_outputs: int, config: Any) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.pooler_dropout = nn.Dropout(_setting(config, "pooler_dropout", *_DROPOUTS, default=0.0))
        self.dense = empty_linear(filter_width, filter_width)
        self.activation = ACT2FN[_setting(config, "pooler_hidden_act", *_ACTIVATIONS, default="gelu")]
        self.dropout = nn.Dropout(_setting(config, "cls_dropout", *_DROPOUTS, default=0.0))
        self.classifier = empty_linear(filter_width, num_outputs)

    def forward(self, token: Tensor) -> Tensor:
        """(R, d_f) -> (R, C)."""
        scores: Tensor = self.classifier(self.dropout(self.activation(self.dense(self.pooler_dropout(token)))))
        return scores


def _head(model: TaskModel | LanguageModel, filter_width: int) -> nn.Module:
    if isinstance(model, LanguageModel):
        return empty_linear(filter_width, model.head.in_features)
    if model.kind == "question_answering":
        return empty_linear(filter_width, 2)
    return SequenceHead(filter_width, model.model.config.num_labels, _config(model))


def reads_last_token(model: TaskModel | LanguageModel) -> bool:
    """Whether a row is summed up by its last token, as in a decoder, and not by its first."""
    return model.causal if isinstance(model, LanguageModel) else is_decoder(model.model.config)


def hidden_width(model: TaskModel | LanguageModel | CachedTeacher) -> int:
    """d, the width of the model's hidden states."""
    width: int = _config(model).hidden_size
    return width


def _config(model: TaskModel | LanguageModel | CachedTeacher) -> Any:
    return model.model.config.get_text_config()


def _setting(config: Any, *names: str, default: Any) -> Any:
    """The first of `names` that the configuration has and sets."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def empty_linear(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Weight (outputs, inputs) and bias (outputs,) on the CPU, not initialised, so that the global generator is not asked."""
    return nn.Linear(inputs, outputs, device="meta", dtype=dtype).to_empty(device="cpu")


def _drawn(module: T, config: Any, generator: torch.Generator) -> T:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=_setting(config, "initializer_range", default=0.02), generator=generator)
            nn.init.zeros_(part.bias)
    return module
