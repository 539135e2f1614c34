"""Every argument of every public loss, given every kind of wrong value: it is refused by name, or it is one that means something."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import RelationTarget
from fastkd.ops.checks import LARGEST_TEMPERATURE, SMALLEST_TEMPERATURE

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH, ENTRIES = 5, 8, 4, 3, 2


@pytest.fixture(autouse=True)
def backend():
    """Arguments are refused before a row kernel is chosen: once is enough."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear_inputs() -> dict[str, Any]:
    return {
        "student_hidden": normal(TOKENS, WIDTH),
        "student_weight": normal(VOCABULARY, WIDTH),
        "teacher_hidden": normal(TOKENS, TEACHER_WIDTH),
        "teacher_weight": normal(VOCABULARY, TEACHER_WIDTH),
    }


def topk_inputs() -> dict[str, Any]:
    log_p, ids = normal(TOKENS, VOCABULARY).log_softmax(-1).topk(ENTRIES)
    student = {name: x for name, x in linear_inputs().items() if name.startswith("student")}
    return {**student, "topk_ids": ids, "topk_logprobs": log_p, "tail_logprob": torch.log1p(-log_p.exp().sum(-1))}


def logits_inputs() -> dict[str, Any]:
    return {"student_logits": normal(TOKENS, VOCABULARY), "teacher_logits": normal(TOKENS, VOCABULARY)}


def cross_entropy_inputs() -> dict[str, Any]:
    return {"hidden": normal(TOKENS, WIDTH), "weight": normal(VOCABULARY, WIDTH), "labels": torch.arange(TOKENS)}


def mse_inputs() -> dict[str, Any]:
    return {
        "student_states": normal(TOKENS, WIDTH),
        "student_weight": normal(6, WIDTH),
        "teacher_states": normal(TOKENS, TEACHER_WIDTH),
        "teacher_weight": normal(6, TEACHER_WIDTH),
    }


def relation_inputs() -> dict[str, Any]:
    sizes = {"student_q": WIDTH, "student_k": WIDTH, "teacher_q": TEACHER_WIDTH, "teacher_k": TEACHER_WIDTH}
    return {name: normal(2, 2, TOKENS, size) for name, size in sizes.items()}


OPS: dict[Callable[..., Any], Callable[[], dict[str, Any]]] = {
    fastkd.linear_kl_div: linear_inputs,
    fastkd.kl_div: logits_inputs,
    fastkd.topk_kl_div: topk_inputs,
    fastkd.linear_cross_entropy: cross_entropy_inputs,
    fastkd.projected_mse: mse_inputs,
    fastkd.relation_kl: relation_inputs,
}
MODULES = {
    fastkd.linear_kl_div: fastkd.LinearKLDivLoss,
    fastkd.projected_mse: fastkd.ProjectedMSELoss,
    fastkd.relation_kl: fastkd.RelationKLLoss,
}

VALUES: dict[str, Any] = {
    "None": None,
    "a list": [1.0],
    "a string": "2",
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "1": 1,
    "1.5": 1.5,
    "True": True,
    "integers": torch.ones(TOKENS, dtype=torch.int32),
    "floats": torch.ones(TOKENS + 7),
    "complex numbers": torch.ones(TOKENS, dtype=torch.complex64),
    "a 0-dim tensor": torch.tensor(1.5),
    "a nan tensor": torch.tensor(math.nan),
    "a zero tensor": torch.tensor(0.0),
    "an empty tensor": torch.ones(TOKENS, 0),
}


@dataclass(frozen=True)
class Kind:
    """What arguments of one kind may be, and which arguments those are."""

    names: str
    may_be: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.names.split()


KINDS = (
    Kind(
        "student_hidden student_weight teacher_hidden student_logits teacher_logits hidden weight labels student_states teacher_states"
    ),
    Kind("topk_ids topk_logprobs student_q student_k teacher_q teacher_k tail_logprob"),
    Kind("teacher_weight student_bias teacher_bias bias mask vocab_index vocab_slots key_mask query_mask group", "None"),
    Kind("divergence reduction backend tail student_support teacher_mass form"),
    Kind("temperature", "1, 1.5"),
    Kind("topk_temperature", "None, 1"),
    Kind("label_weight", "0, 1, 1.5"),
    Kind("student_logit_scale teacher_logit_scale logit_scale", "-1, 1, 1.5"),
    Kind("student_softcap teacher_softcap softcap grad_filter", "None, 1, 1.5"),
    Kind("denominator label_denominator", "None, 1, 1.5, a 0-dim tensor"),
    Kind("temperature_squared", "True"),
    Kind("ignore_index", "-1, 0, 1"),
    Kind("chunk_size memory_budget", "None, 1"),
    Kind("return_stats", "True"),
    Kind("token_weight", "None"),
    Kind("targets"),
)


def cases() -> list[Any]:
    """(op, argument, value, whether it means something), for every argument there is: one of no `Kind` is an error here."""
    found = []
    for op, inputs in OPS.items():
        for name in inspect.signature(op).parameters:
            (kind,) = (kind for kind in KINDS if name in kind)
            may_be = kind.may_be.split(", ")
            # None leaves an optional argument out, and so does None for both weights of a pair that is as wide without them.
            may_be += ["None"] if name == "labels" and name not in inputs() else []
            may_be += ["None"] if name == "student_weight" and op is fastkd.projected_mse else []
            for text, value in VALUES.items():
                found.append(pytest.param(op, name, value, text in may_be, id=f"{op.__name__}-{name}-{text}"))
    return found


def arguments(op: Callable[..., Any], name: str, value: Any) -> dict[str, Any]:
    given = {**OPS[op](), name: value}
    if name == "label_weight" and not (isinstance(value, int) and value == 0):
        given["labels"] = torch.arange(TOKENS)
    if value is None and name in ("student_weight", "teacher_weight") and op is fastkd.projected_mse:
        given |= {
            "student_states": normal(TOKENS, 6),
            "teacher_states": normal(TOKENS, 6),
            "student_weight": None,
            "teacher_weight": None,
        }
    if value is None and name == "teacher_weight" and op is fastkd.linear_kl_div:
        given["teacher_hidden"] = normal(TOKENS, VOCABULARY)
    return given


@pytest.mark.parametrize(("op", "name", "value", "means_something"), cases())
def test_an_argument_is_used_or_refused_by_name(op, name, value, means_something):
    given = arguments(op, name, value)
    if means_something:
        result = op(**given)
        assert (result[0] if isinstance(result, tuple) else result).isfinite()
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        op(**given)
    said = str(caught.value)
    assert re.search(rf"\b{name}\b", said) and said.endswith(".") and "__" not in said, said


@pytest.mark.parametrize("op", [fastkd.linear_kl_div, fastkd.kl_div, fastkd.topk_kl_div])
def test_what_other_libraries_take_is_refused_with_what_would_do(op):
    """transformers' attention masks are int64, and its labels may be narrower; TRL's ends of the JSD are other divergences."""
    inputs, labels = OPS[op](), torch.arange(TOKENS)
    attention_mask = torch.ones(TOKENS, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"mask has dtype torch.int64; .*mask\.bool\(\)"):
        op(**inputs, mask=attention_mask)
    with pytest.raises(TypeError, match=r"labels has dtype torch.int32; .*labels\.long\(\)"):
        op(**inputs, labels=labels.int(), label_weight=1.0)
    with pytest.raises(ValueError, match=r"labels is given with label_weight=0.* pass label_weight=1\.0, or leave it out"):
        op(**inputs, labels=labels)
    _, stats = op(**inputs, labels=labels, return_stats=True)  # where they are read
    assert stats.cross_entropy.isfinite().all()
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="pass divergence='forward_kl' or 'reverse_kl' if that is what you mean"):
            fastkd.Divergence.jsd(end)


@pytest.mark.parametrize("op", MODULES)
def test_a_module_refuses_what_its_function_does(op):
    inputs = OPS[op]()
    for name, value in (
        ("reduction", 3),
        ("chunk_size", True),
        ("mask" if "mask" in inspect.signature(op).parameters else "key_mask", [1]),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            MODULES[op](**{name: value})(**inputs)


TARGETS: dict[str, tuple[Any, str]] = {
    "None": (None, "targets is a NoneType"),
    "one target": (RelationTarget(normal(2, 2, TOKENS, 3), normal(2, 2, TOKENS, 3)), "targets is a RelationTarget"),
    "a tensor": (normal(2, 2, TOKENS, 3), "targets is a Tensor"),
    "a target of a list": ([RelationTarget([1.0], [1.0])], r"targets\[0\].q is a list"),  # type: ignore[arg-type]
    "a string's weight": ([RelationTarget(normal(2, 2, TOKENS, 3), normal(2, 2, TOKENS, 3), "2")], r"targets\[0\].weight='2'"),  # type: ignore[arg-type]
    "a true weight": ([RelationTarget(normal(2, 2, TOKENS, 3), normal(2, 2, TOKENS, 3), True)], r"targets\[0\].weight=True"),
}


@pytest.mark.parametrize(("targets", "text"), TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("has_teacher", [True, False])
def test_wrong_targets_are_refused_by_name(targets, text, has_teacher):
    inputs = relation_inputs()
    if not has_teacher:
        inputs |= {"teacher_q": None, "teacher_k": None}
    with pytest.raises((TypeError, ValueError), match=text):
        fastkd.relation_kl(**inputs, targets=targets)


EMPTY: dict[str, tuple[Callable[..., Any], dict[str, Tensor], str]] = {
    "vocabulary": (fastkd.linear_kl_div, {"student_weight": normal(0, WIDTH)}, "student_weight"),
    "teacher's vocabulary": (fastkd.linear_kl_div, {"teacher_weight": normal(0, TEACHER_WIDTH)}, "teacher_weight"),
    "hidden": (fastkd.linear_kl_div, {"student_hidden": normal(TOKENS, 0), "student_weight": normal(VOCABULARY, 0)}, "student_hidden"),
    "logits": (fastkd.kl_div, {"student_logits": normal(TOKENS, 0), "teacher_logits": normal(TOKENS, 0)}, "student_logits"),
    "labels' vocabulary": (fastkd.linear_cross_entropy, {"weight": normal(0, WIDTH), "labels": torch.full((TOKENS,), -100)}, "weight"),
    "labels' hidden": (fastkd.linear_cross_entropy, {"hidden": normal(TOKENS, 0), "weight": normal(VOCABULARY, 0)}, "hidden"),
    "entries": (
        fastkd.topk_kl_div,
        {
            "topk_ids": torch.zeros(TOKENS, 0, dtype=torch.int64),
            "topk_logprobs": normal(TOKENS, 0),
            "tail_logprob": torch.zeros(TOKENS),
        },
        "topk_ids",
    ),
    "states": (fastkd.projected_mse, {"student_states": normal(TOKENS, 0), "student_weight": normal(6, 0)}, "student_states"),
    "head size": (fastkd.relation_kl, {"student_q": normal(2, 2, TOKENS, 0), "student_k": normal(2, 2, TOKENS, 0)}, "student_q"),
}


@pytest.mark.parametrize(("op", "changed", "name"), EMPTY.values(), ids=EMPTY.keys())
def test_dims_of_nothing_are_refused_by_name(op, changed, name):
    with pytest.raises(ValueError, match=rf"^{name} has .*shape"):
        op(**{**OPS[op](), **changed})


TRANSFORMS = {
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (torch.ones_like(x),)),
    "nested jvp": lambda loss, x: torch.func.jvp(
        lambda y: torch.func.jvp(loss, (y,), (torch.ones_like(y),))[1], (x,), (torch.ones_like(x),)
    ),
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "vmap": lambda loss, x: torch.vmap(loss)(x[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("op", OPS)
def test_transforms_without_a_derivative_of_ours_are_refused(op, transform):
    name, *_ = inputs = OPS[op]()
    with pytest.raises(NotImplementedError, match=rf"{name} is inside a transform .*loss.backward.*fastkd.reference"):
        transform(lambda x: op(**{**inputs, name: x}), inputs[name])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_dual_tensors_are_refused_in_every_argument(op, requires_grad):
    inputs = OPS[op]()
    if "mask" in inspect.signature(op).parameters:
        inputs["mask"] = torch.ones(TOKENS)
    for name, x in inputs.items():
        if x.is_floating_point():
            x = x.clone().requires_grad_(requires_grad)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(NotImplementedError, match=f"^{name} is inside a transform"):
                    op(**{**inputs, name: dual})


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_ad_works_in_the_reference(op):
    name, *_ = inputs = OPS[op]()
    x, direction, step = inputs[name].double(), torch.ones_like(inputs[name]).double(), 1e-6

    def loss(x: Tensor) -> Tensor:
        doubled = {other: y.double() if y.is_floating_point() else y for other, y in inputs.items()}
        return getattr(fastkd.reference, op.__name__)(**{**doubled, name: x})

    _, tangent = torch.func.jvp(loss, (x,), (direction,))
    difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert tangent.isclose(difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_denominator_that_counts_nothing_is_refused(value, as_tensor, is_compiled):
    def loss(denominator):
        return fastkd.kl_div(**logits_inputs(), denominator=denominator)

    torch._dynamo.reset()
    loss = torch.compile(loss, backend="aot_eager") if is_compiled else loss
    with pytest.raises(Exception, match=r"denominator=.* must be a finite number > 0") as caught:
        loss(torch.tensor(value) if as_tensor else value)
    assert is_compiled or caught.type is ValueError


@pytest.mark.parametrize("op", [op for op in OPS if "temperature" in inspect.signature(op).parameters])
def test_temperature_has_limits(op):
    inputs = OPS[op]()
    for temperature in (SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE):
        assert op(**inputs, temperature=temperature).isfinite()
    for temperature in (math.nextafter(LARGEST_TEMPERATURE, math.inf), 1e3, 1e6, 1e-7, 1e-38):
        with pytest.raises(ValueError, match=r"temperature=.* must be from 1e-06 to 32"):
            op(**inputs, temperature=temperature)


@pytest.mark.parametrize("transform", [TRANSFORMS["grad"], TRANSFORMS["vmap"]], ids=["grad", "vmap"])
def test_compiled_transforms_are_refused_in_our_words(transform):
    name, *_ = inputs = logits_inputs()
    torch._dynamo.reset()
    with pytest.raises(Exception, match=rf"{name} is inside a transform"):
        torch.compile(lambda: transform(lambda x: fastkd.kl_div(**{**inputs, name: x}), inputs[name]), backend="eager")()


@pytest.mark.parametrize("number", [np.float32(1.5), np.float64(1.5), np.float16(1.5), Fraction(3, 2)], ids=repr)
@pytest.mark.parametrize("name", ["temperature", "student_softcap", "student_logit_scale", "denominator"])
def test_a_number_of_any_library_is_one(name, number):
    inputs = logits_inputs()
    assert torch.equal(fastkd.kl_div(**inputs, **{name: number}), fastkd.kl_div(**inputs, **{name: 1.5}))


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), np.uint8(2)], ids=repr)
def test_a_whole_number_of_any_library_is_one(number):
    inputs = logits_inputs()
    labels = torch.arange(TOKENS) % 3
    options = {"labels": labels, "label_weight": 1.0}
    expected = fastkd.kl_div(**inputs, **options, ignore_index=2, chunk_size=2, temperature=2)
    assert torch.equal(fastkd.kl_div(**inputs, **options, ignore_index=number, chunk_size=number, temperature=number), expected)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5)], ids=repr)
def test_a_mixing_weight_of_any_library_is_one(number):
    inputs = logits_inputs()
    values = [fastkd.kl_div(**inputs, divergence=fastkd.Divergence.jsd(mixing)) for mixing in (number, 0.5)]
    assert torch.equal(*values)


@pytest.mark.parametrize("op", OPS)
def test_a_backward_pass_over_many_upstream_gradients_at_once_is_refused(op):
    inputs = OPS[op]()
    name = next(iter(inputs))
    leaf = inputs[name].clone().requires_grad_()
    loss = op(**{**inputs, name: leaf})
    with pytest.raises(NotImplementedError, match=r"is_grads_batched=True.* fastkd\.reference"):
        torch.autograd.grad(loss, leaf, torch.ones(3), is_grads_batched=True)
