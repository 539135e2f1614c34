"""`fastkd cache`: what it writes, that an interruption changes nothing of it, and what cannot be cached."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastkd
from fastkd.cli.main import main
from fastkd.models.teacher_cache import HEADER, read_header, write_shard
from fastkd.store import lock
from fastkd.train import cache as cache_module
from fastkd.train.config import read_config
from fastkd.train.output import LOCK_FILE
from fastkd.train.ranks import Ranks
from fastkd.train.schema import to_yaml
from fastkd.train.signals import Preempted
from tests import runs, tiny
from tests.caches import cached, crild, glmd, ted_task, ted_text, write


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_the_header_says_what_the_cache_is_of(tmp_path):
    config = glmd(tmp_path, runs.bert_teacher)
    folder = write(config, kind="topk", k=5, dtype="float16")
    header = read_header(folder)
    contents = header["contents"]
    assert (contents["kind"], contents["k"], contents["dtype"], contents["temperature"]) == ("topk", 5, "float16", 2.0)
    assert (contents["mask_probability"], contents["mask_seed"], contents["predictions"]) == (0.15, 0, "words")
    assert contents["kept_vocabulary"] == 304 and contents["layers"] == [] and contents["rows"] == 60
    assert [shard["rows"] for shard in header["shards"]] == [7] * 8 + [4]
    tensors = load_file(folder / header["shards"][0]["file"])
    tokens = int(tensors["lengths"].sum())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "numbers": (torch.int64, (7,)),
        "lengths": (torch.int32, (7,)),
        "token.topk_ids": (torch.int32, (tokens, 5)),
        "token.topk_logprobs": (torch.float16, (tokens, 5)),
        "token.tail_logprob": (torch.float32, (tokens,)),
    }
    mass = tensors["token.topk_logprobs"].double().exp().sum(-1) + tensors["token.tail_logprob"].double().exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-3)


# ---- interruptions


def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Stopped by a signal in the fourth shard: the first three stay as they are."""
    config = glmd(tmp_path)
    folder = write(config)
    whole = content(folder)
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        original, calls = cache_module.write_shard, []

        def write_shard(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        patch.setattr(cache_module, "write_shard", write_shard)
        with pytest.raises(Preempted, match="SIGTERM"):
            write(config)
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert len(shards) == 3
    with pytest.raises(ValueError, match=r"is not finished.*fastkd cache"):
        fastkd.distill(cached(config))
    write(config)
    assert content(folder) == whole
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_a_damaged_shard_is_named_and_written_again(tmp_path):
    config = glmd(tmp_path)
    folder = write(config)
    whole = content(folder)
    shards = sorted(folder.glob("shard-*"))
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shards[1].name} of the teacher cache is damaged: its sha256 is \w+, the header says \w+"):
        fastkd.distill(cached(config))
    shards[2].write_bytes(b"short")
    with pytest.raises(ValueError, match=r"Shard .*(shard-00001|shard-00002).* is damaged"):
        fastkd.distill(cached(config))
    for shard in shards[1:3]:
        shard.unlink()
    with pytest.raises(ValueError, match=rf"Shard .*{shards[1].name} of the teacher cache is missing"):
        fastkd.distill(cached(config))
    write(config)
    assert content(folder) == whole


def test_ranks_write_the_same_bytes_together(tmp_path, monkeypatch):
    """Two ranks as two threads: each writes every other shard, and the first the header."""
    config = glmd(tmp_path)
    folder = write(config)
    whole = content(folder)
    shutil.rmtree(folder)
    gathered, meeting = {}, threading.Barrier(2)
    written: dict[int, list[str]] = {0: [], 1: []}
    own = threading.local()

    class Threads(Ranks):
        def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
            gathered[self.rank] = json.loads(json.dumps(value))
            meeting.wait()
            values = [gathered[0], gathered[1]]
            meeting.wait()
            return values

        @classmethod
        @contextmanager
        def join(cls, **options: Any) -> Any:
            yield cls(own.rank, 2)

    def recorded(*arguments: Any) -> Any:
        shard = write_shard(*arguments)
        written[own.rank].append(shard.file)
        return shard

    def work(rank: int) -> None:
        own.rank = rank
        write(config)

    monkeypatch.setattr(cache_module, "Ranks", Threads)
    monkeypatch.setattr(cache_module, "write_shard", recorded)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, rank) for rank in range(2)]:
            done.result(timeout=60)
    assert content(folder) == whole
    assert sorted(written[0]) == [name for name in sorted(whole) if name.startswith("shard")][::2] and len(written[1]) == 2


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    config = glmd(tmp_path, max_steps=-1)
    (tmp_path / "run.yaml").write_text(to_yaml(read_config(config)))
    arguments = ["cache", str(tmp_path / "run.yaml"), "--stage", "pretrain", "--output", str(tmp_path / "c")]
    assert main([*arguments, "--kind", "topk", "--k", "4", "--options.temperature", "3"]) == 0
    said = capsys.readouterr().out
    contents = read_header(tmp_path / "c")["contents"]
    assert (contents["temperature"], contents["k"]) == (3.0, 4)
    assert "31 rows, 974 tokens" in said and "rows/s" in said and "bytes a token" in said
    assert main([*arguments, "--kind", "topk", "--k", "5", "--options.temperature", "3"]) == 2
    assert "k is 4 there and 5 here" in capsys.readouterr().err


# ---- what is refused


UNCACHEABLE = {
    "mixup": (lambda f: crild(f), "ild", {}, "stage ild takes no cached teacher: .*MixUp"),
    "no-teacher": (ted_task, "student", {}, "stage student takes no cached teacher: no teacher stands beside"),
    "pads": (lambda f: ted_text(f, runs.llama_teacher, padding="include"), "distill", {}, "padding is 'include'.*exclude"),
    "too-many": (glmd, "pretrain", {"kind": "topk", "k": 10_000}, "k is 10000; a top-k cache holds from 1 to all 352"),
    "none": (glmd, "pretrain", {"kind": "topk", "k": 0}, "k is 0; a top-k cache holds from 1"),
    "divergence": (
        lambda f: glmd(f, options={"divergence": "tvd"}),
        "pretrain",
        {"kind": "topk"},
        "options.divergence is tvd.*forward_kl",
    ),
    "shard-rows": (glmd, "pretrain", {"shard_rows": 0}, "shard_rows is 0"),
    "stage": (glmd, "task_words", {}, "stage task_words is not configured"),
}


@pytest.mark.parametrize("case", UNCACHEABLE)
def test_what_cannot_be_cached_is_refused(tmp_path, case):
    make, stage, options, sentence = UNCACHEABLE[case]
    config = make(tmp_path)
    if stage in ("ild", "student"):
        config["stages"][stage] = {}
    with pytest.raises(ValueError, match=sentence):
        write(config, stage, **options)
    assert not list((tmp_path / "caches").glob("*/shard-*"))
    if stage == "ild":  # a run is refused as the command is
        config["stages"]["ild"]["teacher"] = {"kind": "cache", "path": str(tmp_path)}
        with pytest.raises(ValueError, match=sentence):
            fastkd.distill(config)


def test_a_folder_in_use_or_of_something_else_is_left_alone(tmp_path):
    config = glmd(tmp_path)
    folder = write(config)
    before = content(folder)
    with pytest.raises(ValueError, match=r"is a teacher cache of something else: dtype is 'float32' there and 'float16' here"):
        write(config, dtype="float16")
    assert content(folder) == before
    with lock(folder / LOCK_FILE), pytest.raises(ValueError, match=r"The teacher cache .* is in use by process"):
        write(config)
    (folder / HEADER).unlink()
    with pytest.raises(ValueError, match=r"holds shard-.* and no header.json"):
        write(config)


def test_a_teacher_that_is_not_finite_is_not_written_down(tmp_path):
    config = glmd(tmp_path)
    model = tiny.llama(700, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[5:300] = torch.inf
    tiny.save(Path(config["teacher_model_name_or_path"]), model, tiny.byte_level())
    with pytest.raises(ValueError, match="are not finite"):
        write(config, dtype="float32")
