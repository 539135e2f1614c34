"""The methods by name: their options, their stages, and how a stage is put together from what the driver has loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..models.classifier import Classifier
from ..models.language_model import LanguageModel
from ..tasks.cloze import Example, collate, label_word_ids
from ..tasks.cloze_task import ClozeTask
from ..tasks.metrics import accuracy, f1_macro
from ..tasks.text import Masking, collate_text
from ..tasks.tokenized import TokenRows
from .glmd import GLMDOptions, TaskScores, WordPrediction
from .kd import KDOptions, KnowledgeDistillation
from .language_modeling import LanguageModeling, LanguageModelingOptions
from .objective import Batch, Objective, Stage
from .perplexity import perplexity

Model = LanguageModel | Classifier


@dataclass(frozen=True)
class StageSpec:
    """What a stage of a method needs and what becomes of its result."""

    name: str
    data: Literal["text", "task"]
    needs_teacher: bool = True
    evaluate_first: bool = False
    keep: Literal["best", "last"] = "best"

    def wants_classifier(self, task: ClozeTask | None) -> bool:
        """Whether student and teacher are sequence classifiers in this stage."""
        return self.name == "task_scores" and task is not None and task.kind == "classification"

    def check_task(self, task: ClozeTask) -> None:
        if self.name == "task_words" and task.kind == "classification":
            raise ValueError(
                "Stage task_words compares words and is judged by cloze scores, which kind 'classification' has not. Use kind "
                "'verbalizer' or 'choices', or leave task_words out and go from pretrain to task_scores."
            )


@dataclass(frozen=True)
class Method:
    options: type
    stages: tuple[StageSpec, ...]


METHODS: dict[str, Method] = {
    "glmd": Method(
        GLMDOptions,
        (
            StageSpec("pretrain", "text", keep="last"),
            StageSpec("task_words", "task"),
            StageSpec("task_scores", "task", evaluate_first=True),
        ),
    ),
    "kd": Method(KDOptions, (StageSpec("distill", "text", keep="last"),)),
    "lm": Method(LanguageModelingOptions, (StageSpec("train", "text", needs_teacher=False, keep="last"),)),
}


@dataclass(frozen=True)
class StageInputs:
    """What the driver has loaded for one stage. Rows are `TokenRows` for text, encoded examples for a task."""

    student: Model
    teacher: Model | None
    tokenizer: Any
    options: Any
    rows: TokenRows | Sequence[Example]
    eval_rows: TokenRows | Sequence[Example] | None
    task: ClozeTask | None
    eval_batch_size: int


def build_stage(method: str, spec: StageSpec, inputs: StageInputs) -> Stage:
    """Put the stage together; what cannot work is refused here, before the first step."""
    _check_kinds(inputs)
    objective = _objective(method, spec, inputs)
    if spec.data == "text":
        make_batch, lengths, evaluate = _text(inputs, objective)
        metric, higher = "perplexity", False
    else:
        make_batch, lengths, evaluate = _task(inputs, objective)
        metric, higher = "accuracy", True
    return Stage(
        name=spec.name,
        objective=objective,
        lengths=lengths,
        make_batch=make_batch,
        evaluate=evaluate,
        metric=metric,
        higher_is_better=higher,
        evaluate_first=spec.evaluate_first,
        keep=spec.keep,
    )


def _objective(method: str, spec: StageSpec, inputs: StageInputs) -> Objective:
    student, teacher, options = inputs.student, inputs.teacher, inputs.options
    if spec.name == "task_scores":
        assert teacher is not None and inputs.task is not None
        words = label_word_ids(inputs.task, inputs.tokenizer) if inputs.task.kind == "verbalizer" else None
        return TaskScores(student, teacher, options, inputs.task, None if words is None else torch.tensor(words))
    assert isinstance(student, LanguageModel)
    if method == "lm":
        return LanguageModeling(student)
    assert isinstance(teacher, LanguageModel)
    if method == "kd":
        return KnowledgeDistillation(student, teacher, options, len(inputs.tokenizer))
    return WordPrediction(student, teacher, options)


_Parts = tuple[Callable[[Sequence[int], torch.Generator], Batch], np.ndarray, Callable[[Callable[[], None]], dict[str, float]] | None]


def _text(inputs: StageInputs, objective: Objective) -> _Parts:
    rows, eval_rows, student = inputs.rows, inputs.eval_rows, inputs.student
    assert isinstance(rows, TokenRows) and isinstance(student, LanguageModel)
    pad_id = _pad_id(inputs.tokenizer)
    probability = inputs.options.mask_probability
    masking = None if student.causal else Masking.of(inputs.tokenizer, probability)
    # Perplexity needs masked positions even where the training inputs are not masked.
    eval_masking = None if student.causal else Masking.of(inputs.tokenizer, probability or 0.15)

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> Batch:
        return collate_text([rows[int(i)] for i in indices], pad_id=pad_id, masking=masking, generator=generator)

    def evaluate(poll: Callable[[], None]) -> dict[str, float]:
        assert isinstance(eval_rows, TokenRows)
        size = inputs.eval_batch_size
        batches = (
            collate_text(
                [eval_rows[i] for i in range(start, min(start + size, len(eval_rows)))],
                pad_id=pad_id,
                masking=eval_masking,
                generator=torch.Generator().manual_seed(start),
            )
            for start in range(0, len(eval_rows), size)
        )
        slot_bias = objective.slot_bias() if isinstance(objective, KnowledgeDistillation) else None
        return {"perplexity": perplexity(student, batches, slot_bias=slot_bias, poll=poll)}

    return make_batch, rows.lengths, None if eval_rows is None else evaluate


def _task(inputs: StageInputs, objective: Objective) -> _Parts:
    task, rows, eval_rows = inputs.task, inputs.rows, inputs.eval_rows
    assert task is not None and not isinstance(rows, TokenRows) and eval_rows is not None and not isinstance(eval_rows, TokenRows)
    pad_id = _pad_id(inputs.tokenizer)
    if isinstance(objective, TaskScores):
        scorer = objective
    else:
        # Word prediction is judged by the student's own task scores; the teacher's part of the scorer is never asked.
        words = label_word_ids(task, inputs.tokenizer) if task.kind == "verbalizer" else None
        assert inputs.teacher is not None
        scorer = TaskScores(inputs.student, inputs.teacher, inputs.options, task, None if words is None else torch.tensor(words))

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> Batch:
        return collate([rows[int(i)] for i in indices], pad_id=pad_id)

    def evaluate(poll: Callable[[], None]) -> dict[str, float]:
        training = inputs.student.training
        inputs.student.eval()
        predictions: list[int] = []
        for start in range(0, len(eval_rows), inputs.eval_batch_size):
            poll()
            batch = collate(eval_rows[start : start + inputs.eval_batch_size], pad_id=pad_id)
            predictions += scorer.predict(batch.to(inputs.student.device)).tolist()
        inputs.student.train(training)
        labels = [example.label for example in eval_rows]
        scores = {"accuracy": accuracy(predictions, labels)}
        if task.num_labels:
            scores["f1_macro"] = f1_macro(predictions, labels)
        return scores

    lengths = np.array([max(len(sequence) for sequence in example.sequences) for example in rows])
    return make_batch, lengths, evaluate


def _check_kinds(inputs: StageInputs) -> None:
    student, teacher = inputs.student, inputs.teacher
    if isinstance(student, LanguageModel) and isinstance(teacher, LanguageModel) and student.causal != teacher.causal:
        kinds = {True: "a decoder", False: "an encoder"}
        raise ValueError(f"The teacher is {kinds[teacher.causal]} and the student {kinds[student.causal]}; both must be of one kind.")


def _pad_id(tokenizer: Any) -> int:
    """Decoders often have no pad token; any id serves there, because padded positions are masked everywhere."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0
