"""The oracles are right by themselves: equal to the closed formulas, in every dtype, on every device, and finite where the loss is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import Divergence, RelationTarget, reference
from tests.oracle import assert_close

TOKENS, VOCABULARY, WIDTH, ENTRIES = 5, 7, 4, 3
DIVERGENCES = ["forward_kl", "reverse_kl", "tvd", "jsd(0.3)", "skew_kl(0.1)", "skew_rkl(0.2)"]
MASK = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
LABELS = torch.tensor([3, -100, 1, 0, 6])
IDS = torch.tensor([[0, 3, 6], [1, 2, -1], [5, 4, 3], [-1, -1, 2], [6, 0, 1]])
KEYS = torch.tensor([[True, True, False, True], [False, False, False, False]])
QUERIES = torch.tensor([[True, False, True, True], [True, True, True, True]])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_case(op: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `op` learns, and all else that it can be given, in float64."""
    hidden, weight, bias = normal(TOKENS, WIDTH, seed=1), normal(VOCABULARY, WIDTH, seed=2), normal(VOCABULARY, seed=3)
    student, teacher = normal(TOKENS, VOCABULARY, seed=4), normal(TOKENS, VOCABULARY + 2, seed=5)
    head = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias}
    labels = {"labels": LABELS, "label_weight": 0.5}
    logits = {"student_softcap": 5.0, "student_logit_scale": 1.5}
    if op == "kl_div":
        index = torch.tensor([8, 0, 1, 5, 3, 2, 7])
        return {"student_logits": student}, {"teacher_logits": teacher, "vocab_index": index, "mask": MASK, **labels, **logits}
    if op == "linear_kl_div":
        theirs = {"teacher_hidden": normal(TOKENS, 3, seed=6), "teacher_weight": normal(VOCABULARY, 3, seed=7)}
        return head, {**theirs, "teacher_bias": normal(VOCABULARY, seed=8), "mask": MASK, **labels, **logits}
    if op == "linear_cross_entropy":
        return {"hidden": hidden, "weight": weight, "bias": bias}, {"labels": LABELS, "softcap": 5.0, "logit_scale": 1.5}
    if op == "topk_kl_div":
        log_p = teacher[:, :VOCABULARY].log_softmax(-1)
        listed = torch.zeros(TOKENS, VOCABULARY + 1, dtype=torch.bool).scatter(1, IDS % (VOCABULARY + 1), True)[:, :VOCABULARY]
        tail = log_p.masked_fill(listed, -math.inf).logsumexp(-1)
        known = {"topk_ids": IDS, "topk_logprobs": log_p.gather(1, IDS.clamp_min(0)), "tail_logprob": tail}
        return head, {**known, "mask": MASK, **labels, **logits}
    if op == "projected_mse":
        ours = {"student_states": hidden, "student_weight": normal(3, WIDTH, seed=9), "student_bias": normal(3, seed=10)}
        return ours, {"teacher_states": normal(TOKENS, 3, seed=11), "teacher_weight": None, "mask": MASK}
    q, k, their_q, their_k, other = (normal(2, 2, 4, 3, seed=seed) for seed in range(12, 17))
    target = RelationTarget(other, other, 0.5, key_mask=QUERIES, query_mask=KEYS | QUERIES)
    given = {"teacher_q": their_q, "teacher_k": their_k, "key_mask": KEYS, "query_mask": QUERIES, "targets": [target]}
    return {"student_q": q, "student_k": k}, given


OPS = reference.__all__


def required(op: str, *sides: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a case the op does not do without."""
    names = {name for name, p in inspect.signature(getattr(reference, op)).parameters.items() if p.default is p.empty} | {
        "tail_logprob"
    }
    return [{name: x for name, x in side.items() if name in names} for side in sides]


def moved(x: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """`to` of all tensors in an argument."""
    if isinstance(x, RelationTarget):
        return RelationTarget(**{name: moved(value, to) for name, value in vars(x).items()})
    return [moved(y, to) for y in x] if isinstance(x, list) else to(x) if isinstance(x, Tensor) else x


def call(op: str, learned: Mapping[str, Tensor], given: Mapping[str, Any], **options: Any) -> Any:
    return getattr(reference, op)(**learned, **given, **options)


# The closed formulas, one number at a time.


def softmax(logits: list[float]) -> list[float]:
    sizes = [math.exp(z - max(logits)) for z in logits]
    return [size / sum(sizes) for size in sizes]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mixture(a: list[float], b: list[float], own: float) -> list[float]:
    return [own * x + (1 - own) * y for x, y in zip(a, b, strict=True)]


FORMULAS: dict[str, Callable[[list[float], list[float]], float]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "tvd": lambda p, q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    "jsd(0.3)": lambda p, q: 0.3 * kl(p, mixture(p, q, 0.3)) + 0.7 * kl(q, mixture(p, q, 0.3)),
    "skew_kl(0.1)": lambda p, q: kl(p, mixture(p, q, 0.1)),
    "skew_rkl(0.2)": lambda p, q: kl(q, mixture(q, p, 0.2)),
}


def total(values: list[float], weights: list[float], reduction: str, denominator: float | None = None) -> float:
    size = sum(weights) if denominator is None else denominator
    return sum(v * w for v, w in zip(values, weights, strict=True)) / (1.0 if reduction == "sum" else size)


def capped(z: float) -> float:
    return 5.0 * math.tanh(1.5 * z / 5.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "denominator"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_div_is_its_formula(divergence: str, reduction: str) -> None:
    learned, given = make_case("kl_div")
    student, teacher = learned["student_logits"].tolist(), given["teacher_logits"][:, given["vocab_index"]].tolist()
    weights, denominator = MASK.tolist(), 3.0 if reduction == "denominator" else None
    logits = [[capped(z) for z in row] for row in student]
    pairs = [(softmax([z / 2 for z in t]), softmax([z / 2 for z in s])) for t, s in zip(teacher, logits, strict=True)]
    values = [4 * FORMULAS[divergence](p, q) for p, q in pairs]
    labels = [-math.log(softmax(z)[y]) if y >= 0 else 0.0 for z, y in zip(logits, LABELS.tolist(), strict=True)]
    labelled = [w * (y >= 0) for w, y in zip(weights, LABELS.tolist(), strict=True)]
    expected = total(values, weights, reduction, denominator) + 0.5 * total(labels, labelled, reduction, denominator)
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "return_stats": True}
    options |= {"reduction": "mean", "denominator": 3.0} if denominator else {"reduction": reduction}
    loss, stats = call("kl_div", learned, given, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    entropies = [[-sum(x * math.log(x) for x in side) for side in pair] for pair in pairs]
    for name, expected_rows in (
        ("divergence", values),
        ("cross_entropy", labels),
        ("teacher_entropy", [theirs for theirs, _ in entropies]),
        ("student_entropy", [ours for _, ours in entropies]),
        ("top1_agreement", [float(p.index(max(p)) == q.index(max(q))) for p, q in pairs]),
    ):
        present = [value * (weight > 0) for value, weight in zip(expected_rows, weights, strict=True)]
        assert getattr(stats, name).tolist() == pytest.approx(present, rel=1e-12), name


def test_linear_kl_div_is_kl_div_of_the_heads_products() -> None:
    learned, given = make_case("linear_kl_div")
    student = learned["student_hidden"] @ learned["student_weight"].T + learned["student_bias"]
    teacher = given.pop("teacher_hidden") @ given.pop("teacher_weight").T + given.pop("teacher_bias")
    expected = reference.kl_div(student, teacher, **given)
    _, case = make_case("linear_kl_div")
    assert_close(call("linear_kl_div", learned, case), expected, 1e-14)
    assert_close(reference.linear_kl_div(**learned, teacher_hidden=teacher, teacher_weight=None, **given), expected, 1e-14)


def test_linear_cross_entropy_is_its_formula() -> None:
    learned, given = make_case("linear_cross_entropy")
    logits = (learned["hidden"] @ learned["weight"].T + learned["bias"]).tolist()
    values = [
        -math.log(softmax([capped(z) for z in row])[y]) if y >= 0 else 0.0 for row, y in zip(logits, LABELS.tolist(), strict=True)
    ]
    assert call("linear_cross_entropy", learned, given, reduction="none").tolist() == pytest.approx(values, rel=1e-12)
    assert call("linear_cross_entropy", learned, given).item() == pytest.approx(sum(values) / 4, rel=1e-12)
    assert call("linear_cross_entropy", learned, given, denominator=8.0).item() == pytest.approx(sum(values) / 8, rel=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
def test_topk_kl_div_is_its_formula(tail: str) -> None:
    learned, given = make_case("topk_kl_div")
    logits = (learned["student_hidden"] @ learned["student_weight"].T + learned["student_bias"]).tolist()
    values, labels = [], []
    for row, ids, log_p, log_tail in zip(
        logits, IDS.tolist(), *(given[n].tolist() for n in ("topk_logprobs", "tail_logprob")), strict=True
    ):
        row = [capped(z) for z in row]
        q = softmax([z / 2 for z in row])
        listed = {i: math.exp(x) for i, x in zip(ids, log_p, strict=True) if i >= 0}
        mass = sum(listed.values()) if tail == "renormalize" else 1.0
        value = sum(p / mass * math.log(p / mass / q[i]) for i, p in listed.items())
        if tail == "bucket":
            value += math.exp(log_tail) * (log_tail - math.log(sum(x for i, x in enumerate(q) if i not in listed)))
        values.append(4 * value)
        labels.append(softmax(row))
    cross_entropy = [-math.log(q[y]) if y >= 0 else 0.0 for q, y in zip(labels, LABELS.tolist(), strict=True)]
    loss, stats = call("topk_kl_div", learned, given, tail=tail, temperature=2.0, return_stats=True)
    weights = MASK.tolist()
    labelled = [w * (y >= 0) for w, y in zip(weights, LABELS.tolist(), strict=True)]
    expected = total(values, weights, "mean") + 0.5 * total(cross_entropy, labelled, "mean")
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    present = [value * (weight > 0) for value, weight in zip(values, weights, strict=True)]
    assert stats.divergence.tolist() == pytest.approx(present, rel=1e-12)
    assert stats.cross_entropy is not None and stats.student_entropy is None


def test_projected_mse_is_its_formula() -> None:
    learned, given = make_case("projected_mse")
    ours = learned["student_states"] @ learned["student_weight"].T + learned["student_bias"]
    pairs = zip(ours.tolist(), given["teacher_states"].tolist(), strict=True)
    values = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 3 for a, b in pairs]
    assert call("projected_mse", learned, given).item() == pytest.approx(total(values, MASK.tolist(), "mean"), rel=1e-12)


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
def test_relation_kl_is_its_formula(form: str) -> None:
    learned, given = make_case("relation_kl")
    first = RelationTarget(given["teacher_q"], given["teacher_k"], key_mask=KEYS)
    expected, rows = 0.0, 0
    for batch in range(2):
        for head in range(2):
            for i in (i for i in range(4) if QUERIES[batch, i]):
                rows += 1
                for target in (first, *given["targets"]):
                    keys = [j for j in range(4) if target.key_mask[batch, j]]
                    if not keys or (target.query_mask is not None and not target.query_mask[batch, i]):
                        continue

                    def distribution(
                        q: Tensor, k: Tensor, at: tuple[int, int, int] = (batch, head, i), keys: list[int] = keys
                    ) -> list[float]:
                        return softmax([float(q[at] @ k[at[0], at[1], j]) / math.sqrt(3) for j in keys])

                    p, q = distribution(target.q, target.k), distribution(learned["student_q"], learned["student_k"])
                    entropy = -sum(x * math.log(x) for x in p)
                    expected += target.weight * (kl(p, q) + entropy * (form == "cross_entropy"))
    assert call("relation_kl", learned, given, form=form).item() == pytest.approx(expected / rows, rel=1e-12)


# Gradients.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_value(op: str, reduction: str) -> None:
    learned, given = make_case(op)

    def function(*tensors: Tensor) -> Any:
        return call(op, dict(zip(learned, tensors, strict=True)), given, reduction=reduction)

    tensors = [x.requires_grad_() for x in learned.values()]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_every_divergence_are_those_of_the_value(divergence: str) -> None:
    learned, given = make_case("kl_div")
    student = learned["student_logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call("kl_div", {"student_logits": x}, given, divergence=divergence), student)


@pytest.mark.parametrize("op", OPS)
def test_transforms_that_the_fast_ops_refuse_work(op: str) -> None:
    """An error of theirs names these functions as the remedy."""
    learned, given = make_case(op)
    names = list(learned)

    def function(*tensors: Tensor) -> Tensor:
        loss: Tensor = call(op, dict(zip(names, tensors, strict=True)), given)
        return loss

    expected = torch.autograd.grad(function(*(x.requires_grad_() for x in learned.values())), list(learned.values()))
    found = torch.func.grad(function, argnums=tuple(range(len(names))))(*(x.detach() for x in learned.values()))
    for name, gradient, truth in zip(names, found, expected, strict=True):
        assert_close(gradient, truth, 1e-13, name)
    twice = torch.vmap(function)(*(torch.stack([x.detach()] * 2) for x in learned.values()))
    assert_close(twice, function(*learned.values()).detach().expand(2), 1e-13)


# Dtypes and devices.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("options", [True, False], ids=["all options", "defaults"])
def test_every_dtype_gives_the_number(op: str, options: bool, dtype: torch.dtype, tolerance: float) -> None:
    learned, given = make_case(op)
    if not options:
        learned, given = required(op, learned, given)
    narrow = [
        {n: moved(x, lambda x: x.to(dtype) if x.is_floating_point() else x) for n, x in side.items()} for side in (learned, given)
    ]
    loss = call(op, *narrow)
    assert loss.dtype == dtype
    assert_close(loss, call(op, learned, given), tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_divergence_has_a_number_in_every_dtype(divergence: str, dtype: torch.dtype) -> None:
    student, teacher = normal(TOKENS, VOCABULARY, seed=1), normal(TOKENS, VOCABULARY, seed=2)
    value = reference.kl_div(student.to(dtype), teacher.to(dtype), divergence=divergence)
    assert_close(value, reference.kl_div(student, teacher, divergence=divergence), 0.02)


@pytest.mark.parametrize("where", ["the default device is another", "the inputs are on another"])
@pytest.mark.parametrize("options", [True, False], ids=["all options", "defaults"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_made_on_another_device_than_the_inputs(op: str, options: bool, reduction: str, where: str) -> None:
    learned, given = make_case(op)
    if not options:
        learned, given = required(op, learned, given)
    settings: dict[str, Any] = {"reduction": reduction}
    if "return_stats" in inspect.signature(getattr(fastkd, op)).parameters:
        settings["return_stats"] = True
    expected = call(op, learned, given, **settings)
    if where.startswith("the inputs"):
        device = torch.device("meta")
        learned, given = ({n: moved(x, lambda x: x.to("meta")) for n, x in side.items()} for side in (learned, given))
        found = call(op, learned, given, **settings)
    else:
        device = torch.device("cpu")
        with torch.device("meta"):
            found = call(op, learned, given, **settings)
    for one, other in zip(*(tensors_of(x) for x in (found, expected)), strict=True):
        assert one.device == device and one.shape == other.shape and one.dtype == other.dtype
        assert one.is_meta or torch.equal(one, other)


def tensors_of(result: Any) -> list[Tensor]:
    loss, stats = result if isinstance(result, tuple) else (result, None)
    return [loss, *(x for x in (vars(stats).values() if stats else ()) if x is not None)]


# What is left out.


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_columns_that_neither_model_can_choose_are_as_if_they_were_not_there(
    divergence: str, temperature: float, dtype: torch.dtype
) -> None:
    student, teacher = (normal(TOKENS, VOCABULARY, seed=seed).to(dtype) for seed in (1, 2))
    banned = torch.tensor([False, True, False, False, True, False, False])
    holes, kept = (student.masked_fill(banned, -math.inf), student[:, ~banned])
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "return_stats": True}
    value, stats = reference.kl_div(holes.requires_grad_(), teacher.masked_fill(banned, -math.inf), **options)
    truth, true_stats = reference.kl_div(kept.requires_grad_(), teacher[:, ~banned], **options)
    for one, other in zip(tensors_of((value, stats)), tensors_of((truth, true_stats)), strict=True):
        assert_close(one, other, 1e-6)
    (gradient,), (true_gradient,) = torch.autograd.grad(value, [holes]), torch.autograd.grad(truth, [kept])
    assert bool((gradient[:, banned] == 0).all())
    assert_close(gradient[:, ~banned], true_gradient, 1e-6)


def test_a_token_that_the_student_cannot_choose_and_the_list_does_not_hold_adds_nothing() -> None:
    learned, given = make_case("topk_kl_div")
    head = {**learned, "student_bias": learned["student_bias"].index_fill(0, torch.tensor([4]), -math.inf).requires_grad_()}
    given = {**given, "topk_logprobs": given["topk_logprobs"].masked_fill(IDS == 4, -math.inf), "labels": None, "label_weight": 0.0}
    given.pop("student_softcap")
    for tail in ("bucket", "renormalize", "zero"):
        loss = call("topk_kl_div", head, given, tail=tail)
        assert loss.isfinite() and torch.autograd.grad(loss, head["student_bias"])[0].isfinite().all()


@pytest.mark.parametrize(
    ("divergence", "limit"),
    [
        ("jsd(0.3)", -0.3 * math.log(0.3) - 0.7 * math.log(0.7)),
        ("skew_kl(0.1)", -math.log(0.1)),
        ("skew_rkl(0.2)", -math.log(0.2)),
        ("tvd", 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_models_that_share_no_token_are_as_far_apart_as_they_can_be(divergence: str, limit: float, dtype: torch.dtype) -> None:
    """At T = 0.05 most probabilities of either model underflow, and some of both."""
    student = torch.tensor([[60.0, 0.0, -30.0, -60.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 60.0, -30.0, -60.0]], dtype=dtype)
    value = reference.kl_div(student, teacher, divergence=divergence, temperature=0.05)
    assert value.item() == pytest.approx(0.05**2 * limit, rel=1e-5)
    assert bool(torch.autograd.grad(value, student)[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nothing_to_average_is_zero_with_zero_gradients(op: str, dtype: torch.dtype) -> None:
    learned, given = make_case(op)
    nothing = {"mask": torch.zeros(TOKENS), "labels": torch.full((TOKENS,), -100), "query_mask": torch.zeros(2, 4, dtype=torch.bool)}
    given = {**given, **{name: x for name, x in nothing.items() if name in given}}
    if op == "topk_kl_div":
        given = {**given, "topk_ids": torch.full_like(IDS, -1)}
    learned = {n: x.to(dtype).requires_grad_() for n, x in learned.items()}
    given = {n: moved(x, lambda x: x.to(dtype) if x.is_floating_point() else x) for n, x in given.items()}
    for tail in ("bucket", "renormalize", "zero") if op == "topk_kl_div" else (None,):
        loss = call(op, learned, given, **({} if tail is None else {"tail": tail}))
        assert loss.item() == 0.0
        for gradient in torch.autograd.grad(loss, list(learned.values())):
            assert bool((gradient == 0).all())


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("op", ["kl_div", "linear_kl_div", "linear_cross_entropy", "topk_kl_div", "projected_mse"])
def test_a_token_without_weight_may_hold_anything(op: str, garbage: float) -> None:
    learned, given = make_case(op)
    row = 1 if op == "linear_cross_entropy" else 2
    found = []
    for spoils in (False, True):
        ours = {n: x.clone() for n, x in learned.items()}
        theirs = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        for name, x in {**ours, **theirs}.items():
            if spoils and isinstance(x, Tensor) and x.is_floating_point() and x.shape[:1] == (TOKENS,) and name != "mask":
                x[row] = garbage
        leaves = {n: x.requires_grad_() for n, x in ours.items()}
        loss = call(op, leaves, theirs)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    assert found[0][0].isfinite()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", ["kl_div", "linear_kl_div", "linear_cross_entropy", "topk_kl_div"])
def test_the_mark_of_no_label_may_be_any_number(op: str) -> None:
    learned, given = make_case(op)
    expected = call(op, learned, given)
    for mark in (VOCABULARY, 10**6, -1):
        marked = {**given, "labels": LABELS.masked_fill(LABELS == -100, mark), "ignore_index": mark}
        assert torch.equal(call(op, learned, marked), expected)


def test_nan_is_never_hidden() -> None:
    for op in OPS:
        learned, given = make_case(op)
        name = next(iter(learned))
        learned[name].view(-1)[0] = math.nan
        assert call(op, learned, given).isnan(), op


@pytest.mark.parametrize("op", OPS)
def test_a_reference_takes_all_that_its_op_takes_but_approximations_and_groups(op: str) -> None:
    fast, slow = (inspect.signature(getattr(home, op)).parameters for home in (fastkd, reference))
    others = inspect.signature(reference.kl_div).parameters if op == "linear_kl_div" else {}
    assert set(fast) - set(slow) - set(others) <= {"grad_filter", "group"}
    learned, given = make_case(op)
    steering = {"chunk_size": 2, "memory_budget": 1 << 20, "backend": "torch"}
    taken = {name: value for name, value in steering.items() if name in fast}
    assert torch.equal(call(op, learned, given, **taken), call(op, learned, given))


def test_a_divergence_may_be_given_as_such() -> None:
    learned, given = make_case("kl_div")
    assert torch.equal(
        call("kl_div", learned, given, divergence=Divergence.jsd(0.3)), call("kl_div", learned, given, divergence="jsd(0.3)")
    )
