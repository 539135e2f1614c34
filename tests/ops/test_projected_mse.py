"""projected_mse against the float64 oracle: value and every gradient, over every option."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd.ops.options import LossOptions
from tests.oracle import assert_close, wrong_gradients

TOKENS, STUDENT_WIDTH, TEACHER_WIDTH, WIDTH = 23, 8, 12, 10
NAMES = ["student_states", "student_weight", "student_bias"]
TEACHER = ["teacher_states", "teacher_weight", "teacher_bias"]
MASK = torch.rand(TOKENS, generator=torch.Generator().manual_seed(5)) > 0.4
WEIGHTS = MASK * torch.linspace(0.1, 3.0, TOKENS)
PRECISIONS = [
    pytest.param(torch.float64, 1e-12, id="float64"),
    pytest.param(torch.float32, 2e-6, id="float32"),
    # The residual is rounded to 16 bits before the backward products, and the gradients of the states twice.
    pytest.param(torch.bfloat16, 5e-3, id="bfloat16"),
    pytest.param(torch.float16, 1e-3, id="float16"),
]


@pytest.fixture(autouse=True)
def backend():
    """No row kernel is involved: once is enough."""


def make_inputs(
    dtype: torch.dtype = torch.float64,
    leading: tuple[int, ...] = (TOKENS,),
    *,
    student_weight: bool = True,
    teacher_weight: bool = True,
    bias: bool = True,
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs: dict[str, Tensor | None] = {
        "student_states": normal(*leading, STUDENT_WIDTH if student_weight else WIDTH),
        "student_weight": normal(WIDTH, STUDENT_WIDTH) * 0.5 if student_weight else None,
        "teacher_states": normal(*leading, TEACHER_WIDTH if teacher_weight else WIDTH),
        "teacher_weight": normal(WIDTH, TEACHER_WIDTH) * 0.5 if teacher_weight else None,
        "student_bias": normal(WIDTH) if bias else None,
        "teacher_bias": normal(WIDTH) if bias else None,
    }
    return {name: x if x is None else x.requires_grad_(name in NAMES) for name, x in inputs.items()}


def learned(inputs: dict[str, Tensor | None]) -> list[str]:
    return [name for name in NAMES if inputs[name] is not None and inputs[name].requires_grad]


def value_and_gradients(function, inputs, upstream: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    inputs = {name: x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    value = function(**inputs, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), list(torch.autograd.grad(value, [inputs[n] for n in learned(inputs)], upstream))


def exact(x):
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x


def check(inputs, tolerance: float, upstream: Tensor | None = None, **options) -> None:
    value, gradients = value_and_gradients(fastkd.projected_mse, inputs, upstream, **options)
    truth, true_gradients = value_and_gradients(
        fastkd.reference.projected_mse,
        {name: exact(x) for name, x in inputs.items()},
        upstream,
        **{name: exact(x) for name, x in options.items()},
    )
    assert value.dtype == (torch.float64 if inputs["student_states"].dtype == torch.float64 else torch.float32)
    assert_close(value, truth, min(tolerance, 2e-6))
    for name, gradient, true_gradient in zip(learned(inputs), gradients, true_gradients, strict=True):
        assert gradient.dtype == inputs[name].dtype
        assert_close(gradient, true_gradient, tolerance, name)


SIDES = list(itertools.product([True, False], repeat=3))
IDS = [f"{'filter' if s else 'identity'}-{'filter' if t else 'identity'}-{'bias' if b else 'no bias'}" for s, t, b in SIDES]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("mask", [None, MASK, WEIGHTS], ids=["all rows", "mask", "weights"])
@pytest.mark.parametrize("sides", SIDES, ids=IDS)
def test_filters_and_identities(sides, mask, dtype, tolerance):
    student, teacher, bias = sides
    inputs = make_inputs(dtype, student_weight=student, teacher_weight=teacher, bias=bias)
    check(inputs, tolerance, mask=mask, chunk_size=7)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("mask", [None, MASK, WEIGHTS], ids=["all rows", "mask", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_upstream_gradients(reduction, mask, dtype, tolerance):
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(3)) if reduction == "none" else torch.tensor(-1.7)
    check(make_inputs(dtype), tolerance, upstream, mask=mask, reduction=reduction, chunk_size=5)


def test_without_filters_it_is_torchs_own():
    inputs = make_inputs(student_weight=False, teacher_weight=False, bias=False)
    truth = torch.nn.functional.mse_loss(inputs["student_states"], inputs["teacher_states"])
    assert_close(fastkd.projected_mse(**inputs), truth, 1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [{"chunk_size": n} for n in (1, 3, TOKENS - 1, 1000)] + [{"memory_budget": 400}], ids=str)
def test_the_chunk_changes_nothing(sizes, reduction):
    check(make_inputs(), 1e-12, reduction=reduction, mask=WEIGHTS.double(), **sizes)


def test_leading_dims_are_flattened_inside():
    inputs = make_inputs(leading=(3, 2, 4))
    check(inputs, 1e-12, mask=torch.rand(3, 2, 4) > 0.3)
    assert fastkd.projected_mse(**inputs, reduction="none").shape == (3, 2, 4)


def test_non_contiguous_inputs():
    inputs = make_inputs()
    for name in ("student_states", "student_weight", "teacher_states", "teacher_weight"):
        inputs[name] = inputs[name].detach().T.contiguous().T.requires_grad_(inputs[name].requires_grad)
        assert not inputs[name].is_contiguous()
    check(inputs, 1e-12, mask=MASK)


def test_the_models_may_differ_in_dtype():
    inputs = make_inputs(torch.float32)
    inputs |= {name: inputs[name].bfloat16() for name in TEACHER}
    check(inputs, 2e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_survives_token_weights_and_upstream_gradients_of_any_size(reduction, scale):
    upstream = torch.full((TOKENS,), 1 / scale) if reduction == "none" else None
    check(make_inputs(torch.float16), 1e-3, upstream, mask=WEIGHTS * scale, reduction=reduction)


def test_autocast_gives_operands_its_dtype_and_gradients_their_own():
    inputs = make_inputs(torch.float32)
    rounded = {name: exact(x.detach().bfloat16().requires_grad_(x.requires_grad)) for name, x in inputs.items()}
    rounded |= {name: exact(inputs[name]) for name in ("student_bias", "teacher_bias")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = value_and_gradients(fastkd.projected_mse, inputs)
    truth, true_gradients = value_and_gradients(fastkd.reference.projected_mse, rounded)
    assert_close(value, truth, 2e-6)
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert_close(gradient, true_gradient, 5e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("student_weight", [True, False])
def test_gradcheck(student_weight, reduction):
    inputs = make_inputs(leading=(4,), student_weight=student_weight)
    names = learned(inputs)

    def loss(*tensors):
        mask = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
        return fastkd.projected_mse(
            **{**inputs, **dict(zip(names, tensors, strict=True))}, mask=mask, reduction=reduction, chunk_size=2
        )

    assert torch.autograd.gradcheck(loss, [inputs[n] for n in names])


@pytest.mark.parametrize("name", NAMES)
def test_the_check_refuses_wrong_gradients(name):
    _, gradients = value_and_gradients(fastkd.reference.projected_mse, make_inputs())
    truth = gradients[NAMES.index(name)]
    for what, wrong in wrong_gradients(truth).items():
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_close(wrong, truth, 5e-3, what)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count", [1, 2])
def test_only_what_needs_a_gradient_gets_one(count, reduction):
    for names in itertools.combinations(NAMES, count):
        inputs = {name: x.detach().requires_grad_(name in names) for name, x in make_inputs().items()}
        check(inputs, 1e-12, mask=MASK, reduction=reduction, chunk_size=6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (3,)])
def test_no_tokens_or_all_masked_give_exact_zeros_with_the_graph(leading, reduction):
    inputs = make_inputs(leading=leading)
    loss = fastkd.projected_mse(**inputs, mask=torch.zeros(leading, dtype=torch.bool), reduction=reduction)
    assert loss.shape == (torch.Size(leading) if reduction == "none" else ())
    assert loss.sum().item() == 0.0
    for gradient in torch.autograd.grad(loss.sum(), [inputs[n] for n in NAMES]):
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, -3.5, 1e-8])
def test_backward_twice_under_retain_graph_gives_the_same(upstream, reduction):
    inputs = make_inputs()
    tensors = [inputs[n] for n in NAMES]
    loss = fastkd.projected_mse(**inputs, reduction=reduction).sum() * upstream
    truth = torch.autograd.grad(fastkd.reference.projected_mse(**inputs, reduction=reduction).sum(), tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    for one, two, gradient in zip(first, second, truth, strict=True):
        assert torch.equal(one, two)
        assert_close(one, gradient * upstream, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_clearly(reduction):
    inputs = make_inputs()
    loss = fastkd.projected_mse(**inputs, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, inputs["student_states"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("student_weight", [True, False])
def test_compiles_whole_and_only_once_for_every_number_of_tokens(student_weight, reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fixed = make_inputs(torch.float32, student_weight=student_weight)
    names = learned(fixed)

    def loss(student_states, teacher_states, mask):
        states = {"student_states": student_states, "teacher_states": teacher_states}
        return fastkd.projected_mse(**{**fixed, **states}, mask=mask, reduction=reduction, chunk_size=7)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (11, 16, 30, 5):
        student = torch.randn(tokens, fixed["student_states"].shape[1]).requires_grad_()
        arguments = (student, torch.randn(tokens, TEACHER_WIDTH), torch.rand(tokens) > 0.4)
        tensors = [student, *(fixed[n] for n in names[1:])]
        expected, value = loss(*arguments), compiled(*arguments)
        assert_close(value, expected, 1e-6)
        truth = torch.autograd.grad(expected.sum(), tensors)
        for gradient, true_gradient in zip(torch.autograd.grad(value.sum(), tensors), truth, strict=True):
            assert_close(gradient, true_gradient, 1e-6)
        if tokens == 11:
            first = counter.frame_count
    assert counter.frame_count == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_shapes_and_dtypes_that_are_promised_to_the_compiler_are_kept(dtype):
    inputs = make_inputs(dtype)
    names = ("states", "weight", "bias"), ("teacher_states", "teacher_weight", "teacher_bias", "mask")
    call = repr((*names, False, LossOptions(chunk_size=5).to_text()))
    torch.library.opcheck(
        torch.ops.fastkd.projected_mse.default,
        ([inputs[n] for n in NAMES], [*(inputs[n] for n in TEACHER), MASK], None, [True, True, True], call),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_module_form():
    inputs = make_inputs()
    loss = fastkd.ProjectedMSELoss(reduction="sum")
    assert torch.equal(loss(**inputs, mask=MASK), fastkd.projected_mse(**inputs, reduction="sum", mask=MASK))
    assert "reduction=sum" in repr(loss)
