"""The output folder: locked, tied to one run, and cleared of what a killed process left."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from fastkd.train.checkpoint import newest_checkpoint, save_checkpoint
from fastkd.train.output import prepare_output_dir


def names(output_dir):
    return sorted(path.name for path in output_dir.iterdir())


def test_same_run_comes_back(tmp_path):
    run = {"seed": 1, "betas": (0.9, 0.98), "data": {"path": "a.txt"}}
    with prepare_output_dir(tmp_path / "a" / "b", run) as folder:
        save_checkpoint(folder.path, 1, {}, {})
    with prepare_output_dir(tmp_path / "a" / "b", run, overwrite=True) as folder:
        assert newest_checkpoint(folder.path) == folder.path / "checkpoint-1"  # a restarted job loses nothing


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path):
    with prepare_output_dir(tmp_path, {"seed": 1, "lr": 1e-4, "data": {"path": "a.txt", "split": "train"}}):
        save_checkpoint(tmp_path, 1, {}, {})
    (tmp_path / "log.jsonl").write_text("{}\n")
    other = {"seed": 1, "lr": 2e-4, "data": {"path": "b.txt", "split": "train"}, "new": None}
    with pytest.raises(ValueError, match=r"another output_dir.*overwrite_output_dir") as refusal:
        prepare_output_dir(tmp_path, other)
    message = str(refusal.value)
    assert "lr (0.0001 there, 0.0002 here)" in message and "data.path" in message and "new (" in message
    assert "seed" not in message and "split" not in message
    assert newest_checkpoint(tmp_path) is not None
    for _ in range(2):  # the refusal released the lock; the second time the folder is the new run's
        with prepare_output_dir(tmp_path, other, overwrite=True):
            assert names(tmp_path) == [".lock", "run.json"]


def test_checkpoints_of_nobody_are_not_adopted(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(ValueError, match=r"no run\.json"):
        prepare_output_dir(tmp_path, {})
    assert (tmp_path / "checkpoint-500").exists()


def test_lock_is_exclusive_and_released(tmp_path):
    with (
        prepare_output_dir(tmp_path, {}),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "),
    ):
        prepare_output_dir(tmp_path, {})
    prepare_output_dir(tmp_path, {}).close()


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        prepare_output_dir(tmp_path / "file", {})
    with pytest.raises(ValueError, match="cannot be written"):
        prepare_output_dir(tmp_path / "file" / "below", {})


def test_killed_while_saving(tmp_path):
    """SIGKILL between the manifest and the rename: the lock vanishes, the leftover is cleared, the older one is used."""
    writer = textwrap.dedent("""
        import os, sys, time, torch
        from fastkd.train.checkpoint import save_checkpoint
        from fastkd.train.output import prepare_output_dir
        folder = prepare_output_dir(sys.argv[1], {"seed": 1})
        save_checkpoint(sys.argv[1], 1, {"model": {"w": torch.ones(2)}}, {})
        os.rename = lambda *_: (print("saving", flush=True), time.sleep(60))
        save_checkpoint(sys.argv[1], 2, {"model": {"w": torch.ones(2)}}, {})
    """)
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "saving\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
            prepare_output_dir(tmp_path, {"seed": 1})
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / f"checkpoint-2.tmp-{process.pid}" / "MANIFEST.json").exists()
    with prepare_output_dir(tmp_path, {"seed": 1}):
        assert names(tmp_path) == [".lock", "checkpoint-1", "run.json"]
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_run_refused_before_its_first_step_leaves_the_folder_free(tmp_path):
    with prepare_output_dir(tmp_path, {"seed": 1}):
        (tmp_path / "pretrain").mkdir()
        (tmp_path / "vocab_map").mkdir()  # chosen by the other settings
    with prepare_output_dir(tmp_path, {"seed": 2}):
        assert names(tmp_path) == [".lock", "pretrain", "run.json"]
        (tmp_path / "pretrain" / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="seed \\(2 there, 1 here\\)"):
        prepare_output_dir(tmp_path, {"seed": 1})


def test_a_leftover_within_a_leftover_is_cleared(tmp_path):
    (tmp_path / "student.tmp-1").mkdir()
    (tmp_path / "student.tmp-1" / "map.json.tmp-1").write_text("")
    with prepare_output_dir(tmp_path, {}):
        assert names(tmp_path) == [".lock", "run.json"]
