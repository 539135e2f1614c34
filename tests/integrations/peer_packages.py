"""The packages whose losses fastkd's drop-ins stand in for, as they are installed, on this machine's device."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def liger(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `path` names below liger_kernel; without a GPU its kernels are interpreted."""
    module, _, name = f"liger_kernel.{path}".rpartition(".")
    found = pytest.importorskip(module, reason="liger-kernel is not installed (make .venv/bench)", exc_type=ImportError)
    if DEVICE.type == "cpu":
        _interpret_floats(monkeypatch)
    return getattr(found, name)


def _interpret_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter hand kernels a float as a float32 scalar, which it is on a GPU and whose methods they call."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)


def speculators_losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`speculators.losses` without the rest of that package, which needs transformers below 5.20, servers and clients."""
    spec = importlib.util.find_spec("speculators")
    if spec is None or spec.origin is None:
        pytest.skip("speculators is not installed (make .venv/bench)")
    package = types.ModuleType("speculators")
    package.__path__ = [str(Path(spec.origin).parent)]
    monkeypatch.setitem(sys.modules, "speculators", package)
    losses = importlib.import_module("speculators.losses")
    for name in [name for name in sys.modules if name.startswith("speculators.")]:
        monkeypatch.delitem(sys.modules, name)
    return losses
