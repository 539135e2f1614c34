"""Every test of an op runs once a backend that this machine has."""

from __future__ import annotations

import shutil

import pytest

from fastkd.ops import chunked
from fastkd.ops.backends import row_kernel

HERE = ["torch", "cpp"] if shutil.which("c++") else ["torch"]


@pytest.fixture(params=HERE, autouse=True)
def backend(request, monkeypatch):
    """What "auto" means while the test runs."""
    monkeypatch.setattr(chunked, "row_kernel", lambda name, device: row_kernel(request.param if name == "auto" else name, device))
    return request.param
