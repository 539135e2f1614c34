"""Checkpoints: exact round trips, every kind of damage noticed, and no failure that costs an older one."""

import errno
import json
import logging
import os

import pytest
import torch
from torch import nn

from fastkd import sealed
from fastkd.sealed import read_manifest
from fastkd.train.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointWriter,
    Piece,
    UnreadableCheckpoint,
    checkpoint_identity,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from fastkd.train.ranks import Ranks

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


def save(output_dir, step, **more):
    tensors = {
        "model": {"weight": torch.arange(6.0).reshape(2, 3) + step, "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"weight.step": torch.tensor(float(step))},
    }
    return save_checkpoint(output_dir, step, tensors, {"step": step, "loss": 0.1 + 0.2}, **more)


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


def test_another_format_is_refused_with_the_version_that_reads_it(tmp_path, monkeypatch):
    older = save(tmp_path, 1)
    monkeypatch.setattr("fastkd.train.checkpoint.FORMAT_VERSION", 99)
    monkeypatch.setattr("fastkd.train.checkpoint.__version__", "9.9")
    path = save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(UnreadableCheckpoint, match=r"format_version 99.*use the fastkd that wrote it \(9\.9\)"):
        verify_checkpoint(path)
    with pytest.raises(UnreadableCheckpoint, match=r"checkpoint-2 has format_version 99.*move it away"):
        newest_checkpoint(tmp_path)  # and never silently the one before
    assert names(tmp_path) == [older.name, path.name]


def test_a_manifest_without_its_keys_is_told_from_a_bug(tmp_path):
    path = save(tmp_path, 1)
    manifest = {key: value for key, value in read_manifest(path).items() if key not in ("format_version", "fastkd", "sha256")}
    (path / "MANIFEST.json").write_bytes(sealed._sealed(manifest))
    with pytest.raises(UnreadableCheckpoint, match=r"format_version None.*does not say which"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_bears_the_identity_of_its_run(tmp_path):
    assert checkpoint_identity(save(tmp_path, 1, identity="of this run")) == "of this run"


# ---- what cannot be read is not damaged


def deny(monkeypatch, path, error, times=10**6):
    """Let the system refuse to open what lies below `path`, so many times."""
    real, left = os.open, [times]

    def refusing(name, *arguments, **options):
        if str(name).startswith(f"{path}{os.sep}") and left[0] > 0:
            left[0] -= 1
            raise OSError(error, os.strerror(error), str(name))
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("error", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_is_neither_passed_over_nor_touched(tmp_path, monkeypatch, error):
    monkeypatch.setattr("time.sleep", lambda _: None)
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    with monkeypatch.context() as patch:
        deny(patch, newest, error)
        with pytest.raises(UnreadableCheckpoint, match=r"checkpoint-2 cannot be read.*move it away"):
            newest_checkpoint(tmp_path)
        with pytest.raises(UnreadableCheckpoint, match=r"checkpoint-2 cannot be read"):
            save(tmp_path, 2)
        prune_checkpoints(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == newest and names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_three_stale_reads_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    path = save(tmp_path, 2)
    deny(monkeypatch, path, errno.ESTALE, times=3)
    assert newest_checkpoint(tmp_path) == path


def test_where_none_verifies_nothing_starts_over(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"None of the checkpoints.*checkpoint-2.*checkpoint-1.*Put back a copy"):
        newest_checkpoint(tmp_path)


def test_a_pipe_in_a_checkpoint_does_not_hang(tmp_path):
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        newest_checkpoint(tmp_path)


# ---- links


def test_a_checkpoint_on_another_disk_is_read_and_left_alone(tmp_path):
    """It was moved there by hand and linked back: neither starting nor pruning minds, and its data stay."""
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
    os.rename(tmp_path / "run" / "checkpoint-1", tmp_path / "disk" / "moved")
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "disk" / "moved")
    prune_checkpoints(tmp_path / "run", 1)
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-3"]
    verify_checkpoint(tmp_path / "disk" / "moved")
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"


def test_a_link_whose_disk_is_away_is_not_damaged(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "unmounted" / "checkpoint-2")
    with pytest.raises(UnreadableCheckpoint, match=r"checkpoint-2 cannot be read"):
        newest_checkpoint(tmp_path)


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


def test_everything_is_synced_and_the_manifest_is_written_last(tmp_path, events):
    path = save(tmp_path, 1)
    assert {*events[:-3]} == {*FILES}
    assert events[-3].startswith(f".checkpoint-1.tmp-{os.getpid()}-") and events[-2:] == ["rename", tmp_path.name]
    assert max(path.iterdir(), key=lambda file: file.stat().st_mtime_ns).name == "MANIFEST.json"


def test_verified_checkpoint_is_not_overwritten_and_a_damaged_one_is_set_aside(tmp_path):
    path = save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path, 5)
    for _ in range(2):
        (path / "state.json").write_text("{}")
        save(tmp_path, 5)
    verify_checkpoint(path)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-5.damaged", "checkpoint-5.damaged-2"]
    assert (tmp_path / "checkpoint-5.damaged" / "state.json").read_text() == "{}" and newest_checkpoint(tmp_path) == path


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


def test_prune_leaves_the_checkpoints_of_another_run(tmp_path):
    for step, identity in ((1, "other"), (2, "own"), (3, "own"), (9, "other")):
        save(tmp_path, step, identity=identity)
    prune_checkpoints(tmp_path, 1, "own")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-9"]


def test_a_damaged_checkpoint_of_another_run_is_not_set_aside(tmp_path):
    (save(tmp_path, 5, identity="other") / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged, and not known to be of this run; move it away"):
        save(tmp_path, 5, identity="own")
    assert names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize("found", ["a file", "a folder", "a link"])
def test_what_is_only_called_a_checkpoint_is_not_set_aside(tmp_path, found):
    path = tmp_path / "checkpoint-5"
    {"a file": path.touch, "a folder": path.mkdir, "a link": lambda: path.symlink_to(tmp_path)}[found]()
    with pytest.raises(CheckpointError, match="not known to be of this run; move it away"):
        save(tmp_path, 5)
    assert names(tmp_path) == ["checkpoint-5"]


def test_prune_leaves_what_fastkd_did_not_write(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("foreign")
    (tmp_path / "checkpoint-2" / "MANIFEST.json").write_text("{}")
    prune_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert names(tmp_path / "checkpoint-1") == ["notes.txt"] and len(names(tmp_path / "checkpoint-2")) == len(FILES)


def test_pieces_are_never_left_to_the_background(tmp_path):
    """A thread of one rank could not gather them: they are on the disk, all of them, when `save` returns."""
    writer, rows = CheckpointWriter(Ranks(), in_background=True), torch.arange(6.0).reshape(3, 2)
    writer.save(2, tmp_path, 1, {"model": {"split": Piece(rows), "whole": rows[0]}}, {})
    tensors, _ = load_checkpoint(tmp_path / "checkpoint-1")
    assert torch.equal(tensors["model"]["split"], rows) and torch.equal(tensors["model"]["whole"], rows[0])
    writer.close()
