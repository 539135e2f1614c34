"""Fault 24: triton is missing, there is no GPU, nothing is compiled, or the GPU's compute capability is too old.

`backend="auto"` takes what there is, with the same numbers to rounding; a backend that is named and cannot run is refused in one
sentence that says what it needs and what to take instead.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastkd
from fastkd.ops import backend_cpp, backend_torch, backend_triton, backends
from fastkd.ops.backends import choose, sample_call
from tests import runs

CPU = torch.device("cpu")
TOKENS, WIDTH, VOCABULARY = 9, 16, 301


def strip(patch: pytest.MonkeyPatch) -> None:
    """Make of this a machine with torch and nothing else: no triton, nothing compiled."""
    patch.setattr(backend_triton, "_is_installed", lambda: False)
    patch.setattr(backend_cpp, "is_built", lambda: False)


def loss_and_gradients(backend: str = "auto") -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (TOKENS, WIDTH), (VOCABULARY, WIDTH))
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
    student = [tensor.requires_grad_() for tensor in inputs[:2]]
    loss: Any = fastkd.linear_kl_div(*inputs, temperature=2.0, backend=backend)
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in student)]


def test_auto_gives_the_same_numbers_on_a_bare_machine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    equipped = loss_and_gradients()
    strip(monkeypatch)
    assert choose("auto", sample_call(CPU)) is backend_torch.run
    with caplog.at_level(logging.INFO):
        backends._tell_once.cache_clear()
        caplog.clear()
        for here, there in zip(loss_and_gradients(), equipped, strict=True):
            torch.testing.assert_close(here, there, rtol=2e-5, atol=1e-6)
        loss_and_gradients()
    assert caplog.text.count("Torch's row kernel serves") == 1


def test_a_whole_run_needs_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strip(monkeypatch)
    teacher, text = runs.bert_teacher(tmp_path), runs.write_text(tmp_path)
    result = fastkd.distill(runs.settings(tmp_path, method="kd", teacher_model_name_or_path=teacher, text=text, max_steps=2))
    assert result["distill"]["steps"] == 2


def test_a_named_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    strip(monkeypatch)
    with pytest.raises(ValueError, match=r"backend='triton' cannot serve this call: .*triton.*Use 'auto' or 'torch'"):
        loss_and_gradients("triton")
    with pytest.raises(ValueError, match=r"backend='cuda' cannot serve this call: .*Use 'auto' or 'torch'"):
        loss_and_gradients("cuda")


@pytest.mark.parametrize("capability", [(7, 0), (8, 9), (10, 0)])
def test_an_old_or_another_gpu_is_not_given_hoppers_kernel(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Whatever lies there compiled is not for this GPU; what is too old for Triton too has torch's kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0))
    call = replace(sample_call(CPU), student=on_gpu, teacher=None)
    assert "compute capability" in str(backends.MODULES["cuda"].why_not(call))
    assert (backends.MODULES["triton"].why_not(call) is None) == (capability >= (8, 0))
