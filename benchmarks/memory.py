"""Peak memory of one step above its inputs and the gradients it returns: exact on a GPU, resident pages on the CPU."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Iterable[Tensor | None]]
"""Runs once and returns what it made, which is not counted."""
Build = Callable[..., tuple[Step, Step]]
"""Makes the inputs; returns the step on a few tokens, after which thread pools and workspaces exist, and the step to be measured."""


def peak_bytes(device: torch.device, build: Build, *arguments: Any, own_process: bool = True) -> int:
    """Bytes alive at most during the step that `build(*arguments)` makes, above what was alive before and what it returns.

    On the CPU in a process of its own: there what another step left in the allocator would hide what this one takes. `build` and
    `arguments` must survive pickling for that.
    """
    if device.type == "cuda":
        return _cuda_peak(build, *arguments)
    if not own_process:
        return _cpu_peak(build, *arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_cpu_peak, build, *arguments).result()


def _cuda_peak(build: Build, *arguments: Any) -> int:
    few, step = build(*arguments)
    few()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = _bytes(step())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - made


def _cpu_peak(build: Build, *arguments: Any) -> int:
    few, step = build(*arguments)
    few()
    # What `few` freed is given back, or the step would reuse it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    made = _bytes(step())
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before - made


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
