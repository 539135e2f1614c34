"""Optimizer state: training goes on bit for bit from what a checkpoint holds."""

import pytest
import torch
from torch import nn

from fastkd.train.checkpoint import load_checkpoint, save_checkpoint
from fastkd.train.state import load_optimizer_tensors, optimizer_tensors


class Tied(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 5, dtype=dtype)
        self.inner = nn.Linear(5, 5, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.head = nn.Linear(5, 11, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(11, (4, 3), generator=generator)
        logits = model.head(torch.tanh(model.inner(model.embedding(ids))))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_adamw_goes_on_bit_for_bit(tmp_path, options, dtype):
    def build():
        model = Tied(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}

    model, optimizer, names = build()
    train(model, optimizer, range(5))
    flat = optimizer_tensors(optimizer, names)
    assert flat["embedding.weight.step"].shape == () and flat["embedding.weight.step"] == 5
    assert not any(name.startswith("unused") for name in flat)
    path = save_checkpoint(tmp_path, 5, {"model": model.state_dict(), "optimizer": flat}, {})
    train(model, optimizer, range(5, 10))

    resumed, resumed_optimizer, resumed_names = build()
    train(resumed, resumed_optimizer, range(2))  # state to be replaced
    tensors, _ = load_checkpoint(path, "cpu")
    resumed.load_state_dict(tensors["model"])
    load_optimizer_tensors(resumed_optimizer, resumed_names, tensors["optimizer"])
    train(resumed, resumed_optimizer, range(5, 10))
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    expected, found = optimizer_tensors(optimizer, names), optimizer_tensors(resumed_optimizer, resumed_names)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_moments_keep_a_dtype_of_their_own():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    moments = torch.tensor([1.0001, 2.0001, 3.0001])
    optimizer.state[parameter]["max_exp_avg_sq"] = torch.ones(3)
    load_optimizer_tensors(optimizer, {parameter: "w"}, {"w.exp_avg": moments})
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moments)
    assert list(optimizer.state[parameter]) == ["exp_avg"]  # what was there is replaced, not mixed in
    optimizer.state[parameter]["exp_avg"].zero_()
    assert moments[0] == 1.0001  # the optimizer owns its copy


def test_optimizer_of_another_model_is_refused_and_left_alone():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"layer\.7\.weight"):
        load_optimizer_tensors(optimizer, {parameter: "w"}, {"layer.7.weight.exp_avg": torch.ones(3)})
    assert optimizer.state[parameter]["step"] == 1


def test_state_that_is_no_tensor_is_refused():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter]["step"] = 3
    with pytest.raises(TypeError, match=r"w\.step is a int"):
        optimizer_tensors(optimizer, {parameter: "w"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_state_goes_back_to_where_it_was():
    for options, step_device in (({}, "cpu"), ({"fused": True}, "cuda")):
        parameter = nn.Parameter(torch.ones(3, device="cuda"))
        optimizer = torch.optim.AdamW([parameter], **options)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        flat = {name: tensor.cuda() for name, tensor in optimizer_tensors(optimizer, {parameter: "w"}).items()}
        load_optimizer_tensors(optimizer, {parameter: "w"}, flat)
        assert optimizer.state[parameter]["step"].device.type == step_device
        optimizer.step()
