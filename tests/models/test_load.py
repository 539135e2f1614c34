"""Models and tokenizers that cannot be loaded: refused by the file or folder, before any tensor is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from fastkd.cli.main import main
from fastkd.errors import what_was_done
from fastkd.models.folder import MAPPED_MODEL_TYPE, close_folder, own_settings
from fastkd.models.language_model import LanguageModel
from fastkd.models.load import (
    check_padded_vocabulary,
    check_row_length,
    known_ids,
    load_config,
    load_frozen,
    load_language_model,
    load_tokenizer,
    save_model,
)
from fastkd.models.task_model import TaskHead, load_task_model
from fastkd.sealed import seal
from tests import runs, tiny
from tests.train.test_evaluate import pruned

Tensors = dict[str, torch.Tensor]
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def half_a_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def a_pointer(file: Path) -> None:
    file.write_bytes(POINTER)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", truncated, "is no whole safetensors file (Error while deserializing header"),
        ("model.safetensors", half_a_header, "of 40 bytes, is no whole safetensors file"),
        ("model.safetensors", emptied, "of 0 bytes, is no whole safetensors file"),
        ("model.safetensors", a_pointer, "is a pointer of git-lfs, not the file itself; fetch it by `git lfs pull`"),
        ("tokenizer.json", a_pointer, "is a pointer of git-lfs"),
        ("config.json", a_pointer, "is a pointer of git-lfs"),
    ],
)
def test_a_file_that_is_not_whole_is_named_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None], said: str
) -> None:
    folder = Path(runs.bert_teacher(tmp_path))
    damage(folder / name)
    with pytest.raises(ValueError, match=r"safetensors|git-lfs"):
        load_config(str(folder))
    text = runs.write_text(tmp_path)["path"]
    capsys.readouterr()
    for command in (["eval", str(folder), "--text", text], ["export", str(folder), "--output_dir", str(tmp_path / "out")]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert str(folder / name) in told and said in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "no-such-type"}', '{"model_type": 3}'])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    folder = Path(runs.bert_teacher(tmp_path))
    (folder / "config.json").write_text(content)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (what transformers raises is told with the folder)
        load_config(str(folder))
    assert str(folder) in f"{caught.value} {what_was_done(caught.value)}"


def test_other_shapes_than_the_configuration_says_are_told_with_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(runs.bert_teacher(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    for load in (load_frozen, lambda name: load_task_model(name, TaskHead("question_answering", 2), seed=0, needs_head=True)):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            load(str(folder))
        assert str(folder) in f"{caught.value} {what_was_done(caught.value)}"
    assert main(["export", str(folder), "--output_dir", str(tmp_path / "out")]) in (1, 2)
    told = capsys.readouterr().err.splitlines()[-1]
    assert "bug" not in told and str(folder) in told and not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(runs.bert_teacher(tmp_path))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        load_tokenizer(str(folder))
    assert str(folder) in f"{caught.value} {what_was_done(caught.value)}"
    assert main(["vocab", "count", "--model", str(folder), "--data", "stdlib", "--output_dir", str(tmp_path / "out")]) in (1, 2)
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"the tokenizer {folder}" in told.lower() and "bug" not in told and not (tmp_path / "out").exists()


def no_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "layer.1." not in name and "layers.1." not in name}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def rewritten(folder: str, change: Callable[[Tensors], Tensors], **settings: Any) -> str:
    """The model in `folder` with other tensors in its file, and other settings."""
    file = Path(folder) / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def backbone(folder: Path, model: Any, tokenizer: Any) -> str:
    return tiny.save(folder / "backbone", model, tokenizer)


NOT_WHOLE = {
    "bert-no-layer": (lambda f: rewritten(runs.bert_teacher(f), no_layer), "lacks the weights bert.encoder.layer.1.attention"),
    "llama-no-layer": (lambda f: rewritten(runs.llama_teacher(f), no_layer), "lacks the weights model.layers.1.input_layernorm.weight"),
    "ddp": (
        lambda f: rewritten(runs.bert_teacher(f), prefixed("module.")),
        r"inside a wrapper: .*module.bert.*`module` of Distributed",
    ),
    "compiled": (lambda f: rewritten(runs.llama_teacher(f), prefixed("_orig_mod.")), r"inside a wrapper.*`_orig_mod` of torch.compile"),
    "too-many-layers": (
        lambda f: rewritten(runs.llama_teacher(f), dict, num_hidden_layers=1),
        r"holds the weights model.layers.1.* of layers that its config.json does not count",
    ),
    "other-shapes": (
        lambda f: rewritten(runs.bert_teacher(f), dict, intermediate_size=48),
        r"lacks the weights bert.encoder.layer.0.intermediate.*, or has them in other shapes",
    ),
}
WITHOUT_WORDS = {
    "bert-backbone": (
        lambda f: backbone(f, tiny.bert().bert, tiny.wordpiece()),
        "was saved as BertModel, which has no trained head for words: cls.predictions.bias",
    ),
    "llama-backbone": (
        lambda f: backbone(f, tiny.llama(tie_word_embeddings=False).model, tiny.byte_level()),
        "was saved as LlamaModel, which has no trained head for words: lm_head.weight",
    ),
    "bert-classifier": (runs.bert_classifier, "was saved as BertForSequenceClassification, which has no trained head for words"),
    "tied-llama-classifier": (
        lambda f: backbone(f, tiny.transformer("llama", vocab_size=700, tie_word_embeddings=True), tiny.byte_level()),
        "was saved as LlamaForSequenceClassification, which has no trained head for words",
    ),
}


@pytest.mark.parametrize("case", [*NOT_WHOLE, *WITHOUT_WORDS])
def test_a_language_model_with_random_weights_is_refused_by_their_names(tmp_path: Path, case: str) -> None:
    make, said = {**NOT_WHOLE, **WITHOUT_WORDS}[case]
    with pytest.raises(ValueError, match=said):
        load_frozen(make(tmp_path))


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_a_new_head_stands_on_a_whole_backbone_alone(tmp_path: Path, case: str) -> None:
    make, said = NOT_WHOLE[case]
    with pytest.raises(ValueError, match=said):
        load_task_model(make(tmp_path), TaskHead("classification", 2), seed=0)


@pytest.mark.parametrize("case", [case for case in WITHOUT_WORDS if "backbone" in case])
def test_what_lacks_a_head_alone_may_get_one(tmp_path: Path, case: str) -> None:
    """A backbone, or a language model, which has no pooler."""
    for folder in (WITHOUT_WORDS[case][0](tmp_path), runs.bert_teacher(tmp_path)):
        load_task_model(folder, TaskHead("classification", 2), seed=0)
        with pytest.raises(ValueError, match=r"has no trained head for classification.*Fine-tune it first"):
            load_task_model(folder, TaskHead("classification", 2), seed=0, needs_head=True)


def test_a_tied_head_is_in_its_backbone(tmp_path: Path) -> None:
    model = tiny.llama()
    folder = backbone(tmp_path, model.model, tiny.byte_level())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load_frozen(folder)(ids), model(ids).logits)


@pytest.mark.parametrize("make", [runs.bert_teacher, runs.llama_teacher])
def test_plain_transformers_refuses_a_mapped_student(tmp_path: Path, make: Callable[[Path], str]) -> None:
    """It would feed the model the ids of its teacher's tokenizer."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

    folder = pruned(tmp_path, make(tmp_path), 0.5)
    student = load_frozen(folder)
    concrete = [kind for kind in type(student.model).__mro__ if kind.__module__ == type(student.model).__module__]
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, *concrete, type(student.model.config)):
        with pytest.raises(Exception, match=r"fastkd_mapped_student_open_it_by_fastkd_export"):
            kind.from_pretrained(folder)
    with pytest.raises(Exception, match=r"fastkd_mapped_student_open_it_by_fastkd_export"):
        pipeline("text-generation", folder)
    assert student.vocab_map is not None and student.model.config.model_type in ("bert", "llama")
    assert type(load_tokenizer(folder)) is type(load_tokenizer(make(tmp_path)))
    save_model(student, load_tokenizer(folder), tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (Path(folder) / "config.json").read_text()
    shutil.rmtree(Path(folder) / "vocab_map")
    for load in (load_frozen, lambda name: load_task_model(name, TaskHead("classification", 2), seed=0)):
        with pytest.raises(ValueError, match=r"vocab_map.* is missing, and is one of those the student was saved with.*whole folder"):
            load(folder)
    edit_config(folder, lambda settings: {key: value for key, value in settings.items() if key != "mapped_files"})  # of an older fastkd
    with pytest.raises(ValueError, match="was saved with a vocabulary map and holds no vocab_map/ now: copy that folder too"):
        load_frozen(folder)


def edit_config(folder: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_all_parts_of_a_configuration_are_closed(tmp_path: Path) -> None:
    """transformers takes a part that has the model's type; a label may have any name."""
    part = {"model_type": "gemma3_text", "vocab_size": 100}
    own = {"model_type": "gemma3", "text_config": part, "label2id": {"mapped_road": 0, "vocab_size": 1}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    close_folder(tmp_path, MAPPED_MODEL_TYPE)
    for kind in (transformers.AutoConfig, transformers.Gemma3TextConfig, transformers.Gemma3Config):
        with pytest.raises(Exception, match=MAPPED_MODEL_TYPE):
            kind.from_pretrained(tmp_path)
    assert own_settings(tmp_path) == own


def sealed_student(folder: Path) -> Path:
    """As a stage of glmd leaves it."""
    source = pruned(folder, runs.llama_teacher(folder), 0.5)
    model = load_language_model(source)
    model.slot_bias = torch.arange(float(model.vocabulary))
    save_model(model, load_tokenizer(source), folder / "student")
    (folder / "student" / "README.md").write_text("# Mine\n")
    seal(folder / "student", {"identity": "0"})
    return folder / "student"


def exchanged(file: Path) -> None:
    """A whole file of its kind with other content."""
    if file.suffix == ".json":
        file.write_text(file.read_text().replace("<eos>", "<end>").replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    else:
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


# What KDTrainer saves has no manifest: its config.json names the files that are fastkd's own.
@pytest.mark.parametrize("damage", [Path.unlink, exchanged])
@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        *((name, True) for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json")),
        *(("slot_bias.safetensors", manifest) for manifest in (True, False)),
    ],
)
def test_a_mapped_student_is_all_of_its_files_as_they_were_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None], manifest: bool
) -> None:
    folder, text = sealed_student(tmp_path), runs.write_text(tmp_path)["path"]
    if not manifest:
        (folder / "MANIFEST.json").unlink()
    load_frozen(str(folder))
    (folder / "README.md").unlink()  # for people
    (folder / "generation_config.json").unlink()
    load_frozen(str(folder))
    damage(folder / name)
    judge, export = ["eval", str(folder), "--text", text, "--use_cpu"], ["export", str(folder), "--output_dir", str(tmp_path / "out")]
    for command in (judge, export):
        capsys.readouterr()
        assert main(command) == 2
        told = capsys.readouterr().err
        assert (f"{folder / name} is" in told or f"{folder} holds no {name}" in told) and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (lambda: tiny.llama(90, max_position_embeddings=64), 64),
        (lambda: tiny.llama(90, max_position_embeddings=64, rope_parameters=LINEAR), 128),
        (lambda: tiny.transformer("modernbert", "MaskedLM"), 64),  # with rotary positions for each type of layer
        (lambda: tiny.transformer("gpt2", "CausalLM"), 64),
        (lambda: tiny.transformer("deberta-v3", "MaskedLM"), 10**6),  # relative positions have no end
    ],
    ids=["llama", "scaled", "modernbert", "gpt2", "deberta"],
)
def test_rows_beyond_what_a_model_was_made_for_are_refused(model: Callable[[], Any], longest: int) -> None:
    student = LanguageModel(model())
    check_row_length(student, longest, "student")
    if longest < 10**6:
        with pytest.raises(ValueError, match=f"takes {longest + 1} positions and the student has {longest}; lower the max_length"):
            check_row_length(student, longest + 1, "student")


def test_an_id_without_a_row_is_refused_where_it_occurs(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, model = tiny.byte_level(), LanguageModel(tiny.llama(699))
    check_padded_vocabulary(model, tokenizer, "teacher", 698)
    with pytest.raises(ValueError, match=r"The teacher has 699 vocabulary rows and its tokenizer 700 ids, and the id 699 occurs"):
        check_padded_vocabulary(model, tokenizer, "teacher", 699)
    with caplog.at_level("INFO", "fastkd"):
        check_padded_vocabulary(LanguageModel(tiny.llama(704)), tokenizer, "teacher", 699)
    assert len(caplog.records) == 1 and "704 rows for 700 ids" in caplog.text
    assert (known_ids(model, tokenizer), known_ids(LanguageModel(tiny.llama(704)), tokenizer)) == (699, 700)
