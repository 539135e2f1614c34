"""Where a model's files are: a folder, or the snapshot of a hub name on this machine; and what is refused of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from fastkd.cli.main import main
from fastkd.models.folder import model_folder, one_revision, weight_files
from fastkd.models.load import load_frozen, load_language_model, load_map, load_tokenizer
from fastkd.models.task_model import TaskHead, load_task_model
from fastkd.models.teacher_cache import model_hashes
from fastkd.train.identity import model_digest
from tests import runs, tiny
from tests.train.test_evaluate import pruned

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Put a folder where a download of the hub's model of that name would have left it, with the network off."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish(source: str, name: str, commit: str = COMMIT) -> Path:
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(source, place / "snapshots" / commit))

    return publish


def test_a_mapped_student_by_its_hub_name_has_its_map(tmp_path, publish, capsys):
    local = pruned(tmp_path, runs.bert_teacher(tmp_path), 0.5)
    there = publish(local, "me/student")
    expected, found = load_frozen(local), load_frozen("me/student")
    assert found.vocab_map is not None and found.vocab_map.fingerprint == expected.vocab_map.fingerprint
    assert load_map("me/student").num_kept == found.vocabulary < 600
    assert load_task_model("me/student", TaskHead("classification", 2), seed=0).vocab_map is not None
    assert model_folder("me/student") == there
    assert model_hashes("me/student") == (COMMIT, model_hashes(local)[1])
    assert model_digest("me/student") == model_digest(local)
    assert main(["export", "me/student", "--output_dir", str(tmp_path / "exported")]) == 0
    assert "Exported" in capsys.readouterr().out
    assert len(load_tokenizer(str(tmp_path / "exported"))) == found.vocabulary
    ids = load_tokenizer("me/student")("def read")["input_ids"]
    assert torch.equal(found(torch.tensor([ids])), expected(torch.tensor([ids])))


def test_a_name_that_is_not_on_this_machine_is_told(publish, tmp_path):
    publish(runs.bert_teacher(tmp_path), "me/other")
    for load in (load_language_model, load_tokenizer, model_folder):
        with pytest.raises(ValueError, match=r"me/absent is no folder, and no model of that name is on this machine or can be fetched"):
            load("me/absent")


def only_pickled(folder: Path) -> str:
    model = tiny.bert(600, seed=1)
    tiny.save(folder, model, tiny.wordpiece())
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return str(folder)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path):
    source = only_pickled(tmp_path / "old model")
    for load in (load_frozen, lambda name: load_task_model(name, TaskHead("classification", 2), seed=0)):
        with pytest.raises(
            ValueError, match=r"has no model.safetensors, and fastkd reads no pickles such as pytorch_model.bin"
        ) as caught:
            load(source)
    (command,) = re.findall(r'python -c ".*"$', str(caught.value))
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, cwd=tmp_path, capture_output=True)
    ids = torch.tensor([[7, 8, 9]])
    converted = load_frozen(str(tmp_path / "old model-safetensors"))
    assert torch.equal(converted(ids), tiny.bert(600, seed=1)(ids).logits)
    assert len(load_tokenizer(str(tmp_path / "old model-safetensors"))) == 600


def test_what_lies_beside_the_weights_is_none_of_them(tmp_path):
    """Counts that were written into a model's folder, say; of shards, those of the index are read."""
    for name in ("model.safetensors", "token_counts-0.safetensors", "model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


def test_a_name_stands_for_the_newest_revision_and_within_a_run_for_one(tmp_path, publish):
    source, newer = runs.bert_teacher(tmp_path), "f" * 40
    with one_revision():
        first = publish(source, "me/teacher")
        assert model_folder("me/teacher") == first
        second = publish(source, "me/teacher", newer)
        assert model_folder("me/teacher") == model_folder("me/teacher", weights=True) == first
    assert model_folder("me/teacher") == model_folder("me/teacher", weights=True) == second
