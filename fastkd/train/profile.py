"""Attribute the time of optimizer steps, traced by torch.profiler for a few of them.

Every operation belongs to the nearest of these around it: the loop's own sections, the two backbones (their modules' forwards), and
fastkd's operators. An operation of a backward pass belongs where its forward did. Times are an operation's own, without what it calls;
on a GPU they are those of its kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from ..methods.objective import Objective
from ..store import commit_file, sync, temporary_path, write_json_atomic

log = logging.getLogger("fastkd")

TRACE_FILE, SHARES_FILE = "trace.json", "shares.json"
BETWEEN = "evaluation and saving"
PRODUCTS, ROWS = "losses: matrix products", "losses: the rest"
SECTIONS = ("data", "student backbone", "teacher backbone", PRODUCTS, ROWS, "optimizer", BETWEEN, "other")
_MARK = "fastkd."
_WARM_UP = 2
_PRODUCT_NAMES = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")


def section(name: str) -> AbstractContextManager[Any]:
    """Around work of the loop that belongs to one of `SECTIONS`."""
    return record_function(_MARK + name) if torch.autograd._profiler_enabled() else nullcontext()


class StepProfiler:
    """Traces `steps` optimizer steps behind two that warm up; 0: none, and no cost. `step()` is called behind each.

    Leaves trace.json, for chrome://tracing or ui.perfetto.dev, and shares.json in `folder`, and logs the shares as a table.
    """

    def __init__(self, steps: int, folder: Path, objective: Objective) -> None:
        self.steps, self.folder, self.objective = steps, folder, objective
        self._profiler: Any = None
        self._made = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> StepProfiler:
        if self.steps == 0:
            return self
        backbones = {"student backbone": self.objective.student, "teacher backbone": self.objective.held.get("teacher")}
        for name, owner in backbones.items():
            module = getattr(owner, "model", None)
            if isinstance(module, nn.Module):
                self._hooks += _marking(module, _MARK + name)
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=torch.profiler.schedule(wait=0, warmup=_WARM_UP, active=self.steps, repeat=1),
            on_trace_ready=self._finish,
        ).__enter__()
        return self

    def step(self) -> None:
        if self._profiler is not None:
            self._made += 1
            self._profiler.step()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profiler is not None:
            if error is not None:
                self._profiler.on_trace_ready = None  # the step that was interrupted is none, and what interrupted it goes on
            self._profiler.__exit__(kind, error, trace)
        self._unhook()

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _finish(self, profiler: Any) -> None:
        """Also of a run that ends before it has made all steps."""
        self._unhook()
        steps = self._made - _WARM_UP
        if steps < 1:
            log.info("No optimizer step was traced: the stage ended with the %d that warm up.", _WARM_UP)
            return
        times = section_seconds(profiler.events())
        total = sum(times.values())
        shares = {name: {"seconds_per_step": seconds / steps, "share": seconds / total} for name, seconds in times.items()}
        try:
            self._write(profiler, {"steps": steps, "sections": shares})
        except OSError as error:
            log.warning("The trace is not kept: %s", error)
        table = "\n".join(f"  {name:<26}{1e3 * s['seconds_per_step']:10.2f} ms{100 * s['share']:8.1f} %" for name, s in shares.items())
        log.info("Time of an optimizer step, mean of %d (%s):\n%s", steps, self.folder / TRACE_FILE, table)

    def _write(self, profiler: Any, shares: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = temporary_path(self.folder / TRACE_FILE)
        profiler.export_chrome_trace(str(trace))
        sync(trace)
        commit_file(trace, self.folder / TRACE_FILE)
        write_json_atomic(self.folder / SHARES_FILE, shares)


def section_seconds(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of every section, from `torch.profiler.profile.events()`."""
    events = list(events)
    on_gpu = any(event.self_device_time_total > 0 for event in events)
    # A node of the graph is made by the last operation that saw its number as the next one.
    forwards = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not event.fwd_thread}
    seconds = dict.fromkeys(SECTIONS, 0.0)
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            seconds[_section_of(event, forwards)] += own / 1e6
    return seconds


def _section_of(event: Any, forwards: Mapping[int, Any]) -> str:
    found, is_product = "other", False
    while event is not None:
        is_product |= event.name in _PRODUCT_NAMES
        if event.name == _MARK + BETWEEN:
            return BETWEEN
        if found == "other" and event.name.startswith("fastkd::"):
            found = PRODUCTS if is_product else ROWS
        elif found == "other" and event.name.startswith(_MARK):
            found = event.name.removeprefix(_MARK)
        made_it = forwards.get(event.sequence_nr) if event.fwd_thread else None
        event = made_it or event.cpu_parent
    return found


def _marking(module: nn.Module, mark: str) -> Iterator[Any]:
    """Hooks that put a mark around every forward of `module`, also around one that an exception leaves, as `capture` does."""
    opened: list[record_function] = []

    def open_mark(*_: Any) -> None:
        opened.append(record_function(mark))
        opened[-1].__enter__()

    def close_mark(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(open_mark)
    yield module.register_forward_hook(close_mark, always_call=True)
