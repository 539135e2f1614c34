"""Which backend serves: by name, by preference, by speed; and how short the way to its kernel is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.ops import backend_cpp, backend_torch, backend_triton, backends, probe
from fastkd.ops.backends import choose, prefer_backend, sample_call
from fastkd.ops.row_call import RowCall

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Override the common fixture: these tests have their own."""
    monkeypatch.delenv("FASTKD_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_preferred", "auto")


class Fake:
    """A backend that does what torch's does."""

    def __init__(self, reason: str | None = None, error: Exception | None = None) -> None:
        self.reason, self.error, self.calls = reason, error, 0

    def why_not(self, call: RowCall) -> str | None:
        return self.reason

    def run(self, call: RowCall) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        backend_torch.run(call)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that passes for a GPU: both of its backends take every call and have passed their probe."""
    fakes = {"cuda": Fake(), "triton": Fake(), "torch": Fake()}
    monkeypatch.setattr(backends, "MODULES", fakes)
    monkeypatch.setattr(backends, "_FASTEST_FIRST", {"cpu": ("cuda", "triton"), "cuda": ("cuda", "triton")})
    monkeypatch.setattr(backends, "backend_torch", fakes["torch"])
    return fakes


def name_of(run) -> str:
    return next(name for name, module in backends.MODULES.items() if module.run == run)


def test_auto_takes_the_fastest_that_takes_the_call(gpu):
    call = sample_call(CPU)
    assert name_of(choose("auto", call)) == "cuda"
    gpu["cuda"].reason = "it is for Hopper."
    assert name_of(choose("auto", call)) == "triton"
    gpu["triton"].reason = "it is not installed."
    assert name_of(choose("auto", call)) == "torch"


def test_a_failed_probe_passes_the_call_on(gpu, monkeypatch):
    monkeypatch.setattr(probe, "verdict", lambda name, call: "it was wrong." if name == "cuda" else None)
    assert name_of(choose("auto", sample_call(CPU))) == "triton"


def test_a_wish_comes_first_and_is_not_probed(gpu, monkeypatch):
    monkeypatch.setattr(probe, "verdict", lambda name, call: "it was wrong.")
    prefer_backend("triton", CPU)
    assert name_of(choose("auto", sample_call(CPU))) == "triton"
    monkeypatch.setenv("FASTKD_BACKEND", "cuda")
    assert name_of(choose("auto", sample_call(CPU))) == "cuda"
    gpu["cuda"].reason = "it has no such kernel."
    assert name_of(choose("auto", sample_call(CPU))) == "torch"
    prefer_backend("auto", CPU)
    monkeypatch.setenv("FASTKD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FASTKD_BACKEND='gpu' is not known"):
        choose("auto", sample_call(CPU))


def test_a_named_backend_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match=r"backend='cuda' cannot serve this call: .* Use 'auto' or 'torch'\."):
        choose("cuda", sample_call(CPU))
    with pytest.raises(ValueError, match=r"backend='cuda' cannot serve on cpu: .* Use 'auto'\."):
        prefer_backend("cuda", CPU)


def test_a_launch_that_fails_demotes_its_backend_and_the_next_one_serves(gpu, monkeypatch):
    demoted = []
    monkeypatch.setattr(probe, "demote", lambda name, error: (demoted.append(name), setattr(gpu[name], "reason", "it failed.")))
    gpu["cuda"].error = RuntimeError("no such function")
    inputs = [torch.randn(9, 5, requires_grad=True), torch.randn(33, 5), torch.randn(9, 5), torch.randn(33, 5)]
    loss = fastkd.linear_kl_div(*inputs, chunk_size=4)
    assert demoted == ["cuda"] and (gpu["cuda"].calls, gpu["triton"].calls) == (1, 3)
    torch.testing.assert_close(loss, fastkd.reference.linear_kl_div(*inputs))
    gpu["triton"].error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        fastkd.linear_kl_div(*inputs)
    gpu["torch"].error = RuntimeError("torch's own")
    gpu["triton"].reason = "it is not installed."
    with pytest.raises(RuntimeError, match="torch's own"):
        fastkd.linear_kl_div(*inputs)


def frames_to(kernel_file: str, kernel_name: str, backend: str) -> list[tuple[str, str]]:
    """Our frames, (file, function), from the caller of `linear_kl_div` down to the function of that name."""
    seen: list[tuple[str, str]] = []

    def profile(frame, event, _argument):
        if event == "call" and frame.f_code.co_name == kernel_name and frame.f_code.co_filename.endswith(kernel_file) and not seen:
            while frame is not None and frame.f_code.co_filename != __file__:
                name = Path(frame.f_code.co_filename)
                if name.parent.name in ("ops", "kernels") and "site-packages" not in name.parts:
                    seen.append((name.name, frame.f_code.co_name))
                frame = frame.f_back

    inputs = [torch.randn(3, 5, requires_grad=True), torch.randn(33, 5), torch.randn(3, 5), torch.randn(33, 5)]
    fastkd.linear_kl_div(*inputs, backend=backend)  # what is loaded or compiled once is
    sys.setprofile(profile)
    try:
        fastkd.linear_kl_div(*inputs, backend=backend)
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize(
    ("backend", "file", "function"),
    [
        ("torch", "ops/backend_torch.py", "run"),
        ("cpp", "ops/backend_cpp.py", "run"),
        ("triton", "kernels/rows.py", "softmax_divergence"),
    ],
)
def test_the_way_to_a_kernel_is_five_frames_in_four_files_at_most(backend, file, function):
    module = {"torch": backend_torch, "cpp": backend_cpp, "triton": backend_triton}[backend]
    if module.why_not(sample_call(CPU)) is not None:
        pytest.skip(f"{backend} cannot serve here.")
    frames = frames_to(file, function, backend)
    assert frames, "the kernel was not reached: the test sees nothing"
    assert len(frames) <= 5 and len({name for name, _ in frames}) <= 4, frames
