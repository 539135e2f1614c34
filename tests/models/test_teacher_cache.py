"""Shards and header of a teacher cache: what is written is what is read, padded; and what is not whole is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.models.teacher_cache import (
    HEADER,
    CachedTeacher,
    TeacherCache,
    finished_shard,
    model_hashes,
    read_header,
    write_header,
    write_shard,
)
from tests import tiny

LENGTHS = [np.array([3, 1]), np.array([2, 4, 1])]
NUMBERS = [np.array([2, 5]), np.array([6, 8, 9])]


def tensors(number: int) -> dict[str, torch.Tensor]:
    tokens, rows, first = int(LENGTHS[number].sum()), len(LENGTHS[number]), 100 * number
    return {
        "token.logits": torch.arange(first, first + 2 * tokens).view(tokens, 2).bfloat16(),
        "token.topk_ids": torch.arange(first, first + tokens, dtype=torch.int32)[:, None],
        "row.scores": torch.arange(first, first + 3 * rows).view(rows, 3).float(),
    }


def write(folder: Path, contents: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    shards = [write_shard(folder, number, NUMBERS[number], lengths, tensors(number)) for number, lengths in enumerate(LENGTHS)]
    write_header(folder, contents or {"teacher": "t"}, shards)
    return folder


def test_rows_come_back_in_any_order_padded(tmp_path):
    cache = TeacherCache(write(tmp_path))
    assert cache.names == ["row.scores", "token.logits", "token.topk_ids"] and cache.contents == {"teacher": "t"}
    found = cache.outputs(cache.names, [8, 2, 8, 5], 5)
    second, first = tensors(1), tensors(0)
    assert found["token.logits"].shape == (4, 5, 2) and found["token.logits"].dtype == torch.bfloat16
    assert torch.equal(found["token.logits"][0, :4], second["token.logits"][2:6])
    assert torch.equal(found["token.logits"][1, :3], first["token.logits"][:3])
    assert torch.equal(found["token.logits"][2], found["token.logits"][0])
    assert not found["token.logits"][0, 4:].any() and not found["token.logits"][3, 1:].any()
    ids = found["token.topk_ids"][..., 0].tolist()
    assert ids == [[102, 103, 104, 105, -1], [0, 1, 2, -1, -1], [102, 103, 104, 105, -1], [3, -1, -1, -1, -1]]
    scores = [second["row.scores"][1], first["row.scores"][0], second["row.scores"][1], first["row.scores"][1]]
    assert torch.equal(found["row.scores"], torch.stack(scores))
    assert list(cache.outputs(["row.scores"], [2], 5)) == ["row.scores"]


def test_a_row_that_is_not_there_is_named(tmp_path):
    cache = TeacherCache(write(tmp_path))
    assert cache.has([2, 3, 9, 10, 0]).tolist() == [True, False, True, False, False]
    for missing in (3, 10, 0):
        with pytest.raises(ValueError, match=f"The teacher cache {tmp_path} has no row {missing}"):
            cache.outputs(["row.scores"], [2, missing], 5)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    left, right = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert left == right and len(left) == 3


def test_a_shard_is_finished_if_its_content_is_what_its_name_says(tmp_path):
    write(tmp_path)
    header = read_header(tmp_path)
    shard = finished_shard(tmp_path, 0, LENGTHS[0])
    assert shard is not None and vars(shard) == header["shards"][0] and shard.tokens == 4
    assert finished_shard(tmp_path, 2, LENGTHS[0]) is None
    path = tmp_path / shard.file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert finished_shard(tmp_path, 0, LENGTHS[0]) is None and path.exists()
    other = path.with_name(f"shard-00000-{'0' * 16}.safetensors")
    other.write_bytes(b"mine")
    os.mkfifo(path.with_name("shard-00000-pipe.safetensors"))
    assert write_shard(tmp_path, 0, NUMBERS[0], LENGTHS[0], tensors(0)) == finished_shard(tmp_path, 0, LENGTHS[0]) == shard
    assert other.read_bytes() == b"mine"


def spoil_size(folder: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def spoil_content(folder: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")


def unseal(folder: Path, shard: Path) -> None:
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps({**header, "contents": {"teacher": "another"}}))


def unfinish(folder: Path, shard: Path) -> None:
    write_header(folder, {"teacher": "t"}, None)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "missing": (lambda folder, shard: shard.unlink(), "Shard .*{name} of the teacher cache is missing"),
    "size": (spoil_size, r"Shard .*{name} of the teacher cache is damaged: it has \d+ bytes, the header says \d+"),
    "content": (spoil_content, r"Shard .*{name} of the teacher cache is damaged: its sha256 is \w+, the header says \w+"),
    "seal": (unseal, r"header.json was changed after it was written: its sha256 is \w+, and it says \w+"),
    "json": (lambda folder, shard: (folder / HEADER).write_text("{"), "header.json is not JSON.*Delete the folder"),
    "empty": (lambda folder, shard: (folder / HEADER).write_text(""), "header.json is empty.*Delete the folder"),
    "object": (lambda folder, shard: (folder / HEADER).write_text("{}"), "header.json lacks sha256, format.*Delete the folder"),
    "null": (lambda folder, shard: (folder / HEADER).write_text("null"), "header.json holds no JSON object.*Delete the folder"),
    "no-format": (
        lambda folder, shard: (folder / HEADER).write_text('{"sha256": ""}'),
        "header.json lacks format.*Delete the folder",
    ),
    "pipe": (lambda folder, shard: pipe(folder / HEADER), r"it is no regular file: '.*header\.json'"),
    "shard-pipe": (lambda folder, shard: pipe(shard), "Shard .*{name} of the teacher cache is no regular file"),
    "format": (lambda folder, shard: (folder / HEADER).write_text('{"format": 9, "sha256": ""}'), "has format 9 and .* reads format 3"),
    "unfinished": (unfinish, "is not finished. Run the `fastkd cache` command that wrote it again"),
    "no-header": (lambda folder, shard: (folder / HEADER).unlink(), "holds no header.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_whole_is_refused_by_name(tmp_path, case):
    spoil, sentence = DAMAGE[case]
    write(tmp_path)
    shard = sorted(tmp_path.glob("shard-*"))[1]
    spoil(tmp_path, shard)
    with pytest.raises((ValueError, OSError), match=sentence.format(name=shard.name) if "{name}" in sentence else sentence):
        TeacherCache(tmp_path)
    if case == "content":
        TeacherCache(tmp_path, check_hashes=False)


def test_a_models_hash_is_that_of_its_configuration_and_weights(tmp_path):
    def saved(name: str, **changes: Any) -> str:
        model = tiny.bert(60, **changes)
        return tiny.save(tmp_path / name, model, tiny.wordpiece())

    revision, first = model_hashes(saved("a"))
    assert revision is None and first == model_hashes(saved("b"))[1]
    assert first != model_hashes(saved("c", seed=1))[1]
    assert first != model_hashes(saved("d", layer_norm_eps=1e-7))[1]


def test_a_cached_teacher_has_no_weights(tmp_path):
    teacher = CachedTeacher(tiny.save(tmp_path / "t", tiny.llama(), tiny.byte_level()), tmp_path)
    assert teacher.causal and all(parameter.is_meta for parameter in teacher.model.parameters())
    assert not CachedTeacher(tiny.save(tmp_path / "e", tiny.bert(), tiny.wordpiece()), tmp_path).causal


def test_a_cache_of_an_earlier_fastkd_names_the_version_that_reads_it(tmp_path):
    (tmp_path / HEADER).write_text('{"format": 1, "contents": {}, "shards": null, "sha256": ""}')
    with pytest.raises(ValueError, match=r"fastkd 0\.1 reads it"):
        read_header(tmp_path)
