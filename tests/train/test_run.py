"""Whole runs on tiny models: the stages hand over, finished ones are kept, a killed run ends bit for bit."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.methods.perplexity import perplexity
from fastkd.models.load import load_language_model, load_tokenizer
from fastkd.models.student import count_parameters
from fastkd.tasks.text import collate_text
from fastkd.train.checkpoint import load_checkpoint
from fastkd.train.config import TextData, read_config
from fastkd.train.data import text_rows
from fastkd.train.loop import NonFiniteError, StageTrainer
from fastkd.train.schema import to_yaml
from fastkd.vocab import storage
from tests import runs, tiny
from tests.runs import LLAMA, glmd, log_lines, same_bits, settings, timeless, trained, weights, write_text

ROOT = Path(__file__).parents[2]


# ---- GLMD end to end


@pytest.mark.parametrize(
    ("make", "kind", "stages"),
    [
        (runs.bert_teacher, "verbalizer", ["pretrain", "task_words", "task_scores"]),
        (runs.bert_teacher, "choices", ["pretrain", "task_words", "task_scores"]),
        (runs.bert_teacher, "classification", ["pretrain", "task_scores"]),
        (runs.llama_teacher, "verbalizer", ["pretrain", "task_words", "task_scores"]),
        (runs.llama_teacher, "choices", ["pretrain", "task_words", "task_scores"]),
    ],
    ids=["encoder-verbalizer", "encoder-choices", "encoder-classification", "decoder-verbalizer", "decoder-choices"],
)
def test_all_stages_run_and_hand_over(tmp_path, make, kind, stages):
    """With a rate of almost nothing in the last stage, its weights are the best ones of the stage before."""
    config = glmd(tmp_path, make(tmp_path), kind, eval_steps=1, warmup_steps=0)
    if kind != "classification":
        config["stages"]["task_scores"] = {"learning_rate": 1e-30, "max_steps": 1}
    results = fastkd.distill(config)
    assert list(results) == stages
    output = tmp_path / "run"
    for name in stages:
        recorded = json.loads((output / name / "result.json").read_text())
        assert len(recorded.pop("identity")) == 64
        assert {**recorded, "student_dir": str(output / name / "student")} == results[name]
        assert results[name]["student_dir"] == str(output / name / "student")
        assert results[name]["steps"] == config["stages"][name].get("max_steps", 4)
        assert (output / name / "log.jsonl").is_file() and (output / name / "loss.png").is_file() == (results[name]["steps"] > 1)
    scores = [line for line in log_lines(output / "task_scores") if "eval_accuracy" in line]
    assert scores[0]["step"] == 0
    if kind == "classification":
        return
    assert scores[0]["eval_accuracy"] == results["task_words"]["scores"]["accuracy"]
    words = [line["eval_accuracy"] for line in log_lines(output / "task_words") if "eval_accuracy" in line]
    assert results["task_words"]["scores"]["accuracy"] == max(words)
    assert results["task_words"]["kept_step"] == 1 + words.index(max(words))
    last, _ = load_checkpoint(output / "task_words" / "checkpoint-4")
    handed, received = (load_language_model(results[name]["student_dir"]) for name in ("task_words", "task_scores"))
    parameters = dict(handed.named_parameters())
    assert same_bits(parameters, {name: last["best"][name] for name in parameters})
    assert same_bits(handed.state_dict(), received.state_dict())
    assert not same_bits(weights(results["pretrain"]), weights(results["task_words"]))


def test_the_student_reopens_with_its_score_and_its_map(tmp_path):
    teacher = runs.llama_teacher(tmp_path)
    config = settings(
        tmp_path, teacher_model_name_or_path=teacher, text=write_text(tmp_path), vocabulary={"keep": 0.5, "multiple_of": 8}
    )
    result = fastkd.distill(config)["pretrain"]
    student = load_language_model(result["student_dir"])
    assert student.vocab_map is not None and student.vocabulary == 352 and student.vocab_map.vocab_size == 700
    assert student.model.config.num_hidden_layers == 1
    assert count_parameters(student) < count_parameters(load_language_model(teacher))
    rows = text_rows(TextData(**config["text"]), load_tokenizer(result["student_dir"]), tmp_path / "own", causal=True).eval
    batch = collate_text([rows[i] for i in range(len(rows))], pad_id=0, masking=None, generator=torch.Generator())
    assert perplexity(student, [batch]) == pytest.approx(result["scores"]["perplexity"], rel=1e-6)
    assert [line["eval_perplexity"] for line in log_lines(tmp_path / "run" / "pretrain") if "eval_perplexity" in line] == [
        result["scores"]["perplexity"]
    ]


def test_finished_stages_are_kept(tmp_path, monkeypatch):
    config = glmd(tmp_path, runs.bert_teacher(tmp_path))
    results = fastkd.distill(config, only_stage="pretrain")
    monkeypatch.setattr(StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))
    assert list(results) == ["pretrain"] and not (tmp_path / "run" / "task_words").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "pretrain").rglob("*")}
    assert fastkd.distill(config, only_stage="pretrain") == results
    with pytest.raises(pytest.fail.Exception, match="a step was taken"):  # the stages after it are not finished
        fastkd.distill(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "pretrain").rglob("*")} == before


def test_stages_one_by_one_are_the_whole_run(tmp_path):
    teacher = runs.bert_teacher(tmp_path)
    whole = fastkd.distill(glmd(tmp_path, teacher))
    parts = glmd(tmp_path, teacher, output_dir=str(tmp_path / "parts"))
    for name in whole:
        assert same_bits(weights(fastkd.distill(parts, only_stage=name)[name]), weights(whole[name]))


def test_labels_of_training_rows_change_nothing(tmp_path):
    """GLMD has no labels in its losses; those of the evaluation rows alone are read, to select."""
    teacher = runs.bert_teacher(tmp_path)
    config = glmd(tmp_path, teacher)
    first = fastkd.distill(config)
    rows = [json.loads(line) for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {0, 1}
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))
    second = fastkd.distill({**config, "output_dir": str(tmp_path / "other")})
    for name in first:
        assert same_bits(weights(first[name]), weights(second[name]))


def test_the_seed_decides(tmp_path):
    teacher, text = runs.bert_teacher(tmp_path), write_text(tmp_path)
    found = [
        fastkd.distill(settings(tmp_path, teacher_model_name_or_path=teacher, text=text, seed=seed, output_dir=str(tmp_path / name)))
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    a, b, c = (weights(result["pretrain"]) for result in found)
    assert same_bits(a, b) and not same_bits(a, c)


# ---- the other methods, and where a student comes from


def test_a_decoder_from_nothing_learns(tmp_path):
    tiny.byte_level().save_pretrained(tmp_path / "tokenizer")
    config = settings(
        tmp_path,
        method="lm",
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
        student=LLAMA,
        text=write_text(tmp_path),
        max_steps=60,
        eval_steps=20,
        learning_rate=0.01,
    )
    result = fastkd.distill(config)["train"]
    curve = [line["eval_perplexity"] for line in log_lines(tmp_path / "run" / "train") if "eval_perplexity" in line]
    assert len(curve) == 3 and curve[0] > curve[1] > curve[2] == result["scores"]["perplexity"] < 350  # 700 ids
    model = load_language_model(result["student_dir"]).model
    assert model.config.model_type == "llama" and model.config.vocab_size == 700
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, 0, 0)  # the tokenizer's


@pytest.mark.parametrize("method", ["kd", "glmd"])
@pytest.mark.parametrize("make", [runs.bert_teacher, runs.llama_teacher], ids=["encoder", "decoder"])
def test_a_teacher_teaches(tmp_path, method, make):
    """The loss falls, on a kept vocabulary and on all of it."""
    teacher, text = make(tmp_path), write_text(tmp_path)
    for vocabulary in (None, {"keep": 0.5, "multiple_of": 8}):
        config = settings(
            tmp_path,
            method=method,
            teacher_model_name_or_path=teacher,
            text=text,
            vocabulary=vocabulary,
            max_steps=40,
            learning_rate=0.01,
            options={"temperature": 2.0},
            output_dir=str(tmp_path / f"run-{vocabulary is None}"),
        )
        (result,) = fastkd.distill(config).values()
        losses = [line["loss"] for line in log_lines(Path(result["student_dir"]).parent) if "loss" in line]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_named_student_keeps_its_weights_and_a_mapped_one_its_map(tmp_path):
    teacher, named = runs.bert_teacher(tmp_path), runs.bert_teacher(tmp_path, 5)
    shared = {
        "teacher_model_name_or_path": teacher,
        "text": write_text(tmp_path),
        "student": {},
        "max_steps": 1,
        "learning_rate": 1e-30,
    }
    config = settings(tmp_path, **shared, model_name_or_path=named, vocabulary={"keep": 0.5, "multiple_of": 8})
    first = fastkd.distill(config)["pretrain"]
    student, whole = load_language_model(first["student_dir"]), load_language_model(named)
    torch.testing.assert_close(student.head.weight, whole.head.weight[student.vocab_map.kept_ids], rtol=0, atol=0)
    again = settings(tmp_path, **shared, model_name_or_path=first["student_dir"], output_dir=str(tmp_path / "again"))
    second = fastkd.distill(again)["pretrain"]
    assert same_bits(weights(first), weights(second))
    assert torch.equal(load_language_model(second["student_dir"]).vocab_map.kept_ids, student.vocab_map.kept_ids)


@pytest.mark.parametrize("method", ["glmd", "kd"])
def test_rows_that_only_pad_a_vocabulary_change_nothing(tmp_path, method, caplog):
    """The same models with 20 rows more, on either side: one log line, the same student."""
    tokenizer, text = tiny.byte_level(), write_text(tmp_path)
    folders = {}
    for padding in (0, 20):
        for seed in (1, 5):
            model = tiny.llama(len(tokenizer) + 20, seed)
            if not padding:
                model.resize_token_embeddings(len(tokenizer))
            folders[seed, padding] = tiny.save(tmp_path / f"{seed}-{padding}", model, tokenizer)
    found = []
    with caplog.at_level(logging.INFO, logger="fastkd"):
        for teacher, student in ((0, 0), (20, 0), (0, 20), (20, 20)):
            config = settings(
                tmp_path,
                method=method,
                teacher_model_name_or_path=folders[1, teacher],
                model_name_or_path=folders[5, student],
                student={},
                text=text,
                output_dir=str(tmp_path / f"run-{teacher}-{student}"),
            )
            (result,) = fastkd.distill(config).values()
            found.append(weights(result))
    assert all(same_bits(found[0], other) for other in found[1:])
    assert sum("vocabulary is padded: 720 rows for 700 ids" in message for message in caplog.messages) == 4


# ---- exact resume

KILL = """
import os, signal, sys
from fastkd import distill
from fastkd.methods import registry
from fastkd.train import loop

moment, config = sys.argv[1:]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if moment == "mid-step":
    original = loop.seed_global_generators
    loop.seed_global_generators = lambda seed, number, use: kill() if number == 11 else original(seed, number, use)
else:
    build = registry.build_stage
    from fastkd.train import run
    run.build_stage = lambda spec, inputs: kill() if spec.name == moment else build(spec, inputs)
distill(config)
"""


def test_killed_twice_ends_bit_for_bit(tmp_path):
    """SIGKILL in the second micro-batch of a step in mid-epoch, then between two stages; dropout, masking, accumulation of 2."""
    teacher = runs.bert_teacher(tmp_path)
    config = glmd(tmp_path, teacher, max_steps=8, gradient_accumulation_steps=2, eval_steps=3, save_steps=2)
    assert load_language_model(teacher).model.config.hidden_dropout_prob > 0
    whole = fastkd.distill({**config, "output_dir": str(tmp_path / "whole")})
    (tmp_path / "run.yaml").write_text(to_yaml(read_config(config)))
    output = tmp_path / "run"
    for moment in ("mid-step", "task_words"):
        killed = subprocess.run([sys.executable, "-c", KILL, moment, str(tmp_path / "run.yaml")], cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
        steps = [line["step"] for line in log_lines(output / "pretrain")]
        assert max(steps) == (5 if moment == "mid-step" else 8)
        assert (output / "pretrain" / "result.json").exists() == (moment == "task_words")
    assert not list((output / "task_words").glob("checkpoint-*"))
    resumed = fastkd.distill(tmp_path / "run.yaml")
    for name in whole:
        assert same_bits(weights(whole[name]), weights(resumed[name]))
        assert log_lines(tmp_path / "whole" / name) == log_lines(output / name)
        expected, found = (timeless({**results[name], "student_dir": ""}) for results in (whole, resumed))
        assert expected == found


def test_a_half_written_vocabulary_map_is_made_again(tmp_path, monkeypatch):
    """Stopped between its two files: what is there is no map, and the next run makes one."""
    config = settings(
        tmp_path, teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=write_text(tmp_path), vocabulary={"keep": 0.5}
    )
    save_record = storage.save_record

    def halve(directory: Path, kind: str, *arguments: Any) -> None:
        save_record(directory, kind, *arguments)
        if kind == "vocab_map":
            (directory / "vocab_map.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastkd.vocab.map.save_record", halve)
        with pytest.raises(KeyboardInterrupt):
            fastkd.distill(config)
    assert fastkd.distill(config)["pretrain"]["steps"] == 4


# ---- a loss that is not finite


def test_a_non_finite_loss_keeps_the_last_weights(tmp_path):
    config = settings(
        tmp_path,
        teacher_model_name_or_path=runs.bert_teacher(tmp_path),
        text=write_text(tmp_path),
        learning_rate=1e36,
        warmup_steps=0,
        save_steps=1,
    )
    with pytest.raises(NonFiniteError, match=r"Step 2 of stage pretrain has loss .*rows are \[\d+, \d+, \d+, \d+\]\..*learning_rate"):
        fastkd.distill(config)
    assert trained(tmp_path / "run") == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """A step may be finite and what it makes not, with an epsilon of almost nothing, say."""
    run = StageTrainer.run

    def spoiled(trainer):
        result = run(trainer)
        next(trainer.stage.objective.student.parameters()).data[0] = torch.nan
        return result

    monkeypatch.setattr(StageTrainer, "run", spoiled)
    config = settings(tmp_path, method="kd", teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=write_text(tmp_path))
    with pytest.raises(NonFiniteError, match=r"has made weights that are not finite.*does not save them"):
        fastkd.distill(config)
    assert not (tmp_path / "run" / "distill" / "student").exists() and not (tmp_path / "run" / "distill" / "result.json").exists()


def test_a_student_that_cannot_be_is_refused_before_any_row_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.train.run.train_corpus", lambda *_: pytest.fail("the corpus was opened"))
    teacher = runs.bert_teacher(tmp_path)
    vocabulary = {"keep": 0.5, "multiple_of": 8}
    config = settings(tmp_path, method="kd", teacher_model_name_or_path=teacher, text=write_text(tmp_path), vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"student\.hidden_size"):
        fastkd.distill({**config, "student": {"hidden_size": 33}})
