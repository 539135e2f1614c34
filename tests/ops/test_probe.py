"""The check behind backend="auto" on a GPU: no fault of a kernel, a process or the cache passes it, or harms the call that asks.

No GPU is needed: a kernel is any callable, and the process that runs the check any command.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd import kernels, store
from fastkd.ops import probe, row_check
from fastkd.ops.backend_torch import run
from fastkd.ops.probe import Unavailable, Verdict, ask_child, settle
from fastkd.ops.row_call import RowCall
from fastkd.ops.row_check import CallKind
from tests.row_kinds import CPU, DENSE, KINDS, make_call


@pytest.fixture(autouse=True)
def backend() -> None:
    """Override the common fixture: which kernel runs is said here."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller of the vocabularies alone."""
    monkeypatch.setattr(row_check, "_SIZES", {aligned: sizes[:1] for aligned, sizes in row_check._SIZES.items()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where verdicts are kept, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastkd"


# A process of its own.


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


PASSES, FAILS = f"echo '{probe.READY}'; echo '{probe.ANSWER}null'", f"""echo '{probe.READY}'; echo '{probe.ANSWER}"wrong"'"""


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        (PASSES, None),
        (FAILS, "wrong"),
        (f"{FAILS}; kill -SEGV $$", "wrong"),
        (f"echo '{probe.READY}'; kill -ABRT $$", "the process ended by Aborted: it said nothing."),
        (
            f"echo '{probe.READY}'; echo 'an illegal access' >&2; kill -SEGV $$",
            "the process ended by Segmentation fault: an illegal access.",
        ),
        (f"{PASSES}; kill -ABRT $$", "the process ended by Aborted: it said nothing."),
        (f"echo '{probe.READY}'; echo 'no such backend' >&2; exit 3", "the process ended with status 3: no such backend."),
        (f"echo '{probe.READY}'", "the process ended with status 0: it said nothing."),
    ],
)
def test_a_process_that_dies_is_told_from_one_that_finds_wrong_numbers(script: str, answer: str | None) -> None:
    assert ask_child(shell(script), 60) == answer


def test_a_process_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    assert ask_child(shell(f"sleep 600 & echo $! > {note}; echo {probe.READY}; wait"), 2) == "it did not end within 2 s."
    child = int(note.read_text())
    deadline = time.monotonic() + 60
    while store._started(child) is not None:  # it may take a moment to die
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (shell("echo 'all CUDA-capable devices are busy' >&2; exit 1"), "all CUDA-capable devices are busy"),
        (shell("kill -SEGV $$"), "Segmentation fault"),
        (shell("sleep 600"), "it did not end within 1 s"),
        (["/nowhere/python"], "no process could be started"),
        ([""], "no process could be started"),
    ],
)
def test_a_process_that_never_had_the_gpu_says_nothing_of_the_kernel(command: list[str], why: str) -> None:
    with pytest.raises(Unavailable, match=why):
        ask_child(command, 1 if "600" in command[-1] else 60)


def spec(backend: str) -> str:
    return json.dumps({"backend": backend, "device": "cpu", "kind": asdict(DENSE)})


def test_the_real_command_passes_a_right_kernel() -> None:
    assert ask_child([sys.executable, "-P", "-m", "fastkd.ops.probe", spec("torch")], 300) is None


def test_the_real_command_survives_a_kernel_that_aborts() -> None:
    program = (
        f"import os\nfrom fastkd.ops import probe\nprobe._runner = lambda name: lambda call: os.abort()\nprobe.main({spec('torch')!r})"
    )
    answer = ask_child([sys.executable, "-P", "-c", program], 300)
    assert answer is not None and answer.startswith("the process ended by Aborted")


def off_by_a_percent(call: RowCall) -> None:
    run(call)
    call.gradient.mul_(1.01)


def test_without_a_process_triton_is_checked_here_and_cuda_is_not_taken(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def exclusive(command: list[str], limit: float) -> str | None:
        raise Unavailable("that one did not get the GPU: busy.")

    monkeypatch.setattr(probe, "ask_child", exclusive)
    monkeypatch.setattr(probe, "_runner", lambda backend: run)
    assert probe._examine("triton", DENSE, CPU) == Verdict(None)
    refused = Verdict("it has to run in a process of its own, and that one did not get the GPU: busy.", is_final=False)
    assert probe._examine("cuda", DENSE, CPU) == refused
    monkeypatch.setattr(probe, "_runner", lambda backend: off_by_a_percent)
    found = probe._examine("triton", DENSE, CPU)
    assert found.is_final and found.why_not is not None and "gradient is off" in found.why_not


def test_a_full_gpu_says_nothing_of_the_kernel(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: RowCall) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(probe, "ask_child", lambda command, limit: (_ for _ in ()).throw(Unavailable("busy.")))
    monkeypatch.setattr(probe, "_runner", lambda backend: full)
    found = probe._examine("triton", DENSE, CPU)
    assert not found.is_final and found.why_not is not None and "CUDA out of memory." in found.why_not


# What is kept.

KEY = {"backend": "cuda", "gpu": "NVIDIA H200", "torch": "2.13.0", "divergence": None}


class Examiner:
    """Answers, and counts how often it was asked."""

    def __init__(self, why_not: str | None = None) -> None:
        self.found, self.asked = Verdict(why_not), 0

    def __call__(self) -> Verdict:
        self.asked += 1
        return self.found


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("probe-*.json"))


@pytest.mark.parametrize("why_not", [None, "its gradient is off by 1."])
def test_a_verdict_is_found_again(why_not: str | None, folder: Path) -> None:
    first, second = Examiner(why_not), Examiner()
    assert settle(KEY, first) == settle(KEY, second) == Verdict(why_not)
    assert (first.asked, second.asked) == (1, 0)
    (file,) = kept(folder)
    assert json.loads(file.read_text()) == {"key": KEY, "why_not": why_not}
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name]


def test_what_may_change_by_itself_is_not_kept(folder: Path) -> None:
    busy = Verdict("the GPU is busy.", is_final=False)
    assert settle(KEY, lambda: busy) == busy
    assert kept(folder) == []


@pytest.mark.parametrize("change", [{"torch": "2.14.0"}, {"gpu": "NVIDIA B200"}, {"divergence": "jsd"}])
def test_another_version_machine_or_kind_is_examined_again(change: dict[str, str], folder: Path) -> None:
    examine = Examiner()
    settle(KEY, examine)
    settle({**KEY, **change}, examine)
    assert examine.asked == 2 and len(kept(folder)) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"key": {"backend": "cu',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"null",
        b"{}",
        json.dumps({"key": {**KEY, "torch": "2.14.0"}, "why_not": None}).encode(),
        json.dumps({"key": KEY, "why_not": 0}).encode(),
    ],
    ids=["empty", "torn", "binary", "nested", "null", "no key", "another key", "no sentence"],
)
def test_a_torn_or_foreign_file_is_examined_again_and_replaced(content: bytes, folder: Path) -> None:
    settle(KEY, Examiner("old."))
    (file,) = kept(folder)
    file.write_bytes(content)
    examine = Examiner()
    assert settle(KEY, examine) == settle(KEY, examine) == Verdict(None)
    assert examine.asked == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_not_believed(folder: Path) -> None:
    settle(KEY, Examiner())
    os.chown(kept(folder)[0], 54321, -1)
    examine = Examiner("its gradient is off by 1.")
    assert settle(KEY, examine) == examine.found and examine.asked == 1


def unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    folder.mkdir()
    monkeypatch.setattr(probe, "write_json_atomic", refuse)
    monkeypatch.setattr(probe, "lock", refuse)


def no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file where the folder should be")


def no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(probe, "cache_folder", homeless)


def folders_in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(KEY, Examiner())
    for file in folder.iterdir():
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("spoil", [unwritable, no_folder, no_home, folders_in_the_way])
def test_a_cache_that_cannot_be_used_fails_no_call(spoil: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder, monkeypatch)
    examine = Examiner("its gradient is off by 1.")
    assert settle(KEY, examine) == examine.found and examine.asked == 1


def test_of_two_that_ask_at_once_one_examines(folder: Path) -> None:
    begun, ended = threading.Event(), threading.Event()
    examine = Examiner("its gradient is off by 1.")

    def slowly() -> Verdict:
        begun.set()
        ended.wait(60)
        return examine()

    found: list[Verdict | None] = []
    first = threading.Thread(target=lambda: found.append(settle(KEY, slowly)))
    second = threading.Thread(target=lambda: found.append(settle(KEY, examine)))
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.5)
    assert second.is_alive() and found == []
    ended.set()
    for thread in (first, second):
        thread.join(60)
    assert found == [examine.found] * 2 and examine.asked == 1


def test_who_has_waited_long_enough_examines_for_itself(folder: Path) -> None:
    settle({}, Examiner())
    (file,) = folder.glob("probe-*.lock")
    examine = Examiner()
    with store.lock(file):
        assert settle(KEY, examine, patience=0.0) == Verdict(None)
    assert examine.asked == 1


def test_while_a_graph_is_captured_only_what_is_kept_counts(folder: Path) -> None:
    examine = Examiner()
    assert settle(KEY, examine, may_examine=False) is None
    settle(KEY, examine)
    assert settle(KEY, examine, may_examine=False) == Verdict(None)
    assert examine.asked == 1


def test_the_sources_are_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = probe._fingerprint()
    (tmp_path / "rows.py").write_text("BLOCK = 2048\n")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    first = probe._fingerprint()
    (tmp_path / "rows.py").write_text("BLOCK = 4096\n")
    assert len({before, first, probe._fingerprint()}) == 3


# The question.


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.fixture
def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that is not there: its description, whether it captures, and what its kernels' checks find."""
    state: dict[str, Any] = {"gpu": "NVIDIA H200", "capturing": False, "found": Verdict(None), "asked": 0}

    def examine(backend: str, kind: CallKind, device: torch.device) -> Verdict:
        state["asked"] += 1
        found: Verdict = state["found"]
        return found

    monkeypatch.setattr(probe, "_examine", examine)
    monkeypatch.setattr(probe, "_machine", lambda device: {"gpu": state["gpu"]})
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "_demoted", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


def on_gpu(kind: CallKind = DENSE) -> RowCall:
    call = make_call(kind)
    return replace(call, student=call.student.as_subclass(OnGPU))


def test_calls_on_the_cpu_and_of_torch_are_not_checked(small: None, machine: dict[str, Any]) -> None:
    assert probe.verdict("cpp", make_call(DENSE)) is None
    assert probe.verdict("torch", on_gpu()) is None
    assert machine["asked"] == 0


def test_a_backend_that_passes_is_checked_once_and_nothing_is_said(
    small: None, machine: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert probe.verdict("cuda", on_gpu()) is None
        assert probe.verdict("cuda", on_gpu()) is None
        monkeypatch.setattr(probe, "_verdicts", {})  # as in another process
    assert machine["asked"] == 1 and not caplog.records


def test_a_backend_that_fails_is_told_once(
    small: None, machine: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["found"] = Verdict("its gradient is off by 1.")
    sentence = "backend='cuda' failed its check on this machine: its gradient is off by 1."
    assert probe.verdict("cuda", on_gpu()) == probe.verdict("cuda", on_gpu()) == sentence
    assert [record.getMessage() for record in caplog.records] == [f"{sentence} Another backend serves. Run `fastkd doctor`."]
    assert caplog.records[0].levelno == logging.WARNING
    monkeypatch.setattr(probe, "_verdicts", {})
    assert probe.verdict("cuda", on_gpu()) == sentence
    assert machine["asked"] == 1 and len(caplog.records) == 2


def test_every_kind_of_call_is_checked_by_itself(small: None, machine: dict[str, Any]) -> None:
    kinds = list(dict.fromkeys(KINDS.values()))
    for kind in kinds:
        assert probe.verdict("triton", on_gpu(kind)) is None
    assert machine["asked"] == len(kinds)


def test_while_a_graph_is_captured_nothing_is_checked(small: None, machine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    machine["capturing"] = True
    why_not = probe.verdict("cuda", on_gpu())
    assert why_not is not None and "before the CUDA graph is captured" in why_not and machine["asked"] == 0
    machine["capturing"] = False
    assert probe.verdict("cuda", on_gpu()) is None
    machine["capturing"] = True
    assert probe.verdict("cuda", on_gpu()) is None
    assert machine["asked"] == 1 and not caplog.records


def test_a_launch_error_demotes_for_the_process(small: None, machine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert probe.verdict("cuda", on_gpu()) is None
    for _ in range(2):
        probe.demote("cuda", RuntimeError("too many resources requested for launch"))
    why_not = probe.verdict("cuda", on_gpu())
    assert why_not == "backend='cuda' failed in this process: RuntimeError: too many resources requested for launch"
    assert [record.getMessage() for record in caplog.records] == [f"{why_not} Another backend serves. Run `fastkd doctor`."]
    assert probe.verdict("triton", on_gpu()) is None


def test_importing_it_is_light() -> None:
    program = (
        "import sys, fastkd.ops.probe as p; sys.exit([m for m in ('triton', 'sympy', 'torch._dynamo') if m in sys.modules] or None)"
    )
    assert probe._run([sys.executable, "-c", program], 300) == 0
