"""GLMD against the numbers of its authors' own code: losses from hidden states, and vocabularies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fastkd.methods.glmd import ClozeScores, GLMDOptions, TaskScores, WordPrediction
from fastkd.methods.objective import Objective
from fastkd.models.language_model import LanguageModel
from fastkd.tasks.cloze import ClozeBatch
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.tasks.text import TextBatch
from fastkd.vocab.map import VocabMap
from tests.authors import Case, assert_authors, cases
from tests.oracle import assert_close


class States(PreTrainedModel):
    """Hidden states of one batch, which are what is trained, and the head that reads them."""

    config_class = PretrainedConfig

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__(PretrainedConfig(vocab_size=weight.shape[0], hidden_size=weight.shape[1]))
        self.hidden = nn.Parameter(hidden.clone())
        self.lm_head = nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
        self.lm_head.weight = nn.Parameter(weight.clone())

    def get_input_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        if input_ids.shape == self.hidden.shape[:2]:
            return SimpleNamespace(logits=self.lm_head(self.hidden))
        states = self.lm_head.weight[input_ids]  # LanguageModel looks at a model before it is used: every id is seen everywhere
        return SimpleNamespace(logits=self.lm_head(states + states.mean(1, keepdim=True)))


def models(case: Case) -> tuple[LanguageModel, LanguageModel]:
    """The student on its kept vocabulary, and the frozen teacher."""
    vocab_map = VocabMap(case.tensor("vocabulary/kept_ids"), case.tensor("vocabulary/id_to_slot"))
    states = {
        role: States(case.tensor(f"{case['batch']}{role}_hidden"), case.tensor(f"{role}_weight")) for role in ("student", "teacher")
    }
    teacher = LanguageModel(states["teacher"]).eval().requires_grad_(False)
    return LanguageModel(states["student"], vocab_map), teacher


def cloze_batch(case: Case) -> ClozeBatch:
    inputs = case.under(case["batch"])
    return ClozeBatch(**{name: inputs[name] for name in ClozeBatch.__dataclass_fields__})


def check(case: Case, objective: Objective, batch: Any) -> None:
    student = objective.student
    loss = objective.train()(batch, objective.weight(batch))
    assert_authors(case, loss, {"student_hidden": student.model.hidden, "student_weight": student.head.weight})


@pytest.mark.parametrize("case", cases("glmd", "pretrain", "task_words"), ids=lambda case: case.name)
def test_word_prediction(case: Case) -> None:
    inputs = case.under(case["batch"])
    text = TextBatch(inputs["input_ids"], inputs["attention_mask"], torch.full_like(inputs["input_ids"], -100))
    batch = text if case["stage"] == "pretrain" else cloze_batch(case)
    check(case, WordPrediction(*models(case), GLMDOptions(preset=case["preset"], **case["options"])), batch)


@pytest.mark.parametrize("case", cases("glmd", "task_scores"), ids=lambda case: case.name)
def test_task_scores(case: Case) -> None:
    words, batch = case.under(case["batch"]).get("label_word_ids"), cloze_batch(case)
    if case["kind"] == "verbalizer":
        task = ClozeTask(kind="verbalizer", template="{text} {mask}", label_words=("a", "b", "c"))
    else:
        penalty = case["length_penalty"]
        task = ClozeTask(kind="choices", template="{text} {choice}", choices_column="choices", length_penalty=penalty)
    student, teacher = models(case)
    with torch.no_grad():
        for role, model in (("student", student), ("teacher", teacher)):
            assert_close(ClozeScores(task, words)(model, batch), case.own(f"{role}_scores"), case["tolerance"]["value"], role)
    options = GLMDOptions(preset=case["preset"], **case["options"])
    check(case, TaskScores(student, teacher, options, task, words), batch)


def vocabulary(name: str) -> Case:
    return next(case for case in cases("glmd", "vocabulary") if case.name == name)


def test_stand_ins() -> None:
    case = vocabulary("glmd/stand_ins")
    embedding, kept = case.own("embedding"), case.own("kept_ids")
    id_to_slot = torch.full((len(embedding),), -1)
    id_to_slot[kept] = torch.arange(len(kept))
    for similarity in case["options"]["similarities"]:
        unk_id = case["options"]["unk_id"] if similarity == "unk" else None
        made = VocabMap(kept, id_to_slot).assign_stand_ins(embedding, similarity, unk_id=unk_id)
        assert torch.equal(made.id_to_slot, case.own(similarity)), similarity


def test_kept_ids() -> None:
    case = vocabulary("glmd/kept_ids")
    counts, protected, kept = case.own("counts"), case.own("protected").tolist(), case.own("kept_ids").long()
    made = VocabMap.from_counts(counts, protected=protected, **case["options"])
    assert sorted(made.kept_ids.tolist()) == sorted(kept.tolist())
    # Among the others ids of equal counts stand in another order: the corpus's there, here that of ids.
    ours, theirs = ([counts[id].item() for id in ids.tolist() if id not in protected] for ids in (made.kept_ids, kept))
    assert ours == theirs
