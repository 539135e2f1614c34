"""The head of CR-ILD's code: what it computes, that a run of all stages keeps it, and that nothing takes it for BERT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastkd
from fastkd.methods.registry import METHODS
from fastkd.models.load import load_config, save_model
from fastkd.models.relu_head import BertWithReLUHead
from fastkd.models.student import load_student
from fastkd.models.task_model import TaskHead, TaskModel, build_task_model, load_task_model
from fastkd.tasks.encoded import TaskBatch
from fastkd.train.config import DatasetArguments
from fastkd.train.evaluate import evaluate_on_task
from fastkd.train.readme import for_whom
from tests import runs, tiny
from tests.oracle import assert_close, relative_error

HEAD = TaskHead("classification", 2, relu=True)


def batch() -> TaskBatch:
    ids = torch.randint(5, 100, (6, 9), generator=torch.Generator().manual_seed(0))
    return TaskBatch(ids, torch.ones_like(ids), None, torch.zeros(6, dtype=torch.int64))


def pooled(model: TaskModel) -> torch.Tensor:
    output: torch.Tensor = model.model.bert(batch().input_ids, batch().attention_mask).pooler_output
    return output


def test_scores_are_linear_relu_of_the_pooler_without_dropout() -> None:
    config = tiny.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.9).config
    model = build_task_model(config, HEAD, seed=1).train()
    linear = model.model.classifier[1]
    assert isinstance(model.model, BertWithReLUHead) and linear.weight.std() > 0.1, "drawn as BERT draws, by initializer_range"
    assert bool((pooled(model) < -0.1).any())
    assert_close(model(batch()), pooled(model).relu() @ linear.weight.T + linear.bias, 1e-6)


def run(folder: Path, **more: Any) -> dict[str, Any]:
    return runs.settings(
        folder,
        **{
            "method": "crild",
            "teacher_model_name_or_path": runs.bert_teacher(folder, num_hidden_layers=4),
            "model_name_or_path": runs.bert_teacher(folder, num_hidden_layers=4),
            "student_layers": "first:2",
            "student": {},
            "dataset": runs.write_dataset(folder),
            "options": {"preset": "paper_script", "relu_head": True},
            "stages": {spec.name: {} for spec in METHODS["crild"].stages},
            "max_steps": 2,
            **more,
        },
    )


def test_all_stages_of_a_run_have_it_and_fastkd_alone_reads_what_they_leave(tmp_path: Path) -> None:
    results = fastkd.distill(run(tmp_path))
    folders = [results["teacher"]["teacher_dir"], results["ild"]["student_dir"], results["kd"]["student_dir"]]
    for folder in folders:
        model = load_task_model(folder, TaskHead("classification", 2), seed=0, needs_head=True)
        linear = model.eval().model.classifier[1]
        assert isinstance(model.model, BertWithReLUHead)
        assert_close(model(batch()), pooled(model).relu() @ linear.weight.T + linear.bias, 1e-6)
    scores = evaluate_on_task({"student": folders[-1]}, DatasetArguments(**runs.write_dataset(tmp_path)), use_cpu=True)
    assert scores["models"]["student"]["scores"]["accuracy"] == results["kd"]["scores"]["accuracy"]
    assert "is for fastkd alone; no class of transformers has the head that relu_head gives it" in for_whom(Path(folders[-1]))
    assert "no class of transformers has the head" in (Path(folders[-1]) / "README.md").read_text()
    with pytest.raises(ValueError, match="has the head of relu_head, which no class of transformers has, so it cannot be exported"):
        load_student(folders[-1])


@pytest.mark.parametrize("kind", ["AutoModelForSequenceClassification", "BertForSequenceClassification", "AutoModel", "BertModel"])
def test_plain_transformers_refuses_it(tmp_path: Path, kind: str) -> None:
    """It would draw a classifier of its own."""
    save_model(build_task_model(tiny.bert().config, HEAD, seed=1), tiny.wordpiece(), tmp_path)
    with pytest.raises(Exception, match="fastkd_relu_head_open_it_by_fastkd"):
        getattr(transformers, kind).from_pretrained(tmp_path)
    assert load_config(str(tmp_path)).vocab_size == 600


def test_the_head_of_a_plain_bert_is_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trained head for .*classifier\.1"):
        load_task_model(runs.bert_classifier(tmp_path), HEAD, seed=0, needs_head=True)


@pytest.mark.parametrize(("architecture", "kind"), [("roberta", "classification"), ("bert", "question_answering")])
def test_other_models_and_other_heads_are_refused(tmp_path: Path, architecture: str, kind: Any) -> None:
    model = tiny.transformer(architecture, "MaskedLM", seed=1, vocab_size=100)
    folder = tiny.save(tmp_path / architecture, model, tiny.wordpiece())
    with pytest.raises(ValueError, match=f"relu_head is the head of a BERT that scores rows, and this is a {architecture} for {kind}"):
        load_task_model(folder, TaskHead(kind, 2, relu=True), seed=0)


def test_a_run_with_another_model_is_refused_before_its_first_step(tmp_path: Path) -> None:
    model = tiny.transformer("roberta", "MaskedLM", seed=1, vocab_size=len(tiny.wordpiece()) + 4)
    roberta = tiny.save(tmp_path / "roberta", model, tiny.wordpiece())
    configuration = run(tmp_path, teacher_model_name_or_path=roberta, model_name_or_path=roberta)
    with pytest.raises(ValueError, match="relu_head is the head of the authors' BERT, and a model is roberta; set it to false"):
        fastkd.distill(configuration)
    assert not runs.trained(tmp_path / "run")


def test_without_the_option_scores_are_others(tmp_path: Path) -> None:
    ours, plain = (
        build_task_model(tiny.bert().config, TaskHead("classification", 2, relu=relu), seed=1).eval() for relu in (True, False)
    )
    assert relative_error(plain(batch()), ours(batch())) > 0.01
