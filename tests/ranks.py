"""Two processes on one machine, as torchrun would start them: gloo, a file as the store, and a limit on how long they may take."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]


def spawn(work: Callable[..., None], *arguments: Any, ranks: int = 2, seconds: float = 240.0) -> None:
    """`work(rank, *arguments)` in every process of a gloo group. What one of them raises is raised here; none outlives the limit."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run, (ranks, f"file://{folder}/store", seconds, work, arguments), nprocs=ranks, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1.0):  # which comes back as soon as one of them has ended
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{work.__name__} took longer than {seconds} s on {ranks} ranks.")
        finally:
            for process in context.processes:
                process.kill()


def _run(rank: int, world_size: int, store: str, seconds: float, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(seconds - 5, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    work(rank, *arguments)
    dist.barrier()
    os._exit(0)  # an interpreter that is taken down under threads of torch's engines may abort


def torchrun(*arguments: str, ranks: int = 2, **options: Any) -> subprocess.Popen[str]:
    """`torchrun -m fastkd ARGUMENTS` on this machine, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "fastkd",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **{**pipes, **options})
