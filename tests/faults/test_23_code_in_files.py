"""Fault 23: a pickle is offered as a checkpoint or a model; a model comes with code of its own.

Refused, and nothing of it is executed; fastkd itself writes neither pickles nor code.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors
import torch

import fastkd
from fastkd import sealed
from fastkd.models.load import load_config, load_language_model, load_tokenizer
from fastkd.sealed import file_sha256
from fastkd.train.checkpoint import list_checkpoints
from tests import runs
from tests.faults.disturbed import config, crashes


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """What exists once something was executed; the bomb itself works."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    return tmp_path / "executed"


def test_pickled_weights_are_no_model(tmp_path, marker):
    teacher = Path(runs.bert_teacher(tmp_path))
    (teacher / "model.safetensors").unlink()
    (teacher / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    run = runs.settings(tmp_path, teacher_model_name_or_path=str(teacher), text=runs.write_text(tmp_path))
    with pytest.raises(ValueError, match=r"has no model\.safetensors, and fastkd reads no pickles"):
        fastkd.distill(run)
    assert not marker.exists()


def test_a_pickle_in_a_checkpoint_is_not_read(tmp_path, marker):
    """Not even where the manifest says that it is what was written."""
    run = config("ted", tmp_path, stages={"student": {}}, max_steps=4)
    crashes(run, "student", "begin_step", 3)
    (saved,) = list_checkpoints(tmp_path / "run" / "student")
    file = saved / "model.safetensors"
    file.write_bytes(pickle.dumps(Bomb(marker)))
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    del manifest["sha256"]
    (saved / "MANIFEST.json").write_bytes(sealed._sealed(manifest))
    with pytest.raises((ValueError, safetensors.SafetensorError)):
        fastkd.distill(run)
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["bert", "unheard_of"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, marker, model_type):
    """A type that transformers does not know is refused; of one that it knows, its own code runs."""
    teacher = Path(runs.bert_teacher(tmp_path))
    (teacher / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: ...\n")
    automatic = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForMaskedLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for name, changes in (
        ("config.json", {"auto_map": automatic, "model_type": model_type}),
        ("tokenizer_config.json", {"auto_map": automatic}),
    ):
        settings = json.loads((teacher / name).read_text())
        (teacher / name).write_text(json.dumps({**settings, **changes}))
    run = runs.settings(tmp_path, teacher_model_name_or_path=str(teacher), text=runs.write_text(tmp_path), max_steps=1)
    if model_type == "bert":
        load_tokenizer(str(teacher))
        assert type(load_language_model(str(teacher)).model).__module__.startswith("transformers.")
        fastkd.distill(run)
    else:
        for load in (load_config, load_language_model, fastkd.distill):
            with pytest.raises(ValueError, match=r"trust_remote_code|unheard_of"):
                load(run if load is fastkd.distill else str(teacher))
    assert not marker.exists()


def test_a_run_writes_and_reads_no_pickles(tmp_path, monkeypatch):
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a pickle"))
    run = config("glmd", tmp_path, max_steps=4)
    crashes(run, "task_words", "begin_step", 3)
    fastkd.distill(run)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jsonl", ".npy", ".md", ".lock", ""}
    for file in files:
        assert not file.read_bytes().startswith((b"\x80", b"PK")), file
