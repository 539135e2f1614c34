"""`KDTrainer`: fastkd under transformers' Trainer, with its arguments, callbacks, launchers and checkpoints.

`KDTrainer` is Trainer with an objective for its loss; `patch_head` is for those who keep Trainer, or a loop of their own, as it is.
What Trainer promises holds, and no more: `fastkd train` has the checkpoints that are never half, and resumes bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..methods.objective import Objective, Position
from ..methods.teaching import Model
from ..models.behaviour import forward_arguments
from ..models.language_model import LanguageModel
from ..models.load import save_vocabulary
from ..ops.backends import prefer_backend
from ..train.batches import counter_torch_generator
from ..train.loop import NonFiniteError
from ..train.parallel import StudentSide
from .hf_head import patch_head, unpatch_head
from .hf_models import COLUMNS, batch_of, labels_of
from .hf_objectives import check_vocabularies, make_objective, reads_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KDTrainer", "patch_head", "unpatch_head"]

AUXILIARY_FILE = "auxiliary.safetensors"
_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""Columns that other trainers make labels of."""
_STUDENT = "objective.student.model."  # what the names of the student's tensors begin with in the wrapped module


class KDTrainer(Trainer):
    """Trainer whose loss is an objective's, over whole optimizer steps: sums over the micro-batches, divided by the step's own count.

    The count is the objective's `weight` (tokens, or examples), summed over the micro-batches and, with average_tokens_across_devices,
    over the ranks: gradients do not depend on how a step is split. A step whose gradient is not finite stops the run before the weights
    are touched, but in fp16, where the scaler leaves it out.

    Collators give what transformers' do, input_ids with attention_mask and labels (which a decoder's loss shifts), or batches of
    fastkd. `eval_loss` is Trainer's: the mean over batches of each one's loss, by its own count. Predictions are the student's logits.
    A saved model is the student alone, as plain from_pretrained opens it, or with a vocabulary map as fastkd alone does; what an
    objective trains beside it is in checkpoints only.
    """

    objective: Objective

    def __init__(
        self,
        model: Objective | PreTrainedModel | Model,
        args: TrainingArguments,
        *,
        teacher: PreTrainedModel | Model | str | os.PathLike[str] | None = None,
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
        backend: str = "auto",
        **trainer: Any,
    ) -> None:
        """What Trainer is given, and what is learned.

        Args:
            model: the student, or an objective, which has its student and teacher.
            args: Trainer's own.
            teacher: a model for the same task, or a folder or hub name from which it is loaded in float32; it is frozen.
            method: `kd`, `glmd` (word prediction) or `lm` on text, `crild` (logit distillation) or `finetune` on labelled tasks.
            options: the method's, by name. `completion_only` of `kd` is True for a decoder unless it is given: as in TRL's trainers, a
                token without a label is in no term of the loss.
            backend: kernels of the losses in this process: "auto", or "torch", "cpp", "triton" or "cuda".
            trainer: whatever else Trainer takes, by name.

        Raises:
            ValueError, TypeError: arguments that would be left out, or models that the method is not for.
        """
        _check_arguments(args, trainer)
        prefer_backend(backend, args.device)
        if isinstance(model, Objective):
            if teacher is not None or method is not None or options is not None:
                raise ValueError("model is an objective, which has its teacher and options; leave out teacher, method and options.")
            self.objective = model
        else:
            self.objective = make_objective(model, teacher, method, options or {}, args.device)
        tokenizer = trainer.get("processing_class") or getattr(trainer.get("data_collator"), "tokenizer", None)
        _check_objective(self.objective, args.device, getattr(tokenizer, "tokenizer", tokenizer))
        super().__init__(TrainedSide(self.objective), args, **trainer)
        self.add_callback(_EndStep(self))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step as the objective reads them, and the step's denominator."""
        args, state = self.args, self.state
        first = state.global_step * args.gradient_accumulation_steps
        batches = []
        for number, inputs in enumerate(itertools.islice(epoch_iterator, num_batches), start=first):
            generator = counter_torch_generator(args.seed, number * args.world_size + args.process_index)
            batches.append(self.objective.prepare(self._batch(inputs), generator))
        if not batches:
            return batches, None
        weight = sum(self.objective.weight(batch) for batch in batches)
        if self._sums_over_ranks:
            total = self.accelerator.reduce(torch.as_tensor(weight, dtype=torch.float64, device=device), "sum").cpu().numpy()
            weight = total if isinstance(weight, np.ndarray) else float(total)
        self.objective.begin_step(Position(state.global_step, state.max_steps, int(state.epoch or 0), state.num_train_epochs))
        return batches, _denominator(weight)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """One micro-batch's part of its step's loss. num_items_in_batch: the step's denominator, as `get_batch_samples` gives it."""
        loss = model(self.objective, inputs, num_items_in_batch)
        if self._sums_over_ranks:
            loss = loss * self.accelerator.num_processes  # by which the mean over ranks divides
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, logits, labels) of one batch, in one forward of the wrapped module; no loss without the labels that it needs."""
        labels = labels_of(inputs)
        judged = labels is not None or not reads_labels(self.objective)
        plain = self._batch(inputs, judged=False).to(self.args.device)

        def judge() -> tuple[Tensor | None, Any]:
            loss = None
            if judged:
                batch = self.objective.prepare(plain, counter_torch_generator(self.args.seed))
                loss = self.objective(batch, _denominator(self.objective.weight(batch))).detach()
            return loss, None if prediction_loss_only else _predictions(self.objective.student, plain)

        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = model(judge)
        return loss, logits, None if prediction_loss_only else labels

    @property
    def _sums_over_ranks(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1

    def _batch(self, inputs: Any, *, judged: bool = True) -> Any:
        """What the collator gives as a batch of fastkd. judged: refuse one without the labels that the loss reads."""
        if not isinstance(inputs, Mapping):
            return inputs
        if judged and labels_of(inputs) is None and reads_labels(self.objective):
            raise ValueError(
                f"The collator gives no labels, which {type(self.objective).__name__} reads; add them to the rows. Method kd needs "
                "none with options={'label_weight': 0.0, 'completion_only': False}."
            )
        return batch_of(inputs, self.objective.student)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens({"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask})

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer's estimate knows of no teacher."""
        return 0

    def _set_signature_columns_if_needed(self) -> None:
        # The last two are what collators make `labels` of.
        self._signature_columns: Any = [*COLUMNS, "label", "label_ids"]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if self.args.remove_unused_columns:
            _check_columns(dataset.column_names, self._read_by_the_student())
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        collate = super()._get_collator_with_removed_columns(data_collator, description)
        if not self.args.remove_unused_columns:
            return collate
        return functools.partial(_collate_checked, collate, self._read_by_the_student())

    def _read_by_the_student(self) -> set[str]:
        return forward_arguments(self.objective.student.model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer would apply a NaN and log a loss of 0."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self.accelerator.scaler is None and not math.isfinite(value):
            raise NonFiniteError(
                f"Step {self.state.global_step + 1} has gradient norm {value}; the weights were not updated. Look at its rows, or "
                f"lower learning_rate (now {self.args.learning_rate})."
            )
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the student alone. state_dict: of the wrapped module, from FSDP."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if state_dict is not None:
            state_dict = {name.removeprefix(_STUDENT): tensor for name, tensor in state_dict.items() if name.startswith(_STUDENT)}
        _save_student(self.objective.student, folder, state_dict=state_dict)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The student's weights; FSDP's checkpoints hold the wrapped module."""
        super()._load_from_checkpoint(resume_from_checkpoint, model if self.is_fsdp_enabled else self.objective.student.model)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        auxiliary = nn.ModuleDict(self.objective.auxiliary())
        if auxiliary and self.args.should_save and not self.is_fsdp_enabled:
            safetensors.torch.save_model(auxiliary, str(Path(output_dir) / AUXILIARY_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        auxiliary = nn.ModuleDict(self.objective.auxiliary())
        if auxiliary and checkpoint is not None and not self.is_fsdp_enabled:
            safetensors.torch.load_model(auxiliary, Path(checkpoint) / AUXILIARY_FILE, device=str(self.args.device))


class TrainedSide(StudentSide):
    """The module that accelerate wraps, and that callbacks are given: what it has not itself is the student's transformers model's."""

    objective: Objective
    accepts_loss_kwargs = True  # the loss is divided by the count of its step, so Trainer does not divide it again

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "objective":  # a copy that has nothing yet
                raise
            return getattr(self.objective.student.model, name)

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Tensor:
        """`transformers` generation of a language model, with the ids of the rows in and out, also on a kept vocabulary.

        Args:
            inputs: (B, S) int64 ids; or by name, as input_ids.
            options: of transformers' `generate`.

        Returns:
            (B, S + new) int64.
        """
        ids = options.pop("input_ids", inputs)
        generated: Tensor = self.objective.student.generate(ids, **options)
        return generated

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the student alone, as `KDTrainer.save_model` does, without a tokenizer. options: of transformers' `save_pretrained`."""
        _save_student(self.objective.student, Path(save_directory), **options)


class _EndStep(TrainerCallback):
    """Tells the objective that an optimizer step is done."""

    def __init__(self, trainer: KDTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.objective.end_step()


def _check_arguments(args: TrainingArguments, trainer: Mapping[str, Any]) -> None:
    """Refuse what would be left out, or would work on another loss."""
    for name in ("compute_loss_func", "model_init"):
        if trainer.get(name) is not None:
            raise ValueError(f"{name} is set, and KDTrainer has the objective's loss and student; leave it out.")
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor} is no part of any objective; set it to 0.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, and nn.DataParallel cannot run an objective. Start one process a GPU with "
            "`torchrun --nproc-per-node`, or show it one by CUDA_VISIBLE_DEVICES."
        )


def _check_objective(objective: Objective, device: torch.device, tokenizer: Any) -> None:
    student, teacher = objective.student, getattr(objective, "teacher", None)
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(f"{type(objective).__name__} trains no weight of its student, and KDTrainer saves the student alone.")
    if isinstance(student, LanguageModel):
        student.check_own_loss()
    if teacher is None:
        return
    if torch.empty(0, device=device).device != teacher.device:  # cpu:0 is cpu
        raise ValueError(
            f"The objective's teacher is on {teacher.device} and training on {device}; move it there before the objective is made."
        )
    check_vocabularies(student, teacher, tokenizer)


def _check_columns(names: Iterable[str], read: set[str]) -> None:
    """Refuse (ValueError) rows with a column that would change what the student sees or learns. read: what its forward takes."""
    lost = sorted((read.union(_MASKS) - set(COLUMNS)).intersection(names))
    if lost:
        raise ValueError(
            f"The rows have {', '.join(lost)}, of which fastkd makes nothing. Remove the column, or set remove_unused_columns=False if "
            "the collator reads it; give packed rows one by one, and a mask of what is learned as labels of -100."
        )


def _collate_checked(collate: Callable[[Any], Any], read: set[str], rows: Sequence[Any]) -> Any:
    if rows and isinstance(rows[0], Mapping):
        _check_columns(rows[0], read)
    return collate(rows)


def _save_student(student: Model, folder: Path, **options: Any) -> None:
    student.model.save_pretrained(folder, **options)
    save_vocabulary(student, folder)


def _denominator(weight: Any) -> Any:
    """Where nothing counts all sums are zero, whatever they are divided by."""
    sums = [float(value) or 1.0 for value in np.atleast_1d(weight)]
    return np.array(sums) if isinstance(weight, np.ndarray) else sums[0]


def _predictions(student: Model, batch: Any) -> Any:
    """The logits; of questions a pair, as transformers' models give them."""
    if isinstance(student, LanguageModel):
        return student(batch.input_ids, batch.attention_mask)
    scores = student(batch)
    return scores.unbind(1) if student.kind == "question_answering" else scores
