"""The operators: compiled whole for any batch size, and what backward may and may not do."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd.ops.options import LossOptions
from tests.ops.test_linear_kl import LABELS, MASK, NAMES, make_inputs, value_and_gradients
from tests.oracle import assert_close

OPTIONS = {"mask": MASK, "labels": LABELS, "label_weight": 0.5, "temperature": 2.0, "return_stats": True}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["linear_kl_div", "kl_div", "linear_cross_entropy"])
def test_compiles_whole_and_only_once_for_every_number_of_tokens(name, reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    head, teacher_head = torch.randn(50, 8).requires_grad_(), torch.randn(60, 12)
    bias = torch.randn(50).requires_grad_()

    def loss(hidden, teacher, mask, labels):
        common = {"reduction": reduction, "chunk_size": 7}
        if name == "linear_cross_entropy":
            return fastkd.linear_cross_entropy(hidden, head, labels, bias=bias, **common)
        common |= {"mask": mask, "labels": labels, "label_weight": 0.5, "temperature": 1.5}
        if name == "kl_div":
            return fastkd.kl_div(hidden @ head.T + bias, teacher @ teacher_head.T, **common)
        return fastkd.linear_kl_div(hidden, head, teacher, teacher_head, student_bias=bias, **common)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (11, 16, 30, 5):
        hidden, mask, labels = torch.randn(tokens, 8).requires_grad_(), torch.rand(tokens) > 0.4, torch.randint(50, (tokens,))
        arguments = (hidden, torch.randn(tokens, 12), mask, labels)
        expected, value = loss(*arguments), compiled(*arguments)
        assert_close(value, expected, 1e-6)
        truth = torch.autograd.grad(expected.sum(), [hidden, head, bias])
        for gradient, true_gradient in zip(torch.autograd.grad(value.sum(), [hidden, head, bias]), truth, strict=True):
            assert_close(gradient, true_gradient, 1e-6)
        if tokens == 11:
            first = counter.frame_count
    assert counter.frame_count == first


def test_the_shapes_and_dtypes_that_are_promised_to_the_compiler_are_kept():
    """torch's own check of an operator: schema, no aliasing, fake outputs, autograd registration."""
    inputs = {k: x.float().detach().requires_grad_(x.requires_grad) for k, x in make_inputs().items()}
    student = [inputs[n] for n in NAMES]
    teacher = [inputs["teacher_hidden"], inputs["teacher_weight"][:37].detach(), inputs["teacher_bias"][:37].detach()]
    names = ("hidden", "weight", "bias"), ("teacher_hidden", "teacher_weight", "teacher_bias", "mask", "labels")
    call = repr((*names, False, LossOptions(divergence="forward_kl", chunk_size=5, label_weight=0.5).to_text()))
    torch.library.opcheck(
        torch.ops.fastkd.fused_loss.default,
        (student, [*teacher, MASK, LABELS], None, [True, True, True], call),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("function", ["linear_kl_div", "kl_div"])
def test_a_second_derivative_is_refused_clearly(function):
    inputs = make_inputs()
    if function == "kl_div":
        student = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
        loss = fastkd.kl_div(student, torch.randn(5, 9, dtype=torch.float64))
    else:
        student, loss = inputs["student_hidden"], fastkd.linear_kl_div(**inputs)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("upstream", [1.0, -3.5, 1e-8])
def test_backward_twice_under_retain_graph_multiplies_the_upstream_gradient_once_each(upstream):
    inputs = make_inputs()
    _, truth = value_and_gradients(fastkd.reference.linear_kl_div, inputs)
    tensors = [inputs[n] for n in NAMES]
    loss = fastkd.linear_kl_div(**inputs)
    scaled = loss * upstream
    first = torch.autograd.grad(scaled, tensors, retain_graph=True)
    second = torch.autograd.grad(scaled, tensors)
    for one, two, exact in zip(first, second, truth, strict=True):
        assert torch.equal(one, two)
        assert_close(one, exact * upstream, 1e-11)


def test_gradients_accumulate_into_grad():
    inputs = make_inputs()
    _, truth = value_and_gradients(fastkd.reference.linear_kl_div, inputs)
    for _ in range(3):
        fastkd.linear_kl_div(**inputs).backward()
    for name, exact in zip(NAMES, truth, strict=True):
        assert_close(inputs[name].grad, 3 * exact, 1e-11)


def test_a_loss_that_is_not_used_costs_no_backward():
    inputs = make_inputs()
    loss, _stats = fastkd.linear_kl_div(**inputs, return_stats=True)
    other = inputs["student_hidden"].square().sum()
    other.backward()
    assert inputs["student_weight"].grad is None
    assert loss.requires_grad
