"""Liger's losses on fastkd: the values and gradients of a plain float64 formula, and of the installed liger-kernel."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastkd.integrations import liger
from tests.integrations.peer_packages import DEVICE
from tests.integrations.peer_packages import liger as peer
from tests.oracle import assert_close, relative_error, wrong_gradients

TOKENS, VOCABULARY = 11, 37
PATHS = {
    "LigerFusedLinearJSDLoss": "chunked_loss.LigerFusedLinearJSDLoss",
    "LigerFusedLinearJSD": "transformers.fused_linear_jsd.LigerFusedLinearJSD",
    "LigerFusedLinearKLDivLoss": "transformers.fused_linear_kl_div.LigerFusedLinearKLDivLoss",
    "LigerJSD": "transformers.jsd.LigerJSD",
    "LigerKLDIVLoss": "transformers.kl_div.LigerKLDIVLoss",
    "LigerTVDLoss": "transformers.tvd.LigerTVDLoss",
}
BETAS = (0.0, 0.3, 0.5, 1.0)
REDUCTIONS = ("batchmean", "mean", "sum")


@dataclass(frozen=True)
class Case:
    """A class with its options, and what it is called with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    labels: str = "some"
    """"none": no argument; "some", "all" or "ignored": of which tokens it has labels."""
    bias: bool = False
    target: str = "softmax"
    """The teacher's probabilities: "softmax"; "zeros": with entries that are 0; "unnormalised": rows of other sums, one of zero."""

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        others = [x for x, default in ((self.labels, "some"), (self.target, "softmax"), ("bias" * self.bias, "")) if x != default]
        return "-".join([self.name, *([options] if options else []), *others])


def cases() -> Iterator[Case]:
    for beta, temperature, bias in itertools.product(BETAS, (1.0, 2.5), (False, True)):
        yield Case("LigerFusedLinearJSDLoss", {"beta": beta, "temperature": temperature}, bias=bias)
    for hard, soft, both in itertools.product((0.0, 0.3, 2.0), (0.5, 1.5), (False, True)):
        options = {"weight_hard_loss": hard, "weight_soft_loss": soft, "return_soft_hard_loss": both, "temperature": 2.0}
        yield Case("LigerFusedLinearJSDLoss", options)
    for labels, ignore_index in itertools.product(("all", "ignored"), (-100, 3)):
        yield Case("LigerFusedLinearJSDLoss", {"ignore_index": ignore_index, "chunk_size": 4}, labels)
    for beta, temperature, labels in itertools.product(BETAS, (1.0, 2.5), ("none", "some")):
        yield Case("LigerFusedLinearJSD", {"jsd_beta": beta, "temperature": temperature}, labels)
    yield Case("LigerFusedLinearJSD", {"ignore_index": 3, "accum_dtype": torch.float32})
    for reduction, temperature, labels in itertools.product(REDUCTIONS, (1.0, 2.5), ("none", "some", "ignored")):
        yield Case("LigerFusedLinearKLDivLoss", {"reduction": reduction, "temperature": temperature}, labels)
    for target in ("zeros", "unnormalised"):
        yield Case("LigerFusedLinearKLDivLoss", {"temperature": 2.0, "ignore_index": 3}, target=target)
    for beta, labels in itertools.product(BETAS, ("none", "some")):
        yield Case("LigerJSD", {"beta": beta}, labels)
    for reduction, is_log, target in itertools.product(REDUCTIONS, (False, True), ("softmax", "zeros", "unnormalised")):
        if not (is_log and target != "softmax"):  # Liger has 0 times -inf there
            yield Case("LigerKLDIVLoss", {"reduction": reduction, "log_target": is_log}, "none", target=target)
    yield Case("LigerKLDIVLoss", {}, "none")
    for reduction, labels in itertools.product(REDUCTIONS, ("none", "some")):
        yield Case("LigerTVDLoss", {"reduction": reduction}, labels)
    yield Case("LigerTVDLoss", {"ignore_index": 3}, target="zeros")


CASES = list(cases())


@dataclass(frozen=True)
class Inputs:
    """The student's leaves first; `q` and `log_q` are made of them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    target: Tensor
    labels: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.bias

    def logits(self, case: Case) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's (N, V)."""
        student, teacher = self.hidden @ self.weight.T, self.teacher @ self.teacher_weight.T
        return (student + self.bias, teacher + self.teacher_bias) if case.bias else (student, teacher)


def inputs_of(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target = (2.0 * normal(TOKENS, VOCABULARY)).softmax(-1)
    if case.target == "zeros":
        target = torch.where(target > 0.01, target, 0.0)
        target /= target.sum(-1, keepdim=True)
    elif case.target == "unnormalised":
        target = target * torch.rand(TOKENS, 1, generator=generator).double() * 2
        target[4] = 0.0
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    ignore_index = case.options.get("ignore_index", -100)
    labels = torch.where(labels == ignore_index, labels + 1, labels)
    ignored = {"all": slice(0), "ignored": slice(None)}.get(case.labels, slice(2, 6))
    labels[ignored] = ignore_index
    shapes = ((TOKENS, 8), (VOCABULARY, 8), (VOCABULARY,), (TOKENS, 5), (VOCABULARY, 5), (VOCABULARY,))
    on_device = [x.to(DEVICE, dtype) for x in (*(normal(*shape) for shape in shapes), target)]
    return Inputs(*(x.requires_grad_() for x in on_device[:3]), *on_device[3:], labels.to(DEVICE))


def call(module: Any, case: Case, x: Inputs) -> Any:
    labels = [] if case.labels == "none" else [x.labels]
    student, teacher = x.logits(case)
    match case.name:
        case "LigerFusedLinearJSDLoss":
            biases = (x.bias, x.teacher_bias) if case.bias else ()
            return module(x.hidden, x.weight, x.teacher, x.teacher_weight, x.labels, *biases)
        case "LigerFusedLinearJSD":
            return module(x.hidden, x.weight, x.teacher, x.teacher_weight, *(labels or [None]))
        case "LigerFusedLinearKLDivLoss":
            return module(x.hidden, x.weight, x.target, *labels)
        case "LigerJSD":
            return module(student.log_softmax(-1), teacher.log_softmax(-1), *labels)
        case "LigerKLDIVLoss":
            return module(student.log_softmax(-1), x.target.log() if case.options.get("log_target") else x.target)
        case _:
            return module(student.softmax(-1), x.target, *labels)


def oracle(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """The loss, or (loss, divergence, cross-entropy), as the documentation of Liger's class defines it."""
    options, (student, teacher) = case.options, x.logits(case)
    counts = torch.ones(TOKENS, device=DEVICE, dtype=torch.bool)
    if case.labels != "none":
        counts = x.labels != options.get("ignore_index", -100)
    tokens = counts.sum().clamp_min(1)
    temperature = options.get("temperature", 1.0)
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if "JSD" in case.name:
        soft = generalised_jsd(log_p, log_q, options.get("jsd_beta", options.get("beta", 0.5)))[counts].sum() / tokens
        if case.name != "LigerFusedLinearJSDLoss":
            return (soft,)
        hard = functional.cross_entropy(student[counts], x.labels[counts], reduction="sum") / tokens
        loss = options.get("weight_hard_loss", 0.5) * hard + options.get("weight_soft_loss", 0.5) * soft
        return (loss, soft, hard) if options.get("return_soft_hard_loss") else (loss,)
    if case.name == "LigerTVDLoss":
        rows = 0.5 * (student.softmax(-1) - x.target).abs()
    else:
        rows = functional.kl_div(log_q, x.target, reduction="none")
    default = "mean" if case.name == "LigerKLDIVLoss" else "batchmean"
    denominator = {"batchmean": tokens, "mean": tokens * VOCABULARY, "sum": 1}[options.get("reduction", default)]
    return (rows.sum(-1)[counts].sum() / denominator,)


def generalised_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """(N,) of (N, V)."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_p, log_q) if beta == 0.0 else kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def values_and_gradients(loss: Callable[[Inputs], Any], x: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All values, and the gradients of the first times 3, as behind another loss; zeros where a leaf has no part."""
    found = loss(x)
    values = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(3.0 * values[0], x.leaves, allow_unused=True)
    made = tuple(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(x.leaves, gradients, strict=True))
    return tuple(value.detach() for value in values), made


def assert_equal(found: Any, expected: Any, tolerance: float, value_tolerance: float | None = None) -> None:
    """value_tolerance: of the values, if it is not that of the gradients."""
    for kind, limit, these, those in zip(
        ("value", "gradient"), (value_tolerance or tolerance, tolerance), found, expected, strict=True
    ):
        assert len(these) == len(those)
        for number, (given, truth) in enumerate(zip(these, those, strict=True)):
            assert_close(given, truth, limit, f"{kind} {number}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(case: Case) -> None:
    module = getattr(liger, case.name)(**case.options)
    truth = values_and_gradients(lambda x: oracle(case, x), inputs_of(case, torch.float64))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        found = values_and_gradients(lambda x: call(module, case, x), inputs_of(case, dtype))
        assert_equal(found, truth, tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_liger(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both dtypes, of which Liger computes float64 in float32 but for the gradients of its chunked divergence."""
    theirs = peer(PATHS[case.name], monkeypatch)(**case.options, **({"compiled": False} if "JSDLoss" in case.name else {}))
    ours = getattr(liger, case.name)(**case.options)
    for dtype in (torch.float32, torch.float64):
        expected = values_and_gradients(lambda x: call(theirs, case, x), inputs_of(case, dtype))
        found = values_and_gradients(lambda x: call(ours, case, x), inputs_of(case, dtype))
        exact = dtype == torch.float64 and case.name == "LigerFusedLinearJSDLoss" and case.options.get("weight_hard_loss") == 0.0
        assert_equal(found, expected, 1e-9 if exact else 5e-5, 5e-6 if exact else None)


@pytest.mark.parametrize("name", PATHS)
def test_the_signatures_are_ligers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names and their order; and the defaults, but for `chunk_size`, which is planned here."""
    theirs, ours = peer(PATHS[name], monkeypatch), getattr(liger, name)
    for method in ("__init__", "forward"):
        expected, given = ({n: p.default for n, p in inspect.signature(getattr(c, method)).parameters.items()} for c in (theirs, ours))
        assert list(given) == list(expected)
        assert {n for n in given if given[n] != expected[n]} <= {"chunk_size"}


def test_a_check_of_gradients_can_fail() -> None:
    case = CASES[0]
    _, (gradient, *_) = values_and_gradients(lambda x: oracle(case, x), inputs_of(case, torch.float64))
    assert all(relative_error(wrong, gradient) > 5e-5 for wrong in wrong_gradients(gradient).values())


@pytest.mark.parametrize("name", ["LigerFusedLinearJSDLoss", "LigerFusedLinearJSD"])
def test_a_longer_teacher_is_refused_with_the_remedy(name: str) -> None:
    x = inputs_of(Case(name), torch.float32)
    longer = torch.cat([x.teacher_weight, x.teacher_weight[:3]])
    with pytest.raises(ValueError, match=r"teacher_weight has 40 rows and student_weight 37.*pass teacher_weight\[:37\]"):
        getattr(liger, name)()(x.hidden, x.weight, x.teacher, longer, x.labels)
    getattr(liger, name)()(x.hidden, x.weight, x.teacher, longer[:37], x.labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: liger.LigerFusedLinearJSDLoss(beta=1.5), "beta=1.5"),
        (lambda: liger.LigerFusedLinearJSDLoss(weight_soft_loss=0.0), "take fastkd.linear_cross_entropy"),
        (lambda: liger.LigerFusedLinearJSDLoss(weight_hard_loss=-1.0), "weight_hard_loss=-1.0"),
        (lambda: liger.LigerFusedLinearJSD(jsd_beta=-0.1), "beta=-0.1"),
        (lambda: liger.LigerFusedLinearKLDivLoss(reduction="none"), "reduction='none' has a value for every token and id"),
        (lambda: liger.LigerKLDIVLoss(reduction="none"), "reduction='none' has a value for every token and id"),
        (lambda: liger.LigerTVDLoss(reduction="none"), "reduction='none' has a value for every token and id"),
        (lambda: liger.LigerTVDLoss(reduction="average"), "use one of 'batchmean', 'mean', 'sum'"),
    ],
)
def test_options_that_fastkd_has_not_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_teacher_may_require_a_gradient_and_gets_none() -> None:
    for name in PATHS:
        case = Case(name, bias=name == "LigerFusedLinearJSDLoss", labels="none" if "KLDIV" in name else "some")
        x = inputs_of(case, torch.float32)
        teacher = [t.requires_grad_() for t in (x.teacher, x.teacher_weight, x.teacher_bias, x.target)]
        call(getattr(liger, name)(), case, x).backward()
        assert all(t.grad is None for t in teacher), name
        assert x.hidden.grad is not None


def test_a_probability_that_underflowed_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 200.0, 1.0], [0.3, -0.2, 0.1]], device=DEVICE, requires_grad=True)
    target = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], device=DEVICE)
    loss = liger.LigerTVDLoss()(logits.softmax(-1), target)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    truth = 0.5 * (exact.softmax(-1) - target.double()).abs().sum(-1).mean()
    truth.backward()
    assert_close(loss, truth, 1e-6)
    assert_close(logits.grad, exact.grad, 1e-5)
