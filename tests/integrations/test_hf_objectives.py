"""What KDTrainer learns from: which tokens, which teacher, which ids; and models and rows of which something would be left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastkd.integrations.hf import KDTrainer
from fastkd.integrations.hf_models import batch_of
from fastkd.integrations.hf_objectives import make_objective
from fastkd.methods.kd import KDOptions
from fastkd.methods.language_modeling import LanguageModeling
from fastkd.methods.objective import Stage
from fastkd.models.language_model import LanguageModel
from fastkd.train.config import StageArguments
from fastkd.train.loop import StageTrainer
from tests import tiny
from tests.integrations.test_hf import arguments, collate, pair, text_rows

pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'fastkd[hf]'")


def completions(*, left: bool = False) -> dict[str, Tensor]:
    """Rows of 4 and 12 tokens, padded to 12 on one side; the first two of a row are a prompt, whose labels are -100."""
    ids = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    if not left:
        mask = mask.flip(1)
    labels = torch.where(mask.bool(), ids, -100)
    for row, first in zip(labels, mask.argmax(1), strict=True):
        row[first : first + 2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def divergence(student: Any, teacher: Any, inputs: dict[str, Tensor], counted: Tensor) -> Tensor:
    """mean over `counted` (B, S - 1) of KL(teacher, student), as TRL's trainers write it."""
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    log_p, log_q = (model(**asked).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[counted].mean()


@pytest.mark.parametrize("left", [False, True])
def test_a_decoders_divergence_is_over_completions_alone_as_trls(left: bool):
    student, teacher = pair("gpt2")
    inputs = completions(left=left)
    labelled = inputs["labels"][:, 1:] != -100
    expected = divergence(student, teacher, inputs, labelled)
    objective = make_objective(student, teacher, "kd", {"temperature": 1.0, "label_weight": 0.0})
    batch = batch_of(inputs, objective.student)
    torch.testing.assert_close(objective(batch, objective.weight(batch)), expected, rtol=1e-5, atol=0)
    assert objective.weight(batch).tolist() == [int(labelled.sum())] * 2

    prompts_too = make_objective(student, teacher, "kd", {"temperature": 1.0, "label_weight": 0.0, "completion_only": False})
    weight = prompts_too.weight(batch)
    assert weight[0] == inputs["attention_mask"].sum() and not torch.isclose(prompts_too(batch, weight), expected, rtol=1e-3)


def test_an_encoders_divergence_is_over_all_tokens():
    """Its labels are the few masked ones, and its teacher says something of all."""
    student, teacher = pair("bert")
    inputs = {**completions(), "labels": torch.full((2, 12), -100)}
    inputs["labels"][:, 3] = 7
    objective = make_objective(student, teacher, "kd", {})
    weight = objective.weight(batch_of(inputs, objective.student))
    assert weight.tolist() == [16, 2]
    assert KDOptions().completion_only is False


@pytest.mark.parametrize("completion_only", [False, True])
def test_under_left_padding_a_pads_label_is_neither_counted_nor_summed(completion_only: bool):
    """The pad before the first token predicts it, by the shift."""
    student, teacher = pair("gpt2")
    inputs = completions(left=True)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    predicted = torch.where(inputs["attention_mask"].bool()[:, :-1], inputs["labels"][:, 1:], -100)
    expected = functional.cross_entropy(student(**asked).logits[:, :-1].flatten(0, 1), predicted.flatten())
    objective = make_objective(student, teacher, "kd", {"completion_only": completion_only})
    batch = batch_of(inputs, objective.student)
    objective(batch, objective.weight(batch))
    torch.testing.assert_close(objective.terms["labels"], expected, rtol=1e-5, atol=0)


def test_a_batch_of_prompts_alone_is_zero():
    student, teacher = pair("gpt2")
    inputs = {**completions(), "labels": torch.full((2, 12), -100)}
    objective = make_objective(student, teacher, "kd", {})
    loss = objective(batch_of(inputs, objective.student), np.array([0.0, 0.0]))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("method", ["kd", "crild"])
def test_a_teacher_may_be_a_folder(method: str, tmp_path: Path):
    student, teacher = pair("bert", None if method == "kd" else "SequenceClassification")
    teacher.save_pretrained(tmp_path)
    given, loaded = (make_objective(copy.deepcopy(student), source, method, {}) for source in (teacher, tmp_path))
    for one, other in zip(given.teacher.model.parameters(), loaded.teacher.model.parameters(), strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    with pytest.raises((ValueError, OSError), match=r"none/at/all does not exist; give a folder"):
        KDTrainer(student, arguments(tmp_path), teacher="none/at/all", method=method)
    with pytest.raises(ValueError, match="nope/x is no folder, and no model of that name is on this machine or can be fetched"):
        KDTrainer(student, arguments(tmp_path), teacher="nope/x", method=method)


def test_a_teacher_with_fewer_ids_is_refused_with_what_would_do(tmp_path: Path):
    student, teacher = pair("gpt2")
    student.resize_token_embeddings(210, mean_resizing=False)
    with pytest.raises(
        ValueError, match=r"student has 210 vocabulary rows and the teacher 200.* student.resize_token_embeddings\(200\)"
    ):
        KDTrainer(student, arguments(tmp_path), teacher=teacher, method="kd")
    student.resize_token_embeddings(200)
    KDTrainer(student, arguments(tmp_path), teacher=teacher, method="kd", train_dataset=text_rows(), data_collator=collate).train()


def test_models_of_different_tokenizers_are_refused(tmp_path: Path):
    """By the tokenizers saved with them, or by that of the rows."""
    tokenizer, other = tiny.byte_level(600), tiny.byte_level(650)
    folders = [tiny.save(tmp_path / name, tiny.llama(650), each) for name, each in (("student", tokenizer), ("teacher", other))]
    student, teacher = (type(tiny.llama(650)).from_pretrained(folder) for folder in folders)

    def made(tokenizer: Any = None) -> KDTrainer:
        return KDTrainer(copy.deepcopy(student), arguments(tmp_path), teacher=teacher, method="kd", processing_class=tokenizer)

    made()  # the ids that both have are the same tokens: one is the beginning of the other
    made(copy.deepcopy(other))
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"tokenizers differ \(650 and 601 tokens\): id 600 is '.*' for the teacher and '<pad>'"):
        made(padded)
    words = tiny.wordpiece()
    with pytest.raises(ValueError, match="Teacher and student tokenizers differ"):
        made(words)
    words.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="Teacher and student tokenizers differ"):
        made()


def mixture(**settings: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=200, num_local_experts=2, **shape, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_with_a_routers_loss_is_refused(dtype: torch.dtype, tmp_path: Path):
    """By Trainer's form and by the driver; as a teacher, whose loss nobody makes, it is taken."""
    student = mixture(output_router_logits=True, router_aux_loss_coef=10.0).to(dtype)
    for method, teacher in (("lm", None), ("kd", mixture())):
        with pytest.raises(ValueError, match=r"MixtralForCausalLM computes another loss .*output_router_logits"):
            KDTrainer(student, arguments(tmp_path), teacher=teacher, method=method)
    objective = LanguageModeling(LanguageModel(student))
    stage = Stage("lm", objective, np.array([3]), lambda *_: None, None, "none", True)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"MixtralForCausalLM computes another loss .*output_router_logits"):
        StageTrainer(stage, StageArguments(max_steps=1), tmp_path, seed=0)
    KDTrainer(mixture(), arguments(tmp_path), teacher=student, method="kd")


@pytest.mark.parametrize("name", ["position_ids", "completion_mask", "inputs_embeds"])
@pytest.mark.parametrize("own_collator", [False, True])
def test_columns_that_trainer_would_drop_are_refused(name: str, own_collator: bool, tmp_path: Path):
    student, teacher = pair("gpt2")
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4), name: torch.zeros(4)}] * 8
    more = {"data_collator": collate} if own_collator else {}
    trainer = KDTrainer(student, arguments(tmp_path), teacher=teacher, method="kd", train_dataset=rows, **more)
    with pytest.raises(ValueError, match=f"The rows have {name}, of which fastkd makes nothing. Remove the column"):
        trainer.train()

    def read(rows: list[dict[str, Any]]) -> dict[str, Tensor]:  # as TRL's collator does
        assert name in rows[0]
        return collate(rows)

    kept = arguments(tmp_path, remove_unused_columns=False)
    KDTrainer(student, kept, teacher=teacher, method="kd", train_dataset=rows, data_collator=read).train()
    for row in rows:
        row["number"] = row.pop(name, None)  # what no model reads is left out, as by Trainer
    KDTrainer(student, arguments(tmp_path), teacher=teacher, method="kd", train_dataset=rows, **more).train()
