"""Runs that learn from a cached teacher: the losses of the online run, and a sentence for every cache of something else."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastkd
from fastkd.methods.registry import build_stage
from fastkd.models.teacher_cache import HEADER, read_header
from fastkd.train import run_models
from fastkd.train.batches import counter_torch_generator
from fastkd.train.cached_teacher import rows_read
from fastkd.train.config import StageArguments
from fastkd.train.loop import StageTrainer
from tests import runs, tiny
from tests.caches import cached, crild, glmd, glmd_tasks, kd, learners, losses, ted_task, ted_text, write

CASES = {
    "glmd-decoder": lambda folder: glmd(folder),
    "glmd-encoder-masked": lambda folder: glmd(folder, runs.bert_teacher),
    "glmd-full-mass": lambda folder: glmd(folder, options={"temperature": 2.0, "teacher_mass": "full"}),
    "glmd-slots": lambda folder: glmd(folder, runs.bert_teacher, options={"temperature": 2.0, "teacher_mass": "slots"}),
    "glmd-verbalizer": lambda folder: glmd_tasks(folder, runs.bert_teacher, "verbalizer"),
    "glmd-choices-paper": lambda folder: glmd_tasks(folder, runs.llama_teacher, "choices", preset="paper"),
    "kd-pruned": lambda folder: kd(folder, runs.llama_teacher),
    "kd-encoder-whole-vocabulary": lambda folder: kd(folder, runs.bert_teacher, vocabulary=None),
    "ted-text": lambda folder: ted_text(folder, runs.llama_teacher),
    "ted-text-states-alone": lambda folder: ted_text(folder, runs.bert_teacher, kl_alpha=0.0),
    "ted-filters": ted_task,
    "crild-classes": crild,
    "crild-regression": lambda folder: crild(folder, "glue/stsb", num_labels=1),
    "crild-multiple-choice": lambda folder: crild(folder, "super_glue/copa", num_labels=1),
    "crild-questions": lambda folder: crild(folder, "squad_v2", "QuestionAnswering"),
}


def test_more_processes_read_more_rows():
    rows: Any = SimpleNamespace(train=SimpleNamespace(lengths=np.arange(1, 101)))
    arguments = StageArguments(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    read = [set(rows_read(rows, arguments, 0, processes)) for processes in (1, 2, 5)]
    assert list(map(len, read)) == [24, 48, 100] and read[0] < read[1] < read[2]
    assert len(rows_read(rows, replace(arguments, fp16=True), 0, 1)) == 100  # its scaler leaves out steps
    assert set(rows_read(rows, arguments, 1, 1)) != read[0]


def refused(*arguments: Any, **options: Any) -> None:
    raise AssertionError("this was not to happen")


@pytest.mark.parametrize("case", CASES)
def test_a_cached_teacher_gives_the_losses_of_the_online_one(tmp_path, monkeypatch, case):
    """To float32 rounding with a float32 cache, step by step; and the teacher's weights are not loaded."""
    config = {**CASES[case](tmp_path), "max_steps": 3}
    with monkeypatch.context() as patch:  # online too, masks are drawn row by row
        generator = partial(counter_torch_generator, 0)
        patch.setattr("fastkd.train.run.build_stage", lambda spec, inputs: build_stage(spec, replace(inputs, row_generator=generator)))
        fastkd.distill({**config, "output_dir": str(tmp_path / "online")})
    for name in config["stages"]:
        if name in learners(config):
            write(config, name, whole=False)
        else:
            fastkd.distill(cached(config), only_stage=name)
    teachers = {config["teacher_model_name_or_path"], str(tmp_path / "run" / "teacher" / "teacher")}
    for load in ("load_frozen", "load_task_model"):
        original = getattr(run_models, load)
        guarded = lambda source, *a, original=original, **k: refused() if source in teachers else original(source, *a, **k)  # noqa: E731
        monkeypatch.setattr(run_models, load, guarded)
    fastkd.distill(cached(config))
    for name in learners(config):
        expected = losses(tmp_path / "online", name)
        assert len(expected) == 3 and losses(tmp_path / "run", name) == pytest.approx(expected, rel=3e-6)


def test_masks_are_static_and_those_of_the_row(tmp_path, caplog):
    """The same row has the same masks in every batch, in the cache and in the run; another seed's are refused below."""
    config = glmd(tmp_path, runs.bert_teacher, max_steps=2, per_device_train_batch_size=60, learning_rate=1e-30, warmup_steps=0)
    config["student"] = {**config["student"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write(config)
    caplog.set_level(logging.INFO, logger="fastkd")
    fastkd.distill(cached(config))
    first, second = losses(tmp_path / "run")  # an epoch is one batch of all rows, in another order
    assert first == pytest.approx(second, rel=1e-6)
    assert any("same in every epoch" in message for message in caplog.messages)


@pytest.mark.parametrize("make", [runs.llama_teacher, runs.bert_teacher], ids=["decoder", "encoder"])
def test_topk(tmp_path, make):
    """All k give the dense loss; a few, with the rest as one event, never more than it; of kd on a pruned map too."""
    for config, stage in ((glmd(tmp_path, make), "pretrain"), (kd(tmp_path, make), "distill")):
        config = {**config, "max_steps": 1}
        dense = write(config, stage)
        vocabulary = read_header(dense)["contents"]["kept_vocabulary"]
        (expected,) = run(config, stage, "dense")
        for k in (vocabulary, 16):
            shutil.rmtree(dense)
            write(config, stage, kind="topk", k=k)
            (found,) = run(config, stage, f"top-{k}")
            if k == vocabulary:
                assert found == pytest.approx(expected, rel=1e-5)
            else:
                assert 0.2 * expected < found < expected


def run(config: dict[str, Any], stage: str, name: str, **more: Any) -> list[float]:
    output_dir = Path(config["output_dir"]).parent / "runs" / stage / name
    fastkd.distill({**cached(config, **more), "output_dir": str(output_dir)})
    return losses(output_dir, stage)


def test_a_cache_in_16_bits_is_as_good_as_they_are(tmp_path):
    config = {**glmd(tmp_path), "max_steps": 1}
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        folder = write(config, dtype=dtype)
        found[dtype] = run(config, "pretrain", dtype)[0]
        shutil.rmtree(folder)
    assert len(set(found.values())) == 3
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=3e-3)
    assert found["float16"] == pytest.approx(found["float32"], rel=4e-4)


def test_the_tail_is_the_readers_choice(tmp_path):
    config = {**glmd(tmp_path), "max_steps": 1}
    write(config, kind="topk", k=8)
    found = {tail: run(config, "pretrain", tail, tail=tail)[0] for tail in ("bucket", "renormalize", "zero")}
    assert len(set(found.values())) == 3


# ---- what is refused


def change(*keys: str, to: Any) -> Any:
    def apply(config: dict[str, Any], folder: Path) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = to(folder) if callable(to) else to

    return apply


def other_text(config: dict[str, Any], folder: Path) -> None:
    (folder / "train.txt").write_text("\n".join(tiny.lines()[100:148]))


def other_weights(config: dict[str, Any], folder: Path) -> None:
    tiny.save(Path(config["teacher_model_name_or_path"]), tiny.bert(600, seed=5), tiny.wordpiece())


def other_tokenizer(config: dict[str, Any], folder: Path) -> None:
    """The same ids, and other texts for them: with a space more."""
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(tiny.wordpiece())
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.save_pretrained(config["teacher_model_name_or_path"])


def header(**values: Any) -> Any:
    """A header that says something else, sealed; or, with `seal`, one that is not."""

    def apply(config: dict[str, Any], folder: Path) -> None:
        path = folder / "caches" / "pretrain" / HEADER
        found = json.loads(path.read_text())
        if "format" in values:
            path.write_text(json.dumps({**found, **values}))
        else:
            path.write_text(json.dumps({**found, "contents": {**found["contents"], **values}}))

    return apply


NO_SETTING = "changed, and no setting that it records did. Write a cache"
FOREIGN = {
    "teacher": (other_weights, f"does not fit this run: the teacher's weights {NO_SETTING}"),
    "tokenizer": (other_tokenizer, f"does not fit this run: the tokenizer {NO_SETTING}"),
    "rows": (other_text, f"does not fit this run: the training rows {NO_SETTING}"),
    "length": (change("text", "max_length", to=31), r"does not fit this run: text.max_length \(32 there, 31 here\)\. Write"),
    "vocabulary": (change("vocabulary", "keep", to=0.6), r"does not fit this run: vocabulary.keep \(0.5 there, 0.6 here\)\. Write"),
    "seed": (change("seed", to=3), r"does not fit this run: seed \(0 there, 3 here\)\. Write"),
    "mask": (change("options", "mask_probability", to=0.2), r"run: options.mask_probability \(0.15 there, 0.2 here\)\. Write"),
    "unmasked": (change("options", "mask_probability", to=0.0), r"run: options.mask_probability \(0.15 there, 0.0 here\)\. Write"),
    "temperature": (change("options", "temperature", to=3.0), r"at temperature 2.0, and options.temperature is 3.0\..*--kind dense"),
    "divergence": (change("options", "divergence", to="reverse_kl"), "options.divergence is reverse_kl.*--kind dense"),
    "format": (header(format=0), r"has format 0 and this fastkd reads format 3\..*write the cache again"),
    "header": (header(k=6), r"was changed after it was written: its sha256 is \w+, and it says \w+"),
    "folder": (change("stages", "pretrain", "teacher", "path", to="/no/where"), "/no/where holds no header.json.*fastkd cache"),
    "path": (change("stages", "pretrain", "teacher", "path", to=None), "teacher.path is not set, and kind is cache"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_cache_of_something_else_is_refused(tmp_path, monkeypatch, case):
    spoil, sentence = FOREIGN[case]
    config = glmd(tmp_path, runs.bert_teacher)
    write(config, kind="topk", k=5)
    config = cached(config)
    spoil(config, tmp_path)
    monkeypatch.setattr(StageTrainer, "_step", refused)
    with pytest.raises(ValueError, match=sentence):
        fastkd.distill(config)


def test_other_layers_and_other_predictions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(StageTrainer, "_step", refused)
    config = ted_text(tmp_path, runs.llama_teacher)
    write(config, "distill")
    config["options"]["layer_map"] = [[1, 1]]
    with pytest.raises(ValueError, match=r"holds the states of layers \[2\], and this stage compares \[1\]"):
        fastkd.distill(cached(config))
    config["options"].update(layer_map=[[1, 2]], kl_alpha=0.0)
    shutil.rmtree(tmp_path / "caches")
    write(config, "distill")
    config["options"]["kl_alpha"] = 1.0
    with pytest.raises(ValueError, match="holds predictions of none, and this stage learns from words"):
        fastkd.distill(cached(config))
