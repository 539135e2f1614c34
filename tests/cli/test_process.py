"""Closed streams, closed pipes, signals and half an environment of torchrun, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from fastkd.cli.process import Stopped, is_main_process, stopping_cleanly
from tests import runs

ROOT = Path(__file__).parents[2]
FASTKD = f"{sys.executable} -m fastkd"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


# ---- streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams(closed: str) -> None:
    done = shell(f"{FASTKD} train --list {closed}")
    assert done.returncode == 0 and done.stderr == "" and ("ted/rte" in done.stdout) == (">&-" not in closed.split())
    wrong = shell(f"{FASTKD} export x --output_dir '' {closed}")
    assert wrong.returncode == 2 and ("names nothing" in wrong.stderr) == ("2>&-" not in closed.split())


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    model, text, counts = runs.bert_teacher(tmp_path), runs.write_text(tmp_path)["path"], tmp_path / "counts"
    done = shell(f"{FASTKD} vocab count --model {model} --data {text} --output_dir {counts} >&- 2>&-")
    assert done.returncode == 0
    assert list(counts.glob("*.safetensors")) and all(b"tokens in" not in file.read_bytes() for file in counts.iterdir())


@pytest.mark.parametrize("command", ["--help", "train --help", "train --list"])
def test_a_closed_pipe_ends_quietly(command: str) -> None:
    done = shell(f"{FASTKD} {command} | (exec 0<&-)")
    assert done.returncode in (0, 141) and done.stderr == ""
    assert shell(f"(sleep 1; {FASTKD} {command}) | true").returncode == 141


def test_a_character_that_stdout_has_not_is_printed_as_its_escape(tmp_path: Path) -> None:
    done = shell(f"{FASTKD} train glmd/rte --output_dir 'größe' --print_config", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "output_dir: gr\\xf6\\xdfe" in done.stdout


# ---- signals

SIGNALLED = """
import os, signal, sys
import {module}
from fastkd.cli.main import main

def interrupted(*arguments, **options):
    os.kill(os.getpid(), signal.{name})
    raise AssertionError("it went on")

{module}.{function} = interrupted
sys.exit(main(sys.argv[1:]))
"""
COMMANDS = {
    "eval": ("fastkd.train.evaluate", "load_frozen", ["eval", "MODEL", "--text", "TEXT", "--output_dir", "OUT"]),
    "count": ("fastkd.vocab.count", "save_record", ["vocab", "count", "--model", "MODEL", "--data", "TEXT", "--output_dir", "OUT"]),
    "doctor": ("fastkd.ops.selfcheck", "check_ops", ["doctor"]),
    "plot": ("fastkd.train.curves", "plot_logs", ["plot", "OUT"]),
    "bench": ("fastkd.benchmarks.claim", "run_claims", ["bench", "masked", "--smoke", "--device", "cpu"]),
}


def signalled(folder: Path, command: str, name: str) -> subprocess.CompletedProcess[str]:
    """Run a command that gets the signal in the middle of its work."""
    module, function, arguments = COMMANDS[command]
    places = {
        "MODEL": lambda: runs.bert_teacher(folder),
        "TEXT": lambda: runs.write_text(folder)["path"],
        "OUT": lambda: folder / "out",
    }
    argv = [str(places[word]()) if word in places else word for word in arguments]
    program = SIGNALLED.format(module=module, function=function, name=name)
    return subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_is_a_sentence_and_130(tmp_path: Path, command: str) -> None:
    done = signalled(tmp_path, command, "SIGINT")
    name = COMMANDS[command][2][0]
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == f"fastkd {name}: stopped by SIGINT."
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.tmp-*"))


TO_ALL = """
import os, signal, sys
from fastkd.cli.main import main
from fastkd.vocab import count

batches = count.text_batches

def interrupted(rows, size):
    for number, batch in enumerate(batches(rows, 2)):
        if number == 4:
            os.killpg(0, signal.SIGINT)
        yield batch

count.text_batches = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_of_an_interrupt_to_all_processes_one_tells(tmp_path: Path) -> None:
    argv = ["vocab", "count", "--model", runs.bert_teacher(tmp_path), "--data", runs.write_text(tmp_path)["path"], "--num_proc", "2"]
    argv += ["--documents", "line", "--output_dir", str(tmp_path / "counts")]
    program = [sys.executable, "-c", TO_ALL, *argv]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "fastkd vocab: stopped by SIGINT."
    assert "KeyboardInterrupt" not in done.stderr


WRITING = """
import os, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerBase
from fastkd.cli.main import main

def interrupted(self, folder, **options):
    assert list(Path(folder).glob("*.safetensors")), "the weights are there"
    os.kill(os.getpid(), signal.{name})
    raise AssertionError("it went on")

if "{name}" == "SIGHUP":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
PreTrainedTokenizerBase.save_pretrained = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_in_export_leaves_nothing(tmp_path: Path, name: str, code: int) -> None:
    model = runs.bert_teacher(tmp_path)
    before = sorted(tmp_path.iterdir())
    argv = ["export", model, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", WRITING.format(name=name), *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == f"fastkd export: stopped by {name}." and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_an_ignored_signal_stays_ignored_and_handlers_come_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_cleanly():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, stopping_cleanly():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == handler


def test_the_echo_of_a_signal_does_not_end_the_cleaning() -> None:
    cleaned = []

    def clean() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        cleaned.append(True)

    with pytest.raises(Stopped), stopping_cleanly(), ExitStack() as stack:  # noqa: PT012 (the signal comes in the stack)
        stack.callback(clean)
        os.kill(os.getpid(), signal.SIGTERM)
    assert cleaned


# ---- ranks


@pytest.mark.parametrize(
    ("environment", "is_main"),
    [
        ({}, True),
        ({"RANK": "3"}, True),
        ({"RANK": "3", "WORLD_SIZE": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "4"}, True),
        ({"RANK": "3", "WORLD_SIZE": "4"}, False),
    ],
)
def test_a_rank_counts_together_with_a_world_size_only(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_main: bool
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() is is_main


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment and RANK ''"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is 2 in the environment and RANK '2'"),
    ],
)
def test_half_an_environment_is_a_sentence(environment: dict[str, str], said: str) -> None:
    done = shell(f"{FASTKD} plot nowhere", **environment)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_rank_alone_does_not_mute_a_run(tmp_path: Path) -> None:
    from fastkd.train.config import read_config
    from fastkd.train.schema import to_yaml

    settings = runs.settings(
        tmp_path, method="lm", tokenizer_name_or_path=runs.bert_teacher(tmp_path), text=runs.write_text(tmp_path), max_steps=1
    )
    settings["student"] = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    (tmp_path / "run.yaml").write_text(to_yaml(read_config(settings)))
    done = shell(f"{FASTKD} train {tmp_path / 'run.yaml'}", RANK="1")
    assert done.returncode == 0, done.stderr
    assert "steps" in done.stdout and str(tmp_path / "run") in done.stdout
