"""Fault 16: a shard of a teacher's cache is missing or damaged; its training rows, teacher, teacher's revision or tokenizer are others.

The run is refused before its first step, by what changed, and does its work with a cache that is made for it. And fault 5 of `fastkd
cache`: ended by SIGTERM it has exit code 143, and the same command goes on to the bytes of one that was left alone.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from tokenizers import normalizers

import fastkd
from fastkd.cli.main import main
from fastkd.models.teacher_cache import read_header
from fastkd.sealed import file_sha256
from fastkd.train import cache
from fastkd.train.config import read_config
from fastkd.train.log import LOG_FILE
from fastkd.train.schema import to_yaml
from tests import tiny
from tests.caches import cached, glmd, losses, write
from tests.faults.disturbed import crashes, terminate

ON_HUB = "organisation/teacher"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One step from a teacher that the hub's cache holds in its first revision."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    publish(tmp_path, "a" * 40, seed=1)
    return glmd(tmp_path, lambda folder: ON_HUB, max_steps=1)


def publish(folder: Path, revision: str, seed: int) -> None:
    """Make this the newest revision of the teacher, as a download of it would."""
    repository = folder / "hub" / f"models--{ON_HUB.replace('/', '--')}"
    tiny.save(repository / "snapshots" / revision, tiny.bert(seed=seed), tiny.wordpiece())
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)


def refusal(config: dict[str, Any]) -> str:
    """What the run is refused with, before any step."""
    with pytest.raises(ValueError, match="fastkd cache") as error:
        fastkd.distill(config)
    assert not list(Path(config["output_dir"]).rglob(LOG_FILE))
    return str(error.value)


def other_rows(folder: Path) -> None:
    (folder / "train.txt").write_text("\n".join(tiny.lines()[100:148]))


def other_revision(folder: Path) -> None:
    publish(folder, "b" * 40, seed=2)


def other_tokenizer(folder: Path) -> None:
    """Publish a tokenizer of the same tokens and ids, in the same revision."""
    tokenizer = copy.deepcopy(tiny.wordpiece())
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    (snapshot,) = folder.glob("hub/*/snapshots/*")
    tokenizer.save_pretrained(snapshot)


@pytest.mark.parametrize(
    ("change", "key", "what"),
    [
        (other_rows, "dataset_fingerprint", "the training rows"),
        (other_revision, "teacher_sha256", "the teacher's weights"),
        (other_tokenizer, "tokenizer_sha256", "the tokenizer"),
    ],
    ids=["rows", "revision", "tokenizer"],
)
def test_a_stale_cache_is_refused_by_what_changed(
    tmp_path: Path, run: dict[str, Any], change: Callable[[Path], None], key: str, what: str
) -> None:
    stale = write(run)
    old = read_header(stale)["contents"]
    change(tmp_path)
    said = refusal(cached(run))
    shutil.rmtree(stale)
    new = read_header(write(run))["contents"]
    assert old[key] != new[key] and f"{what} changed, and no setting that it records did" in said
    fastkd.distill(cached(run))
    assert len(losses(Path(run["output_dir"]))) == 1


def test_rows_that_were_touched_and_put_back_are_the_same_rows(tmp_path: Path, run: dict[str, Any]) -> None:
    """After `cp train.txt x && mv x train.txt` and `touch`, a run that was killed goes on, with its teacher's cache."""
    config = {**run, "max_steps": 3, "save_steps": 1}
    write(config)
    crashes(cached(config), "pretrain", "begin_step", 2)
    shutil.copy(tmp_path / "train.txt", tmp_path / "x").rename(tmp_path / "train.txt")
    os.utime(tmp_path / "train.txt", ns=(0, 0))
    fastkd.distill(cached(config))
    assert len(losses(Path(run["output_dir"]))) == 3


def test_the_revision_stands_for_weights_that_are_not_here(tmp_path: Path, run: dict[str, Any]) -> None:
    """As on a machine that has the cache and of the teacher its configuration and tokenizer alone."""
    contents = read_header(write(run))["contents"]
    assert contents["teacher_revision"] == "a" * 40
    (weights,) = tmp_path.glob("hub/*/snapshots/*/model.safetensors")
    weights.unlink()
    fastkd.distill(cached(run))
    assert len(losses(Path(run["output_dir"]))) == 1


def test_a_missing_shard_is_named_and_a_damaged_one_refused_with_both_hashes(run: dict[str, Any]) -> None:
    shards = sorted(write(run).glob("shard-*"))
    written = file_sha256(shards[1])
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    assert re.search(f"{shards[1].name}.* its sha256 is {file_sha256(shards[1])}, the header says {written}", refusal(cached(run)))
    shards[1].unlink()
    assert f"{shards[1]} of the teacher cache is missing" in refusal(cached(run))
    write(run)
    fastkd.distill(cached(run))
    assert len(losses(Path(run["output_dir"]))) == 1


@pytest.mark.parametrize(("moment", "number", "finished"), [("to_cache", 6, 1), ("write_shard", 3, 3)], ids=["shard", "switch"])
def test_a_terminated_command_goes_on(
    tmp_path: Path,
    run: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    number: int,
    finished: int,
) -> None:
    """SIGTERM in the second batch of the second shard, or while the third is written."""
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(read_config({**run, "max_steps": -1, "per_device_eval_batch_size": 2})))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def command(folder: Path) -> list[str]:
        return ["cache", str(config), "--stage", "pretrain", "--shard_rows", "7", "--output", str(folder)]

    assert main(command(whole)) == 0
    with monkeypatch.context() as patch:
        strike(patch, moment, number)
        assert main(command(stopped)) == 143
    assert "stopped by SIGTERM; run the same command again to go on" in capsys.readouterr().err
    assert len(list(stopped.glob("shard-*"))) == finished and not list(stopped.rglob("*.tmp-*"))
    assert read_header(stopped)["shards"] is None
    assert main(command(stopped)) == 0
    assert hashes(stopped) == hashes(whole)


def strike(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """SIGTERM at this call, counted from 1, of a function that the command uses."""
    original, calls = getattr(cache, name), []

    def call(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            terminate()
        return original(*arguments)

    patch.setattr(cache, name, call)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}
