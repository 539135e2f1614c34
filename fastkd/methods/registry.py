"""The methods by name: their options, their stages, and how a stage is put together from what the driver has loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.cloze_scores import check_candidates
from ..models.language_model import LanguageModel
from ..models.load import known_ids
from ..models.task_model import TaskModel
from ..models.teacher_cache import CachedTeacher
from ..tasks.cloze import label_word_ids
from ..tasks.cloze_task import ClozeTask
from . import crild, ted
from .cached import CachedLesson
from .crild import CRILDOptions, IntermediateLayerDistillation, LogitDistillation
from .finetune import FineTuneOptions, FineTuning
from .glmd import ClozeScores, GLMDOptions, TaskScores, WordPrediction, compared_words
from .kd import KDOptions, KnowledgeDistillation
from .language_modeling import LanguageModeling, LanguageModelingOptions
from .objective import Objective, Stage
from .stage_data import (
    ClozeRows,
    DatasetRows,
    MakeBatch,
    RowGenerator,
    Rows,
    StageData,
    TextRows,
    batch_maker,
    cloze_data,
    dataset_data,
    row_lengths,
    text_data,
    train_fingerprint,
    train_sequences,
)
from .teaching import Lesson, Model, TaughtBatch, task_scores
from .ted import FilterTraining, TaskAwareDistillation, TEDOptions

Data = Literal["text", "task", "dataset"]


@dataclass(frozen=True)
class StageInputs:
    """What the driver has loaded for one stage."""

    student: Model
    """The model that the stage is about: the student, or the teacher while it is made."""
    teacher: Model | CachedTeacher | None
    tokenizer: Any
    options: Any
    rows: Rows
    eval_batch_size: int
    seed: int
    cached: CachedLesson | None = None
    """What the teacher has said of every training row, if it is a cached one."""
    row_generator: RowGenerator | None = None
    """With a cached teacher: what a row's masks are drawn from."""
    filters: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the filters that finished stages have made, by stage."""


@dataclass(frozen=True)
class LessonInputs:
    """What decides a stage's lesson, before any model is loaded."""

    options: Any
    rows: Rows
    tokenizer: Any
    kept: slice | Tensor
    """The teacher's rows behind those of the student's head."""
    num_words: int
    """Ids, from 0 on, that the tokenizer and the teacher have."""
    compared: Any
    """What the stage's `check_models` has returned."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage of a method needs and what becomes of its result."""

    name: str
    data: tuple[Data, ...]
    """Kinds of data, one of which is to be given."""
    build: Callable[[StageInputs], Objective]
    trains: Literal["student", "teacher"] = "student"
    makes: Literal["model", "filters"] = "model"
    needs_teacher: bool = True
    """Whether a frozen teacher stands beside the model that is trained."""
    reads_scores: bool = True
    """Whether the teacher's scores on a labelled task are learned from, and not only its states."""
    needs_labels: bool = True
    """Whether a labelled task's labels are read, and its metrics judge the stage."""
    captures: bool = False
    """Whether states inside the models are read, which a compiled backbone does not show."""
    check_models: Callable[[Any, Any, Any], Any] | None = None
    """(student, teacher, options) -> anything: refuses transformers models, perhaps without weights, that cannot be compared."""
    evaluate_first: bool = False
    keep: Literal["best", "last"] = "best"
    lesson: Callable[[LessonInputs], Lesson] | None = None
    """What is asked of the teacher, where the answers can be cached; refuses options under which they cannot."""
    check_task: Callable[[ClozeTask], None] = lambda task: None
    """Refuses cloze questions from which the stage cannot learn. Kind classification makes sequence classifiers of the models."""
    check_stages: Callable[[Any, Sequence[str]], None] = lambda options, stages: None
    """(options, all stages of the run) -> None: refuses a run without the stages that this one needs."""


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    arxiv: str


@dataclass(frozen=True)
class Method:
    """A method's options and its stages, in their order."""

    title: str
    options: type
    stages: tuple[StageSpec, ...]
    paper: Paper | None = None


def build_stage(spec: StageSpec, inputs: StageInputs) -> Stage:
    """Put the stage together; what cannot work is refused here, before the first step."""
    _check_kinds(inputs)
    objective = spec.build(inputs)
    mask_probability = getattr(inputs.options, "mask_probability", 0.0)
    make_batch = batch_maker(inputs.rows, inputs.student, inputs.tokenizer, mask_probability, inputs.row_generator)
    data = _data(spec, inputs, objective, make_batch, mask_probability)
    return Stage(
        name=spec.name,
        objective=objective,
        lengths=row_lengths(inputs.rows),
        make_batch=data.make_batch if inputs.cached is None else _taught(data.make_batch, inputs.cached, inputs.rows),
        evaluate=data.evaluate,
        metric=data.metric,
        higher_is_better=data.higher_is_better,
        evaluate_first=spec.evaluate_first,
        keep=spec.keep,
        captures=spec.captures,
        fingerprint=train_fingerprint(inputs.rows),
        events=data.events,
    )


def _data(spec: StageSpec, inputs: StageInputs, objective: Objective, make_batch: MakeBatch, mask_probability: float) -> StageData:
    student, rows, size = inputs.student, inputs.rows, inputs.eval_batch_size
    if isinstance(rows, TextRows):
        return text_data(rows, student, inputs.tokenizer, make_batch, mask_probability, size)
    if isinstance(rows, ClozeRows):
        # Word prediction is judged by the student's own task scores; the teacher's part of the scorer is never asked.
        scorer = objective if isinstance(objective, TaskScores) else _task_scores(inputs)
        return cloze_data(rows, student, inputs.tokenizer, make_batch, scorer.predict, size)
    return dataset_data(rows, student, make_batch, size, judged=spec.needs_labels and spec.makes == "model")


def _taught(make_batch: MakeBatch, cached: CachedLesson, rows: Rows) -> MakeBatch:
    """Batches that come with what the teacher has said of them."""
    sequences = train_sequences(rows)

    def make_taught_batch(indices: Sequence[int], generator: torch.Generator) -> TaughtBatch:
        batch = make_batch(indices, generator)
        return TaughtBatch(batch, cached(sequences.behind(indices), batch.input_ids.shape[1]))

    return make_taught_batch


def _word_prediction(inputs: StageInputs) -> Objective:
    assert isinstance(inputs.student, LanguageModel) and isinstance(inputs.teacher, LanguageModel | CachedTeacher)
    return WordPrediction(inputs.student, inputs.teacher, inputs.options, known_ids(inputs.teacher, inputs.tokenizer))


def _task_scores(inputs: StageInputs) -> TaskScores:
    assert isinstance(inputs.rows, ClozeRows) and inputs.teacher is not None
    task, rows, student = inputs.rows.task, inputs.rows, inputs.student
    if isinstance(student, LanguageModel) and student.vocab_map is not None:
        check_candidates(task, [*rows.train, *rows.eval], student.vocab_map)
    return TaskScores(inputs.student, inputs.teacher, inputs.options, task, _label_words(task, inputs.tokenizer))


def _label_words(task: ClozeTask, tokenizer: Any) -> Tensor | None:
    return torch.tensor(label_word_ids(task, tokenizer)) if task.kind == "verbalizer" else None


def _knowledge_distillation(inputs: StageInputs) -> Objective:
    assert isinstance(inputs.student, LanguageModel) and isinstance(inputs.teacher, LanguageModel | CachedTeacher)
    return KnowledgeDistillation(inputs.student, inputs.teacher, inputs.options, known_ids(inputs.teacher, inputs.tokenizer))


def _hard_labels(inputs: StageInputs) -> Objective:
    return LanguageModeling(inputs.student) if isinstance(inputs.student, LanguageModel) else FineTuning(inputs.student)


def _ted_labels(inputs: StageInputs) -> Objective:
    if isinstance(inputs.student, LanguageModel):
        return LanguageModeling(inputs.student)
    return FineTuning(inputs.student, zero_context=inputs.options.resolved().padding == "include")


def _intermediate_layers(inputs: StageInputs) -> Objective:
    assert isinstance(inputs.teacher, LanguageModel | TaskModel)
    return IntermediateLayerDistillation(inputs.student, inputs.teacher, inputs.options, seed=inputs.seed)


def _logits(inputs: StageInputs) -> Objective:
    assert isinstance(inputs.student, TaskModel) and isinstance(inputs.teacher, TaskModel | CachedTeacher)
    return LogitDistillation(inputs.student, inputs.teacher, inputs.options)


def _teacher_filters(inputs: StageInputs) -> Objective:
    return FilterTraining(inputs.student, inputs.options, role="teacher", seed=inputs.seed, filters=inputs.filters)


def _student_filters(inputs: StageInputs) -> Objective:
    return FilterTraining(inputs.student, inputs.options, role="student", seed=inputs.seed, filters=inputs.filters)


def _task_aware(inputs: StageInputs) -> Objective:
    assert inputs.teacher is not None
    return TaskAwareDistillation(inputs.student, inputs.teacher, inputs.options, filters=inputs.filters, seed=inputs.seed)


def _word_lesson(inputs: LessonInputs) -> Lesson:
    return Lesson(words=compared_words(inputs.options, inputs.kept, inputs.num_words))


def _all_words_lesson(inputs: LessonInputs) -> Lesson:
    return Lesson(words=slice(inputs.num_words))


def _cloze_lesson(inputs: LessonInputs) -> Lesson:
    assert isinstance(inputs.rows, ClozeRows)
    return Lesson(scores=ClozeScores(inputs.rows.task, _label_words(inputs.rows.task, inputs.tokenizer)))


def _scores_lesson(inputs: LessonInputs) -> Lesson:
    if isinstance(inputs.rows, DatasetRows) and inputs.rows.train.kind == "question_answering":
        _refuse_pads(inputs.options)
    return Lesson(scores=task_scores)


def _task_aware_lesson(inputs: LessonInputs) -> Lesson:
    rows, layers = inputs.rows, tuple(other for _, other in inputs.compared)
    kind = rows.train.kind if isinstance(rows, DatasetRows) else None
    if layers or kind == "question_answering":
        _refuse_pads(inputs.options)
    return ted.lesson(inputs.options, kind, layers, inputs.kept)


def _refuse_pads(options: Any) -> None:
    if options.resolved().padding == "include":
        raise ValueError(
            "padding is 'include', by the preset if not by itself: what the teacher makes of pads depends on what else is in the "
            "micro-batch, and a cache holds tokens alone. Set options.padding to exclude, or the teacher's kind to model."
        )


def _refuse_classification(task: ClozeTask) -> None:
    if task.kind == "classification":
        raise ValueError(
            "Stage task_words compares words and is judged by cloze scores, which kind 'classification' has not. Use kind "
            "'verbalizer' or 'choices', or leave task_words out and go from pretrain to task_scores."
        )


_TEXT_OR_DATASET: tuple[Data, ...] = ("dataset", "text")
_FINETUNE_TEACHER = StageSpec("teacher", _TEXT_OR_DATASET, _hard_labels, trains="teacher", needs_teacher=False)
_STUDENT_FILTERS = StageSpec(
    "student_filters", _TEXT_OR_DATASET, _student_filters, makes="filters", needs_teacher=False, captures=True, keep="last"
)

METHODS: dict[str, Method] = {
    "glmd": Method(
        "GLMD",
        GLMDOptions,
        (
            StageSpec("pretrain", ("text",), _word_prediction, keep="last", lesson=_word_lesson),
            StageSpec("task_words", ("task",), _word_prediction, lesson=_word_lesson, check_task=_refuse_classification),
            StageSpec("task_scores", ("task",), _task_scores, evaluate_first=True, lesson=_cloze_lesson),
        ),
        Paper(
            "Are Intermediate Layers and Labels Really Necessary? A General Language Model Distillation Method",
            "Tan et al.",
            "Findings of ACL 2023",
            "2306.06625",
        ),
    ),
    "crild": Method(
        "CR-ILD",
        CRILDOptions,
        (
            _FINETUNE_TEACHER,
            StageSpec(
                "ild",
                _TEXT_OR_DATASET,
                _intermediate_layers,
                reads_scores=False,
                needs_labels=False,
                captures=True,
                check_models=crild.compared_layers,
                keep="last",
            ),
            StageSpec("kd", ("dataset",), _logits, lesson=_scores_lesson),
        ),
        Paper(
            "Revisiting Intermediate Layer Distillation for Compressing Language Models: An Overfitting Perspective",
            "Ko et al.",
            "Findings of EACL 2023",
            "2302.01530",
        ),
    ),
    "ted": Method(
        "TED",
        TEDOptions,
        (
            replace(_FINETUNE_TEACHER, build=_ted_labels),
            StageSpec("student", _TEXT_OR_DATASET, _ted_labels, needs_teacher=False),
            replace(_STUDENT_FILTERS, name="teacher_filters", build=_teacher_filters, trains="teacher"),
            _STUDENT_FILTERS,
            StageSpec(
                "distill",
                _TEXT_OR_DATASET,
                _task_aware,
                captures=True,
                check_models=ted.compared_layers,
                lesson=_task_aware_lesson,
                check_stages=ted.check_filters,
            ),
        ),
        Paper(
            "Less is More: Task-aware Layer-wise Distillation for Language Model Compression",
            "Liang et al.",
            "ICML 2023",
            "2210.01351",
        ),
    ),
    "kd": Method(
        "knowledge distillation over the teacher's whole vocabulary",
        KDOptions,
        (StageSpec("distill", ("text",), _knowledge_distillation, keep="last", lesson=_all_words_lesson),),
        Paper("Distilling the Knowledge in a Neural Network", "Hinton et al.", "2015", "1503.02531"),
    ),
    "lm": Method(
        "language modelling without a teacher",
        LanguageModelingOptions,
        (StageSpec("train", ("text",), _hard_labels, needs_teacher=False, keep="last"),),
    ),
    "finetune": Method(
        "fine-tuning on labels without a teacher",
        FineTuneOptions,
        (StageSpec("train", ("dataset",), _hard_labels, needs_teacher=False),),
    ),
}


def _check_kinds(inputs: StageInputs) -> None:
    student, teacher = inputs.student, inputs.teacher
    if not isinstance(student, LanguageModel) or not isinstance(teacher, LanguageModel | CachedTeacher):
        return
    if student.causal != teacher.causal:
        kinds = {True: "a decoder", False: "an encoder"}
        raise ValueError(f"The teacher is {kinds[teacher.causal]} and the student {kinds[student.causal]}; both must be of one kind.")
