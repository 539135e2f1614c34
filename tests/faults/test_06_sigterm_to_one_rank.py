"""Fault 6: SIGTERM to one of 2 ranks. Both stop at the same step, and the run goes on bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.train.checkpoint import list_checkpoints, verify_checkpoint
from fastkd.train.config import read_config
from fastkd.train.schema import load_yaml, to_yaml
from tests import runs
from tests.ranks import ROOT

RANK = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from fastkd.cli.main import main
    from fastkd.train import checkpoint, loop

    def marking(original, name):
        def work(*arguments):
            (Path(sys.argv[2]) / f"{os.environ['RANK']}-{name(*arguments)}").touch()
            time.sleep(0.1)
            return original(*arguments)
        return work

    loop.seed_global_generators = marking(loop.seed_global_generators, lambda seed, index, use: index)
    checkpoint._finish = marking(checkpoint._finish, lambda folder, final, *rest: final.name)
    sys.exit(main(["train", sys.argv[1]]))
""")


def start(config: Path, marks: Path, port: int) -> list[subprocess.Popen[str]]:
    """Both ranks, with torchrun's environment; every micro-batch, and every save at its end, leaves a mark and takes its time."""
    torchrun = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(config), str(marks)],
            cwd=ROOT,
            env={**os.environ, **torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for(mark: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), mark
        time.sleep(0.02)


def write(folder: Path, **more: object) -> Path:
    config = runs.settings(
        folder,
        method="lm",
        teacher_model_name_or_path=runs.bert_teacher(folder),
        text=runs.write_text(folder),
        **{"max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 2, **more},
    )
    path = folder / "config.yaml"
    path.write_text(to_yaml(read_config(config)))
    return path


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_both_ranks_stop_at_one_step_and_go_on(tmp_path, fsdp):
    config, marks = write(tmp_path, fsdp=fsdp), tmp_path / "marks"
    marks.mkdir()
    processes = start(config, marks, free_port())
    wait_for(marks / "1-9", processes)  # rank 1 in its fifth step
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    assert "a signal to another rank" in errors[0] and "SIGTERM" in errors[1]
    newest = list_checkpoints(tmp_path / "run" / "train")[0]
    verify_checkpoint(newest)
    step = int(newest.name.removeprefix("checkpoint-"))
    assert 4 <= step < 8
    seen = sorted(tuple(map(int, mark.name.split("-"))) for mark in marks.iterdir() if "checkpoint" not in mark.name)
    per_rank = [max(index for rank, index in seen if rank == own) // 2 for own in (0, 1)]
    assert per_rank[0] == per_rank[1]  # none is a step ahead

    processes = start(config, marks, free_port())
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    on_one = {"output_dir": str(tmp_path / "alone"), "gradient_accumulation_steps": 2}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: products are added up in the same order
    expected = fastkd.distill({**load_yaml(config), **on_one})["train"]
    torch.set_num_threads(threads)
    found = runs.weights(tmp_path / "run" / "train" / "student")
    if not fsdp:  # two addends, so that even one process adds them up alike
        assert runs.same_bits(found, runs.weights(expected))
    for name, value in runs.weights(expected).items():
        assert float((found[name] - value).abs().max()) < 1e-3, name
