"""Checkpoints: exact round trips, every kind of damage noticed, and no failure that costs an older one."""

import json
import logging
import os

import pytest
import torch
from torch import nn

from fastkd.train.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointWriter,
    Piece,
    discard_checkpoints_after,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from fastkd.train.ranks import Ranks

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


def save(output_dir, step):
    tensors = {
        "model": {"weight": torch.arange(6.0).reshape(2, 3) + step, "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"weight.step": torch.tensor(float(step))},
    }
    return save_checkpoint(output_dir, step, tensors, {"step": step, "loss": 0.1 + 0.2})


def names(output_dir):
    return sorted(path.name for path in output_dir.iterdir())


# ---- save, load, verify


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoint-7"
    assert sorted(os.listdir(path)) == sorted(FILES)
    tensors, state = load_checkpoint(path, "cpu")
    assert state == {"step": 7, "loss": 0.1 + 0.2}
    assert set(tensors) == {"model", "optimizer"}
    torch.testing.assert_close(tensors["model"]["weight"], torch.arange(6.0).reshape(2, 3) + 7, rtol=0, atol=0)
    assert tensors["model"]["half"].dtype == torch.bfloat16
    assert tensors["optimizer"]["weight.step"].shape == () and tensors["optimizer"]["weight.step"] == 7
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["step"] == 7 and manifest["torch"] == torch.__version__ and manifest["format_version"] == FORMAT_VERSION
    assert manifest["files"]["state.json"]["size"] == (path / "state.json").stat().st_size


def test_shared_and_strided_tensors_are_stored_in_full(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    entries = {"embedding": table, "head": table, "slice": table[1:], "transposed": table.t(), "p": nn.Parameter(table)}
    tensors, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {"model": entries}, {}), "cpu")
    for name, tensor in entries.items():
        assert torch.equal(tensors["model"][name], tensor), name


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_file_is_named_and_the_previous_checkpoint_used(tmp_path, caplog, file, damage):
    older, newest = save(tmp_path, 9), save(tmp_path, 10)
    target = newest / file
    content = bytearray(target.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    elif damage == "truncate":
        target.write_bytes(content[:-1])
    else:
        target.unlink()
    with pytest.raises(CheckpointError, match=file):
        verify_checkpoint(newest)
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(newest, "cpu")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == older
    assert "checkpoint-10" in caplog.text and file in caplog.text and "checkpoint-9:" not in caplog.text


@pytest.mark.parametrize("file", ["state.json", "MANIFEST.json"])
def test_every_single_flipped_byte_is_noticed(tmp_path, file):
    path = save(tmp_path, 1)
    content = (path / file).read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        (path / file).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=file):
            verify_checkpoint(path)
    (path / file).write_bytes(content)
    verify_checkpoint(path)


def test_newer_format_is_refused_with_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.train.checkpoint.FORMAT_VERSION", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format_version 99"):
        verify_checkpoint(path)


def test_something_else_is_not_a_checkpoint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        load_checkpoint(tmp_path / "pytorch_model.bin", "cpu")


def test_newest_is_the_largest_step_and_never_a_temporary_folder(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for step in (100, 20, 3):
        save(tmp_path, step)
    os.rename(tmp_path / "checkpoint-100", tmp_path / "checkpoint-100.tmp-1")
    (tmp_path / "checkpoint-old").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


# ---- faults while saving


@pytest.mark.parametrize("fault", ["os.rename", "safetensors.torch.save_file", "os.fsync"])
def test_failed_save_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch, fault):
    older = save(tmp_path, 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fault, fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path) == older
    assert newest_checkpoint(tmp_path) != save(tmp_path, 2)


def test_everything_is_synced_and_the_manifest_is_written_last(tmp_path, monkeypatch):
    events, by_descriptor = [], {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def recording_open(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        by_descriptor[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(by_descriptor[fd]), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    path = save(tmp_path, 1)
    monkeypatch.undo()
    temporary = f"checkpoint-1.tmp-{os.getpid()}"
    assert sorted(events[: len(FILES)]) == sorted(FILES)
    assert events[len(FILES) :] == [temporary, "rename", tmp_path.name]
    assert max(path.iterdir(), key=lambda file: file.stat().st_mtime_ns).name == "MANIFEST.json"


def test_verified_checkpoint_is_not_overwritten_and_a_broken_one_is_replaced(tmp_path):
    path = save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path, 5)
    (path / "state.json").write_text("{}")
    save(tmp_path, 5)
    verify_checkpoint(path)
    assert names(tmp_path) == ["checkpoint-5"]


def test_leftover_of_a_killed_process_with_our_process_id_does_not_hinder(tmp_path):
    leftover = tmp_path / f"checkpoint-5.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "junk.safetensors").write_bytes(b"half")
    path = save(tmp_path, 5)
    assert sorted(os.listdir(path)) == sorted(FILES) and not leftover.exists()


# ---- pruning


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]
    with pytest.raises(ValueError, match="keep=0"):
        prune_checkpoints(tmp_path, 0)


def test_prune_never_deletes_the_last_verified_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3" / "state.json").unlink()
    prune_checkpoints(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-1").exists()
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    prune_checkpoints(tmp_path, 1)  # nothing verifies, nothing goes
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_going_back_discards_later_history(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
    discard_checkpoints_after(tmp_path, 100)
    assert names(tmp_path) == ["checkpoint-100"]
    save(tmp_path, 200)


def test_pieces_are_never_left_to_the_background(tmp_path):
    """A thread of one rank could not gather them: they are on the disk, all of them, when `save` returns."""
    writer, rows = CheckpointWriter(Ranks(), in_background=True), torch.arange(6.0).reshape(3, 2)
    writer.save(2, tmp_path, 1, {"model": {"split": Piece(rows), "whole": rows[0]}}, {})
    tensors, _ = load_checkpoint(tmp_path / "checkpoint-1")
    assert torch.equal(tensors["model"]["split"], rows) and torch.equal(tensors["model"]["whole"], rows[0])
    writer.close()
