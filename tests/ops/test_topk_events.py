"""The row kernels of a sparse teacher on the CPU, against their oracle: values by the oracle in float64, gradients by its autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastkd.ops import backend_torch
from fastkd.ops.backends import MODULES, wished
from fastkd.ops.checks import TAILS
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, RowOutputs, TopK
from fastkd.ops.row_check import check as probe
from tests.oracle import assert_close, relative_error, wrong_gradients
from tests.row_kernels import DIVERGENCES, assert_outputs, topk_cases, topk_divergence
from tests.row_kinds import CPU, KINDS

ROWS, VOCABULARY = 5, 43
INFINITY = float("inf")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
PLAIN = RowOptions()


def make_logits(vocabulary: int = VOCABULARY, noise: float = 0.5, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(17 * vocabulary)
    student = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return student, student + noise * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def cache(teacher: Tensor, entries: int, temperature: float = 1.0) -> TopK:
    """What a cache keeps of these logits, exactly: the tail is summed, not subtracted from one."""
    log_p = (teacher / temperature).log_softmax(-1)
    best = log_p.topk(entries, -1)
    return TopK(best.indices, best.values, log_p.scatter(1, best.indices, -INFINITY).logsumexp(-1))


def pad(teacher: TopK, counts: list[int]) -> TopK:
    """Row i keeps counts[i] entries, in places that are not the first; what stands beside a missing id is nonsense."""
    missing = torch.arange(teacher.ids.shape[1] - 1, -1, -1) >= torch.tensor(counts)[:, None]
    tail = torch.cat((teacher.log_probabilities.masked_fill(~missing, -INFINITY), teacher.log_tail[:, None]), -1).logsumexp(-1)
    return TopK(teacher.ids.masked_fill(missing, -1), teacher.log_probabilities.masked_fill(missing, torch.nan), tail)


def run(student, teacher, tail, options=PLAIN, labels=None, label_weight=None, dtype=torch.float64, gradient=None, weights=None):
    """The losses of the backend that the test runs with, and its gradient (in `dtype` unless there is a place for it)."""
    rows = len(student)
    nothing = torch.full((rows,), torch.nan, dtype=dtype)
    out = RowOutputs(divergence=nothing.clone(), cross_entropy=None if labels is None else nothing.clone())
    kept, has_own_memory = student.clone(), gradient is None
    gradient = torch.full(student.shape, torch.nan, dtype=dtype) if has_own_memory else gradient
    weights = torch.linspace(0.5, 2.0, rows, dtype=dtype) if weights is None else weights
    label_weight = None if label_weight is None else label_weight.to(dtype)
    settings = {"labels": labels, "label_weight": label_weight, "gradient": gradient, "row_weight": weights, "outputs": out}
    MODULES[wished()].run(
        RowCall(student=student, teacher=teacher, options=replace(options, tail=tail), keeps_logits=has_own_memory, **settings)
    )
    if has_own_memory:
        torch.testing.assert_close(student, kept, rtol=0, atol=0, equal_nan=True)
    return gradient, out


def oracle(student, teacher, tail, options=PLAIN, labels=None, label_weight=None):
    leaf = student.to(torch.float64, copy=True).requires_grad_()
    logits = options.student.apply(leaf)
    exact = TopK(*(None if x is None else x.double() if x.is_floating_point() else x for x in vars(teacher).values()))
    divergence = topk_divergence(logits, exact, tail, options.divergence, temperature=options.temperature)
    total = (torch.linspace(0.5, 2.0, len(student), dtype=torch.float64) * divergence).sum()
    cross_entropy = None
    if labels is not None:
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        if label_weight is not None:
            total = total + (label_weight.double() * cross_entropy).sum()
    expected = {"divergence": divergence.detach()} | ({} if cross_entropy is None else {"cross_entropy": cross_entropy.detach()})
    return torch.autograd.grad(total, leaf)[0], expected


def check(student, teacher, tail, options=PLAIN, dtype=torch.float64, **labels) -> None:
    tolerance = TOLERANCE[dtype]
    truth, expected = oracle(student, teacher, tail, options, **labels)
    gradient, losses = run(student, teacher, tail, options, dtype=dtype, **labels)
    assert_close(gradient, truth, tolerance, "gradient")
    assert_outputs(losses, expected, student, None, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("entries", [1, 7, VOCABULARY])
@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
def test_equals_the_oracle(tail, divergence, entries, temperature, dtype):
    student, teacher = make_logits()
    teacher = cache(teacher, entries, temperature)
    student = student.to(dtype)
    teacher = replace(teacher, log_probabilities=teacher.log_probabilities.to(dtype), log_tail=teacher.log_tail.to(dtype))
    check(student, teacher, tail, RowOptions(Divergence.parse(divergence), temperature), dtype)


@pytest.mark.parametrize("tail", TAILS)
def test_the_check_refuses_wrong_gradients_and_wrong_tails(tail):
    student, teacher = make_logits()
    teacher = cache(teacher, 7)
    truth, losses = oracle(student, teacher, tail)
    for wrong in wrong_gradients(truth).values():
        assert relative_error(wrong, truth) > 100 * TOLERANCE[torch.float32]
    for other in set(TAILS) - {tail}:
        gradient, others = run(student, teacher, other)
        assert relative_error(gradient, truth) > 0.01
        assert relative_error(others.divergence, losses["divergence"]) > 0.01
    if tail == "bucket":
        gradient, others = run(student, replace(teacher, log_tail=teacher.log_tail + 0.1), tail)
        assert relative_error(gradient, truth) > 0.01
        assert relative_error(others.divergence, losses["divergence"]) > 0.01


@pytest.mark.parametrize("tail", TAILS)
def test_formulas_by_hand(tail):
    """Four tokens, two of them listed."""
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    p = torch.tensor([0.5, 0.3], dtype=torch.float64)
    teacher = TopK(torch.tensor([[2, 0]]), p.log()[None], torch.tensor([0.2]).double().log())
    gradient, losses = run(q.log()[None], teacher, tail, weights=torch.ones(1, dtype=torch.float64))
    listed = 0.5 * torch.tensor(0.5 / 0.3).log() + 0.3 * torch.tensor(0.3 / 0.1).log()
    value, slope = {
        "bucket": (listed + 0.2 * torch.tensor(0.2 / 0.6).log(), [0.1 - 0.3, 0.2 * (1 - 0.2 / 0.6), 0.3 - 0.5, 0.4 * (1 - 0.2 / 0.6)]),
        "renormalize": (listed / 0.8 - torch.tensor(0.8).log(), [0.1 - 0.3 / 0.8, 0.2, 0.3 - 0.5 / 0.8, 0.4]),
        "zero": (listed, [0.8 * 0.1 - 0.3, 0.8 * 0.2, 0.8 * 0.3 - 0.5, 0.8 * 0.4]),
    }[tail]
    assert_close(losses.divergence, value[None], 1e-7)
    assert_close(gradient[0], torch.tensor(slope, dtype=torch.float64), 1e-7)


def test_the_bucket_is_a_lower_bound_that_grows_to_the_full_divergence():
    student, logits = make_logits(noise=1.5)
    full = torch.nn.functional.kl_div(student.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    previous = torch.zeros_like(full)
    for entries in (1, 4, 12, 30, VOCABULARY):
        value = run(student, cache(logits, entries), "bucket")[1].divergence
        assert (value >= previous - 1e-12).all() and (value <= full + 1e-12).all()
        assert entries == VOCABULARY or (value < full - 1e-6).any()
        previous = value
    for tail in TAILS:
        assert_close(run(student, cache(logits, VOCABULARY), tail)[1].divergence, full, 1e-11)


@pytest.mark.parametrize("tail", TAILS)
def test_a_student_that_equals_its_teacher_gets_no_gradient(tail):
    _, teacher = make_logits()
    gradient, losses = run(teacher, cache(teacher, 6), tail)
    if tail == "bucket":
        assert gradient.abs().max() < 1e-14 and losses.divergence.abs().max() < 1e-14
    # Whatever the mass, nothing pushes all logits up or down.
    assert gradient.sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_missing_entries(tail, divergence, dtype):
    student, teacher = make_logits()
    padded = pad(cache(teacher, 6), [1, 6, 3, 5, 2])
    check(student.to(dtype), padded, tail, RowOptions(Divergence.parse(divergence), 2.0), dtype)
    short = cache(teacher, 6)[:1]
    one = TopK(short.ids[:, 5:], short.log_probabilities[:, 5:], padded.log_tail[:1])
    assert_close(run(student[:1], padded[:1], tail)[0], run(student[:1], one, tail)[0], 1e-12)


def test_a_row_that_lists_nothing():
    """All mass is in the tail, and so is all of the student's."""
    student, teacher = make_logits(rows=2)
    empty = pad(cache(teacher, 3), [0, 3])
    for tail in ("bucket", "zero"):
        gradient, losses = run(student, empty, tail)
        assert losses.divergence[0].abs() < 1e-12 and gradient[0].abs().max() < 1e-12
    assert run(student, empty, "renormalize")[1].divergence.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_mass_in_the_tail(dtype):
    """0 log 0 = 0, and the gradient off the list is q M alone."""
    student, teacher = make_logits()
    sure = cache(teacher, 4)
    sure = TopK(sure.ids, sure.log_probabilities.log_softmax(-1), torch.full((ROWS,), -INFINITY, dtype=torch.float64))
    check(student.to(dtype), sure, "bucket", dtype=dtype)
    assert_close(run(student, sure, "bucket")[0], run(student, sure, "renormalize")[0], 1e-12)


@pytest.mark.parametrize("gap", [12.0, 25.0, 80.0, 200.0])
def test_nearly_all_of_the_students_mass_is_listed(gap):
    """q_tail down to e^-200: 1 - sum_S q is pure rounding, or zero, long before."""
    student, teacher = make_logits()
    teacher = cache(teacher, 5)
    student = student.scatter_add(1, teacher.ids, torch.full((ROWS, 5), gap, dtype=torch.float64)).float()
    check(student, teacher, "bucket", dtype=torch.float32)
    truth, _ = oracle(student, teacher, "bucket")
    gradient, _ = run(student, teacher, "bucket", dtype=torch.float32)
    off_list = torch.ones_like(truth).scatter(1, teacher.ids, 0.0)
    assert_close(gradient * off_list, truth * off_list, 2e-5, "gradient off the list")
    listed = (truth * (1 - off_list)).norm(dim=1)
    assert ((truth * off_list).norm(dim=1) > 0.01 * listed).all(), "a gradient that is too small to be seen proves nothing"


@pytest.mark.parametrize("tail", TAILS)
def test_impossible_tokens_off_the_list(tail):
    """-inf in the student's logits is the same as a smaller vocabulary, also where nothing else is left beside the list."""
    student, logits = make_logits()
    teacher = cache(logits, 6)
    banned = torch.ones_like(student, dtype=torch.bool).scatter(1, teacher.ids, False)
    some = banned & (torch.arange(VOCABULARY) % 2 == 0)
    holes = student.masked_fill(some, -INFINITY)
    check(holes, teacher, tail)
    assert (run(holes, teacher, tail)[0][some] == 0).all()
    sure = TopK(teacher.ids, teacher.log_probabilities.log_softmax(-1), torch.full((ROWS,), -INFINITY, dtype=torch.float64))
    alone, losses = run(student.masked_fill(banned, -INFINITY), sure, tail)
    assert (alone[banned] == 0).all()
    expected, truth = run(student.gather(1, sure.ids), replace(sure, ids=torch.arange(6).expand(ROWS, 6)), tail)
    assert_close(alone.gather(1, sure.ids), expected, 1e-12)
    assert_close(losses.divergence, truth.divergence, 1e-12)


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("where", ["listed", "unlisted"])
@pytest.mark.parametrize("gap", [2.0, 10.0, 30.0])
@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
def test_gradients_of_a_student_that_is_nearly_certain(tail, divergence, gap, where, has_labels):
    """In float32, of a token that the teacher lists or not; the rows' labels are that token, another one and none."""
    student, teacher = make_logits(120)
    teacher = cache(teacher, 6, 2.0)
    column = teacher.ids[:, 3] if where == "listed" else student.scatter(1, teacher.ids, INFINITY).argmin(1)
    student[torch.arange(ROWS), column] = student.amax(1) + gap
    student = student.float()
    labels = torch.tensor([int(column[0]), 5, -1, int(teacher.ids[3, 0]), 7])
    given = {"labels": labels, "label_weight": torch.tensor([0.3, 2.0, 5.0, 1.0, 0.1])} if has_labels else {}
    for options in (RowOptions(temperature=2.0), RowOptions(student=LogitTransform(1.0, 50.0))):
        options = replace(options, divergence=Divergence.parse(divergence))
        truth, _ = oracle(student, teacher, tail, options, **given)
        gradient, _ = run(student, teacher, tail, options, dtype=torch.float32, **given)
        for made, exact in zip(gradient, truth, strict=True):
            assert_close(made, exact, 1e-4)


@pytest.mark.parametrize("gap", [5.0, 10.0, 20.0])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "tvd"])
def test_gradients_where_both_are_nearly_certain_of_a_listed_token(divergence, gap):
    """All that is left is of the size of what is not certain; tvd has a sign there, which rounding decides."""
    student, logits = make_logits(120)
    column = logits.argmax(1, keepdim=True)
    student = student.scatter(1, column, student.amax(1, keepdim=True) + gap).float()
    teacher = cache(logits.scatter_add(1, column, torch.full((ROWS, 1), 0.8 * gap, dtype=torch.float64)), 6)
    options = RowOptions(Divergence.parse(divergence))
    truth, _ = oracle(student, teacher, "bucket", options)
    others = truth.scatter(1, column, 0.0)
    truth = others.scatter(1, column, -others.sum(1, keepdim=True))
    gradient, _ = run(student, teacher, "bucket", options, dtype=torch.float32)
    for made, exact in zip(gradient, truth, strict=True):
        assert_close(made, exact, 1e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("top-k")])
def test_the_check_that_users_machines_make_passes(name):
    assert probe(MODULES[wished()].run, KINDS[name], CPU) is None


def test_reverse_kl_is_infinite_where_the_teacher_has_nothing():
    student, teacher = make_logits()
    teacher = cache(teacher, 6)
    nothing = torch.full((ROWS,), -INFINITY, dtype=torch.float64)
    _, losses = run(student, replace(teacher, log_tail=nothing), "bucket", RowOptions(Divergence("reverse_kl")))
    assert (losses.divergence == INFINITY).all()


def test_a_tail_that_the_student_cannot_have_is_infinite():
    student, teacher = make_logits()
    teacher = cache(teacher, 6)
    alone = torch.full_like(student, -INFINITY).scatter(1, teacher.ids, student.gather(1, teacher.ids))
    gradient, losses = run(alone, teacher, "bucket")
    assert (losses.divergence == INFINITY).all() and gradient.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("place", ["listed", "unlisted"])
def test_nan_shows(tail, bad, place):
    student, teacher = make_logits()
    teacher = cache(teacher, 6)
    student[1, teacher.ids[1, 2] if place == "listed" else student[1].scatter(0, teacher.ids[1], INFINITY).argmin()] = bad
    gradient, losses = run(student, teacher, tail)
    assert losses.divergence.isnan().tolist() == [False, True, False, False, False]
    assert gradient[1].isnan().all() and gradient[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_constant_on_the_logits_changes_nothing(tail):
    student, teacher = make_logits()
    teacher = cache(teacher, 6)
    student = ((student * 64).round() / 64).float()
    gradient, losses = run(student, teacher, tail, dtype=torch.float32)
    shifted_gradient, shifted = run(student + 1000, teacher, tail, dtype=torch.float32)
    assert torch.equal(shifted_gradient, gradient) and torch.equal(shifted.divergence, losses.divergence)


@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_labels_and_softcap_and_scale(tail, divergence, dtype):
    student, teacher = make_logits()
    options = RowOptions(Divergence.parse(divergence), 2.0, LogitTransform(1.5, 6.0))
    teacher = cache(options.student.apply(teacher), 6, 2.0)
    labels = torch.tensor([int(teacher.ids[0, 3]), -1, 42, 0, int(teacher.ids[4, 0])])
    weight = torch.tensor([0.3, 5.0, 1.0, 2.0, 0.7])
    check(student.to(dtype), teacher, tail, options, dtype, labels=labels, label_weight=weight)
    check(student.to(dtype), teacher, tail, replace(options, student=LogitTransform(-0.4)), dtype, labels=labels)


@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
def test_gradcheck_of_the_oracle(tail, divergence):
    """The oracle's own gradient, which all others are held to, is that of its value."""
    student, teacher = make_logits(9)
    teacher = pad(cache(teacher, 4, 2.0), [4, 1, 3, 2, 4])
    kind = Divergence.parse(divergence)
    assert torch.autograd.gradcheck(lambda x: topk_divergence(x, teacher, tail, kind, temperature=2.0), student.requires_grad_())


@pytest.mark.parametrize("tail", TAILS)
def test_a_rounded_cache_still_gives_the_gradient_of_the_value(tail):
    """Float16 log-probabilities no longer add up to one."""
    student, teacher = make_logits()
    teacher = cache(teacher, 6)
    check(student, TopK(teacher.ids, teacher.log_probabilities.half(), teacher.log_tail.half()), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_where_the_gradient_goes(tail, monkeypatch):
    """Over the logits, over them in 16 bits, elsewhere in 16 bits, or nowhere: the same gradient from any number of blocks."""
    monkeypatch.setattr(backend_torch, "_CPU_BLOCK_ELEMENTS", 2 * VOCABULARY)
    student, teacher = make_logits()
    teacher = cache(teacher, 6)
    truth, expected = oracle(student.float(), teacher, tail)
    row = torch.empty(ROWS, VOCABULARY + 5)
    row[:, :VOCABULARY] = student
    over, wide = row.clone()[:, :VOCABULARY], row.clone()
    narrow = wide.view(torch.bfloat16)[:, :VOCABULARY]
    for logits, gradient, tolerance in ((over, over, 1e-5), (wide[:, :VOCABULARY], narrow, 4e-3), (student, narrow.clone(), 4e-3)):
        _, losses = run(logits, teacher, tail, dtype=torch.float32, gradient=gradient)
        assert_close(gradient, truth, tolerance)
        assert_close(losses.divergence, expected["divergence"], 1e-5)
    logits, losses = student.clone(), RowOutputs(divergence=torch.empty(ROWS, dtype=torch.float64))
    ones = torch.ones(ROWS, dtype=torch.float64)
    backend_torch.run(RowCall(student=logits, teacher=teacher, options=replace(PLAIN, tail=tail), outputs=losses, row_weight=ones))
    assert torch.equal(logits, student)
    assert_close(losses.divergence, expected["divergence"], 1e-6)


def test_bfloat16_logits_are_read_as_they_are():
    student, teacher = make_logits()
    student, teacher = student.bfloat16(), cache(teacher, 6)
    check(student, teacher, "bucket", dtype=torch.float32)


@pytest.mark.parametrize("tail", TAILS)
def test_no_rows(tail):
    student, teacher = make_logits()
    gradient, losses = run(student[:0], cache(teacher, 6)[:0], tail)
    assert gradient.shape == (0, VOCABULARY) and losses.divergence.shape == (0,)


def test_rows_of_a_cache():
    teacher = cache(make_logits()[1], 6)
    assert torch.equal(teacher[1:3].ids, teacher.ids[1:3])
    assert torch.equal(teacher[torch.tensor([4, 0])].log_tail, teacher.log_tail[[4, 0]])
    assert replace(teacher, log_tail=None)[:2].log_tail is None
