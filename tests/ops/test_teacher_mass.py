"""A teacher with tokens that the student has not: its mass renormalised, kept whole, or summed into slots, against the definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import Divergence, reference
from fastkd.vocab.map import VocabMap
from tests.oracle import assert_close, relative_error, wrong_gradients
from tests.row_kernels import DIVERGENCES

TOKENS, TEACHER, STUDENT = 40, 301, 77
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-3}


def make(dtype: torch.dtype = torch.float64, tokens: int = TOKENS, teacher: int = TEACHER, student: int = STUDENT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "student_hidden": normal(tokens, 12),
        "student_weight": normal(student, 12, scale=0.6),
        "teacher_hidden": normal(tokens, 16),
        "teacher_weight": normal(teacher, 16, scale=0.6),
    }


def index_of(teacher: int = TEACHER, student: int = STUDENT) -> Tensor:
    return torch.randperm(teacher, generator=torch.Generator().manual_seed(1))[:student]


def slots_of(teacher: int = TEACHER, student: int = STUDENT) -> Tensor:
    """Every slot has a token, the first a fifth of all, and some tokens have none."""
    generator = torch.Generator().manual_seed(2)
    slots = torch.randint(-1, student, (teacher,), generator=generator)
    slots[torch.rand(teacher, generator=generator) < 0.2] = 0
    slots[index_of(teacher, student)] = torch.arange(student)
    return slots


def options_of(mass: str) -> dict[str, Any]:
    return {"teacher_mass": mass, "vocab_slots": slots_of()} if mass == "slots" else {"teacher_mass": mass, "vocab_index": index_of()}


def with_gradients(function, inputs: dict[str, Tensor], bias: Tensor | None = None, **options) -> list[Tensor]:
    leaves = [inputs["student_hidden"].clone().requires_grad_(), inputs["student_weight"].clone().requires_grad_()]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
        options["student_bias"] = leaves[-1]
    loss = function(*leaves[:2], inputs["teacher_hidden"], inputs["teacher_weight"], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(inputs: dict[str, Tensor], tolerance: float | None = None, **options) -> None:
    """The loss and every gradient equal autograd's of the definition in float64, from the very same numbers."""
    made = with_gradients(fastkd.linear_kl_div, inputs, **options)
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}
    truth = with_gradients(reference.linear_kl_div, {name: x.double() for name, x in inputs.items()}, **wide)
    for value, exact in zip(made, truth, strict=True):
        assert_close(value, exact, tolerance or TOLERANCE[inputs["student_hidden"].dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mass", ["full", "slots"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_definition(divergence, mass, dtype):
    check(make(dtype), divergence=divergence, **options_of(mass))


@pytest.mark.parametrize("mass", ["full", "slots"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_definition_with_every_option(divergence, mass):
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand(TOKENS, generator=generator) < 0.7
    labels = torch.randint(STUDENT, (TOKENS,), generator=generator)
    check(
        make(),
        divergence=divergence,
        temperature=2.0,
        mask=mask,
        labels=labels,
        label_weight=0.3,
        bias=torch.randn(STUDENT, generator=generator, dtype=torch.float64),
        teacher_bias=torch.randn(TEACHER, generator=generator, dtype=torch.float64),
        student_softcap=20.0,
        teacher_softcap=30.0,
        teacher_logit_scale=0.7,
        chunk_size=7,
        **options_of(mass),
    )


@pytest.mark.parametrize("mass", ["full", "slots"])
def test_equals_the_definition_where_the_dropped_rows_take_several_tiles(mass):
    inputs = make(torch.float32, tokens=30, teacher=12000, student=3000)
    extra = {"vocab_slots": slots_of(12000, 3000)} if mass == "slots" else {"vocab_index": index_of(12000, 3000)}
    made = with_gradients(fastkd.linear_kl_div, inputs, teacher_mass=mass, chunk_size=8, **extra)
    if mass == "full":
        logits = inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().T
        log_p = logits.log_softmax(-1)[:, index_of(12000, 3000)]
        log_q = (inputs["student_hidden"].double() @ inputs["student_weight"].double().T).log_softmax(-1)
        assert_close(made[0], (log_p.exp() * (log_p - log_q)).sum(-1).mean(), 2e-5)
    else:
        check(inputs, teacher_mass=mass, chunk_size=8, **extra)


@pytest.mark.parametrize("mass", ["full", "slots"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_that_exist_give_the_same(mass, dtype):
    inputs = make()
    student = (inputs["student_hidden"] @ inputs["student_weight"].T).to(dtype)
    teacher = (inputs["teacher_hidden"] @ inputs["teacher_weight"].T).to(dtype)
    mask = torch.arange(TOKENS) % 3 > 0
    for divergence in DIVERGENCES:
        for extra in ({}, {"mask": mask, "temperature": 3.0, "teacher_softcap": 9.0}):
            leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
            options = {**options_of(mass), "divergence": divergence, **extra}
            made, truth = fastkd.kl_div(leaf, teacher, **options), reference.kl_div(exact, teacher.double(), **options)
            assert_close(made, truth, TOLERANCE[dtype])
            assert_close(*torch.autograd.grad(made, leaf), *torch.autograd.grad(truth, exact), TOLERANCE[dtype])


@pytest.mark.parametrize("mass", ["full", "slots"])
def test_without_an_index_the_rows_past_the_students_are_dropped(mass):
    inputs = make()
    expected = with_gradients(reference.linear_kl_div, inputs, vocab_index=torch.arange(STUDENT), teacher_mass="full")
    slots = torch.full((TEACHER,), -1)
    slots[:STUDENT] = torch.arange(STUDENT)
    extra = {"vocab_slots": slots} if mass == "slots" else {}
    for value, exact in zip(with_gradients(fastkd.linear_kl_div, inputs, teacher_mass=mass, **extra), expected, strict=True):
        assert_close(value, exact, 1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_where_nothing_is_dropped_all_three_agree(divergence):
    inputs = make(teacher=STUDENT)
    order = index_of(STUDENT, STUDENT)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(STUDENT)
    expected = with_gradients(fastkd.linear_kl_div, inputs, vocab_index=order, divergence=divergence)
    full = with_gradients(fastkd.linear_kl_div, inputs, vocab_index=order, divergence=divergence, teacher_mass="full")
    summed = with_gradients(fastkd.linear_kl_div, inputs, vocab_slots=slots, divergence=divergence, teacher_mass="slots")
    for made in (full, summed):
        for value, exact in zip(made, expected, strict=True):
            assert_close(value, exact, 1e-10)


def test_full_is_what_trainers_of_drafts_compute():
    """Their target: the softmax over all rows, of which the draft's are taken; cross-entropy with it, which differs by a constant."""
    inputs = make()
    index = index_of()
    target = (inputs["teacher_hidden"] @ inputs["teacher_weight"].T).softmax(-1)[:, index]

    def theirs(hidden: Tensor, weight: Tensor, *_teacher: Tensor) -> Tensor:
        return -(target * (hidden @ weight.T).log_softmax(-1)).sum(-1).mean() + (target * target.log()).sum(-1).mean()

    made = with_gradients(fastkd.linear_kl_div, inputs, vocab_index=index, teacher_mass="full")
    for value, exact in zip(made, with_gradients(theirs, inputs), strict=True):
        assert_close(value, exact, 1e-9)


def test_the_check_tells_the_masses_and_wrong_gradients_apart():
    inputs = make()
    made = {mass: with_gradients(reference.linear_kl_div, inputs, **options_of(mass)) for mass in ("renormalize", "full", "slots")}
    for mass, others in (("full", ("renormalize", "slots")), ("slots", ("renormalize", "full"))):
        for other in others:
            assert all(relative_error(made[other][i], made[mass][i]) > 0.01 for i in range(3))
        for wrong in wrong_gradients(made[mass][1]).values():
            assert relative_error(wrong, made[mass][1]) > 1e-3


@pytest.mark.parametrize("mass", ["full", "slots"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(0.3)"])
def test_gradcheck(mass, divergence):
    inputs = make(tokens=3)
    leaves = inputs["student_hidden"].requires_grad_(), inputs["student_weight"].requires_grad_()
    rest = inputs["teacher_hidden"], inputs["teacher_weight"]
    options = {**options_of(mass), "divergence": divergence, "temperature": 2.0}
    assert torch.autograd.gradcheck(lambda *leaves: fastkd.linear_kl_div(*leaves, *rest, **options), leaves)


@pytest.mark.parametrize("mass", ["full", "slots"])
def test_statistics_and_values_of_tokens(mass):
    inputs = make()
    arguments = list(inputs.values())
    mask = torch.arange(TOKENS) % 4 > 0
    for divergence in DIVERGENCES:
        options = {**options_of(mass), "divergence": divergence, "mask": mask, "reduction": "none", "return_stats": True}
        made, statistics = fastkd.linear_kl_div(*arguments, **options)
        truth, expected = reference.linear_kl_div(*arguments, **options)
        assert_close(made, truth, 1e-9)
        for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "acceptance"):
            assert_close(getattr(statistics, name), getattr(expected, name), 1e-9, name)


def test_a_teacher_whose_mass_is_nearly_all_dropped_keeps_its_gradient():
    """One token of 1e-9 of the mass: a mass taken as one minus the rest would be lost in float32."""
    teacher = torch.tensor([[0.0, 1.0, 25.0]])
    student = torch.tensor([[0.3, -0.4]], requires_grad=True)
    loss = fastkd.kl_div(student, teacher, teacher_mass="full")
    exact = student.detach().double().requires_grad_()
    truth = reference.kl_div(exact, teacher.double(), teacher_mass="full")
    assert_close(loss, truth, 1e-5)
    assert_close(*torch.autograd.grad(loss, student), *torch.autograd.grad(truth, exact), 1e-5)


@pytest.mark.parametrize("mass", ["full", "slots"])
def test_compiles_as_one_graph(mass):
    torch._dynamo.reset()
    inputs, options = make(torch.float32), options_of(mass)
    plain = with_gradients(fastkd.linear_kl_div, inputs, **options)
    compiled = torch.compile(fastkd.linear_kl_div, fullgraph=True, backend="aot_eager")
    for value, exact in zip(with_gradients(compiled, inputs, **options), plain, strict=True):
        assert_close(value, exact, 1e-6)


def test_slots_are_a_vocabulary_maps():
    counts = torch.arange(TEACHER, 0, -1)
    vocabulary = VocabMap.from_counts(counts, STUDENT, multiple_of=1).assign_stand_ins(torch.randn(TEACHER, 4))
    inputs = make(student=vocabulary.kept_ids.numel())
    p = (inputs["teacher_hidden"] @ inputs["teacher_weight"].T).softmax(-1)
    of_slots = torch.zeros(TOKENS, STUDENT, dtype=p.dtype).index_add_(1, vocabulary.id_to_slot, p)
    q = (inputs["student_hidden"] @ inputs["student_weight"].T).log_softmax(-1)
    made = fastkd.linear_kl_div(*inputs.values(), teacher_mass="slots", vocab_slots=vocabulary.id_to_slot)
    assert_close(made, (of_slots * (of_slots.log() - q)).sum(-1).mean(), 1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher_mass": "all"}, "teacher_mass='all' is not known; use one of 'renormalize', 'full', 'slots'"),
        ({"teacher_mass": "slots"}, "teacher_mass='slots' needs vocab_slots"),
        ({"teacher_mass": "slots", "vocab_slots": slots_of(), "vocab_index": index_of()}, "and no vocab_index"),
        ({"teacher_mass": "full", "vocab_slots": slots_of()}, "only 'slots' reads it"),
        ({"vocab_slots": slots_of()}, "vocab_slots was given with teacher_mass='renormalize'"),
        ({"teacher_mass": "slots", "vocab_slots": slots_of()[:-1]}, r"vocab_slots has dtype torch.int64 and shape \(300,\)"),
        ({"teacher_mass": "slots", "vocab_slots": slots_of().int()}, "vocab_slots has dtype torch.int32"),
        ({"teacher_mass": "slots", "vocab_slots": slots_of().clamp_min(0) + 1}, "vocab_slots holds 77 at place"),
        ({"teacher_mass": "slots", "vocab_slots": slots_of() - 1}, "vocab_slots holds -2 at place"),
        ({"teacher_mass": "slots", "vocab_slots": slots_of().clamp_min(1)}, "gives no token to row 0 of the student"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(ValueError, match=says):
        fastkd.linear_kl_div(*make().values(), **options)


def test_full_is_refused_where_the_dropped_logits_are_not_there():
    logits = torch.randn(3, STUDENT)
    with pytest.raises(ValueError, match="needs the logits of the tokens that were dropped"):
        fastkd.kl_div(logits, logits, teacher_mass="full")
    with pytest.raises(ValueError, match="needs the logits of the tokens that were dropped"):
        fastkd.linear_kl_div(torch.randn(3, 5), torch.randn(STUDENT, 5), logits, None, teacher_mass="full")


def test_divergences_know_what_is_dropped_by_hand():
    """Half of the teacher's mass is dropped, and the student has one token."""
    student, teacher = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    values = {
        "forward_kl": 0.5 * math.log(0.5),
        "reverse_kl": math.log(2.0),
        "tvd": 0.5,
        "jsd(0.5)": 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0)) + 0.5 * math.log(1 / 0.75),
        "skew_kl(0.1)": 0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(10.0),
        "skew_rkl(0.1)": math.log(1 / 0.55),
    }
    for name, value in values.items():
        made = fastkd.kl_div(student, teacher, divergence=Divergence.parse(name), teacher_mass="full")
        assert_close(made, torch.tensor(value), 1e-7, name)
