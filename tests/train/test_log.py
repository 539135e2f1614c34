import io
import json
import logging
import math
import os
import sys
import termios
from contextlib import suppress

import numpy as np
import pytest

from fastkd.train.log import Progress, RunLog, peak_memory_mb, read_log


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(path):
    return [(entry.get("stage"), entry["step"]) for entry in read_log(path)]


def write(output_dir, numbers, keep=None):
    """The log's size behind every line."""
    with RunLog(output_dir, stage="first", keep=keep) as log:
        sizes = [log.size]
        for step in numbers:
            log.write({"step": step, "loss": 1 / step})
            sizes.append(log.size)
    return sizes


def test_lines_are_strict_json_and_visible_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(tmp_path, stage="pretrain") as log:
        log.write({"step": 1, "loss": 0.1 + 0.2, "grad_norm": math.nan})
        assert strict(path) == [{"stage": "pretrain", "step": 1, "loss": 0.1 + 0.2, "grad_norm": "nan"}]
        log.write({"step": 2, "loss": math.inf, "scores": {"a": -math.inf, "b": [np.float64("nan"), 1]}})
        assert strict(path)[1] == {"stage": "pretrain", "step": 2, "loss": "inf", "scores": {"a": "-inf", "b": ["nan", 1]}}
    with RunLog(tmp_path) as log:
        log.write({"step": 3})
    assert read_log(path)[2] == {"step": 3}


def test_resume_cuts_what_will_happen_again(tmp_path):
    path = tmp_path / "log.jsonl"
    sizes = write(tmp_path, [10, 20, 30, 40])
    before = path.read_bytes()
    assert sizes[-1] == len(before) and write(tmp_path, [], keep=sizes[-1]) == [len(before)]
    assert write(tmp_path, [30, 40], keep=sizes[2])[0] == sizes[2]
    assert path.read_bytes() == before  # the same lines again: the file of an uninterrupted run
    write(tmp_path, [50])  # none is cut
    assert steps(path) == [("first", step) for step in (10, 20, 30, 40, 50)]
    write(tmp_path, [], keep=0)
    assert steps(path) == []


def test_a_log_that_lost_lines_is_not_made_longer(tmp_path):
    """A power cut may take lines that the checkpoint has seen."""
    sizes = write(tmp_path, [10, 20])
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes()[: sizes[1] + 3])
    write(tmp_path, [30], keep=sizes[-1])
    assert steps(tmp_path / "log.jsonl") == [("first", 10), ("first", 30)]


def test_other_ranks_write_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write(None, [1, 2]) == [0, 0, 0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b'{"step": 3}', b"\xc3"])
def test_half_line_is_dropped(tmp_path, half):
    path = tmp_path / "log.jsonl"
    write(tmp_path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert [entry["step"] for entry in read_log(path)] == [1, 2]
    RunLog(tmp_path, stage="second").close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("garbage", ["nonsense", "[1]", "3", "", "[" * 100_000], ids=["text", "list", "number", "empty", "deep"])
def test_broken_line_in_the_middle_is_named_or_passed_over(tmp_path, garbage):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{garbage}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        read_log(path)
    assert read_log(path, strict=False) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("garbage", [b"nonsense", b'{"step": "x"}', b"[]", b"\0\0", b"half\ra line"])
@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_a_run_resumes_behind_garbage_in_its_log(tmp_path, garbage, report_to):
    path = tmp_path / "log.jsonl"
    before = b'{"step": 1}\n' + garbage + b'\n{"step": 2}\n'
    path.write_bytes(before + b'{"step": 3}\n{"step"')
    with RunLog(tmp_path, keep=len(before), report_to=report_to) as lines:
        lines.write({"step": 3, "loss": 1.0})
    assert path.read_bytes() == before + b'{"step": 3, "loss": 1.0}\n'


def test_a_link_is_neither_followed_nor_cut(tmp_path):
    foreign = tmp_path / "precious.txt"
    foreign.write_text("no line break at its end")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(foreign)
    with pytest.raises(OSError, match=r"log\.jsonl' is a link, .*remove the link"):
        RunLog(tmp_path / "run", keep=3)
    assert foreign.read_text() == "no line break at its end"


def test_what_is_cut_is_the_file_that_was_read(tmp_path, monkeypatch):
    """Another file under the log's name while it is opened is not cut."""
    path, foreign = tmp_path / "log.jsonl", tmp_path / "foreign"
    path.write_text('{"step": 1}\nhalf')
    foreign.write_text("precious")
    truncate = os.ftruncate

    def swapped(target, size):
        os.replace(foreign, path)
        truncate(target, size)

    monkeypatch.setattr(os, "ftruncate", swapped)
    monkeypatch.setattr(os, "truncate", lambda target, size: pytest.fail("cut by its name"))
    RunLog(tmp_path).close()
    assert path.read_text() == "precious"


def use_progress():
    with Progress(10, initial=4, description="train") as bar:
        bar.update(3)
        bar.set_postfix(loss=1.25)
        bar.refresh()


def test_progress_writes_nothing_to_a_file(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    use_progress()
    assert stream.getvalue() == ""


LINES = [
    {"step": 30, "loss": 2.5, "loss_words": 1.25, "grad_norm": 3.0, "tokens_per_second": 12345.6, "peak_memory_mb": 812.0},
    {"step": 30, "eval_perplexity": 150.1, "eval_events": "352 slots of 700 ids"},
    {"step": 40, "eval_accuracy": 0.5, "eval_f1": 0.25},
]


def test_off_a_terminal_every_line_of_the_log_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("time.monotonic", iter([0.0, 60.0, 61.0, 80.0]).__next__)
    with caplog.at_level(logging.INFO, "fastkd"):
        bar = Progress(40, initial=20, description="pretrain")
        with RunLog(tmp_path, stage="pretrain", bar=bar) as lines:
            for line in LINES:
                lines.write(line)
    assert [record.getMessage() for record in caplog.records] == [
        "pretrain: step 30/40, loss 2.5, words 1.25, 12,346 tokens/s, 812 MB, 01:00 left",
        "pretrain: step 30/40, perplexity 150.1 over 352 slots of 700 ids, 01:01 left",
        "pretrain: step 40/40, accuracy 0.5, f1 0.25, 00:00 left",
    ]


def test_off_a_terminal_what_has_no_log_says_every_half_minute_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for shown in (True, False):
        monkeypatch.setattr("time.monotonic", iter([0.0, 10.0, 40.0, 69.0, 80.0]).__next__)
        with caplog.at_level(logging.INFO, "fastkd"), Progress(100, description="eval", unit="rows", shown=shown) as bar:
            for _ in range(4):
                bar.update(20)
    assert [record.getMessage() for record in caplog.records] == ["eval: 40/100 rows, 01:00 left", "eval: 80/100 rows, 00:20 left"]


def test_before_the_first_step_nothing_is_guessed_and_other_ranks_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "fastkd"):
        Progress(40, description="ild").show({"step": 0, "eval_accuracy": 0.5})
        Progress(40, description="ild", shown=False).show({"step": 10, "loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == ["ild: step 0/40, accuracy 0.5"]


def test_the_bar_is_ten_wide_on_80_columns(monkeypatch):
    other_end, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (25, 80))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(4000, initial=1000, description="task_words") as bar:
            bar.update(1000)
            bar.show({**LINES[0], "step": 2000})
    written = b""
    with suppress(OSError):  # which says that the terminal is closed, and all that it showed is read
        while part := os.read(other_end, 10_000):
            written += part
    os.close(other_end)
    shown = written.decode().replace("\n", "\r").split("\r")
    assert max(map(len, shown)) <= 80
    last = next(line for line in reversed(shown) if "loss" in line)
    assert len(last.split("|")[1]) == 10 and "2000/4000" in last and last.strip().endswith("left, loss 2.5, words 1.25")


def test_progress_needs_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    use_progress()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    use_progress()
    assert "train" in stream.getvalue() and "7/10" in stream.getvalue() and "loss=1.25" in stream.getvalue()


def test_peak_memory_is_in_mebibytes():
    before = peak_memory_mb()
    block = np.ones(2**24)  # 128 MiB
    assert 100 < peak_memory_mb() < 100_000
    assert peak_memory_mb() >= before and block[0] == 1


def scalars(folder):
    """{name: [(step, value)]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def board(folder, numbers, keep=None):
    with RunLog(folder, keep=keep, report_to="tensorboard") as lines:
        sizes = [lines.size]
        for step in numbers:
            lines.write({"step": step, "loss": 1 / step, "rows": [1], "grad_norm": math.inf})
            sizes.append(lines.size)
    return sizes


def test_tensorboard_shows_the_log_and_hides_what_happens_again(tmp_path):
    pytest.importorskip("tensorboard")
    sizes = board(tmp_path, [1, 2, 3, 4])
    assert scalars(tmp_path) == {name: [(step, value(step)) for step in (1, 2, 3, 4)] for name, value in SHOWN.items()}
    board(tmp_path, [3, 4, 5], keep=sizes[2])  # resumed from step 2
    assert scalars(tmp_path) == {name: [(step, value(step)) for step in (1, 2, 3, 4, 5)] for name, value in SHOWN.items()}


SHOWN = {"loss": lambda step: 1 / step, "grad_norm": lambda step: math.inf}


def test_a_board_that_fails_is_told_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, "add_scalar", full)
    board(tmp_path, [1, 2, 3])
    assert steps(tmp_path / "log.jsonl") == [(None, 1), (None, 2), (None, 3)]
    assert [record.message for record in caplog.records] == [
        "TensorBoard cannot be written (No space left on device); training goes on without it."
    ]


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "flush", "close"])
def test_no_part_of_tensorboard_can_stop_a_run(tmp_path, monkeypatch, caplog, method):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def broken(*_, **__):
        raise RuntimeError("protobuf is too new")

    monkeypatch.setattr(writer, method, broken)
    board(tmp_path, [1, 2])
    assert steps(tmp_path / "log.jsonl") == [(None, 1), (None, 2)]
    assert len(caplog.records) == 1 and "protobuf is too new" in caplog.text


def test_tensorboard_writes_through_no_link(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    board(tmp_path, [1])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(caplog.records) == 1 and "tensorboard is a link" in caplog.text


def test_a_broken_tensorboard_is_not_called_missing(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    monkeypatch.delattr("tensorboard.__version__")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    board(tmp_path, [1])
    assert len(caplog.records) == 1 and "requires TensorBoard version" in caplog.text


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board(tmp_path, [1])
    assert steps(tmp_path / "log.jsonl") == [(None, 1)] and "fastkd[tensorboard]" in caplog.text


def test_the_bar_shows_losses_speed_and_memory(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(10, description="kd") as bar, RunLog(tmp_path, bar=bar) as lines:
        line = {"step": 1, "loss": 2.0, "loss_labels": 0.51234, "grad_norm": 1.0, "tokens_per_second": 12345.6, "peak_memory_mb": 812.3}
        lines.write(line)
        bar.update(1)
        lines.write({"step": 1, "eval_loss": 3.0})
    shown = terminal.getvalue()
    assert "loss 2, labels 0.5123, 12,346 tokens/s, 812 MB" in shown and "eval" not in shown


def test_a_copy_by_hard_links_keeps_its_log(tmp_path):
    """`cp -al` of a run is a backup of it: going on with the run adds nothing to the backup."""
    with RunLog(tmp_path) as log:
        log.write({"step": 1})
    (tmp_path / "backup.jsonl").hardlink_to(tmp_path / "log.jsonl")
    with RunLog(tmp_path) as log:
        log.write({"step": 2})
    assert read_log(tmp_path / "backup.jsonl") == [{"step": 1}] and read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_log_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        RunLog(tmp_path)
