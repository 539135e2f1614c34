"""What the Triton backend refuses, and in which words. Its numbers: tests/kernels."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastkd.kernels
from fastkd.kernels import topk
from fastkd.ops import backend_triton
from fastkd.ops.backend_triton import why_not
from fastkd.ops.row_call import RowCall, RowOptions, TopK
from tests.row_kernels import make_logits, make_outputs


@pytest.fixture(autouse=True)
def backend():
    """These tests name their backend: once is enough."""


def make_call(**settings) -> RowCall:
    student, teacher = (x.float() for x in make_logits(3, 40))
    outputs = make_outputs(3, torch.float32, True, False, False)
    defaults = {"student": student, "teacher": teacher, "options": RowOptions(), "outputs": outputs, "row_weight": torch.ones(3)}
    return RowCall(**(defaults | settings))


def on_gpu(capability: tuple[int, int], monkeypatch):
    """A call whose tensors lie on such a GPU."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    call = make_call()
    return SimpleNamespace(**vars(call) | {"student": SimpleNamespace(device=torch.device("cuda", 0))})


def test_a_plain_call_is_served():
    assert why_not(make_call()) is None


def test_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not(make_call()) == (
        "it runs on NVIDIA GPUs and the tensors are on cpu; move them, or set TRITON_INTERPRET=1 to try it on a CPU."
    )


def test_old_and_other_gpus_are_refused(monkeypatch):
    found = why_not(on_gpu((7, 5), monkeypatch))
    assert found == "it needs a GPU of compute capability 8.0 or newer and cuda:0 has 7.5; use one of Ampere or later."
    call = on_gpu((9, 0), monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "runs on NVIDIA GPUs" in why_not(call)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("rows", "row_math"):
        monkeypatch.delitem(sys.modules, f"fastkd.kernels.{name}", raising=False)
        monkeypatch.delattr(fastkd.kernels, name, raising=False)
    backend_triton._is_installed.cache_clear()
    try:
        assert why_not(make_call()) == "triton is not installed, or its import fails; pip install triton."
    finally:
        backend_triton._is_installed.cache_clear()


@pytest.mark.parametrize("name", ["student", "teacher", "gradient"])
def test_dtypes_and_strides(name):
    narrow = torch.zeros(3, 40).to(torch.float8_e5m2)
    assert why_not(make_call(**{name: narrow})) == (
        f"{name} is torch.float8_e5m2; it takes float16, bfloat16, float32 and float64: cast it."
    )
    words = why_not(make_call(**{name: torch.zeros(40, 3).T}))
    assert words == f"{name} has strides (1, 3); it needs stride 1 along the vocabulary: .contiguous()."


def test_the_longest_list():
    for entries, refused in ((topk.LONGEST_LIST, False), (topk.LONGEST_LIST + 1, True)):
        teacher = TopK(torch.zeros(3, 1, dtype=torch.int64).expand(3, entries), torch.zeros(3, 1).expand(3, entries), torch.zeros(3))
        words = why_not(make_call(teacher=teacher))
        assert words == ("the teacher lists 1025 tokens a row; it takes up to 1024: keep fewer." if refused else None)


def test_a_gradient_may_lie_where_it_covers_nothing_that_is_read_later():
    memory, call = torch.zeros(3, 120), make_call()
    call = replace(call, student=memory[:, :40], teacher=memory[:, 40:80])
    for gradient in (None, memory[:, 80:], call.student, call.student.view(torch.bfloat16)[:, :40], torch.zeros(3, 40)):
        assert why_not(replace(call, gradient=gradient)) is None
    one_row = {name: getattr(call, name)[:1] for name in ("student", "teacher", "row_weight")}
    assert why_not(replace(call, **one_row, gradient=call.student[:1])) is None


def test_a_gradient_over_logits_that_are_read_later_is_refused():
    memory, call = torch.zeros(3, 120), make_call()
    call = replace(call, student=memory[:, :40], teacher=memory[:, 40:80])
    packed = memory.view(torch.bfloat16).view(6, 120)[:3, :40]
    shifted = memory[:, 1:41]
    wider = torch.zeros(3, 80).bfloat16()
    for gradient in (packed, shifted, call.teacher, call.teacher.view(torch.bfloat16)[:, :40], memory[:, 60:100]):
        words = why_not(replace(call, gradient=gradient))
        assert words is not None and words.startswith("gradient (") and words.endswith("or the rows of the student.")
        assert "lies over student" in words or "lies over teacher" in words
    assert "lies over student" in why_not(replace(call, student=wider[:, :40], gradient=wider.view(torch.float32)))
    # Of the same size but another type: a bfloat16 is no float16.
    other = call.student.half()
    assert why_not(replace(call, student=other, gradient=other.view(torch.bfloat16))) is not None


def test_no_rows_and_no_tokens_are_nothing_to_do():
    for shape in ((0, 9), (2, 0)):
        empty = torch.empty(shape)
        backend_triton.run(make_call(student=empty, teacher=empty, row_weight=torch.ones(shape[0]), gradient=empty))
