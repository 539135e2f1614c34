"""Fault 12: a rank whose whole micro-batch is masked. Nothing hangs, and all ranks divide by the same global count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.methods.language_modeling import LanguageModeling
from fastkd.train.loop import StageTrainer
from tests import runs
from tests.ranks import spawn
from tests.train.test_parallel import ENGINES, EXACT, distance, logs, made, same_losses


def config(folder: Path) -> dict[str, Any]:
    return runs.settings(
        folder,
        method="lm",
        teacher_model_name_or_path=runs.bert_teacher(folder),
        text=runs.write_text(folder),
        options={"mask_probability": 0.02},
        **{**EXACT, "max_steps": 6, "per_device_train_batch_size": 1},
    )


def work(rank: int, folder: str) -> None:
    weights: list[float] = []
    original = LanguageModeling.weight

    def weight(self, batch):
        weights.append(original(self, batch))
        return weights[-1]

    LanguageModeling.weight = weight
    for engine, keys in ENGINES.items():
        weights.clear()
        fastkd.distill({**json.loads((Path(folder) / "config.json").read_text()), **keys, "output_dir": f"{folder}/{engine}"})
        Path(folder, f"{engine}-{rank}.json").write_text(json.dumps(weights))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    (folder / "config.json").write_text(json.dumps(config(folder)))
    spawn(work, str(folder))
    fastkd.distill({**config(folder), "gradient_accumulation_steps": 2, "output_dir": str(folder / "one")})
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_without_a_label_count_nothing(folder, engine):
    counts = list(zip(*(json.loads((folder / f"{engine}-{rank}.json").read_text()) for rank in (0, 1)), strict=True))
    assert any(0.0 in pair and max(pair) > 0 for pair in counts)  # a step with one rank that has nothing to say
    assert distance(made(folder / engine), made(folder / "one")) < 1e-4
    assert same_losses(logs(folder / engine), logs(folder / "one"))


def test_a_step_in_which_nothing_counts_is_zero(tmp_path, monkeypatch):
    """All rows of all ranks without a label: 0 / 0 is a loss of zero here, and no NaN."""
    monkeypatch.setattr(StageTrainer, "_skip", lambda *_: pytest.fail("taken for a step that is not finite"))
    settings = config(tmp_path)
    text = {**settings["text"], "eval_path": None}
    fastkd.distill({**settings, "text": text, "options": {"mask_probability": 1e-9}, "max_steps": 2})
    losses = [line["loss"] for line in logs(tmp_path / "run") if "loss" in line]
    assert losses == [0.0, 0.0]
