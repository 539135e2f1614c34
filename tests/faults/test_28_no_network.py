"""Fault 28: the network is off.

With `HF_HUB_OFFLINE=1` and every socket failing, whatever is on the disk works: all stages from local models, text and tasks, and the
corpus `stdlib`. A name that only the hub knows is refused with a sentence.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

import fastkd
from tests import runs


@pytest.fixture(autouse=True)
def network_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to connect fails, and is listed."""
    attempts: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            attempts.append(address)
        raise OSError("Network is unreachable")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return attempts


def test_all_stages_run_on_what_is_here(tmp_path: Path, network_off: list[Any]) -> None:
    results = fastkd.distill(runs.glmd(tmp_path, runs.bert_teacher(tmp_path), max_steps=2))
    assert list(results) == ["pretrain", "task_words", "task_scores"]
    assert not network_off, "nobody even tried"


def test_the_standard_library_is_a_corpus(tmp_path: Path, network_off: list[Any]) -> None:
    text = {"path": "stdlib", "max_rows": 40, "eval_split": "dev", "max_eval_rows": 8, "max_length": 32}
    teacher = runs.llama_teacher(tmp_path)
    fastkd.distill(runs.settings(tmp_path, method="kd", teacher_model_name_or_path=teacher, text=text, max_steps=2))
    assert not network_off


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": {"path": "some-organisation/some-corpus"}}, "hub dataset 'some-organisation/some-corpus'"),
        ({"teacher_model_name_or_path": "some-organisation/some-teacher"}, "couldn't find them in the cached files|some-teacher"),
    ],
    ids=["corpus", "teacher"],
)
def test_what_is_only_on_the_hub_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings = runs.settings(
        tmp_path, method="kd", teacher_model_name_or_path=runs.bert_teacher(tmp_path), text=runs.write_text(tmp_path)
    )
    with pytest.raises((ValueError, OSError), match=said):
        fastkd.distill({**settings, **changes})
