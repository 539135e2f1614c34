"""A run on two ranks that is stopped goes on bit for bit on two, and within rounding on another number of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.train.batches import seed_global_generators
from fastkd.train.checkpoint import list_checkpoints, load_checkpoint
from fastkd.train.signals import Preempted
from tests import runs
from tests.ranks import spawn
from tests.train.test_parallel import ENGINES, EXACT, distance, logs, made

STEPS = {"max_steps": 6, "eval_steps": 2, "save_steps": 2}
MOMENT = 13  # the micro-batch, of two ranks times accumulation 2, at which rank 1 is signalled: within step 4


def signalled(config: dict[str, Any], moment: int) -> None:
    """Run until the rank that trains on micro-batch `moment` gets a SIGTERM there; every rank stops."""

    def seed(seed: int, index: int, use: int) -> None:
        if index == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_global_generators(seed, index, use)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.train.loop.seed_global_generators", seed)
        with pytest.raises(Preempted):
            fastkd.distill(config)


def work(rank: int, folder: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    for engine, keys in ENGINES.items():
        on_two = {**config, **keys, "gradient_accumulation_steps": 2}
        fastkd.distill({**on_two, "output_dir": f"{folder}/{engine}-whole"})
        stopped = {**on_two, "output_dir": f"{folder}/{engine}-stopped"}
        signalled(stopped, MOMENT)
        if rank == 0:
            shutil.copytree(f"{folder}/{engine}-stopped", f"{folder}/{engine}-on-one")
        fastkd.distill(stopped)
        fastkd.distill({**on_two, "output_dir": f"{folder}/one-on-{engine}"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: whole, stopped and gone on, and stopped ones for another number of ranks."""
    folder = tmp_path_factory.mktemp("resume")
    config = runs.settings(
        folder,
        method="lm",
        teacher_model_name_or_path=runs.bert_teacher(folder),
        text=runs.write_text(folder),
        options={"mask_probability": 0.3},
        **{**EXACT, **STEPS, "per_device_train_batch_size": 2},
    )
    (folder / "config.json").write_text(json.dumps(config))
    on_one = {**config, "gradient_accumulation_steps": 4}
    fastkd.distill({**on_one, "output_dir": str(folder / "one-whole")})
    signalled({**on_one, "output_dir": str(folder / "one-stopped")}, MOMENT)
    for engine in ENGINES:
        shutil.copytree(folder / "one-stopped", folder / f"one-on-{engine}")
    spawn(work, str(folder))
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_go_on_bit_for_bit(folder, engine):
    whole, resumed = folder / f"{engine}-whole", folder / f"{engine}-stopped"
    assert runs.same_bits(made(whole), made(resumed)) and logs(whole) == logs(resumed)
    stopped = list_checkpoints(folder / f"{engine}-on-one" / "train")[0]
    assert stopped.name == "checkpoint-4"  # the last whole step, on both ranks: they hear of it as the next one begins


@pytest.mark.parametrize("engine", ENGINES)
def test_one_goes_on_from_two(folder, engine, caplog):
    config = json.loads((folder / "config.json").read_text())
    output = folder / f"{engine}-on-one"
    with caplog.at_level(logging.WARNING):
        fastkd.distill({**config, "gradient_accumulation_steps": 4, "output_dir": str(output)})
    assert "world_size 2 there, 1 here" in caplog.text and "not bit for bit" in caplog.text
    assert distance(made(output), made(folder / "one-whole")) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_two_go_on_from_one(folder, engine):
    assert distance(made(folder / f"one-on-{engine}"), made(folder / "one-whole")) < 1e-4


def test_the_pieces_of_two_ranks_are_the_whole(folder):
    """Every rank writes its rows; together they are what one rank would have written."""
    newest = list_checkpoints(folder / "fsdp-whole" / "train")[0]
    assert {file.name for file in newest.glob("model*")} == {f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)}
    pieces, state = load_checkpoint(newest)
    whole, _ = load_checkpoint(folder / "one-whole" / "train" / newest.name)
    assert state["made_by"]["world_size"] == 2
    for group in ("model", "optimizer"):
        assert distance(dict(pieces[group]), dict(whole[group])) < 1e-4
    sizes = [file.stat().st_size for group in ("model", "optimizer") for file in sorted(newest.glob(f"{group}-*"))]
    assert len(sizes) == 4 and all(0.8 < first / second < 1.25 for first, second in zip(sizes[::2], sizes[1::2], strict=True))
    weight = next(name for name in whole["model"] if whole["model"][name].shape[0] > 9)
    assert pieces["model"].rows(weight, 3, 9).equal(pieces["model"][weight][3:9])


def test_another_number_of_micro_batches_is_another_run(folder):
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps \(4 there, 2 here\)"):
        fastkd.distill({**config, "gradient_accumulation_steps": 2, "output_dir": str(folder / "one-whole")})
