"""Fault 26: a kernel is launched on tensors that are not contiguous, empty, misaligned, or of more than 2^31 elements.

The result and every gradient equal the plain reference's on tidy copies. Nothing is silently misread.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd

TOKENS, WIDTH, VOCABULARY = 7, 12, 97
BACKENDS = ["torch", *(["cpp"] if shutil.which("c++") else [])]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 << 30,
    reason="needs a CUDA device of 40 GiB",
)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def strided(tensor: Tensor) -> Tensor:
    """Every second column of a wider one."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def misaligned(tensor: Tensor) -> Tensor:
    """One element behind where an allocation starts."""
    buffer = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


def gapped(tensor: Tensor) -> Tensor:
    """Rows that lie apart."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


def repeated(tensor: Tensor) -> Tensor:
    """One row seen many times, without a copy."""
    return tensor[:1].expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout for layout in (transposed, strided, misaligned, gapped, repeated)
}


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, WIDTH), (VOCABULARY, WIDTH), (tokens, WIDTH), (VOCABULARY, WIDTH))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(function: Callable[..., Any], tensors: list[Tensor], trained: int, **options: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(place < trained) for place, tensor in enumerate(tensors)]
    loss = function(*leaves, temperature=2.0, **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves[:trained])]  # type: ignore[misc]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_equals_the_reference_on_tidy_copies(layout: str, dtype: torch.dtype, backend: str) -> None:
    awkward = [LAYOUTS[layout](tensor) for tensor in inputs(TOKENS, dtype)]
    tidy = [tensor.contiguous().clone().double() for tensor in awkward]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-3}
    expected = with_gradients(fastkd.reference.linear_kl_div, tidy, 2)
    for found, wanted in zip(with_gradients(fastkd.linear_kl_div, awkward, 2, backend=backend), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, **tolerance)
    logits = [LAYOUTS[layout]((hidden.float() @ weight.float().T).to(dtype)) for hidden, weight in (tidy[:2], tidy[2:])]
    expected = with_gradients(fastkd.reference.kl_div, [tensor.contiguous().clone().double() for tensor in logits], 1)
    for found, wanted in zip(with_gradients(fastkd.kl_div, logits, 1, backend=backend), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 5)])
def test_empty_inputs_give_zero_with_the_graph(leading: tuple[int, ...], backend: str) -> None:
    hidden = torch.zeros(*leading, WIDTH, requires_grad=True)
    weight = inputs(1, torch.float32)[1].requires_grad_()
    loss: Any = fastkd.linear_kl_div(hidden, weight, hidden.detach(), weight.detach(), backend=backend)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and (weight.grad == 0).all()
    none: Any = fastkd.linear_kl_div(hidden, weight, hidden.detach(), weight.detach(), backend=backend, reduction="none")
    assert none.shape == leading


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_elements_than_32_bits_count(dtype: torch.dtype) -> None:
    """The last rows of 2^31 logits and some: where an index of 32 bits overflows they would be others'."""
    vocabulary = 1 << 17
    tokens = (1 << 31) // vocabulary + 3
    generator = torch.Generator("cuda").manual_seed(0)
    student = torch.randn(tokens, vocabulary, generator=generator, device="cuda", dtype=dtype)
    teacher = student.roll(1, 0)
    assert student.numel() > 1 << 31
    values: Any = fastkd.kl_div(student, teacher, reduction="none")
    for rows in (slice(0, 2), slice(-4, None)):
        expected: Any = fastkd.reference.kl_div(student[rows].double(), teacher[rows].double(), reduction="none")
        torch.testing.assert_close(values[rows].double(), expected, rtol=1e-3, atol=1e-4)
