"""Files and folders that are whole or absent, say who is making them, and are removed by nobody else."""

import json
import os
import socket
import subprocess
import sys

import pytest

from fastkd import store
from fastkd.store import InUse, Maker, lock, new_folder, sweep, temporary_path, with_final_names, write_bytes_atomic, write_json_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_a_dead_process(path):
    """The name under which a process of this host that has ended would have prepared `path`."""
    program = f"from pathlib import Path; from fastkd.store import temporary_path; print(temporary_path(Path({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return path.with_name(os.path.basename(done.stdout.strip()))


# ---- writing


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
    assert events[0].startswith(f".data.tmp-{os.getpid()}-") and events[1:] == ["replace", tmp_path.name]
    assert (tmp_path / "data").read_bytes() == b"\0\1" and names(tmp_path) == ["data"]


def test_a_new_folder_appears_when_it_is_full(tmp_path, events):
    with new_folder(tmp_path / "rows") as folder:
        assert names(folder) == [] and folder.parent == tmp_path
        (folder / "data").write_text("all")
        assert not (tmp_path / "rows").exists()
    assert events == ["data", folder.name, "rename", tmp_path.name]
    assert names(tmp_path) == ["rows"] and names(tmp_path / "rows") == ["data"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    def write_half():
        with new_folder(tmp_path / "rows") as folder:
            (folder / "data").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", ["an empty folder", "a full folder", "a file", "a link"])
def test_a_new_folder_takes_no_name_that_exists(tmp_path, there):
    path = tmp_path / "rows"
    if there == "a link":
        path.symlink_to(tmp_path / "nowhere")
    elif there == "a file":
        path.write_text("foreign")
    else:
        path.mkdir()
        if there == "a full folder":
            (path / "data").write_text("foreign")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError), new_folder(path):
        pytest.fail("begun")
    assert contents(tmp_path) == before and names(tmp_path) == ["rows"]


def test_nothing_is_written_over_or_through_a_link(tmp_path):
    (tmp_path / "foreign").write_text("foreign")
    (tmp_path / "link").symlink_to("foreign")
    with pytest.raises(FileExistsError, match="link"):
        write_bytes_atomic(tmp_path / "link", b"ours")
    with pytest.raises(OSError, match="symbolic"):
        lock(tmp_path / "link")
    assert (tmp_path / "foreign").read_text() == "foreign" and (tmp_path / "link").is_symlink()


def test_a_planted_temporary_name_is_never_written_to(tmp_path, monkeypatch):
    """The name cannot be guessed; if it could, what lies there would be refused."""
    planted = temporary_path(tmp_path / "data")
    planted.symlink_to(tmp_path / "victim")
    monkeypatch.setattr(store, "temporary_path", lambda path: planted)
    with pytest.raises(FileExistsError):
        write_bytes_atomic(tmp_path / "data", b"ours")
    assert not (tmp_path / "victim").exists() and planted.is_symlink()
    assert temporary_path(tmp_path / "data") != planted


def test_people_are_told_final_names(tmp_path):
    file = temporary_path(tmp_path / "checkpoint-2") / "model.safetensors"
    told = f"{file}: No space left on device."
    assert with_final_names(told) == f"{tmp_path}/checkpoint-2/model.safetensors: No space left on device."


# ---- sweeping


def test_sweep_removes_what_dead_processes_of_this_host_left_of_known_names(tmp_path):
    file, folder = of_a_dead_process(tmp_path / "log"), of_a_dead_process(tmp_path / "student")
    file.write_text("half")
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "half").write_text("half")
    sweep(tmp_path, {"log", "student"}.__contains__)
    assert names(tmp_path) == []


def test_sweep_leaves_everything_else(tmp_path):
    dead = of_a_dead_process(tmp_path / "log")
    foreign = {
        "IMG.tmp-1": tmp_path / "IMG.tmp-1",
        "an unknown name": of_a_dead_process(tmp_path / "photo"),
        "this process": temporary_path(tmp_path / "log"),
        "another host": dead.with_name(f"{dead.name}-elsewhere"),
        "in a sub-folder": tmp_path / "sub" / dead.name,
    }
    for path in foreign.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("foreign")
    dead.symlink_to(tmp_path / "IMG.tmp-1")
    before = contents(tmp_path)
    sweep(tmp_path, {"log", "IMG"}.__contains__)
    assert contents(tmp_path) == before and dead.is_symlink()


def test_a_process_is_known_by_its_start_and_its_boot_too():
    here = socket.gethostname()
    own = Maker(here, os.getpid(), store._started(os.getpid()), store._boot())
    assert not own.is_gone()
    assert Maker(here, own.pid, own.start + 1, own.boot).is_gone()  # its number was given to another process
    assert Maker(here, own.pid, own.start, "0badcafe").is_gone()  # the machine was started anew
    assert not Maker("elsewhere", own.pid, own.start + 1, own.boot).is_gone()


# ---- locks


def test_a_lock_is_exclusive_names_its_holder_and_is_released(tmp_path):
    with lock(tmp_path / "lock"), pytest.raises(InUse, match=f"process {os.getpid()} on {socket.gethostname()}"):
        lock(tmp_path / "lock")
    lock(tmp_path / "lock").close()


def test_waiting_for_a_lock_polls(tmp_path):
    held, polls = lock(tmp_path / "lock"), []

    def poll():
        polls.append(1)
        if len(polls) == 2:
            held.close()

    lock(tmp_path / "lock", poll=poll).close()
    assert len(polls) == 2


def test_a_lock_is_never_made_of_a_foreign_file(tmp_path):
    (tmp_path / "lock").write_text("a shopping list\n")
    with pytest.raises(FileExistsError, match="something else"):
        lock(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == "a shopping list\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        lock(tmp_path / "pipe")
