"""GLMD: general language model distillation without labels or intermediate layers (Tan et al., Findings of ACL 2023, arXiv:2306.06625).

Three stages, exactly one loss in each (the authors' code: github.com/aitsc/GLMKD, distill/distill_model.py):

    pretrain      word prediction   unlabeled text        pre-trained teacher     from random weights
    task_words    word prediction   task inputs           fine-tuned teacher      from pretrain's result
    task_scores   task scores       task inputs           fine-tuned teacher      from the best-dev weights of task_words,
                                                                                  which are scored before the first step

Teacher and student see the same ids at the same positions and nothing else is matched: width, depth and architecture are free. The
student may keep a part of the vocabulary: it reads every dropped id as its stand-in. The teacher's softmax is taken over the kept rows
alone, which are gathered once, or by `teacher_mass` over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.cloze_scores import check_label_words, choice_scores, verbalizer_scores
from ..models.language_model import LanguageModel
from ..models.load import vocabulary_rows
from ..models.task_model import TaskModel
from ..models.teacher_cache import CachedTeacher
from ..ops.checks import check_choice, check_temperature
from ..ops.divergence import Divergence
from ..ops.options import TEACHER_MASSES
from ..tasks.cloze import ClozeBatch
from ..tasks.cloze_task import ClozeTask
from .language_modeling import check_mask_probability
from .objective import Objective
from .task_losses import upcast
from .teaching import Lesson, plain

STAGES = ("pretrain", "task_words", "task_scores")


@dataclass(frozen=True, kw_only=True)
class GLMDOptions:
    """Options of method `glmd`."""

    preset: Literal["strict", "paper"] = "strict"
    """strict: pads are out of the mean's denominator and padded choices out of every softmax. paper: what the authors' code computes,
    pads in the denominator and padded choices in both softmaxes and in the word-prediction loss."""
    temperature: float = 15.0
    """Temperature of word prediction, which carries its square; the authors' 15 is close to regression on centred logits and asks
    for long runs. Task scores are always compared at temperature 1."""
    divergence: str = "forward_kl"
    """Divergence of word prediction; the authors' is forward_kl."""
    teacher_mass: Literal["renormalize", "full", "slots"] = "renormalize"
    """What the teacher says of ids that the student dropped: renormalize, nothing, as in the authors' code; full, that they are likely,
    and the student's kept ids are compared with less than one; slots, what their stand-ins are taught beside their own probability."""
    mask_probability: float = 0.15
    """Share of tokens masked in an encoder's pretrain inputs; the loss covers masked and unmasked positions alike."""

    def __post_init__(self) -> None:
        Divergence.parse(self.divergence)
        check_mask_probability(self.mask_probability)
        check_temperature(self.temperature)
        check_choice("teacher_mass", self.teacher_mass, TEACHER_MASSES)


class WordPrediction(Objective):
    """T^2 mean over positions of KL(softmax(z_t[K] / T) || softmax(z_s / T)), at every position that holds a token.

    K are the student's kept ids; with another `teacher_mass` see `linear_kl_div`, whose slots are those of the student. strict: the
    mean is over tokens. paper: it is over all positions, pads (whose term is zero) included, and the copies that fill short lists of
    choices count as rows.
    """

    student: LanguageModel
    teacher: LanguageModel

    def __init__(
        self, student: LanguageModel, teacher: LanguageModel | CachedTeacher, options: GLMDOptions, tokens: int | None = None
    ) -> None:
        """The teacher's rows that are compared are gathered here.

        Args:
            student: trained, perhaps on a kept vocabulary.
            teacher: frozen, with a row for each of those ids; or what stands for a cache.
            options: the method's.
            tokens: ids that there are, for another `teacher_mass` than renormalize; None: as many as the teacher has.

        Raises:
            ValueError: a teacher that is not frozen, or has fewer rows.
        """
        super().__init__()
        self.student = student
        self.options = options
        self.tokens = min(tokens or vocabulary_rows(teacher), vocabulary_rows(teacher))
        self.learn_from(teacher, Lesson(words=compared_words(options, student.kept, self.tokens)))

    def weight(self, batch: Any) -> float:
        """How many positions are compared; paper: how many the batch has."""
        if self.options.preset == "paper":
            return float(batch.input_ids.numel())
        return float(self.mask(batch).sum())

    def mask(self, batch: Any) -> Tensor:
        """(B, S) bool: the positions that are compared."""
        batch = plain(batch)
        tokens: Tensor = batch.attention_mask.bool()
        if isinstance(batch, ClozeBatch) and self.options.preset == "strict":
            return tokens & batch.choice_mask.reshape(-1, 1)
        return tokens

    def forward(self, batch: Any, denominator: float) -> Tensor:
        """(): T^2 KL summed over the compared positions, divided by the step's number of them."""
        (batch, taught), options, student = self.taught(batch), self.options, self.student
        words = taught.words
        assert words is not None

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            loss, _ = words.divergence(
                hidden,
                weight,
                student_bias=bias,
                divergence=options.divergence,
                temperature=options.temperature,
                mask=self.mask(batch),
                denominator=denominator,
                **self._dropped(),
                **student.logit_options("student"),
            )
            return loss

        return student(batch.input_ids, batch.attention_mask, at_head)

    def _dropped(self) -> dict[str, Any]:
        """What `linear_kl_div` is told of ids that the student dropped, where the teacher speaks of them."""
        student, mass = self.student, self.options.teacher_mass
        if student.vocab_map is None or mass == "renormalize":
            return {}
        slots = student.id_to_slot[: self.tokens]
        if mass == "slots":
            return {"teacher_mass": mass, "vocab_slots": slots}
        return {"teacher_mass": mass, "vocab_index": student.vocab_map.kept_ids.to(slots.device)}


def compared_words(options: GLMDOptions, kept: slice | Tensor, tokens: int) -> slice | Tensor:
    """Rows of the teacher's head that word prediction reads: those behind the student's, or of all `tokens` ids."""
    return kept if options.teacher_mass == "renormalize" or isinstance(kept, slice) else slice(tokens)


@dataclass(frozen=True, eq=False)
class ClozeScores:
    """(model, batch) -> u, (B, C): label-word logits, candidates' log-likelihoods, or class logits."""

    task: ClozeTask
    label_word_ids: Tensor | None = None
    """(C,) ids; of verbalizers."""

    def __call__(self, model: LanguageModel | TaskModel, batch: ClozeBatch) -> Tensor:
        if isinstance(model, TaskModel):
            return model(batch)
        if self.task.kind == "verbalizer":
            assert self.label_word_ids is not None
            return verbalizer_scores(model, batch, self.label_word_ids.to(batch.input_ids.device))
        return choice_scores(model, batch, self.task.length_penalty)


class TaskScores(Objective):
    """mean over examples of -sum_c softmax(u_t)_c log softmax(u_s)_c on task scores u, at temperature 1 and without T^2.

    strict: the copies that fill short lists of choices are in neither softmax. paper: they are in both.
    """

    student: LanguageModel | TaskModel
    teacher: LanguageModel | TaskModel

    def __init__(
        self,
        student: LanguageModel | TaskModel,
        teacher: LanguageModel | TaskModel | CachedTeacher,
        options: GLMDOptions,
        task: ClozeTask,
        label_word_ids: Tensor | None = None,
    ) -> None:
        """Both models are asked for the same scores.

        Args:
            student: trained.
            teacher: frozen; or what stands for a cache.
            options: the method's.
            task: how its scores are made of a language model's words.
            label_word_ids: (C,) int64 teacher ids of the label words; of verbalizers.

        Raises:
            ValueError: a teacher that is not frozen, or a model whose vocabulary does not keep a label word.
        """
        super().__init__()
        for model in (student, teacher):
            if isinstance(model, LanguageModel) and model.vocab_map is not None and label_word_ids is not None:
                check_label_words(task, label_word_ids, model.vocab_map)
        self.student = student
        self.options, self.scores = options, ClozeScores(task, label_word_ids)
        self.learn_from(teacher, Lesson(scores=self.scores))

    def weight(self, batch: Any) -> float:
        """How many examples the batch has."""
        return float(plain(batch).num_examples)

    def forward(self, batch: Any, denominator: float) -> Tensor:
        """(): summed over the batch's examples, divided by the step's number of them."""
        batch, taught = self.taught(batch)
        scores = upcast(self.scores(self.student, batch))
        assert taught.scores is not None
        target = upcast(taught.scores).view_as(scores)
        if self.options.preset == "strict" and scores.shape == batch.choice_mask.shape:
            target = target.masked_fill(~batch.choice_mask, -torch.inf)
            # Zero instead of -inf for the student: its log-softmax there meets a target of exactly zero.
            present = batch.choice_mask
            log_q = scores - scores.masked_fill(~present, -torch.inf).logsumexp(-1, keepdim=True)
        else:
            log_q = scores.log_softmax(-1)
        return -(target.softmax(-1) * log_q).sum() / denominator

    @torch.no_grad()
    def predict(self, batch: ClozeBatch) -> Tensor:
        """(B,) int64 index of the highest score among the real candidates."""
        scores = self.scores(self.student, batch)
        if scores.shape == batch.choice_mask.shape:
            scores = scores.masked_fill(~batch.choice_mask, -torch.inf)
        return scores.argmax(-1)
