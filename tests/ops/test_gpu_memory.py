"""What the pass holds at a time where a GPU plans it, counted on meta tensors by an allocator's rules: no GPU is needed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.ops import backend_torch, fused_loss, linear_logits, plan
from fastkd.ops.gradient_in_forward import pack
from fastkd.ops.options import LossOptions
from fastkd.ops.row_call import RowCall

GIBIBYTE = 2**30
TOKENS, WIDTH, TEACHER_WIDTH = 8192, 2048, 4096


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside of it and alive at a time."""

    def __init__(self, known: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        self.bytes = 0
        self.known = {x.untyped_storage()._cdata for x in known.values() if x is not None}
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata: self.alive.pop(key))
        self.bytes = max(self.bytes, sum(storage.nbytes() for reference in self.alive.values() if (storage := reference()) is not None))
        return found


@pytest.fixture(autouse=True)
def backend() -> None:
    """Override the common fixture: which kernel runs is said here."""


@pytest.fixture
def as_on_an_h200(monkeypatch):
    """Meta tensors are planned and multiplied as an H200's are."""
    plan_chunks = plan.plan_chunks
    monkeypatch.setattr(plan, "default_budget", lambda device: plan.GPU_BUDGET_LIMIT)
    monkeypatch.setattr(fused_loss, "plan_chunks", lambda *args, **options: plan_chunks(*args, **{**options, "device": "cuda"}))
    monkeypatch.setattr(linear_logits, "multiplies", lambda *_: True)
    monkeypatch.setattr(linear_logits, "mm_", lambda *_, **__: None)
    monkeypatch.setattr(linear_logits, "gradient_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(backend_torch, "_CPU_BLOCK_ELEMENTS", backend_torch.GPU_BLOCK_ELEMENTS)


def peak_above_gradients(monkeypatch: pytest.MonkeyPatch, vocabulary: int, run: Any, **options: Any) -> int:
    """Bytes of one pass in bfloat16 above its inputs and its gradients."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    student = {"hidden": empty(TOKENS, WIDTH).requires_grad_(), "weight": empty(vocabulary, WIDTH).requires_grad_(), "bias": None}
    teacher = {"teacher_hidden": empty(TOKENS, TEACHER_WIDTH), "teacher_weight": empty(vocabulary, TEACHER_WIDTH)}
    monkeypatch.setattr(fused_loss, "choose", lambda name, call: run)
    call = pack(student, teacher, LossOptions(**options).to_text(), deferred=False)
    with torch.no_grad(), Peak({**student, **teacher}) as peak:
        *_, gradients = fused_loss._make(*call)
    assert [x.shape for x in gradients[:2]] == [(TOKENS, WIDTH), (vocabulary, WIDTH)]
    return peak.bytes - sum(x.nbytes for x in gradients)


def nothing(call: RowCall) -> None:
    """A kernel that allocates nothing, as Triton's and CUDA's do."""


@pytest.mark.parametrize(
    ("vocabulary", "limit"),
    [(30_522, 0.6), (128_256, 2.3), (151_936, 1.6), (262_144, 2.3)],
)
def test_a_pass_holds_its_plan_and_no_second_copy_of_its_sums(as_on_an_h200, monkeypatch, vocabulary, limit):
    """In several chunks the weight's gradient is summed in float32: the logits' memory is free before it is rounded to bfloat16."""
    assert peak_above_gradients(monkeypatch, vocabulary, nothing, divergence="forward_kl") <= limit * GIBIBYTE


@pytest.mark.parametrize("options", [{"divergence": "forward_kl"}, {"divergence": "jsd", "mixing": 0.5}], ids=["forward_kl", "jsd"])
def test_torchs_kernel_adds_a_quarter_of_a_gibibyte(as_on_an_h200, monkeypatch, options):
    kernel = peak_above_gradients(monkeypatch, 128_256, backend_torch.run, **options)
    assert kernel - peak_above_gradients(monkeypatch, 128_256, nothing, **options) <= 0.3 * GIBIBYTE
