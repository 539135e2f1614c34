"""What `fastkd cache` says before it writes, the kind that it takes by itself, and the room that it does not take unasked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastkd
from fastkd.cli.main import main
from fastkd.models.teacher_cache import HEADER, TeacherCache, read_header
from fastkd.train.cache import CachePlan, write_cache
from fastkd.train.config import read_config
from fastkd.train.loop import StageTrainer
from fastkd.train.schema import to_yaml
from tests import runs
from tests.caches import cached, glmd, glmd_tasks, kd, ted_text, write


def planned(config: dict[str, Any], stage: str = "pretrain", **options: Any) -> tuple[CachePlan, Any]:
    """What is said before, and what was done."""
    plans: list[CachePlan] = []
    folder = Path(config["output_dir"]).parent / "caches" / stage
    done = write_cache(read_config(config), stage, folder, **{"shard_rows": 7, "show": plans.append, **options})
    (plan,) = plans
    return plan, done


KINDS: dict[str, tuple[Callable[[Path], dict[str, Any]], str, dict[str, Any], str]] = {
    "words": (glmd, "pretrain", {}, "topk"),
    "no more words than k": (glmd, "pretrain", {"k": 352}, "dense"),
    "words by another divergence": (lambda folder: glmd(folder, options={"divergence": "tvd"}), "pretrain", {}, "dense"),
    "all words": (lambda folder: kd(folder, runs.bert_teacher, vocabulary=None), "distill", {}, "topk"),
    "scores": (lambda folder: glmd_tasks(folder, runs.bert_teacher, "verbalizer"), "task_scores", {}, "dense"),
    "states": (lambda folder: ted_text(folder, runs.llama_teacher, kl_alpha=0.0), "distill", {}, "dense"),
}


@pytest.mark.parametrize("case", KINDS)
def test_the_smallest_kind_that_the_stage_can_use_is_taken_and_its_size_is_said(tmp_path: Path, case: str) -> None:
    make, stage, options, kind = KINDS[case]
    plan, done = planned(make(tmp_path), stage, **options)
    contents = read_header(tmp_path / "caches" / stage)["contents"]
    assert plan.form.kind == contents["kind"] == kind and contents["k"] == (64 if kind == "topk" else None)
    assert plan.has_words == (contents["kept_vocabulary"] is not None)
    assert (plan.rows, plan.tokens) == (done.rows, done.tokens) and plan.seconds > 0
    heads = done.bytes - plan.bytes - 4 * done.rows
    assert 0 < heads < 1024 * done.shards, "the tensors' bytes, without what says their shapes"


def test_what_is_there_is_not_counted_again(tmp_path: Path) -> None:
    config = glmd(tmp_path)
    whole, done = planned(config)
    for shard in sorted((tmp_path / "caches" / "pretrain").glob("shard-*"))[1:]:
        shard.unlink()
    rest, _ = planned(config)
    assert (rest.rows, rest.tokens) == (done.new_rows - 7, done.new_tokens - read_header_tokens(tmp_path / "caches" / "pretrain"))
    assert 0 < rest.bytes < whole.bytes
    nothing, done = planned(config)
    assert (nothing.rows, nothing.bytes, nothing.seconds, done.new_rows) == (0, 0, 0, 0)


def read_header_tokens(folder: Path) -> int:
    return int(read_header(folder)["shards"][0]["tokens"])


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"max_steps": 2}, 7),  # of 4 rows, and of the 3 that are left over
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, 15),
        ({"max_steps": 100}, 31),
        ({"max_steps": -1}, 31),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 15),
    ],
)
def test_the_rows_that_the_run_reads_are_counted_and_written_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], rows: int
) -> None:
    config = {**glmd(tmp_path), **settings}
    plan, done = planned(config)
    assert (plan.rows, plan.read, plan.available, plan.processes) == (rows, rows, 31, 1)
    assert (plan.tokens, done.rows, done.tokens) == (done.new_tokens, rows, done.new_tokens)
    cache, read = TeacherCache(tmp_path / "caches" / "pretrain"), set()
    outputs = TeacherCache.outputs

    def noted(self: TeacherCache, names: Any, numbers: Any, width: int) -> Any:
        read.update(map(int, numbers))
        return outputs(self, names, numbers, width)

    monkeypatch.setattr(TeacherCache, "outputs", noted)
    fastkd.distill(cached(config))
    assert read == {number for number in range(31) if cache.has([number])[0]} and len(read) == rows


def test_a_run_that_may_skip_rows_reads_any(tmp_path: Path) -> None:
    """Others come in the place of those that are skipped."""
    plan, done = planned({**glmd(tmp_path), "max_steps": 2, "non_finite": "skip"})
    assert plan.read == done.rows == 31


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"max_steps": 3}, "max_steps (2 there, 3 here)"),
        ({"per_device_train_batch_size": 5}, "per_device_train_batch_size (4 there, 5 here)"),
        ({"seed": 1}, "seed (0 there, 1 here)"),
    ],
)
def test_a_run_that_reads_other_rows_is_refused_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], phrase: str
) -> None:
    config = {**glmd(tmp_path), "max_steps": 2}
    planned(config)
    with pytest.raises(ValueError, match=re.escape(f"is a teacher cache of something else: {phrase}")):
        planned({**config, **settings})
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(ValueError, match=f"holds 7 of 31 training rows, and not all of the .* reads: {re.escape(phrase)}"):
            fastkd.distill(cached({**config, **settings}))
    fastkd.distill(cached({**config, "max_steps": 1}))


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("fastkd.train.cache.shutil.disk_usage", lambda path: SimpleNamespace(free=size))


def test_a_large_share_of_the_disk_is_not_taken_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = glmd(tmp_path)
    size = planned(config, kind="dense")[0].bytes
    shutil.rmtree(tmp_path / "caches")
    free(monkeypatch, 3 * size)
    with pytest.raises(
        ValueError, match=r"will take about .* GiB of the .* GiB that are free at .*, more than 25%.*--kind topk.*--yes"
    ):
        planned(config, kind="dense")
    assert not list((tmp_path / "caches" / "pretrain").glob("shard-*")) and not (tmp_path / "caches" / "pretrain" / HEADER).exists()
    planned(config, kind="topk", k=4)  # the folder is as good as new
    shutil.rmtree(tmp_path / "caches")
    planned(config, kind="dense", yes=True)
    shutil.rmtree(tmp_path / "caches")
    free(monkeypatch, size // 2)
    with pytest.raises(ValueError, match="so it does not fit"):
        planned(config, kind="dense", yes=True)


def test_the_command_says_it_all_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(read_config({**glmd(tmp_path), "max_steps": 2})))
    arguments = ["cache", str(tmp_path / "run.yaml"), "--stage", "pretrain", "--output", str(tmp_path / "c")]
    with monkeypatch.context() as patch:
        free(patch, 2**10)
        assert main(arguments) == 2
    said = capsys.readouterr()
    assert f"{tmp_path / 'c'}: 7 rows, 224 tokens as topk, k 64, bfloat16: about 0.1 MiB of 0.0 GiB of free disk, and" in said.out
    assert "--kind dense has the whole one" in said.out and "reads 7 of 31 rows on 1 process; --max_steps -1 writes all" in said.out
    assert "so it does not fit" in said.err
    assert main([*arguments, "--yes", "--kind", "dense"]) == 0
    said = capsys.readouterr()
    assert "224 tokens as dense, bfloat16: about" in said.out and "has the whole one" not in said.out


@pytest.mark.parametrize("kind", ["folder", "link", "header"])
def test_what_is_no_file_and_has_the_name_of_one_is_refused(tmp_path: Path, kind: str) -> None:
    config = glmd(tmp_path)
    folder = write(config)
    taken = folder / HEADER if kind == "header" else next(folder.glob("shard-00002-*"))
    taken.rename(tmp_path / "mine")
    if kind == "link":
        taken.symlink_to(tmp_path / "mine")
    else:
        taken.mkdir()
    with pytest.raises(ValueError, match=rf"{taken.name} is no regular file, and has the name of one of a teacher cache; move it away"):
        write(config)
    assert taken.is_symlink() or taken.is_dir()
