"""token_weight: weights that are functions of the token's own losses, as constants, against float64 and at four products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LossStats
from tests.ops.test_linear_kl import INDEX, LABELS, MASK, NAMES, TOKENS, check, make_inputs, value_and_gradients
from tests.oracle import assert_close, relative_error

FLOAT_MASK = MASK * torch.rand(TOKENS, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
PRECISIONS = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]


def focal(losses: Tensor, told: LossStats) -> Tensor:
    return (-losses).exp()


def clipped(losses: Tensor, told: LossStats) -> Tensor:
    return losses.clamp(0.2, 2.0)


def by_statistics(losses: Tensor, told: LossStats) -> Tensor:
    return told.divergence / (1.0 + told.student_entropy) - 0.3 * told.top1_agreement


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("function", [focal, clipped])
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"mask": FLOAT_MASK, "chunk_size": 4},
        {"mask": MASK, "labels": LABELS, "label_weight": 0.7, "chunk_size": 5},
        {"labels": LABELS, "label_weight": 0.7, "denominator": 11.0, "temperature": 2.0, "student_softcap": 3.0},
        {"vocab_index": INDEX, "teacher_mass": "full", "divergence": "tvd"},
    ],
    ids=["sum", "float mask", "labels", "denominator", "full"],
)
def test_value_and_gradients(options, function, dtype, tolerance):
    check({**options, "token_weight": function}, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_statistics_are_those_of_return_stats(dtype, tolerance):
    inputs, seen = make_inputs(dtype=dtype), []

    def function(losses: Tensor, told: LossStats) -> Tensor:
        seen.append(len(losses))
        return by_statistics(losses, told)

    options = {"mask": MASK, "token_weight": function, "return_stats": True, "chunk_size": 4}
    loss, stats = fastkd.linear_kl_div(**inputs, **options)
    assert sum(seen) == int(MASK.sum()) and max(seen) <= 4
    weights = by_statistics(stats.divergence, stats) * MASK
    assert_close(loss.detach(), (weights * stats.divergence).sum() / MASK.sum(), tolerance)
    check({"mask": MASK, "token_weight": weights_of(stats, MASK), "chunk_size": TOKENS}, dtype, tolerance)


def weights_of(stats: LossStats, mask: Tensor):
    """The same weights, looked up: the oracle sees all tokens, a chunk of all tokens the unmasked ones."""

    def function(losses: Tensor, told: LossStats) -> Tensor:
        weights = by_statistics(stats.divergence, stats).to(losses.dtype)
        return weights if len(losses) == len(mask) else weights[mask]

    return function


def test_no_gradient_flows_through_the_weights():
    """The gradient is that of constant weights, and not that of w(loss) loss."""
    inputs = make_inputs()
    _, gradients = value_and_gradients(fastkd.linear_kl_div, inputs, token_weight=focal, reduction="sum")
    losses = fastkd.linear_kl_div(**inputs, reduction="none")
    constant = torch.autograd.grad(((-losses).exp().detach() * losses).sum(), [inputs[name] for name in NAMES])
    through = torch.autograd.grad(
        [((-x).exp() * x).sum() for x in [fastkd.reference.linear_kl_div(**inputs, reduction="none")]], [inputs[name] for name in NAMES]
    )
    for gradient, right, wrong in zip(gradients, constant, through, strict=True):
        assert_close(gradient, right, 1e-9)
        assert relative_error(wrong, right) > 0.1


def test_ones_are_the_loss_itself_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(dtype=dtype)
        plain = value_and_gradients(fastkd.linear_kl_div, inputs, mask=MASK)
        weighted = value_and_gradients(fastkd.linear_kl_div, inputs, mask=MASK, token_weight=lambda losses, _: torch.ones_like(losses))
        assert plain[0].equal(weighted[0]) and all(a.equal(b) for a, b in zip(plain[1], weighted[1], strict=True))


def test_the_mask_of_the_caller_stays_as_it_is():
    mask = torch.ones(TOKENS, dtype=torch.float64)
    fastkd.linear_kl_div(**make_inputs(), mask=mask, token_weight=focal)
    assert mask.eq(1).all()


def test_a_loss_inside_of_the_function_is_not_weighted():
    inputs = make_inputs()
    inner = {name: x.detach() for name, x in inputs.items()}
    found = []

    def function(losses: Tensor, told: LossStats) -> Tensor:
        found.append(fastkd.linear_kl_div(**inner))
        return torch.full_like(losses, 2.0)

    doubled, plain = fastkd.linear_kl_div(**inputs, token_weight=function), fastkd.linear_kl_div(**inputs)
    assert_close(doubled.detach(), 2 * plain.detach(), 1e-12)
    assert_close(found[0], plain.detach(), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_cross_entropy_times_its_own_probability(dtype, tolerance):
    """Token scaling: ce * exp(-ce.detach())."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((TOKENS, 8), (37, 8)))
    exact = [hidden.requires_grad_(), weight.requires_grad_()]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    truth = fastkd.reference.linear_cross_entropy(*exact, LABELS, token_weight=focal)
    counted = LABELS != -100
    ce = torch.nn.functional.cross_entropy(hidden @ weight.T, LABELS.clamp_min(0), reduction="none")
    assert_close(truth.detach(), (ce * (-ce).exp())[counted].mean().detach(), 1e-12)
    loss = fastkd.linear_cross_entropy(*ours, LABELS, token_weight=focal, chunk_size=5)
    assert_close(loss.detach(), truth.detach(), tolerance)
    for found, right in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(truth, exact), strict=True):
        assert_close(found, right, tolerance)


def test_four_products_as_without_it(monkeypatch):
    from fastkd.ops import linear_logits

    def products(**options) -> int:
        calls, original = [], linear_logits.mm_
        with monkeypatch.context() as patch:
            patch.setattr(linear_logits, "mm_", lambda *arguments, **how: (calls.append(1), original(*arguments, **how))[1])
            fastkd.linear_kl_div(**make_inputs(), **options)
        return len(calls)

    assert products(token_weight=focal) == products() > 0


def test_a_compiler_breaks_the_graph_and_goes_on():
    inputs = make_inputs(dtype=torch.float32)
    plain = value_and_gradients(fastkd.linear_kl_div, inputs, token_weight=focal)
    compiled = value_and_gradients(torch.compile(fastkd.linear_kl_div, backend="eager"), inputs, token_weight=focal)
    assert plain[0].equal(compiled[0]) and all(a.equal(b) for a, b in zip(plain[1], compiled[1], strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"token_weight": torch.ones(TOKENS)}, TypeError, "token_weight is Tensor; give a function"),
        ({"token_weight": focal, "reduction": "none"}, ValueError, "with 'none' multiply the losses yourself"),
        ({"token_weight": lambda losses, told: losses[1:]}, ValueError, r"floats of shape \(23,\), one for each token"),
        ({"token_weight": lambda losses, told: losses > 0}, ValueError, "torch.bool"),
        ({"token_weight": lambda losses, told: 1.0}, TypeError, "returned float; it must return a tensor"),
        ({"token_weight": lambda losses, told: losses / 0}, ValueError, "not finite"),
        ({"token_weight": focal, "group": object()}, ValueError, "token_weight is not known to group="),
    ],
    ids=["tensor", "none", "shape", "dtype", "number", "infinite", "group"],
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        fastkd.linear_kl_div(**make_inputs(), **options)
