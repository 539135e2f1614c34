"""All sides of `train_throughput.py` train the same: tiny models, in this process, and no time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastkd.benchmarks import authors_loops, train_setup, train_throughput, trainer_baseline
from fastkd.benchmarks.train_setup import CASES, Bert, Clock, Size, Training
from tests import tiny

TINY = Size(
    vocabulary=600,
    teacher=Bert(2, 32, 4),
    student=Bert(1, 16, 2),
    length=24,
    paragraphs=160,
    teacher_steps=2,
    warmup_steps=1,
    steps=3,
    rounds=2,
)


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        lines = [line for line in tiny.lines() if len(line.split()) >= 3]
        patch.setattr(train_setup, "_paragraphs", lambda: lines)
        # At the authors' temperature of 15 these models' divergence is 4e-5 nats, of which float32 has no more than three digits.
        patch.setitem(CASES, "glmd", replace(CASES["glmd"], options={"preset": "paper", "temperature": 2.0}))
        yield patch


@pytest.fixture(scope="module")
def folder(patched, tmp_path_factory):
    made = tmp_path_factory.mktemp("train")
    train_setup.prepare(made, CASES, TINY)
    return made


def losses(side, folder, name):
    training = Training(folder, name, TINY, torch.device("cpu"))
    clock = Clock(training)
    found = [float(loss) for loss in side.train(training, clock)]
    assert len(found) == training.steps and clock.seconds > 0 and clock.peak >= clock.before > 0
    return found


@pytest.mark.parametrize("name", ["kd", "kd_labels", "kd_packed"])
def test_trainer_has_the_same_curve(folder, name):
    ours, theirs = losses(train_throughput, folder, name), losses(trainer_baseline, folder, name)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len({round(loss, 6) for loss in ours}) > 1


@pytest.mark.parametrize("name", ["glmd", "crild", "ted"])
def test_the_authors_loops_have_the_same_curve(folder, name):
    """The first loss is that of the preset's formula; the later ones hold because both take the same optimizer steps."""
    ours, theirs = losses(train_throughput, folder, name), losses(authors_loops, folder, name)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len({round(loss, 6) for loss in ours}) > 1


def test_a_step_too_few_is_seen(folder):
    training = Training(folder, "kd", TINY, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="0 optimizer steps were taken, and 4 were to be timed"), Clock(training):
        pass


def test_the_record(patched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_throughput, "QUICK", TINY)
    monkeypatch.setattr(train_throughput, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    arguments = ["--output", str(tmp_path), "--device", "cpu", "--only", "kd", "glmd", "--quick"]
    assert train_throughput.main(arguments) == 0
    record = json.loads((tmp_path / "train_throughput_cpu.json").read_text())
    assert record["claim"] == "train_throughput" and record["smoke"] is True and record["repeats"] == 2
    assert record["environment"]["versions"]["torch"] == torch.__version__ and '"/' not in json.dumps(record)
    assert [result["case"] for result in record["results"]] == ["kd", "glmd"]
    for result, peer in zip(record["results"], ("Trainer, eager losses", "authors' loop"), strict=True):
        ours, theirs = result["sides"]
        assert (ours["implementation"], theirs["implementation"]) == ("fastkd", peer)
        assert result["loss_difference"] < 1e-4
        assert result["speedup"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
        assert result["peak_ratio"] == pytest.approx(ours["peak_bytes"] / theirs["peak_bytes"])
        for side in (ours, theirs):
            assert side["tokens_per_second"] == pytest.approx(result["tokens"] / side["seconds"]["median"])
            assert side["seconds"]["rounds"] == 2 and len(side["losses"]) == 4
    profile = record["profile"]
    assert profile["case"] == "kd" and sum(section["share"] for section in profile["sections"].values()) == pytest.approx(1)
    assert "x the speed" in capsys.readouterr().out
