"""relation_kl against the float64 oracle: value and both gradients, over every option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import RelationTarget
from tests.oracle import assert_close, wrong_gradients

BATCH, HEADS, LENGTH, STUDENT_SIZE, TEACHER_SIZE = 3, 2, 11, 4, 6
NAMES = ["student_q", "student_k"]
PRECISIONS = [pytest.param(torch.float64, 1e-11, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]
FORMS, REDUCTIONS = ["kl", "cross_entropy"], ["mean", "sum", "none"]
# One entry of the batch is whole; two lack keys and rows, not the same ones.
KEY_MASK = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7], [1]])
OTHER_MASK = torch.arange(LENGTH) >= torch.tensor([[2], [0], [4]])
QUERY_MASK = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.4
MASKS = {
    "no mask": {},
    "key mask": {"key_mask": KEY_MASK},
    "query mask": {"query_mask": QUERY_MASK},
    "both masks": {"key_mask": KEY_MASK, "query_mask": QUERY_MASK},
}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_inputs(
    dtype: torch.dtype = torch.float64, batch: int = BATCH, heads: int = HEADS, length: int = LENGTH, size: int = STUDENT_SIZE
) -> dict[str, Tensor]:
    """Scores of order two: a few nats between the models."""
    leading = (batch, heads, length)
    inputs = {name: 1.5 * normal(*leading, size, seed=seed, dtype=dtype) for seed, name in enumerate(NAMES)}
    inputs |= {
        name: 1.5 * normal(*leading, TEACHER_SIZE, seed=seed, dtype=dtype) for seed, name in enumerate(("teacher_q", "teacher_k"), 2)
    }
    for name in NAMES:
        inputs[name].requires_grad_()
    return inputs


def make_targets(dtype: torch.dtype = torch.float64) -> list[RelationTarget]:
    """The two consistency targets of CR-ILD, of the student's head size, with masks of their own, and one of another size with few."""
    shape = (BATCH, HEADS, LENGTH, STUDENT_SIZE)
    clean_q, clean_k, size_one = (
        normal(*shape, seed=7, dtype=dtype),
        normal(*shape, seed=8, dtype=dtype),
        normal(*shape[:3], 1, seed=9, dtype=dtype),
    )
    return [
        RelationTarget(clean_q, clean_k, 0.7, OTHER_MASK, QUERY_MASK.flip(0)),
        RelationTarget(clean_q.flip(0), clean_k.flip(0), torch.tensor(0.3), OTHER_MASK.flip(0), OTHER_MASK.flip(0)),
        RelationTarget(size_one, size_one, 2, query_mask=KEY_MASK),
    ]


def raised(value):
    """Options with their tensors, and those of their targets, in float64."""
    if isinstance(value, RelationTarget):
        return replace(value, q=value.q.double(), k=value.k.double())
    return [raised(x) for x in value] if isinstance(value, list) else value


def value_and_gradients(function, inputs: dict[str, Tensor], upstream: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    value = function(**inputs, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), list(torch.autograd.grad(value, [inputs[n] for n in NAMES], upstream))


def check(
    options: dict, dtype: torch.dtype, tolerance: float, inputs: dict[str, Tensor] | None = None, upstream: Tensor | None = None
) -> None:
    inputs = inputs or make_inputs(dtype)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    value, gradients = value_and_gradients(fastkd.relation_kl, inputs, upstream, **options)
    truth, true_gradients = value_and_gradients(
        fastkd.reference.relation_kl, exact, upstream, **{name: raised(option) for name, option in options.items()}
    )
    assert value.shape == truth.shape
    assert_close(value, truth, tolerance)
    for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
        assert gradient.dtype == inputs[name].dtype
        assert_close(gradient, true_gradient, tolerance, name)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_mask_form_and_reduction_with_an_upstream_gradient(reduction, masks, form, dtype, tolerance):
    upstream = normal(BATCH, HEADS, LENGTH, seed=3) if reduction == "none" else torch.tensor(-1.7)
    check({"form": form, "reduction": reduction, **masks}, dtype, tolerance, upstream=upstream)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_targets_in_one_pass(reduction, masks, form, dtype, tolerance):
    upstream = normal(BATCH, HEADS, LENGTH, seed=3) if reduction == "none" else torch.tensor(0.3)
    options = {"targets": make_targets(dtype), "form": form, "reduction": reduction, "chunk_size": 4, **masks}
    check(options, dtype, tolerance, upstream=upstream)


def test_the_oracle_is_the_definition():
    """Row by row in the formula's own words, for one head with masked keys."""
    inputs = make_inputs()
    q, k, teacher_q, teacher_k = (x.detach()[1, 0] for x in inputs.values())
    kept = KEY_MASK[1]
    p = torch.softmax(teacher_q @ teacher_k[kept].T / TEACHER_SIZE**0.5, -1)
    own = torch.softmax(q @ k[kept].T / STUDENT_SIZE**0.5, -1)
    rows = fastkd.reference.relation_kl(**inputs, key_mask=KEY_MASK, reduction="none")[1, 0]
    assert_close(rows, (p * (p / own).log()).sum(-1), 1e-12)
    rows = fastkd.reference.relation_kl(**inputs, key_mask=KEY_MASK, reduction="none", form="cross_entropy")[1, 0]
    assert_close(rows, -(p * own.log()).sum(-1), 1e-12)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [fastkd.relation_kl, fastkd.reference.relation_kl], ids=["op", "reference"])
def test_what_masks_leave_out_may_hold_anything(function, reduction, form, garbage):
    """Keys and rows that no target keeps, in both models, and each target's own; one batch entry has no key."""
    key_mask, other_mask = KEY_MASK.clone(), OTHER_MASK.clone()
    key_mask[1] = other_mask[1] = False
    inputs, (target, *_) = make_inputs(torch.float32), make_targets(torch.float32)
    target = replace(target, key_mask=other_mask)
    options = {"key_mask": key_mask, "query_mask": QUERY_MASK, "form": form, "reduction": reduction}
    upstream = normal(BATCH, HEADS, LENGTH, seed=3) if reduction == "none" else None
    truth, true_gradients = value_and_gradients(function, inputs, upstream, targets=[target], **options)

    def spoil(x: Tensor, kept: Tensor) -> Tensor:
        return x.detach().masked_fill(~kept[:, None, :, None], garbage).requires_grad_(x.requires_grad)

    has_key, other_has_key = key_mask.any(-1, keepdim=True), other_mask.any(-1, keepdim=True)
    rows, other_rows = QUERY_MASK & has_key, QUERY_MASK & other_has_key & target.query_mask
    spoilt = {
        "student_q": spoil(inputs["student_q"], rows | other_rows),
        "student_k": spoil(inputs["student_k"], key_mask | other_mask),
        "teacher_q": spoil(inputs["teacher_q"], rows),
        "teacher_k": spoil(inputs["teacher_k"], key_mask),
    }
    target = replace(target, q=spoil(target.q, other_rows), k=spoil(target.k, other_mask))
    value, gradients = value_and_gradients(function, spoilt, upstream, targets=[target], **options)
    assert truth.isfinite().all() and torch.equal(value, truth)
    for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
        assert torch.equal(gradient, true_gradient)
        left_out = ~((rows | other_rows) if name == "student_q" else (key_mask | other_mask))
        assert (gradient[left_out[:, None].expand(-1, HEADS, -1)] == 0).all()


def test_the_mean_is_over_heads_and_unmasked_rows():
    inputs = make_inputs()
    rows = fastkd.relation_kl(**inputs, **MASKS["both masks"], reduction="none")
    assert rows.shape == (BATCH, HEADS, LENGTH)
    assert (rows[~QUERY_MASK[:, None].expand_as(rows)] == 0).all()
    mean = fastkd.relation_kl(**inputs, **MASKS["both masks"])
    assert_close(mean, rows.sum() / (HEADS * QUERY_MASK.sum()), 1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_targets_query_mask_is_its_own_and_does_not_change_what_the_mean_is_over(reduction):
    """The rows are those of a target without it, zero where it masks; the call's query_mask has them divided."""
    inputs = make_inputs()
    teacher, own = (inputs["teacher_q"], inputs["teacher_k"]), OTHER_MASK.flip(0)
    student = [inputs[name] for name in NAMES]
    rows = fastkd.relation_kl(**inputs, **MASKS["both masks"], reduction="none").where(own[:, None], 0.0)
    loss = fastkd.relation_kl(
        *student, None, None, targets=[RelationTarget(*teacher, 1.0, KEY_MASK, own)], query_mask=QUERY_MASK, reduction=reduction
    )
    count = HEADS * QUERY_MASK.sum()
    assert_close(loss, {"mean": rows.sum() / count, "sum": rows.sum(), "none": rows}[reduction], 1e-12)


def test_cross_entropy_is_kl_plus_the_teachers_entropy_with_the_same_gradient():
    inputs = make_inputs()
    kl, gradients = value_and_gradients(fastkd.relation_kl, inputs)
    cross_entropy, others = value_and_gradients(fastkd.relation_kl, inputs, form="cross_entropy")
    p = torch.softmax(inputs["teacher_q"] @ inputs["teacher_k"].mT / TEACHER_SIZE**0.5, -1)
    assert_close(cross_entropy - kl, -(p * p.log()).sum(-1).mean(), 1e-11)
    for gradient, other in zip(gradients, others, strict=True):
        assert_close(gradient, other, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_one_tensor_as_queries_and_keys_has_a_two_sided_gradient(masks, dtype, tolerance):
    inputs = make_inputs(dtype)
    x, teacher = inputs["student_q"], inputs["teacher_k"]
    value = fastkd.relation_kl(x, x, teacher, teacher, chunk_size=4, **masks)
    exact = x.detach().double().requires_grad_()
    truth = fastkd.reference.relation_kl(exact, exact, teacher.double(), teacher.double(), **masks)
    assert_close(value, truth, tolerance)
    gradient = torch.autograd.grad(value, x)[0]
    assert_close(gradient, torch.autograd.grad(truth, exact)[0], tolerance)
    if not masks:
        own, p = (torch.softmax(z.double() @ z.double().mT / z.shape[-1] ** 0.5, -1) for z in (x.detach(), teacher))
        g = (own - p) / (BATCH * HEADS * LENGTH)
        assert_close(gradient, (g + g.mT) @ exact.detach() / STUDENT_SIZE**0.5, tolerance)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_head_sizes(size):
    check({"key_mask": KEY_MASK}, torch.float64, 1e-11, make_inputs(size=size))


def test_targets_add_up_and_may_stand_alone():
    inputs, targets = make_inputs(), make_targets()
    together, gradients = value_and_gradients(fastkd.relation_kl, inputs, key_mask=KEY_MASK, targets=targets)

    def student_only(student_q, student_k, **options):
        return fastkd.relation_kl(student_q, student_k, None, None, **options)

    student = {name: inputs[name] for name in NAMES}
    terms = [value_and_gradients(fastkd.relation_kl, inputs, key_mask=KEY_MASK)]
    terms += [value_and_gradients(student_only, student, targets=[target]) for target in targets]
    assert_close(together, sum(value for value, _ in terms), 1e-12)
    for index, gradient in enumerate(gradients):
        assert_close(gradient, sum(term[index] for _, term in terms), 1e-12)


def test_a_weight_of_zero_changes_nothing():
    inputs = make_inputs()
    value, gradients = value_and_gradients(fastkd.relation_kl, inputs)
    for zero in (0, 0.0, torch.tensor(0.0)):
        targets = [RelationTarget(inputs["teacher_k"], inputs["teacher_q"], zero, KEY_MASK)]
        other, others = value_and_gradients(fastkd.relation_kl, inputs, targets=targets)
        assert_close(other, value, 1e-14)
        for gradient, same in zip(gradients, others, strict=True):
            assert_close(same, gradient, 1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "plan", [{"chunk_size": n} for n in (1, 3, 10, 11, 12, 22, 30, 1000)] + [{"memory_budget": n} for n in (1, 2000, 9000)], ids=str
)
def test_the_chunk_changes_nothing(plan, reduction):
    check({**plan, "reduction": reduction, "key_mask": KEY_MASK}, torch.float64, 1e-11)
    check({**plan, "reduction": reduction, "targets": make_targets()}, torch.float64, 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_keep_float32_scores(dtype):
    """At a KL of about 1e-4 nats scores rounded to 16 bits would put the gradient off by far more than the tolerance.

    A sum, because the gradient of their mean would lie among float16's subnormal numbers.
    """
    q, k = (normal(2, 3, 50, 32, seed=seed).to(dtype) for seed in (0, 1))
    near = (q.double() + 0.02 * normal(2, 3, 50, 32, seed=2)).to(dtype).requires_grad_()
    own_k = k.clone().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (near, own_k)]
    loss = fastkd.relation_kl(near, own_k, q, k, chunk_size=17, reduction="sum")
    truth = fastkd.reference.relation_kl(*exact, q.double(), k.double(), reduction="sum")
    assert loss.dtype == torch.float32
    assert 1e-5 < truth / 300 < 1e-3
    assert_close(loss, truth, 1e-2)
    for gradient, true_gradient in zip(torch.autograd.grad(loss, [near, own_k]), torch.autograd.grad(truth, exact), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, true_gradient, 5e-3)


def test_dtypes_may_differ_and_autocast_changes_nothing():
    inputs = make_inputs(torch.float32)
    inputs["student_k"] = inputs["student_k"].detach().bfloat16().requires_grad_()
    inputs["teacher_q"] = inputs["teacher_q"].half()
    value, gradients = value_and_gradients(fastkd.relation_kl, inputs)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    truth, true_gradients = value_and_gradients(fastkd.reference.relation_kl, exact)
    assert_close(value, truth, 2e-5)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]
    assert_close(gradients[0], true_gradients[0], 2e-5)
    assert_close(gradients[1], true_gradients[1], 5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, others = value_and_gradients(fastkd.relation_kl, inputs)
    assert torch.equal(again, value) and all(map(torch.equal, others, gradients))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
def test_rows_without_a_key_add_zero_and_get_zero(several, form, reduction):
    mask = KEY_MASK.clone()
    mask[1] = False
    options = {"key_mask": mask, "form": form, "reduction": reduction, "targets": []}
    if several:
        options["targets"] = [
            replace(t, q=t.q.flip(1), k=t.k.flip(1), key_mask=mask.roll(i + 1, 0)) for i, t in enumerate(make_targets())
        ]
    check(options, torch.float64, 1e-11)
    if not several:
        value, gradients = value_and_gradients(fastkd.relation_kl, make_inputs(), **options)
        assert reduction != "none" or (value[1] == 0).all()
        assert all((gradient[1] == 0).all() and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masks", [{"query_mask": ~torch.ones_like(KEY_MASK)}, {"key_mask": ~torch.ones_like(KEY_MASK)}], ids=list)
def test_all_masked_gives_exact_zeros_with_the_graph(masks, reduction):
    value, gradients = value_and_gradients(fastkd.relation_kl, make_inputs(), reduction=reduction, **masks)
    assert (value == 0).all() and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"heads": 0}, {"length": 0}], ids=str)
def test_nothing_at_all_gives_exact_zeros_with_the_graph(shape, reduction):
    inputs = make_inputs(**shape)
    value, gradients = value_and_gradients(fastkd.relation_kl, inputs, reduction=reduction)
    assert value.sum() == 0
    assert [g.shape for g in gradients] == [inputs[n].shape for n in NAMES]


def test_what_a_masked_key_holds_changes_nothing():
    inputs = make_inputs()
    value, gradients = value_and_gradients(fastkd.relation_kl, inputs, key_mask=KEY_MASK)
    masked = ~KEY_MASK[:, None, :, None]
    other = {name: x.detach().masked_fill(masked, 1e3) if name.endswith("_k") else x for name, x in inputs.items()}
    other["student_k"].requires_grad_()
    again, others = value_and_gradients(fastkd.relation_kl, other, key_mask=KEY_MASK)
    assert_close(again, value, 1e-13)
    for gradient, same in zip(gradients, others, strict=True):
        assert_close(same, gradient, 1e-12)
    assert (gradients[1].masked_select(masked) == 0).all()


def test_views_as_attention_makes_them():
    inputs = make_inputs()
    inputs = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad) for name, x in inputs.items()
    }
    assert not inputs["student_q"].is_contiguous()
    check({"key_mask": KEY_MASK}, torch.float64, 1e-11, inputs)


def test_identical_relations_give_zero():
    q, k = (normal(2, 2, 9, 4, seed=seed, dtype=torch.float32).requires_grad_() for seed in (0, 1))
    loss = fastkd.relation_kl(q, k, q.detach(), k.detach())
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-7 for gradient in torch.autograd.grad(loss, [q, k]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    q, k, *teacher, clean = (normal(2, 1, 3, size, seed=size) for size in (2, 3, 4, 5, 6))
    q, k = q.requires_grad_(), k[..., :2].clone().requires_grad_()
    teacher = [x[..., :4] for x in teacher]
    mask = torch.tensor([[True, True, False], [False, True, True]])

    def loss(student_q, student_k):
        targets = [RelationTarget(clean, clean, 0.3, ~mask, mask.flip(1)), RelationTarget(clean.flip(0), clean, 0.7)]
        masks = {"key_mask": mask, "query_mask": mask.flip(0)}
        return fastkd.relation_kl(student_q, student_k, *teacher, **masks, targets=targets, reduction=reduction, chunk_size=2)

    assert torch.autograd.gradcheck(loss, [q, k])
    assert torch.autograd.gradcheck(lambda x: loss(x, x), [q])


@pytest.mark.parametrize("name", NAMES)
def test_the_check_refuses_wrong_gradients(name):
    truth = value_and_gradients(fastkd.reference.relation_kl, make_inputs())[1][NAMES.index(name)]
    for what, wrong in wrong_gradients(truth).items():
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_close(wrong, truth, 2e-5, what)


def test_module_form():
    inputs = make_inputs()
    loss = fastkd.RelationKLLoss(form="cross_entropy", reduction="sum")
    assert torch.equal(
        loss(**inputs, key_mask=KEY_MASK), fastkd.relation_kl(**inputs, form="cross_entropy", reduction="sum", key_mask=KEY_MASK)
    )
    assert "form=cross_entropy" in repr(loss)
