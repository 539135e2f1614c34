"""Files and folders that are whole or absent."""

import hashlib
import json
import os

import pytest

from fastkd.files import file_sha256, new_folder, remove_folder, write_bytes_atomic, write_json_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def events(monkeypatch):
    """The base names that are synced, and the renames between them, in order."""
    events, by_descriptor = [], {}
    real_open, real_fsync, real_rename, real_replace = os.open, os.fsync, os.rename, os.replace

    def recording_open(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        by_descriptor[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(by_descriptor[fd]), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b)))
    return events


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"score": 0.1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"score": object()})

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_json_atomic(path, {"score": 0.2})
    assert json.loads(path.read_text()) == {"score": 0.1}
    assert names(tmp_path) == ["results.json"]


def test_a_file_is_synced_before_and_its_folder_after_the_rename(tmp_path, events):
    write_bytes_atomic(str(tmp_path / "data"), b"\0\1")
    assert events == [f"data.tmp-{os.getpid()}", "replace", tmp_path.name]
    assert (tmp_path / "data").read_bytes() == b"\0\1" and names(tmp_path) == ["data"]


def test_a_new_folder_appears_when_it_is_full(tmp_path, events):
    leftover = tmp_path / f"rows.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "junk").write_text("of a killed process with our process id")
    with new_folder(tmp_path / "rows") as folder:
        assert folder == leftover and names(folder) == []
        (folder / "data").write_text("all")
        assert not (tmp_path / "rows").exists()
    assert events == ["data", leftover.name, "rename", tmp_path.name]
    assert names(tmp_path) == ["rows"] and names(tmp_path / "rows") == ["data"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    def write_half():
        with new_folder(tmp_path / "rows") as folder:
            (folder / "data").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(tmp_path) == []


def test_removing_a_folder_never_leaves_a_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "data").write_text("all")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "rows")
    assert names(tmp_path) == [f"rows.tmp-{os.getpid()}"]
    (tmp_path / "rows").mkdir()
    remove_folder(tmp_path / "rows")
    assert names(tmp_path) == []


def test_file_sha256(tmp_path):
    (tmp_path / "data").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "data") == hashlib.sha256(b"abc" * 100_000).hexdigest()
