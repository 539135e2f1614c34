"""Which backend's row kernel serves a call. All of them give the torch backend's numbers to rounding."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from . import backend_cpp, backend_cuda, backend_torch, backend_triton, probe
from .checks import check_choice
from .options import BACKENDS
from .row_call import RowCall, RowOptions, RowOutputs


class Backend(Protocol):
    """A module that has a row kernel."""

    def run(self, call: RowCall) -> None:
        """Do what `RowCall` says."""

    def why_not(self, call: RowCall) -> str | None:
        """Why it cannot, in a sentence with the remedy; None: it can."""


MODULES: dict[str, Backend] = {"torch": backend_torch, "cpp": backend_cpp, "triton": backend_triton, "cuda": backend_cuda}
_FASTEST_FIRST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
_preferred = "auto"


def choose(name: str, call: RowCall) -> Callable[[RowCall], None]:
    """The row kernel of the backend `name`, or for "auto" of the fastest one that takes this call, and on a GPU has passed its probe.

    Where FASTKD_BACKEND in the environment, or `prefer_backend`, names a backend that takes the call, "auto" is that one, unprobed.

    Raises:
        ValueError: the named backend does not take this call; says why, and what would.
    """
    if name != "auto":
        reason = _reason(name, call)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot serve this call: {reason} Use 'auto' or 'torch'.")
        return MODULES[name].run
    wish = wished()
    if wish != "auto" and _reason(wish, call) is None:
        return MODULES[wish].run
    for name in _FASTEST_FIRST.get(call.student.device.type, ()):
        reason = MODULES[name].why_not(call) or probe.verdict(name, call)
        if reason is None:
            return MODULES[name].run
        if name == "cpp":
            _tell_once(f"Torch's row kernel serves, with the same numbers, instead of the C++ one: {reason}")
    return backend_torch.run


def wished() -> str:
    """What FASTKD_BACKEND in the environment, or `prefer_backend`, lets "auto" be."""
    wish = os.environ.get("FASTKD_BACKEND") or _preferred
    check_choice("FASTKD_BACKEND", wish, BACKENDS)
    return wish


def replace_failed(run: Callable[[RowCall], None], name: str, call: RowCall, error: RuntimeError) -> Callable[[RowCall], None]:
    """The next backend for `call` after `run`, which "auto" chose on a GPU and which could not be launched; else `error` is raised."""
    failed = next((own for own, module in MODULES.items() if module.run == run), "")
    if name != "auto" or failed not in _FASTEST_FIRST["cuda"] or isinstance(error, torch.OutOfMemoryError):
        raise error
    probe.demote(failed, error)
    return choose(name, call)


def prefer_backend(name: str, device: torch.device) -> None:
    """Let "auto" be the backend `name`, for the rest of this process, wherever that takes a call; "auto" takes it back.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve on `device`; says why.
    """
    check_choice("backend", name, BACKENDS)
    if name != "auto":
        reason = _reason(name, sample_call(device))
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot serve on {device}: {reason} Use 'auto'.")
    global _preferred
    _preferred = name


def arithmetic(device: torch.device) -> str:
    """Which row kernel "auto" takes, and on a CPU which of its instructions: what decides the last bits of a loss."""
    run = choose("auto", sample_call(device))
    name = next(name for name, module in MODULES.items() if module.run == run)
    if device.type != "cpu":
        return name
    variant = f" {backend_cpp.extension(build=False).variant()}" if name == "cpp" else ""
    multiplier = backend_cpp.multiplier(torch.bfloat16)
    products = f", bfloat16 by {multiplier}" if multiplier else ""
    return f"{name}{variant} on {torch.backends.cpu.get_cpu_capability()}{products}"


def sample_call(device: torch.device, vocabulary: int = 4096) -> RowCall:
    """A call of the commonest kind, of one row of zeros, by which a backend is asked whether it could serve on `device`."""
    logits = torch.zeros(1, vocabulary, device=device)
    column = torch.zeros(1, device=device)
    return RowCall(student=logits, teacher=logits, options=RowOptions(), outputs=RowOutputs(divergence=column), row_weight=column)


def _reason(name: str, call: RowCall) -> str | None:
    """Why a backend that was asked for by name cannot serve; the C++ kernels are compiled then if they are not."""
    return backend_cpp.why_not(call, build=True) if name == "cpp" else MODULES[name].why_not(call)


@cache
def _tell_once(message: str) -> None:
    logging.getLogger("fastkd").info(message)
