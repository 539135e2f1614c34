"""A transformers model with the head of one labelled task, over the teacher's ids whatever vocabulary it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..tasks.labelled import Kind
from ..vocab.map import VocabMap
from .load import has_relu_head, load_config, load_map, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
"""By which plain transformers knows that a score is a value as it stands, and not a sigmoid's argument."""


@dataclass(frozen=True)
class TaskHead:
    """What a model's head says of a task: `num_outputs` scores a row; regression and multiple choice have one."""

    kind: Kind
    num_outputs: int
    label_names: tuple[str, ...] = ()
    own_classes: bool = False
    """Whether the classes' order is known here alone, so that a model has to name its own; that of a benchmark is known to all."""
    relu: bool = False
    """Linear(ReLU(pooled)) without dropout, on BERT alone; see `BertWithReLUHead`."""


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _with_head(config, head, pad_id)
        model = load_weights(_model_class(head, config), name_or_path, config, dtype, head=head.kind, new_head=not needs_head)
    return TaskModel(model, head.kind, load_map(name_or_path))


def build_task_model(config: PreTrainedConfig, head: TaskHead, *, seed: int, pad_id: int | None = None) -> TaskModel:
    """A task model with random weights, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TaskModel(_model_class(head, config).from_config(_with_head(config, head, pad_id), dtype=torch.float32), head.kind)


def _model_class(head: TaskHead, config: Any) -> Any:
    """One of transformers' Auto classes, or ours where the head, or the one that the model was saved with, has a ReLU."""
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    if head.relu and (head.kind == "question_answering" or config.model_type != "bert"):
        raise ValueError(
            f"relu_head is the head of a BERT that scores rows, and this is a {config.model_type} for {head.kind}; set it to false."
        )
    if head.kind == "question_answering":
        return AutoModelForQuestionAnswering
    if head.relu or has_relu_head(config):
        from .relu_head import BertWithReLUHead

        return BertWithReLUHead
    return AutoModelForSequenceClassification


def _with_head(config: Any, head: TaskHead, pad_id: int | None) -> Any:
    if head.kind != "question_answering":
        config.num_labels = head.num_outputs
    if head.kind != "classification" or head.num_outputs > 1:  # a finished model's one output may be a value or a choice's score
        config.problem_type = _PROBLEMS.get(head.kind)
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
    if head.own_classes and unnamed and [*head.label_names] != [str(index) for index in range(len(given))]:
        raise ValueError(
            f"The model {name} does not name its {len(given)} classes, so which of them is {head.label_names[0]} is not known; write "
            "id2label and label2id into its config.json, or fine-tune it on these rows."
        )
