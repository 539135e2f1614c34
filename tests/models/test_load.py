"""Models and tokenizers that cannot be loaded: refused by the file or folder, before any tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastkd.cli.main import main
from fastkd.errors import what_was_done
from fastkd.models.load import load_config, load_frozen, load_tokenizer, weight_files
from fastkd.models.task_model import TaskHead, load_task_model
from tests import runs

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


def test_what_lies_beside_the_weights_is_none_of_them(tmp_path):
    """Counts that were written into a model's folder, say; of shards, those of the index are read."""
    for name in ("model.safetensors", "token_counts-0.safetensors", "model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
