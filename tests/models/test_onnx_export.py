"""Encoders as ONNX files: equal to torch on text and on shapes that were not traced; whatever differs is refused."""

from __future__ import annotations

import copy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from fastkd.models import onnx_export
from fastkd.models.load import load_tokenizer
from fastkd.models.onnx_export import TOLERANCE, check_onnx, export_onnx, onnx_difference
from fastkd.models.prune import prune_model
from fastkd.models.student import export_student
from tests import runs, tiny
from tests.models.test_student import vocab_map_for


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A masked language model on half of its vocabulary: model, tokenizer, ONNX file and its difference."""
    folder = tmp_path_factory.mktemp("pruned")
    tokenizer = tiny.wordpiece()
    student = prune_model(tiny.bert(num_hidden_layers=1), vocab_map_for(tokenizer, width=32))
    kept = with_token_types(export_student(student, tokenizer, folder))
    difference = export_onnx(student.model, kept, folder / "model.onnx")
    return student.model, kept, folder / "model.onnx", difference


def with_token_types(tokenizer):
    """As BERT's own has them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def outputs_on_text(model, tokenizer, path, texts, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    """(onnx, torch) for every output, on a padded batch of texts."""
    session = onnxruntime.InferenceSession(str(path))
    batch = tokenizer(texts, padding=True, return_tensors="np", **options)
    found = session.run(None, {given.name: batch[given.name] for given in session.get_inputs()})
    with torch.no_grad():
        expected = model(**{given.name: torch.from_numpy(batch[given.name]) for given in session.get_inputs()})
    names = [output.name for output in session.get_outputs()]
    held = batch["attention_mask"].astype(bool)
    pairs = [(ours, expected[name].numpy()) for name, ours in zip(names, found, strict=True)]
    return [(ours[held], theirs[held]) if ours.shape[:2] == held.shape else (ours, theirs) for ours, theirs in pairs]


def test_a_pruned_masked_language_model(pruned):
    model, tokenizer, path, difference = pruned
    assert 0 < difference < 1e-5
    pairs = list(zip(tiny.lines()[20:27], tiny.lines()[30:37], strict=True))
    for texts in (list(tiny.lines()[:1]), pairs):
        [(ours, theirs)] = outputs_on_text(model, tokenizer, path, texts)
        assert ours.shape[-1] == len(tokenizer) < 600
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    shapes = {given.name: given.shape for given in onnxruntime.InferenceSession(str(path)).get_inputs()}
    assert shapes == {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask", "token_type_ids")}


def test_no_path_of_this_machine_is_in_the_file(pruned):
    content = pruned[2].read_bytes()
    assert b".py" not in content and b"site-packages" not in content


def test_other_weights_are_found_and_refused(pruned, tmp_path, monkeypatch):
    """One row of one matrix, a hundredth off."""
    model, tokenizer, path, _ = pruned
    stale = SimpleNamespace(save=lambda place: shutil.copy(path, place))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: stale)
    monkeypatch.setattr(onnx_export, "_forget_where_it_was_made", lambda _: None)
    assert export_onnx(model, tokenizer, tmp_path / "model.onnx") <= TOLERANCE
    model = copy.deepcopy(model)
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[3] *= 1.01
    assert onnx_difference(model, tokenizer, path) > TOLERANCE
    with pytest.raises(ValueError, match=r"differs from torch by .* and 0\.0001 is allowed, so it is not kept"):
        export_onnx(model, tokenizer, tmp_path / "model.onnx")
    with torch.no_grad():
        weight[3] = float("nan")
    with pytest.raises(ValueError, match="differs from torch by nan"):
        export_onnx(model, tokenizer, tmp_path / "model.onnx")


@pytest.mark.parametrize(("name", "head"), [("modernbert", "SequenceClassification"), ("deberta-v3", "QuestionAnswering")])
def test_other_architectures_and_heads(tmp_path, name, head):
    tokenizer = with_token_types(tiny.wordpiece())
    model = tiny.transformer(name, head, vocab_size=len(tokenizer), num_hidden_layers=2 if name == "modernbert" else 1)
    path = tmp_path / "model.onnx"
    assert 0 < export_onnx(model, tokenizer, path) < 1e-5
    pairs = outputs_on_text(model, tokenizer, path, list(tiny.lines()[20:25]))
    assert len(pairs) == (2 if head == "QuestionAnswering" else 1)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    names = {given.name for given in onnxruntime.InferenceSession(str(path)).get_inputs()}
    assert ("token_type_ids" in names) == (name != "modernbert")  # whose forward has none


def test_batches_are_within_the_model_and_padded_as_its_own():
    tokenizer = with_token_types(tiny.wordpiece())
    batch = onnx_export._batch(tiny.bert(), tokenizer, 4, 9, torch.Generator().manual_seed(0))
    held = batch["attention_mask"].bool()
    assert batch["input_ids"].shape == (4, 9) and held[0].all() and not held.all() and held[:, 0].all()
    assert (batch["input_ids"][~held] == tokenizer.pad_token_id).all() and batch["input_ids"].max() < 600
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}


def test_what_cannot_be_exported_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    encoder, decoder = runs.bert_teacher(tmp_path), runs.llama_teacher(tmp_path)
    check_onnx(encoder)
    with pytest.raises(ValueError, match="is a decoder, and ONNX files are made of encoders alone"):
        check_onnx(decoder)
    tiny.save(tmp_path / "classifier", tiny.transformer("llama"), load_tokenizer(decoder))
    with pytest.raises(ValueError, match="is a decoder"):
        check_onnx(str(tmp_path / "classifier"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript, which cannot be imported .*pip install 'fastkd\[onnx\]'"):
        check_onnx(encoder)


def test_a_broken_package_is_named_before_the_model_is_read(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('built for another numpy')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"ONNX needs onnxruntime, .*built for another numpy"):
        check_onnx(str(tmp_path / "no model is here"))
