"""The Triton gathers under the interpreter: `index_select`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastkd.kernels import gather
from fastkd.kernels.gather import gather_columns, gather_rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(gather, "BLOCK", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("vocabulary", "width", "count"), [(1, 1, 1), (23, 16, 40), (50, 37, 17), (7, 5, 0), (7, 0, 3)])
def test_equal_to_index_select(vocabulary, width, count, dtype):
    weight, index = torch.randn(vocabulary, width).to(dtype), torch.randint(vocabulary, (count,))
    assert torch.equal(gather_rows(weight, index), weight.index_select(0, index))
    logits = weight.T.contiguous()
    assert torch.equal(gather_columns(logits, index), logits.index_select(1, index))


def test_strides():
    weight, index = torch.randn(30, 44)[::2, 3:40:2], torch.tensor([14, 0, 0, 7, 3, 3])[::2]
    assert torch.equal(gather_rows(weight, index), weight.index_select(0, index))
    assert torch.equal(gather_columns(weight.T, index), weight.T.index_select(1, index))
    assert torch.equal(gather_columns(weight[:1].expand(4, -1), index), weight[:1].expand(4, -1).index_select(1, index))


def test_nan_and_infinity_are_copied():
    weight = torch.tensor([[float("nan"), 1.0], [-float("inf"), -0.0]])
    index = torch.tensor([1, 0])
    assert torch.equal(gather_rows(weight, index).view(torch.int32), weight.index_select(0, index).view(torch.int32))


def test_an_index_outside_reads_nothing_and_shows():
    weight, index = torch.ones(4, 3), torch.tensor([3, 4, -1, 0])
    assert gather_rows(weight, index).isnan().all(1).tolist() == [False, True, True, False]
    assert gather_columns(weight.T, index).isnan().all(0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("source", "index", "says"),
    [
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int32), "index is torch.int32"),
        (torch.ones(3, 2), torch.zeros(2, 1, dtype=torch.int64), r"index is .* shape \(2, 1\)"),
        (torch.ones(3), torch.zeros(2, dtype=torch.int64), r"weight is .* shape \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "weight is torch.int64"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64, device="meta"), "index is on meta"),
    ],
)
def test_bad_arguments(source, index, says):
    with pytest.raises(ValueError, match=says):
        gather_rows(source, index)
