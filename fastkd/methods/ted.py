"""TED: task-aware layer-wise distillation (Liang et al., ICML 2023, arXiv:2210.01351).

Hidden states hold much that a task does not need. A filter after each chosen layer, of the teacher and of the student, is trained to
keep what it does need; then the student learns to have the teacher's filtered states. The authors' code is
github.com/cliang1453/task-aware-distillation; its stages:

    teacher, student                   fine-tuning on labels, or on text (finetune.py, language_modeling.py)
    teacher_filters, student_filters   the same loss, backbone frozen: a filter and a head a layer; the heads end there
    distill                            student, its head and its filters; the teacher and its filters are frozen

Layer-wise distillation (LWD) and plain KD are settings of the last stage. Filters are no part of a saved model. Text, for encoders and
decoders, is our extension: the authors' code has labelled tasks on DeBERTaV3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..models.capture import capture, check_capture, num_layers
from ..models.deberta import zero_context_at_pads
from ..models.filters import FilterBank, FilterHeads, hidden_width, reads_last_token
from ..models.language_model import LanguageModel
from ..models.layer_map import LayerMap, intervals, layer_map
from ..models.task_model import TaskModel
from ..models.teacher_cache import CachedTeacher
from ..ops.checks import check_temperature
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.projected_mse import projected_mse
from ..tasks.labelled import Kind
from ..tasks.text import IGNORE_INDEX
from .language_modeling import LanguageModeling, check_mask_probability
from .objective import Objective
from .task_losses import label_loss, score_divergence
from .teaching import Lesson, Taught, plain, task_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TaskModel | LanguageModel
Role = Literal["student", "teacher"]
Folders = Mapping[str, str | Path]


@dataclass(frozen=True, kw_only=True)
class TEDOptions:
    """Options of method `ted`."""

    preset: Literal["strict", "paper"] = "strict"
    """What the next three are where they are null. strict: exclude, mse, false. paper: what the authors' code computes, include,
    batch_softmax, true."""
    padding: Literal["exclude", "include"] | None = None
    """Whether pads count in the mean of squared distances, and in the softmax over positions of question answering's divergence.
    include: DeBERTa's pads then have the states that the authors' transformers 4.28 gives them, without any attention context."""
    regression_kd: Literal["mse", "batch_softmax", "none"] | None = None
    """How a regression's values are distilled. mse: their squared distance. batch_softmax: the divergence of softmaxes over the
    examples of a batch, a ranking loss that depends on what else the batch holds; each micro-batch is one. none: not at all."""
    filter_stage_dropout: bool | None = None
    """Whether the frozen backbone's dropout is on while filters are trained."""
    layerwise: Literal["ted", "lwd", "none"] = "ted"
    """ted: filtered states are compared. lwd: the student's through new filters with the teacher's as they are. none: plain KD."""
    kl_alpha: float = 20.0
    """Weight of the divergence of predictions; the authors use 5 to 20, and 0 for CoLA."""
    mse_alpha: float = 50.0
    """Weight of the squared distance of states; the authors use 10 to 7500 by task, with lwd 5 to 100. 0 is layerwise: none."""
    temperature: float = 2.0
    """Softens the predictions of both models; the divergence carries its square."""
    filter_interval: int = 1
    """Every so many student layers have a filter, beginning with the layer of this number."""
    teacher_filter_interval: int = 1
    """The same for the teacher; the k-th filters of both are compared, so there must be as many."""
    layer_map: tuple[tuple[int, ...], ...] | None = None
    """Pairs [student layer, teacher layer], counted from 1, in place of the intervals."""
    filter_output_dim: int | None = None
    """Width of filtered states; null: the teacher's width."""
    filter_nonlinear: bool = False
    """New filters are Linear, activation, Linear; else one Linear."""
    teacher_filters: str | None = None
    """Folder of filters that this stage of another run made; null: those of this run."""
    student_filters: str | None = None
    """The same for the student, which must begin from the model they were trained on."""
    mask_probability: float = 0.15
    """Share of tokens an encoder predicts on text; decoders predict every next token whatever it says."""

    def __post_init__(self) -> None:
        check_mask_probability(self.mask_probability)
        for name in ("kl_alpha", "mse_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number >= 0; 0 leaves its term out.")
        check_temperature(self.temperature)
        for name in ("filter_interval", "teacher_filter_interval", "filter_output_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        pairs = self.layer_map
        if pairs is not None:
            repeats = any(len(set(side)) < len(pairs) for side in zip(*pairs, strict=False))
            if not pairs or repeats or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
                raise ValueError(f"layer_map={pairs} must be pairs [student layer, teacher layer] from 1 on, no layer of either twice.")
        if self.layerwise == "lwd" and (self.teacher_filters or self.student_filters):
            raise ValueError("layerwise='lwd' has new filters: leave out teacher_filters and student_filters, or take layerwise: ted.")

    @property
    def compares_states(self) -> bool:
        """Whether stage distill has its term on states."""
        return self.layerwise != "none" and self.mse_alpha > 0

    @property
    def needs_filters(self) -> bool:
        """Whether stage distill begins with filters that were trained before it."""
        return self.layerwise == "ted" and self.compares_states

    def resolved(self) -> TEDOptions:
        """The same with the preset's values where they are null."""
        return replace(self, **{name: value for name, value in _PRESETS[self.preset].items() if getattr(self, name) is None})


_PRESETS: dict[str, dict[str, Any]] = {
    "strict": {"padding": "exclude", "regression_kd": "mse", "filter_stage_dropout": False},
    "paper": {"padding": "include", "regression_kd": "batch_softmax", "filter_stage_dropout": True},
}


class FilterTraining(Objective):
    """Stage I: (1/K) sum_k L(head_k(filter_k(h_k))), with L the task's own loss, a mean over examples; over labelled tokens of text.

    The model, called the student as in every stage, is frozen and may be either of the two. A state is used as soon as its layer has
    made it, and what is above the last filter is not run.
    """

    student: Model

    def __init__(self, student: Model, options: TEDOptions, *, role: Role, seed: int, filters: Folders | None = None) -> None:
        """New filters and heads beside a model that is frozen here.

        Args:
            student: the model.
            options: the method's.
            role: which of the two models it is.
            seed: filters and heads are drawn from it.
            filters: folders of those made before, by stage; the student's get the teacher's width.

        Raises:
            ValueError: layers that the model does not have, or filters that differ in number or width from the teacher's.
        """
        super().__init__()
        self.student = student.requires_grad_(False)
        self.options = options.resolved()
        layers = _own_layers(student, options, role)
        width = options.filter_output_dim if role == "teacher" else _student_filter_width(options, filters, len(layers))
        generator = torch.Generator().manual_seed(seed)
        self.filters = FilterBank.of(student, layers, generator, filter_width=width, nonlinear=options.filter_nonlinear)
        self.heads = FilterHeads(student, self.filters.shape, generator)

    def train(self, mode: bool = True) -> FilterTraining:
        """The frozen backbone's dropout is on only with filter_stage_dropout."""
        super().train(mode)
        self.student.train(mode and bool(self.options.filter_stage_dropout))
        return self

    def weight(self, batch: Any) -> float:
        """How many examples the batch has, or of text labelled tokens."""
        return float(_labelled(self.student, batch))

    def forward(self, batch: Any, denominator: float) -> Tensor:
        """(): the heads' losses summed over examples or labelled tokens, divided by K and by the step's number of them."""
        layers, positions = self.filters.shape.layers, self.heads.positions(batch)
        losses: list[Tensor] = []

        def probe(layer: int, state: Tensor) -> None:
            read = state if positions is None else state.flatten(0, 1).index_select(0, positions)
            with torch.enable_grad():
                losses.append(self._loss(layers.index(layer), read, positions, batch))

        reads = capture(self.student.model, hidden=layers, at_hidden=probe, stop=True)
        with torch.no_grad(), _pads_as_published(self.options, self.student), reads:
            _run(self.student, batch)
        return torch.stack(losses).sum() / (len(layers) * max(denominator, 1.0))  # text may have no label at all

    def _loss(self, k: int, read: Tensor, positions: Tensor | None, batch: Any) -> Tensor:
        """Loss of head k, summed over examples or labelled tokens."""
        model, filtered = self.student, self.filters.filtered(k, read)
        if isinstance(model, TaskModel):
            return label_loss(model.kind, self.heads.scores(k, filtered, batch.num_choices), batch.labels).sum()
        labels, transform = model.to_slots(batch.labels.flatten()[positions]), model.transform

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, labels, bias=bias, softcap=transform.softcap, logit_scale=transform.scale, reduction="sum"
            )

        return model.through_head(self.heads.scores(k, filtered), at_head)


class TaskAwareDistillation(Objective):
    """Stage II: L + kl_alpha T^2 KL(teacher || student) + mse_alpha (1/K) sum_k mean (F_k^s(h_k^s) - F_k^t(h_k^t))^2.

    L and the divergence are of the task's scores, means over examples; on text L is over labelled tokens, and the divergence over all
    tokens and the vocabulary rows that the student has. The last mean is over the filtered width and over tokens, or with
    padding="include" over all positions. layerwise="lwd": F^t is the identity.

    A term of weight zero is not computed, and without both the teacher is not run. Of the teacher the K states alone are kept, each
    until the student's has been compared with it, which is done inside the student's forward.
    """

    student: Model
    teacher: Model
    teacher_filters: FilterBank

    def __init__(
        self, student: Model, teacher: Model | CachedTeacher, options: TEDOptions, *, seed: int, filters: Folders | None = None
    ) -> None:
        """With the filters that were trained, or for lwd with new ones of the student.

        Args:
            student: trained.
            teacher: frozen; or what stands for a cache.
            options: the method's.
            seed: of lwd's filters.
            filters: folders of those that stages have made, by stage; what the options name comes first.

        Raises:
            ValueError: a teacher that is not frozen or for another task, or filters that are missing or do not fit.
        """
        super().__init__()
        self.options = options = options.resolved()
        own = _predicts(student)
        theirs = own if isinstance(teacher, CachedTeacher) else _predicts(teacher)
        if theirs != own:
            raise ValueError(f"The teacher is {theirs}, the student {own}; load both for one task, as encoders or as decoders.")
        self.student = student
        self.pairs = compared_layers(student.model, teacher.model, options)
        kind, kept = (None, student.kept) if isinstance(student, LanguageModel) else (student.kind, None)
        self.learn_from(teacher, lesson(options, kind, tuple(other for _, other in self.pairs), kept))
        if not self.pairs:
            return
        layers, teacher_layers = zip(*self.pairs, strict=True)
        width = hidden_width(teacher)
        if options.needs_filters:
            teacher_filters = _load(options, filters, "teacher", teacher, teacher_layers).to(student.device)
            self.hold("teacher_filters", teacher_filters.eval().requires_grad_(False))
            self.filters = _load(options, filters, "student", student, layers).to(student.device)
            width = teacher_filters.shape.filter_width
        else:
            generator = torch.Generator().manual_seed(seed)
            self.filters = FilterBank.of(student, layers, generator, filter_width=width, nonlinear=options.filter_nonlinear)
        for asked in (self.filters.shape.filter_width, options.filter_output_dim):
            if asked not in (None, width):
                remedy = "train both models' filters with one filter_output_dim, or leave it out with layerwise: lwd"
                raise ValueError(f"The student's filtered states would be {asked} wide, the teacher's {width}; {remedy}.")

    def weight(self, batch: Any) -> np.ndarray:
        """(3,) float64: examples or labelled tokens, tokens, and positions."""
        mask = batch.attention_mask
        return np.array([_labelled(self.student, batch), int(mask.sum()), mask.numel()], dtype=np.float64)

    def forward(self, batch: Any, denominator: np.ndarray) -> Tensor:
        """(): the sum of the terms of this batch. denominator: (3,), the step's sum of `weight`."""
        labelled, tokens, positions = map(float, denominator)
        with _pads_as_published(self.options, *self.held.values()):
            batch, taught = self.taught(batch)
        distances: list[Tensor] = []
        number = {own: (k, other) for k, (own, other) in enumerate(self.pairs)}

        def compare(layer: int, state: Tensor) -> None:
            k, other = number[layer]
            distances.append(self._distance(k, state, taught.states.pop(other), batch))

        reads: Any = capture(self.student.model, hidden=number, at_hidden=compare) if number else nullcontext()
        with _pads_as_published(self.options, self.student), reads:
            if isinstance(self.student, LanguageModel):
                loss = self._text_loss(batch, taught, labelled, tokens)
            else:
                loss = self._task_loss(batch, taught, labelled)
        if not distances:
            return loss
        compared = tokens if self.options.padding == "exclude" else positions
        return loss + self.term("states", self.options.mse_alpha * torch.stack(distances).sum() / (len(distances) * compared))

    def _distance(self, k: int, state: Tensor, target: Tensor, batch: Any) -> Tensor:
        """Summed over positions, mean over width."""
        features, last = self.filters.features(k, state), self.filters.last_linear(k)
        weight, bias = None, None
        if self.options.needs_filters:
            teacher_last = self.teacher_filters.last_linear(k)
            target, weight, bias = self.teacher_filters.features(k, target), teacher_last.weight, teacher_last.bias
        mask = batch.attention_mask.bool() if self.options.padding == "exclude" else None
        return projected_mse(
            features, last.weight, target, weight, student_bias=last.bias, teacher_bias=bias, mask=mask, reduction="sum"
        )

    def _task_loss(self, batch: Any, taught: Taught, examples: float) -> Tensor:
        """Summed over the batch's examples, of which the step has so many."""
        student, options = self.student, self.options
        assert isinstance(student, TaskModel)
        scores, kind = student(batch), student.kind
        loss = self.term("labels", label_loss(kind, scores, batch.labels).sum() / examples)
        if taught.scores is None:
            return loss
        teacher_scores = taught.scores.view_as(scores)
        if kind != "regression":
            mask = batch.attention_mask.bool() if kind == "question_answering" and options.padding == "exclude" else None
            divergence = score_divergence(kind, scores, teacher_scores, options.temperature, mask=mask)
        elif options.regression_kd == "mse":
            divergence = label_loss(kind, scores, teacher_scores)
        else:
            # The examples of this batch are the classes; divided by those of the step, a micro-batch counts by its share of them.
            divergence = score_divergence("classification", scores[None], teacher_scores[None], options.temperature)
        return loss + self.term("divergence", options.kl_alpha * divergence.sum() / examples)

    def _text_loss(self, batch: Any, taught: Taught, labelled: float, tokens: float) -> Tensor:
        """Divided by the denominators of its two terms, which are made in one pass over the logits."""
        student, words, kl_alpha = self.student, taught.words, self.options.kl_alpha
        assert isinstance(student, LanguageModel)
        if words is None:
            return self.term("labels", LanguageModeling(student)(replace(batch, labels=batch.token_labels), labelled))

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            loss, stats = words.divergence(
                hidden,
                weight,
                student_bias=bias,
                temperature=self.options.temperature,
                mask=batch.attention_mask.bool(),
                labels=student.to_slots(batch.token_labels, ignore_index=IGNORE_INDEX),
                # Both terms are then multiplied by kl_alpha.
                label_weight=1.0 / kl_alpha,
                denominator=tokens,
                label_denominator=max(labelled, 1.0),
                **student.logit_options("student"),
            )
            assert stats.divergence is not None and stats.cross_entropy is not None
            self.term("divergence", kl_alpha * stats.divergence.sum() / tokens)
            self.term("labels", stats.cross_entropy.sum() / max(labelled, 1.0))
            return kl_alpha * loss

        return student(batch.input_ids, batch.attention_mask, at_head)


def _pads_as_published(options: TEDOptions, *models: nn.Module) -> AbstractContextManager[None]:
    """Around forwards of `models`: with padding="include" the states at pads are those of the authors' transformers."""
    return zero_context_at_pads(*models) if options.padding == "include" else nullcontext()


def lesson(options: TEDOptions, kind: Kind | None, layers: tuple[int, ...], kept: slice | Tensor | None) -> Lesson:
    """What stage `distill` asks of the teacher. kind: of the labelled task, None for text, where the student has the `kept` rows."""
    undistilled = kind == "regression" and options.resolved().regression_kd == "none"
    if options.kl_alpha == 0 or undistilled:
        return Lesson(layers=layers)
    return Lesson(words=kept, layers=layers) if kind is None else Lesson(scores=task_scores, layers=layers)


def compared_layers(student: PreTrainedModel, teacher: PreTrainedModel, options: TEDOptions) -> LayerMap:
    """(student layer, teacher layer) whose states stage `distill` compares; models that do not fit the options are refused."""
    if not options.compares_states:
        return ()
    depths = num_layers(student), num_layers(teacher)
    steps = options.filter_interval, options.teacher_filter_interval
    pairs = intervals(*depths, *steps) if options.layer_map is None else layer_map(options.layer_map, *depths)
    for model, layers in zip((student, teacher), zip(*pairs, strict=True), strict=True):
        check_capture(model, hidden=layers)
    return pairs


def check_filters(options: TEDOptions, stages: Sequence[str]) -> None:
    """Refuse a run of these `stages` whose stage `distill`, with these options, would find no filters."""
    for role in get_args(Role) if options.needs_filters else ():
        if folder := _folder(options, {}, role):
            FilterBank.load(folder)
        elif f"{role}_filters" not in stages:
            raise ValueError(_no_filters(role))


def _load(options: TEDOptions, filters: Folders | None, role: Role, model: Model | CachedTeacher, layers: Sequence[int]) -> FilterBank:
    folder = _folder(options, filters, role)
    if folder is None:
        raise ValueError(_no_filters(role))
    return FilterBank.load(folder, layers=layers, width=hidden_width(model)).to(model.model.dtype)


def _folder(options: TEDOptions, filters: Folders | None, role: Role) -> str | Path | None:
    return getattr(options, f"{role}_filters") or (filters or {}).get(f"{role}_filters")


def _no_filters(role: Role) -> str:
    return f"The {role} has no filters: run stage {role}_filters first, set {role}_filters to their folder, or take layerwise: lwd."


def _own_layers(model: Model, options: TEDOptions, role: Role) -> list[int]:
    """The model's side of the pairs; whether it fits the other model's is known in stage II."""
    depth, side = num_layers(model.model), get_args(Role).index(role)
    interval = (options.filter_interval, options.teacher_filter_interval)[side]
    layers = [pair[side] for pair in options.layer_map or ()] or list(range(interval, depth + 1, interval))
    if not layers:
        raise ValueError(f"The {role} has {depth} layers, and every {interval}th has a filter, which is none; lower the interval.")
    check_capture(model.model, hidden=layers)
    return layers


def _student_filter_width(options: TEDOptions, filters: Folders | None, count: int) -> int:
    """That of the teacher's filters; refuse `count` filters where the teacher has more or fewer."""
    folder, width = _folder(options, filters, "teacher"), options.filter_output_dim
    if folder is None:
        if width is None:
            raise ValueError(f"The width of the student's filters is not known; set filter_output_dim. {_no_filters('teacher')}")
        return width
    teacher = FilterBank.load(folder).shape
    if len(teacher.layers) != count or width not in (None, teacher.filter_width):
        raise ValueError(
            f"The teacher has {len(teacher.layers)} filters {teacher.filter_width} wide, the student {count}, with filter_output_dim="
            f"{width}. Both need as many, equally wide: see filter_interval, teacher_filter_interval, layer_map and filter_output_dim."
        )
    return teacher.filter_width


def _predicts(model: Model) -> str:
    """What a model's predictions are of; those of teacher and student are compared."""
    kind = "a decoder" if reads_last_token(model) else "an encoder"
    task = "text" if isinstance(model, LanguageModel) else f"{model.kind} with {model.model.config.num_labels} outputs"
    return f"{kind} for {task}"


def _labelled(model: Model, batch: Any) -> int:
    """What the task's loss is a mean over: examples, or the labelled tokens of text."""
    batch = plain(batch)
    return int((batch.token_labels != IGNORE_INDEX).sum()) if isinstance(model, LanguageModel) else batch.num_examples


def _run(model: Model, batch: Any) -> Tensor:
    """Scores of a task; of text what enters the head."""
    if isinstance(model, LanguageModel):
        return model(batch.input_ids, batch.attention_mask, lambda hidden, weight, bias: hidden)
    return model(batch)
