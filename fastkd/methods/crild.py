"""CR-ILD: last-layer distillation with MixUp and consistency (Ko et al., Findings of EACL 2023, arXiv:2302.01530).

Three stages (the authors' code: github.com/jongwooko/CR-ILD, training_functions.py and losses.py):

    teacher   labels                 fine-tunes the teacher; left out where it is fine-tuned already
    ild       intermediate states    no labels and no scores, frozen teacher; the last weights go on
    kd        task scores            no labels, the same teacher

In `ild` both models read the same mixed rows. What is compared is named by letters: A is Q K^T, Q, K and V are Q Q^T, K K^T and V V^T,
each over sqrt(head size) and under a softmax over keys; H are hidden states and P is the [CLS] vector, the student's after one linear
layer `fit_dense` that is trained beside it. Consistency draws what the student makes of mixed rows to what it makes of clean ones.

Of QKV nothing above the last layer's Q, K and V is run: that layer's output and feed-forward parts, the pooler and the head get no
gradient in `ild`. For decoders, which are our extension, relations are over all keys of a row, future ones too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..models.capture import Captured, Projections, attention_heads, capture, check_capture, num_layers
from ..models.filters import empty_linear
from ..models.language_model import LanguageModel
from ..models.layer_map import LayerMap, layer_map
from ..models.load import is_decoder
from ..models.task_model import TaskModel
from ..models.teacher_cache import CachedTeacher
from ..ops.checks import check_temperature
from ..ops.projected_mse import projected_mse
from ..ops.relation_kl import RelationTarget, relation_kl
from .mixup import MixedBatch, partners
from .objective import Objective, Position
from .task_losses import label_loss, score_divergence
from .teaching import Lesson, plain, task_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OBJECTS = {"A": "attention", "H": "hidden", "P": "summary", "Q": "queries", "K": "keys", "V": "values"}
"""What a letter stands for, as the log names it."""
Preset = Literal["consistency", "paper_script", "tinybert", "pkd"]
Layers = Literal["last", "uniform"]
Ramp = Literal["epoch", "step"]
Padding = Literal["exclude", "include"]
Form = Literal["kl", "cross_entropy"]
Model = TaskModel | LanguageModel


@dataclass(frozen=True, kw_only=True)
class CRILDOptions:
    """Options of method `crild`. Where one is null, the preset's value holds."""

    preset: Preset = "consistency"
    """consistency: AH of the last layer with MixUp and consistency, the method as described. paper_script: the authors' published
    command, QKV of the last layer with MixUp, for which the consistency that it asks for is never computed. tinybert and pkd:
    baselines, AH and P of all layers without either. The last three count pads as the authors do."""
    objects: str | None = None
    """What is compared, of the letters A (Q with K), H (hidden states), P ([CLS], a decoder's last token), Q, K and V (each with
    itself); all have unit weight. AH, QKV, AH and P in the presets' order."""
    layers: Layers | None = None
    """last: the student's last layer with the teacher's. uniform: layer i with the teacher's i * r, r being the quotient of the depths,
    and for H the embeddings too. uniform in the baselines."""
    mixup: bool | None = None
    """Mix every row's embeddings with those of the row as far from the batch's end as it is from the beginning; not in baselines."""
    consistency_weight: float | None = None
    """Weight of consistency at the end of its ramp; 0.1, in the baselines 0."""
    consistency_objects: str | None = None
    """Letters of `objects` that have a consistency term. consistency: all but P, which can have none; the others: A and H, as the
    authors, so that QKV has none. Without MixUp its target is the same rows under other dropout, or averaged weights."""
    ema_decay: float | None = None
    """Consistency's targets are those of the student's running average with this decay (the authors': 0.999), without dropout. null: of
    the student as it is, with dropout."""
    ramp: Ramp | None = None
    """How consistency grows: by the share of epochs that are finished, 0 in the first, or of steps. step in consistency, else epoch."""
    relation_heads: int | None = None
    """Split the width of all heads into this many, as MiniLMv2 does, so that models of different heads can be compared by A, Q, K, V.
    null: the models' own heads."""
    padding: Padding | None = None
    """exclude: pads are no keys, query rows, positions or answers, and means are over tokens; a mixed row has a token where either of
    its rows has one. include: means are over all positions, and only A leaves out keys, the pads of a row without its partner's tokens.
    exclude in consistency, else include."""
    form: Form | None = None
    """cross_entropy is kl plus the target's entropy, with the same gradient. kl in consistency, else cross_entropy."""
    temperature: float = 2.0
    """Temperature of stage kd; the loss carries its square."""
    label_weight: float = 0.0
    """Weight of the labels' loss in stage kd; the authors use no labels."""
    relu_head: bool = False
    """Scores of all stages are Linear(ReLU(pooled)) without dropout, as in the authors' BERT; with paper_script it is their command.
    No class of transformers has this head: fastkd alone loads such models, and export refuses them."""

    def __post_init__(self) -> None:
        for name, kind in (("preset", Preset), ("layers", Layers), ("ramp", Ramp), ("padding", Padding), ("form", Form)):
            if (value := getattr(self, name)) is not None and value not in get_args(kind):
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(get_args(kind))}.")
        settings = self.resolved()
        for name, allowed, least in (("objects", "".join(OBJECTS), 1), ("consistency_objects", settings.objects.replace("P", ""), 0)):
            letters = getattr(settings, name)
            if set(letters) - set(allowed) or not least <= len(letters) == len(set(letters)):
                raise ValueError(f"{name}={letters!r} must be {least} or more letters of {allowed!r}, each at most once.")
        if not 0 <= settings.consistency_weight < np.inf:
            raise ValueError(f"consistency_weight={settings.consistency_weight} must be a finite number >= 0; the authors use 0.1.")
        if settings.has_consistency and settings.layers == "uniform":
            raise ValueError("layers='uniform' has no consistency; set consistency_weight: 0, or layers: last.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1); the authors use 0.999.")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads={self.relation_heads} must be at least 1, or null for the models' own heads.")
        check_temperature(self.temperature)
        if not self.label_weight >= 0:
            raise ValueError(f"label_weight={self.label_weight} must be >= 0.")

    def resolved(self) -> Settings:
        """What is given, and the preset's value for everything else."""
        preset = _PRESETS[self.preset]
        given = {field.name: getattr(self, field.name) for field in fields(Settings)}
        settings = replace(preset, **{name: value for name, value in given.items() if value is not None})
        if self.consistency_objects is not None:
            return settings
        return replace(settings, consistency_objects="".join(x for x in settings.objects if x in preset.consistency_objects))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options that a preset decides, once they are decided. The defaults are those of paper_script."""

    objects: str = "QKV"
    layers: Layers = "last"
    mixup: bool = True
    consistency_weight: float = 0.1
    consistency_objects: str = "AH"
    ramp: Ramp = "epoch"
    padding: Padding = "include"
    form: Form = "cross_entropy"

    @property
    def has_consistency(self) -> bool:
        """Whether any object has a consistency term."""
        return self.consistency_weight > 0 and bool(self.consistency_objects)


_BASELINE = Settings(layers="uniform", mixup=False, consistency_weight=0.0)
_PRESETS = {
    "consistency": Settings(objects="AH", consistency_objects="AHQKV", ramp="step", padding="exclude", form="kl"),
    "paper_script": Settings(),
    "tinybert": replace(_BASELINE, objects="AH"),
    "pkd": replace(_BASELINE, objects="P"),
}


@dataclass(frozen=True, eq=False)
class _Target:
    """States that the student's are drawn to, without gradient, by the student's layer."""

    states: Captured
    weight: float
    tokens: Tensor
    """(B, S) bool: its tokens."""
    fit_dense: nn.Linear | None = None
    """What its hidden states go through: the student's own; None for the teacher's."""


class IntermediateLayerDistillation(Objective):
    """sum over objects o and layers of loss_o(S(x'), T(x')) + c (mix loss_o(S(x'), S(x)) + (1 - mix) loss_o(S(x'), S(reversed x)))

    with x' = mix x + (1 - mix) reversed x. A, Q, K, V: KL or cross-entropy of relations, mean over heads and query rows. H: squared
    distance, mean over positions and width. P: the same of vectors of length 1, mean over rows, width and layers.
    c, for the consistency objects, grows from 0 to `consistency_weight` as `begin_step` tells; while it is 0, S(x) is not computed (the
    authors' code always does).

    padding="exclude": a consistency target's query rows and positions are its own tokens, of which x' may have more; what all terms are
    divided by is the number in x', so that mix and 1 - mix weigh single tokens.
    """

    student: Model
    teacher: Model

    def __init__(self, student: Model, teacher: Model, options: CRILDOptions, *, seed: int) -> None:
        """The layers that are compared are paired here.

        Args:
            student: trained; text and labelled tasks alike.
            teacher: frozen, of the same kind.
            options: of stage `ild`.
            seed: `fit_dense` is drawn from it.

        Raises:
            ValueError: a teacher that is not frozen, or models that do not fit the options.
        """
        super().__init__()
        self.student = student
        self.hold("teacher", teacher)
        self.options, self.settings = options, options.resolved()
        self.pairs = compared_layers(student.model, teacher.model, options)
        self.fit_dense = _fit_dense(student, teacher, seed) if set("HP") & set(self.settings.objects) else None
        self.average: nn.ModuleDict | None = None
        if options.ema_decay is not None and self.settings.has_consistency:
            self.average = nn.ModuleDict(copy.deepcopy(dict(self.named_children()))).eval().requires_grad_(False)
        self.summary_is_last = is_decoder(student.model.config)
        self.consistency = 0.0

    def train(self, mode: bool = True) -> IntermediateLayerDistillation:
        """The running average stays in evaluation mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def prepare(self, batch: Any, generator: torch.Generator) -> MixedBatch:
        """The batch with the mix of its rows drawn, or without one."""
        return MixedBatch.draw(batch, generator) if self.settings.mixup else MixedBatch(batch, None)

    def begin_step(self, at: Position) -> None:
        """Set consistency's weight by the share of steps or epochs that are done."""
        done = at.epoch / at.total_epochs if self.settings.ramp == "epoch" else at.step / at.total_steps
        self.consistency = self.settings.consistency_weight * done

    @torch.no_grad()
    def end_step(self) -> None:
        """Draw the running average to the student, if there is one."""
        if self.average is None or self.options.ema_decay is None:
            return
        for name, average in self.average.items():
            current = getattr(self, name)
            torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - self.options.ema_decay)
            for buffer, value in zip(average.buffers(), current.buffers(), strict=True):
                buffer.copy_(value)

    def weight(self, batch: MixedBatch) -> np.ndarray:
        """(2,) float64, rows and positions; with padding="exclude" positions that hold a token of a mixed row."""
        tokens = batch.tokens
        positions = int(tokens.sum()) if self.settings.padding == "exclude" else tokens.numel()
        return np.array([len(tokens), positions], dtype=np.float64)

    def forward(self, batch: MixedBatch, denominator: np.ndarray) -> Tensor:
        """(): the terms of this batch. denominator: (2,), the rows and positions of the step."""
        rows, positions = denominator
        own, objects = batch.attention_mask.bool(), self.settings.objects
        consistent = self.settings.consistency_objects if self.consistency > 0 else ""
        with torch.no_grad():
            teacher = self._states(self.teacher, batch.inputs, objects, 1, batch)
            targets = [_Target(teacher, 1.0, batch.tokens if self.settings.padding == "exclude" else own)]
            if consistent:
                source: Any = self if self.average is None else self.average
                clean = self._states(source.student, batch.batch, consistent, 0)
                mix = 1.0 if batch.mix is None else batch.mix
                targets.append(_Target(clean, self.consistency * mix, own, source.fit_dense))
                if mix < 1:
                    targets.append(_Target(partners(clean), self.consistency * (1 - mix), own.flip(0), source.fit_dense))
        student = self._states(self.student, batch.inputs, objects, 0, batch)
        terms = []
        for letter, pairs in self.pairs.items():
            drawn_to = targets if letter in consistent else targets[:1]
            for layer, _ in pairs:
                if letter == "P":
                    loss = self._summary(student.hidden[layer], teacher.hidden[layer], batch.tokens) / (rows * len(pairs))
                elif letter == "H":
                    loss = self._hidden(layer, student.hidden[layer], drawn_to) / positions
                else:
                    loss = self._relation(letter, layer, student.attention[layer], drawn_to) / positions
                terms.append(self.term(OBJECTS[letter], loss))
        return torch.stack(terms).sum()

    def _relation(self, letter: str, layer: int, student: Projections, drawn_to: Sequence[_Target]) -> Tensor:
        """Sum over query rows, mean over heads; one pass for all targets."""
        exclude = self.settings.padding == "exclude"
        q, k = self._queries_and_keys(letter, student)
        targets = [
            RelationTarget(
                *self._queries_and_keys(letter, target.states.attention[layer]),
                weight=target.weight,
                key_mask=target.tokens if exclude or letter == "A" else None,
                query_mask=target.tokens if exclude else None,
            )
            for target in drawn_to
        ]
        return relation_kl(q, k, None, None, targets=targets, form=self.settings.form, reduction="sum") / q.shape[1]

    def _queries_and_keys(self, letter: str, seen: Projections) -> tuple[Tensor, Tensor]:
        """Both (B, heads, S, d). For A, grouped keys are repeated; K and V have as many heads as there are keys."""
        q, k = {"A": (seen.q, seen.k), "Q": (seen.q, seen.q), "K": (seen.k, seen.k), "V": (seen.v, seen.v)}[letter]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if len(k[0]) < len(q[0]) else k
        heads = self.options.relation_heads
        if heads is not None:  # (B, h, S, d) -> (B, heads, S, h d / heads)
            q, k = (torch.unflatten(x.transpose(1, 2).flatten(2), 2, (heads, -1)).transpose(1, 2) for x in (q, k))
        return q, k

    def _hidden(self, layer: int, student: Tensor, drawn_to: Sequence[_Target]) -> Tensor:
        """Sum over positions, mean over width."""
        assert self.fit_dense is not None
        losses = [
            target.weight
            * projected_mse(
                student,
                self.fit_dense.weight,
                target.states.hidden[layer],
                None if target.fit_dense is None else target.fit_dense.weight.detach(),
                student_bias=self.fit_dense.bias,
                teacher_bias=None if target.fit_dense is None else target.fit_dense.bias.detach(),
                mask=target.tokens if self.settings.padding == "exclude" else None,
                reduction="sum",
            )
            for target in drawn_to
        ]
        return torch.stack(losses).sum()

    def _summary(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        """Sum over rows, mean over width. A row is summed up by its first token, in decoders by its last one."""
        assert self.fit_dense is not None
        rows = torch.arange(len(tokens), device=tokens.device)
        position = tokens.sum(-1) - 1 if self.summary_is_last else torch.zeros_like(rows)
        return (_unit(self.fit_dense(student[rows, position])) - _unit(teacher[rows, position])).square().mean(-1).sum()

    def _states(self, model: Any, inputs: Any, letters: str, side: int, mixed: MixedBatch | None = None) -> Captured:
        """The states that `letters` are made of, by the student's layer; nothing above them is run."""
        hidden, attention = self._layers(letters, side)
        embed = None if mixed is None or mixed.mix is None else mixed.embed
        with capture(model.model, hidden=hidden.values(), attention=attention.values(), stop=True, embeddings=embed) as seen:
            model(*((inputs,) if isinstance(model, TaskModel) else (inputs.input_ids, inputs.attention_mask)))
        return Captured({x: seen.hidden[y] for x, y in hidden.items()}, {x: seen.attention[y] for x, y in attention.items()})

    def _layers(self, letters: str, side: int) -> tuple[dict[int, int], dict[int, int]]:
        """{student's layer: layer of this side (0 the student's, 1 the teacher's)}, of hidden states and of projections."""
        hidden, attention = dict[int, int](), dict[int, int]()
        for letter in letters:
            for own, other in self.pairs[letter]:
                (hidden if letter in "HP" else attention)[own] = (own, other)[side]
        return hidden, attention


def compared_layers(student: PreTrainedModel, teacher: PreTrainedModel, options: CRILDOptions) -> dict[str, LayerMap]:
    """(student layer, teacher layer) that stage `ild` compares, by letter; models that do not fit the options are refused."""
    for model in (student, teacher):
        if options.relu_head and model.config.model_type != "bert":
            raise ValueError(f"relu_head is the head of the authors' BERT, and a model is {model.config.model_type}; set it to false.")
    settings, depths = options.resolved(), (num_layers(student), num_layers(teacher))
    pairs = {letter: layer_map(settings.layers, *depths, embeddings=letter == "H") for letter in settings.objects}
    for letter, layers in pairs.items():
        for model, own in zip((student, teacher), zip(*layers, strict=True), strict=True):
            check_capture(model, **{"hidden" if letter in "HP" else "attention": own})
        if letter not in "HP":
            _check_heads(letter, student, teacher, options.relation_heads)
    return pairs


class LogitDistillation(Objective):
    """mean over examples of T^2 KL(softmax(z_t / T) || softmax(z_s / T)), or cross-entropy, + label_weight * the labels' loss.

    Question answering: see `score_divergence`; padding="exclude" leaves pads out of its softmax. Regression: (z_s - z_t)^2; in the
    authors' presets ((z_s - z_t) / T)^2, which is not multiplied by T^2 again.
    """

    student: TaskModel
    teacher: TaskModel

    def __init__(self, student: TaskModel, teacher: TaskModel | CachedTeacher, options: CRILDOptions) -> None:
        """Both models are for one kind of task with as many outputs.

        Args:
            student: trained.
            teacher: frozen; or what stands for a cache.
            options: of stage `kd`.

        Raises:
            ValueError: a teacher that is not frozen, or for another task.
        """
        super().__init__()
        self.student = student
        self.options, self.settings = options, options.resolved()
        self.learn_from(teacher, Lesson(scores=task_scores))
        own = student.kind, student.model.config.num_labels
        other = (teacher.kind, teacher.model.config.num_labels) if isinstance(teacher, TaskModel) else own
        if own != other:
            raise ValueError(
                f"The student is for {own[0]} with {own[1]} outputs and the teacher for {other[0]} with {other[1]}; stage kd compares "
                "them one by one. Take a teacher that is fine-tuned on this task."
            )

    def weight(self, batch: Any) -> float:
        """How many examples the batch has."""
        return float(plain(batch).num_examples)

    def forward(self, batch: Any, denominator: float) -> Tensor:
        """(): summed over the batch's examples, divided by the step's number of them."""
        options, settings, kind = self.options, self.settings, self.student.kind
        batch, taught = self.taught(batch)
        scores = self.student(batch)
        assert taught.scores is not None
        target = taught.scores.view_as(scores)
        if kind == "regression":
            losses = ((scores - target) / (1.0 if options.preset == "consistency" else options.temperature)).square()
        else:
            mask = batch.attention_mask.bool() if kind == "question_answering" and settings.padding == "exclude" else None
            losses = score_divergence(kind, scores, target, options.temperature, form=settings.form, mask=mask)
        loss = losses.sum() / denominator
        if options.label_weight == 0:
            return loss
        labels = options.label_weight * label_loss(kind, scores, batch.labels).sum() / denominator
        return self.term("divergence", loss) + self.term("labels", labels)


def _check_heads(letter: str, student: PreTrainedModel, teacher: PreTrainedModel, relation_heads: int | None) -> None:
    """Refuse models whose heads cannot be compared one by one."""
    counts, widths = zip(*(_heads(letter, model) for model in (student, teacher)), strict=True)
    if relation_heads is None and counts[0] != counts[1]:
        raise ValueError(
            f"Object {letter} compares heads one by one; the student has {counts[0]} and the teacher {counts[1]}. Set relation_heads, "
            f"into which the width of all heads, {widths[0]} and {widths[1]}, is then split."
        )
    if relation_heads is not None and any(width % relation_heads for width in widths):
        raise ValueError(
            f"relation_heads={relation_heads} must divide the width of all heads, which for object {letter} is {widths[0]} in the "
            f"student and {widths[1]} in the teacher."
        )


def _heads(letter: str, model: PreTrainedModel) -> tuple[int, int]:
    """Number of heads of a relation, and the width of all of them."""
    config, heads = model.config.get_text_config(), attention_heads(model)
    count = heads.query if letter in "AQ" else heads.key_value
    return count, count * (getattr(config, "head_dim", None) or config.hidden_size // heads.query)


def _unit(x: Tensor) -> Tensor:
    """(..., d) of length 1, in float32 or float64."""
    return nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _fit_dense(student: Model, teacher: Model, seed: int) -> nn.Linear:
    """From the student's width to the teacher's, drawn from N(0, 0.02^2) by `seed`, with a bias of zeros."""
    widths = (side.model.config.get_text_config().hidden_size for side in (student, teacher))
    dense = empty_linear(*widths)
    nn.init.normal_(dense.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(dense.bias)
    return dense.to(next(student.parameters()))
