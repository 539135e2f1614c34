"""Every test of an op runs once a backend that this machine has."""

from __future__ import annotations

import shutil

import pytest

HERE = ["torch", "cpp"] if shutil.which("c++") else ["torch"]


@pytest.fixture(params=HERE, autouse=True)
def backend(request, monkeypatch):
    """What "auto" means while the test runs."""
    monkeypatch.setenv("FASTKD_BACKEND", request.param)
    return request.param
