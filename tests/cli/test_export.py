"""`fastkd export` as people call it: what plain transformers and ONNX Runtime make of the folder is what the student says."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

import fastkd
from fastkd import store
from fastkd.cli.main import main
from fastkd.models import onnx_export
from fastkd.models.student import load_student
from tests import runs, tiny
from tests.train.test_evaluate import pruned


@pytest.fixture
def distilled(tmp_path):
    """A classifier of CR-ILD's last stage."""
    teacher = runs.bert_classifier(tmp_path)
    data = runs.write_dataset(tmp_path)
    config = runs.settings(
        tmp_path,
        method="crild",
        teacher_model_name_or_path=teacher,
        model_name_or_path=teacher,
        student_layers="first:1",
        student={},
        dataset=data,
        stages={"kd": {}},
    )
    return fastkd.distill(config)["kd"], data, teacher


def test_a_classifier_its_card_and_its_onnx_file(tmp_path, capsys, distilled, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result, data, teacher = distilled
    folder, exported = result["student_dir"], tmp_path / "small"
    judge = ["eval", folder, "--teacher", teacher, "--task", "glue/rte", "--path", data["path"], "--max_length", "32", "--use_cpu"]
    assert main([*judge, "--output_dir", str(tmp_path / "eval")]) == 0
    evaluation = json.loads((tmp_path / "eval" / "results.json").read_text())
    capsys.readouterr()
    assert main(["export", folder, "--output_dir", str(exported), "--results", str(tmp_path / "eval" / "results.json"), "--onnx"]) == 0
    shown = capsys.readouterr().out
    assert "model.onnx differs from torch by" in shown and "AutoTokenizer and AutoModel open it" in shown

    student, plain = load_student(folder), AutoModelForSequenceClassification.from_pretrained(exported).eval()
    batch = AutoTokenizer.from_pretrained(exported)(list(tiny.lines()[:5]), padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, student(SimpleNamespace(**batch)), rtol=0, atol=0)
    assert runs.same_bits(runs.weights(str(exported)), runs.weights(folder))

    text = (exported / "README.md").read_text()
    card = ModelCard(text).data
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.eval_results if r.dataset_split}
    assert measured == {("glue-rte", name): value for name, value in evaluation["models"]["student"]["scores"].items()}
    assert not [r for r in card.eval_results if not r.dataset_split]  # the run's own figure is of the same metric and rows
    assert card.tags == ["fastkd", "knowledge-distillation", "crild", "onnx"] and card.base_model is None
    assert f"| kd | student | {result['steps']} | {result['kept_step']} | {result['tokens']:,} |" in text
    assert str(tmp_path) not in text and str(tmp_path) not in (exported / "fastkd.json").read_text()

    monkeypatch.chdir(tmp_path)  # where the card's code finds "small"
    found: dict[str, object] = {}
    code = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    exec(code[0], found)
    by_torch = found["outputs"].logits.detach().numpy()
    exec(code[1], found)
    np.testing.assert_allclose(found["outputs"][0], by_torch, rtol=1e-4, atol=1e-5)


def test_filters_are_stripped_and_a_copy_without_a_record_has_none(tmp_path, distilled):
    """A student folder that somebody made by hand: other tensors in its file, and no fastkd.json."""
    folder = shutil.copytree(distilled[0]["student_dir"], tmp_path / "copy")
    (folder / "fastkd.json").unlink()
    tensors = runs.weights(str(folder))
    more = {**tensors, "student_filters.0.weight": torch.ones(4, 4)}
    safetensors.torch.save_file(more, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(folder), "--output_dir", str(tmp_path / "small")]) == 0
    assert runs.same_bits(runs.weights(str(tmp_path / "small")), tensors)
    assert "- Teacher: not recorded\n" in (tmp_path / "small" / "README.md").read_text()
    assert not {"fastkd.json", "model.onnx"} & {path.name for path in (tmp_path / "small").iterdir()}


def test_an_onnx_file_that_differs_leaves_nothing(tmp_path, capsys, monkeypatch):
    student = runs.bert_teacher(tmp_path)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(save=lambda path: path.write_bytes(b"half")))
    monkeypatch.setattr(onnx_export, "_forget_where_it_was_made", lambda _: None)
    monkeypatch.setattr(onnx_export, "onnx_difference", lambda *_: 0.25)
    before = sorted(tmp_path.iterdir())
    assert main(["export", student, "--output_dir", str(tmp_path / "small"), "--onnx"]) == 2
    assert "differs from torch by 0.25 (relative), and 0.0001 is allowed" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def without_its_map(folder: Path) -> str:
    """A mapped student, as earlier versions saved it, copied without its vocab_map/."""
    student = Path(pruned(folder, runs.bert_teacher(folder), 0.5))
    shutil.rmtree(student / "vocab_map")
    settings = json.loads((student / "config.json").read_text())
    own = {"model_type": "bert", "vocab_size": settings["mapped_vocab_size"]}
    (student / "config.json").write_text(json.dumps({**settings, **own}))
    return str(student)


def of_another_tokenizer(folder: Path) -> str:
    return tiny.save(folder / "another", tiny.bert(512), tiny.wordpiece())


def test_added_tokens_that_have_no_row_are_exported_as_they_are(tmp_path):
    """As those of gemma-3 and CodeLlama, which no text holds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs.bert_teacher(tmp_path))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    student = tiny.save(tmp_path / "student", tiny.bert(600), tokenizer)
    assert main(["export", student, "--output_dir", str(tmp_path / "small")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == 601


def headless(folder: Path) -> str:
    return tiny.save(folder / "headless", tiny.transformer("bert", ""), tiny.wordpiece())


@pytest.mark.parametrize(
    ("make", "flags", "sentence"),
    [
        (runs.llama_teacher, ["--onnx"], "is a decoder, and ONNX files are made of encoders alone"),
        (runs.bert_teacher, ["--results", "RESULTS"], "judges runs/other/student on glue/rte, and the card is of"),
        (runs.bert_teacher, ["--results", "NOWHERE"], "NOWHERE"),
        (runs.bert_teacher, ["--results", "/dev/full"], "/dev/full: it is no regular file"),
        (runs.bert_teacher, ["--results", "EMPTY"], "is no file that `fastkd eval --output_dir` writes"),
        (without_its_map, [], "has 304 vocabulary rows, and 296 tokens of its tokenizer have ids beyond them. Give it the tokenizer"),
        (of_another_tokenizer, [], "has 512 vocabulary rows, and 88 tokens of its tokenizer have ids beyond them"),
        (headless, [], "was saved as BertModel, which has no head for words, classes or answers"),
        (lambda folder: str(folder / "none"), [], "does not exist; give a folder made by save_pretrained"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, make, flags, sentence):
    judged = {"model_name_or_path": "runs/other/student", "scores": {"accuracy": 0.5}, "parameters": 1}
    data, versions = {"task": "glue/rte", "split": "validation", "examples": 8}, {"fastkd": "1", "torch": "2"}
    other = {"data": data, "settings": {"batch_size": 4, "max_length": 32}, "versions": versions, "models": {"student": judged}}
    (tmp_path / "RESULTS").write_text(json.dumps(other))
    (tmp_path / "EMPTY").write_text("{}")
    student = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    places = [str(tmp_path / word) if word.isupper() else word for word in flags]
    assert main(["export", student, "--output_dir", str(tmp_path / "small"), *places]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line)
    assert error.startswith("fastkd export: ") and sentence in error
    assert sorted(tmp_path.iterdir()) == before


def small_files() -> None:
    """The operating system refuses to let a file grow beyond 16 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_nothing_and_names_the_folder(tmp_path):
    student = runs.bert_teacher(tmp_path)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "fastkd", "export", student, "--output_dir", str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("fastkd export: ") and f"writing the model {tmp_path / 'small'}" in told and "File too large" in told
    assert sorted(tmp_path.iterdir()) == before


def test_no_space_for_the_card_is_told_with_its_file(tmp_path, capsys, monkeypatch):
    student = runs.bert_teacher(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "write_bytes_synced", full)
    capsys.readouterr()
    assert main(["export", student, "--output_dir", str(tmp_path / "small")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"fastkd export: writing the model {tmp_path / 'small'}: No space left on device."
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", ["", "{}", "null", "{", '{"method": 3, "seed": 0, "student": [], "stages": {}}'])
def test_a_record_that_is_none_is_no_traceback(tmp_path, capsys, caplog, content):
    student = runs.bert_teacher(tmp_path)
    (Path(student) / "fastkd.json").write_text(content)
    assert main(["export", student, "--output_dir", str(tmp_path / "small")]) in (0, 1, 2)
    told = capsys.readouterr().err + caplog.text
    assert "fastkd.json" in told and "Traceback" not in told and "bug" not in told
