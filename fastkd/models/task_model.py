"""A transformers model with the head of one labelled task, over the teacher's ids whatever vocabulary it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..tasks.labelled import Kind
from ..vocab.map import VocabMap
from .load import VOCAB_MAP_FOLDER, load_config, loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TaskHead:
    """What a model's head says of a task: `num_outputs` scores a row; regression and multiple choice have one."""

    kind: Kind
    num_outputs: int
    label_names: tuple[str, ...] = ()


class TaskModel(nn.Module):
    """A batch of a task -> its scores: what they are depends on the kind.

    classification (B, C), regression (B,), multiple_choice (B, C), one score a choice, and question_answering (B, 2, S): logits of the
    answer's first and last token. Ids become slots on the way in if there is a vocabulary map.
    """

    __call__: Callable[..., Tensor]  # nn.Module's own says nothing of what it returns
    model: Any
    id_to_slot: Tensor

    def __init__(self, model: PreTrainedModel, kind: Kind = "classification", vocab_map: VocabMap | None = None) -> None:
        super().__init__()
        self.model, self.kind, self.vocab_map = model, kind, vocab_map
        if vocab_map is not None:
            self.register_buffer("id_to_slot", vocab_map.id_to_slot, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        parameter: Tensor = next(self.model.parameters())
        return parameter.device

    def forward(self, batch: Any) -> Tensor:
        """Scores of a batch, in the model's dtype: for C classes (B, C), for regression (B,), for C choices, each of them a row, (B,
        C), for questions (B, 2, S).

        Args:
            batch: input_ids (R, S) int64, attention_mask (R, S), perhaps token_type_ids (R, S), and num_choices for choices.
        """
        ids = batch.input_ids if self.vocab_map is None else self.id_to_slot[batch.input_ids]
        token_types = getattr(batch, "token_type_ids", None)
        options = {} if token_types is None else {"token_type_ids": token_types}
        output = self.model(input_ids=ids, attention_mask=batch.attention_mask, **options)
        if self.kind == "question_answering":
            return torch.stack([output.start_logits, output.end_logits], 1)
        logits: Tensor = output.logits
        if self.kind == "classification":
            return logits
        scores = logits.squeeze(-1)
        return scores if self.kind == "regression" else scores.view(-1, batch.num_choices)


def load_task_model(
    name_or_path: str,
    head: TaskHead,
    *,
    seed: int,
    pad_id: int | None = None,
    needs_head: bool = False,
    dropout: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> TaskModel:
    """The task model at `name_or_path`, or a new head (drawn from `seed`) on the backbone found there.

    Args:
        name_or_path: a folder or a hub name.
        head: the task's kind, outputs and label names.
        seed: of a new head; the global generator is left as it was.
        pad_id: what rows are padded with, by which decoders find a row's last token.
        needs_head: refuse a model whose head would be new, or is that of another task.
        dropout: probabilities that it is to have, by their names in the configuration.
        dtype: of the weights.

    Raises:
        ValueError: a folder without a model, an unknown dropout, or with needs_head no trained head for this task.
    """
    config = load_config(name_or_path, dropout)
    if needs_head:
        _check_labels(name_or_path, config, head)
    with torch.random.fork_rng(devices=[]), loading("model", name_or_path):
        torch.manual_seed(seed)
        model, found = _auto_class(head).from_pretrained(
            name_or_path,
            config=_with_head(config, head, pad_id),
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=not needs_head,
            output_loading_info=True,
        )
    missing = ", ".join(sorted(found["missing_keys"]))
    if needs_head and missing:
        raise ValueError(
            f"The model {name_or_path} has no trained head for {head.kind} (missing are {missing}), "
            "and its scores are asked for. Fine-tune it first: by a stage that trains the teacher, or by method finetune."
        )
    folder = Path(name_or_path) / VOCAB_MAP_FOLDER
    return TaskModel(model, head.kind, VocabMap.load(folder) if folder.is_dir() else None)


def build_task_model(config: PreTrainedConfig, head: TaskHead, *, seed: int, pad_id: int | None = None) -> TaskModel:
    """A task model with random weights, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TaskModel(_auto_class(head).from_config(_with_head(config, head, pad_id), dtype=torch.float32), head.kind)


def _auto_class(head: TaskHead) -> Any:
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    return AutoModelForQuestionAnswering if head.kind == "question_answering" else AutoModelForSequenceClassification


def _with_head(config: Any, head: TaskHead, pad_id: int | None) -> Any:
    if head.kind != "question_answering":
        config.num_labels = head.num_outputs
    if head.label_names:
        config.id2label = dict(enumerate(head.label_names))
        config.label2id = {name: index for index, name in enumerate(head.label_names)}
    if pad_id is not None:
        config.pad_token_id = pad_id
    return config


def _check_labels(name: str, config: Any, head: TaskHead) -> None:
    """Refuse a model whose classes are not the task's, in their number, names or order."""
    if head.kind == "question_answering":
        return
    given = [config.id2label[index] for index in sorted(config.id2label)]
    if len(given) != head.num_outputs:
        raise ValueError(f"The model {name} has {len(given)} outputs and the task {head.num_outputs}; fine-tune it on this task.")
    unnamed = all(str(label).startswith("LABEL_") for label in given)
    if head.label_names and not unnamed and given != list(head.label_names):
        raise ValueError(
            f"The model {name} has the classes {', '.join(given)} and the task {', '.join(head.label_names)}, in this order; their "
            "scores cannot be compared. Fine-tune it on this task."
        )
