"""The Triton kernel of a sparse teacher under the interpreter, against the torch backend in float64 on the same inputs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastkd.kernels import topk as kernels
from fastkd.ops import backend_torch, backend_triton
from fastkd.ops.checks import TAILS
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, TopK
from fastkd.ops.row_check import check as probe
from tests.oracle import assert_close, relative_error, wrong_gradients
from tests.row_kernels import DIVERGENCES, assert_outputs, make_outputs, topk_cases
from tests.row_kinds import CPU, KINDS

TOLERANCE = 2e-5
BLOCK = 16
INFINITY = float("inf")
PLAIN = RowOptions()


@pytest.fixture(autouse=True)
def quiet():
    """numpy warns of what the kernel guards against: -inf - -inf, 0 * inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks in a small vocabulary; the backend leaves the block to this default."""
    monkeypatch.setitem(kernels.topk_divergence.__kwdefaults__, "block", BLOCK)


def problem(rows: int, vocabulary: int, entries: int, temperature: float = 1.0, noise: float = 0.5) -> tuple[Tensor, TopK]:
    """Float32 student logits, and the cache of a teacher close to them; a random entry's place in the list is missing if it can be."""
    generator = torch.Generator().manual_seed(17 * vocabulary + entries)
    student = 3 * torch.randn(rows, vocabulary, generator=generator)
    teacher = student + noise * torch.randn(rows, vocabulary, generator=generator)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    best = log_p.topk(entries, -1)
    order = torch.randperm(entries, generator=generator)
    tail = log_p.scatter(1, best.indices, -INFINITY).logsumexp(-1)
    return student, TopK(best.indices[:, order], best.values[:, order].float(), tail.float())


def without(teacher: TopK, entry: int) -> TopK:
    """Row 0 lacks this entry, and holds nonsense in its place; its mass is in the tail."""
    ids, log_p, log_tail = teacher.ids.clone(), teacher.log_probabilities.clone(), teacher.log_tail.clone()
    log_tail[0] = torch.logaddexp(log_tail[0], log_p[0, entry])
    ids[0, entry], log_p[0, entry] = -1, torch.nan
    return TopK(ids, log_p, log_tail)


def run(kernel, student, teacher, tail, options=PLAIN, gradient: Tensor | bool | None = True, **settings):
    """The gradient, in place, in what is given, or none, and the kernel's losses; float64 inputs are the oracle's."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    call = RowCall(
        student=student,
        teacher=teacher,
        options=replace(options, tail=tail),
        outputs=make_outputs(len(student), dtype, True, settings.get("labels") is not None, False),
        row_weight=torch.linspace(0.5, 2.0, len(student)).to(dtype),
        gradient=student if gradient is True else gradient,
        **{name: x.to(dtype) if x.is_floating_point() else x for name, x in settings.items()},
    )
    kernel(call)
    return call.gradient, call.outputs


def truth_of(student, teacher, tail, options=PLAIN, **settings):
    return run(backend_torch.run, student.to(torch.float64, copy=True), teacher, tail, options, **settings)


def launch(student, teacher, tail, options=PLAIN, **settings):
    return run(backend_triton.run, student, teacher, tail, options, **settings)


def check(student: Tensor, teacher: TopK, tail: str, options: RowOptions = PLAIN, tolerance: float = TOLERANCE, **settings) -> None:
    """Everything that the Triton kernel returns equals the torch backend's in float64."""
    expected_gradient, expected = truth_of(student, teacher, tail, options, **settings)
    gradient, losses = launch(student.clone(), teacher, tail, options, **settings)
    finite = expected_gradient.isfinite()
    torch.testing.assert_close(gradient[~finite].double(), expected_gradient[~finite], equal_nan=True)
    assert_close(gradient[finite], expected_gradient[finite], tolerance, "gradient")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    expected = {name: x for name, x in vars(expected).items() if x is not None}
    assert_outputs(losses, expected, student, None, options, dtype)


def test_the_tails_are_those_of_the_torch_backend():
    assert kernels.TAILS == TAILS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 15.0])
@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
def test_every_tail_and_divergence(tail, divergence, temperature):
    student, teacher = problem(3, 83, 7, temperature)
    check(student, without(teacher, 2), tail, RowOptions(Divergence.parse(divergence), temperature))


@pytest.mark.parametrize(("vocabulary", "entries"), [(1, 1), (7, 1), (7, 7), (16, 5), (17, 16), (33, 33), (70, 9)])
@pytest.mark.parametrize("tail", TAILS)
def test_every_width(tail, vocabulary, entries):
    student, teacher = problem(2, vocabulary, entries)
    check(student, teacher, tail, RowOptions(temperature=2.0))


@pytest.mark.parametrize("tail", TAILS)
def test_more_blocks_than_one_word_has_bits(tail):
    """Listed ids in every group of 32 blocks, among them the first and the last token."""
    student, teacher = problem(2, 2 * 32 * BLOCK + 37, 24)
    ids = torch.linspace(0, student.shape[1] - 1, 24).long().expand(2, 24).clone()
    ids[1, :3] = torch.tensor([31 * BLOCK, 32 * BLOCK - 1, 32 * BLOCK])
    student.scatter_add_(1, ids, torch.full((2, 24), 9.0))
    check(student, replace(teacher, ids=ids), tail)


def test_the_block_that_is_launched(monkeypatch):
    monkeypatch.setitem(kernels.topk_divergence.__kwdefaults__, "block", kernels.BLOCK)
    for vocabulary in (kernels.BLOCK - 3, 2 * kernels.BLOCK + 1):
        check(*problem(2, vocabulary, 11), "bucket")


@pytest.mark.parametrize("tail", TAILS)
def test_the_check_refuses_wrong_gradients(tail):
    student, teacher = problem(4, 50, 6)
    truth, _ = truth_of(student, teacher, tail)
    wrong = wrong_gradients(truth)
    wrong["the list left as if it were tail"] = truth.scatter(1, teacher.ids, 0.0)
    for gradient in wrong.values():
        assert relative_error(gradient, truth) > 100 * TOLERANCE


@pytest.mark.parametrize("gap", [12.0, 25.0, 80.0, 200.0])
def test_nearly_all_of_the_students_mass_is_listed(gap):
    """q_tail down to e^-200: 1 - sum_S q is pure rounding, or zero, long before."""
    student, teacher = problem(3, 83, 5)
    student.scatter_add_(1, teacher.ids, torch.full((3, 5), gap))
    truth, expected = truth_of(student, teacher, "bucket")
    gradient, losses = launch(student, teacher, "bucket")
    off_list = torch.ones_like(truth).scatter(1, teacher.ids, 0.0)
    assert_close(gradient * off_list, truth * off_list, TOLERANCE)
    assert_close(gradient, truth, TOLERANCE)
    assert_close(losses.divergence, expected.divergence, TOLERANCE)


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("where", ["listed", "unlisted"])
@pytest.mark.parametrize("gap", [2.0, 10.0, 30.0])
@pytest.mark.parametrize("tail", TAILS)
def test_gradients_of_a_student_that_is_nearly_certain(tail, gap, where, has_labels):
    """A logit of a token that the teacher lists or not, in labels too; a row's labels are that token, another one and none."""
    student, teacher = problem(3, 120, 6, 2.0)
    column = teacher.ids[:, 3] if where == "listed" else student.scatter(1, teacher.ids, INFINITY).argmin(1)
    student[torch.arange(3), column] = student.amax(1) + gap
    labels = {"labels": torch.tensor([int(column[0]), 5, -1]), "label_weight": torch.tensor([0.3, 2.0, 5.0])} if has_labels else {}
    for options in (RowOptions(temperature=2.0), RowOptions(student=LogitTransform(1.0, 50.0))):
        truth, _ = truth_of(student, teacher, tail, options, **labels)
        gradient, _ = launch(student.clone(), teacher, tail, options, **labels)
        for made, exact in zip(gradient, truth, strict=True):
            assert_close(made, exact, 1e-4)


@pytest.mark.parametrize("gap", [5.0, 20.0])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "tvd"])
def test_gradients_where_both_are_nearly_certain_of_a_listed_token(divergence, gap):
    student, teacher = problem(3, 120, 6)
    first = teacher.log_probabilities.argmax(1, keepdim=True)
    column = teacher.ids.gather(1, first)
    log_p = torch.cat((teacher.log_probabilities, teacher.log_tail[:, None]), 1).double()
    log_p = log_p.scatter_add(1, first, torch.full((3, 1), 0.8 * gap, dtype=torch.float64)).log_softmax(1)
    student.scatter_(1, column, student.amax(1, keepdim=True) + gap)
    sure, options = TopK(teacher.ids, log_p[:, :-1], log_p[:, -1]), RowOptions(Divergence.parse(divergence))
    truth, _ = truth_of(student, sure, "bucket", options)
    gradient, _ = launch(student.clone(), sure, "bucket", options)
    for made, exact in zip(gradient, truth, strict=True):
        assert_close(made, exact, 1e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("top-k")])
def test_the_check_that_users_machines_make_passes(name, monkeypatch):
    monkeypatch.setitem(kernels.topk_divergence.__kwdefaults__, "block", kernels.BLOCK)
    assert probe(backend_triton.run, KINDS[name], CPU) is None


@pytest.mark.parametrize("vocabulary", [40, 41])
@pytest.mark.parametrize("tail", TAILS)
def test_a_bias(tail, vocabulary):
    student, teacher = problem(3, vocabulary, 6)
    labels = {"labels": torch.tensor([int(teacher.ids[0, 3]), -1, 5]), "label_weight": torch.tensor([0.3, 5.0, 1.0])}
    bias = torch.linspace(-2, 3, vocabulary)
    check(student, teacher, tail, RowOptions(student=LogitTransform(1.5, 6.0)), student_bias=bias, **labels)


@pytest.mark.parametrize("tail", TAILS)
def test_a_close_student(tail):
    """q and p are 2 % apart, and a few roundings of each are 3e-5 of that."""
    student, teacher = problem(2, 200, 12, noise=0.02)
    check(student, teacher, tail, tolerance=3e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_constant_on_the_logits_changes_nothing(tail):
    student, teacher = problem(2, 50, 6)
    student = (student * 64).round() / 64  # exact under the shift
    gradient, losses = launch(student.clone(), teacher, tail)
    shifted_gradient, shifted = launch(student + 1000, teacher, tail)
    assert_close(shifted_gradient, gradient, 1e-6)
    assert_close(shifted.divergence, losses.divergence, 1e-6)


@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
def test_labels_and_softcap_and_scale(tail, divergence):
    student, teacher = problem(3, 45, 6)
    options = RowOptions(Divergence.parse(divergence), 2.0, LogitTransform(1.5, 6.0))
    labels, weight = torch.tensor([int(teacher.ids[0, 3]), -1, 44]), torch.tensor([0.3, 5.0, 1.0])
    check(student, without(teacher, 0), tail, options, labels=labels, label_weight=weight)
    check(student, teacher, tail, replace(options, student=LogitTransform(-0.4)), labels=labels)


def test_an_id_or_label_outside_of_the_vocabulary_gives_nan():
    student, teacher = problem(3, 20, 4)
    teacher.ids[0, 1] = 20
    _, losses = launch(student, teacher, "bucket", labels=torch.tensor([0, 20, 3]))
    assert losses.divergence.isnan().tolist() == [True, False, False]
    assert losses.cross_entropy.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_that_lists_nothing(tail):
    student, teacher = problem(2, 20, 1)
    check(student, without(teacher, 0), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_no_mass_in_the_tail(tail):
    student, teacher = problem(2, 40, 5)
    sure = TopK(teacher.ids, teacher.log_probabilities.log_softmax(-1), torch.full((2,), -INFINITY))
    check(student, sure, tail)
    # Nor can the student have any.
    check(torch.full_like(student, -INFINITY).scatter(1, teacher.ids, student.gather(1, teacher.ids)), sure, tail)


@pytest.mark.parametrize("tail", TAILS)
def test_minus_infinity(tail):
    """Masked tokens off the list: in the first block, whole blocks of them, and the last token; then all of them."""
    student, teacher = problem(2, 51, 4)
    masked = torch.zeros(2, 51, dtype=torch.bool)
    masked[0, :36], masked[1, 3], masked[1, 14:33], masked[1, 50] = True, True, True, True
    masked.scatter_(1, teacher.ids, False)
    check(student.masked_fill(masked, -INFINITY), teacher, tail)
    check(student.masked_fill(torch.ones_like(masked).scatter(1, teacher.ids, False), -INFINITY), teacher, tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("place", ["listed", "unlisted"])
def test_nan_shows(tail, bad, place):
    student, teacher = problem(3, 40, 5)
    student[1, teacher.ids[1, 2] if place == "listed" else student[1].scatter(0, teacher.ids[1], INFINITY).argmin()] = bad
    check(student, teacher, tail)
    gradient, losses = launch(student, teacher, tail)
    assert losses.divergence.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_of_minus_infinity_is_undefined(tail):
    student, teacher = problem(2, 20, 3)
    student[0] = -INFINITY
    _, losses = launch(student, teacher, tail)
    assert losses.divergence.isnan().tolist() == [True, False]


@pytest.mark.parametrize(("tail", "divergence"), topk_cases())
def test_float64(tail, divergence):
    student, teacher = problem(3, 45, 6, 15.0)
    options = RowOptions(Divergence.parse(divergence), 15.0, LogitTransform(0.3, 30.0))
    labels, weight = torch.tensor([1, -1, 44]), torch.full((3,), 0.1)
    check(student.double(), teacher, tail, options, tolerance=1e-11, labels=labels, label_weight=weight)


@pytest.mark.parametrize("tail", TAILS)
def test_where_the_gradient_goes(tail):
    """Elsewhere, in 16 bits over the logits' own rows, or nowhere."""
    student, teacher = problem(3, 75, 6)
    truth, expected = truth_of(student, teacher, tail)
    left = student.clone()
    gradient, losses = launch(left, teacher, tail, gradient=torch.full_like(student, torch.nan))
    assert_close(gradient, truth, TOLERANCE)
    assert torch.equal(left, student)
    _, losses = launch(left, teacher, tail, gradient=None)
    assert_close(losses.divergence, expected.divergence, TOLERANCE)
    assert torch.equal(left, student)
    narrow, _ = launch(left, teacher, tail, gradient=torch.empty(3, 75, dtype=torch.bfloat16))
    assert_close(narrow, truth, 8e-3)  # the interpreter truncates
    over, losses = launch(left, teacher, tail, gradient=left.view(torch.bfloat16)[:, :75])
    assert torch.equal(over, narrow)
    assert_close(losses.divergence, expected.divergence, TOLERANCE)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_logits(divergence):
    """Losses as exact as of float32 logits; only the stored gradient is rounded."""
    student, teacher = problem(3, 45, 6)
    student, options = student.bfloat16(), RowOptions(Divergence.parse(divergence))
    truth, expected = truth_of(student, teacher, "bucket", options)
    gradient, losses = launch(student, teacher, "bucket", options)
    assert gradient.dtype == torch.bfloat16
    assert_close(gradient, truth, 5e-3)
    assert_close(losses.divergence, expected.divergence, TOLERANCE)


@pytest.mark.parametrize("tail", TAILS)
def test_strides(tail):
    student, teacher = problem(3, 37, 6)
    wide, cached = torch.full((3, 64), 9.0), torch.full((3, 2, 9), -1)
    wide[:, 5:42], cached[:, 1, :6] = student, teacher.ids
    strided = TopK(cached[:, 1, :6], teacher.log_probabilities.T.contiguous().T, torch.stack((teacher.log_tail,) * 2, 1)[:, 0])
    truth, expected = truth_of(student, teacher, tail)
    gradient, losses = launch(wide[:, 5:42], strided, tail)
    assert_close(gradient, truth, TOLERANCE)
    assert_close(losses.divergence, expected.divergence, TOLERANCE)
    assert (wide[:, :5] == 9).all() and (wide[:, 42:] == 9).all()


def test_no_rows():
    student, teacher = problem(2, 9, 3)
    gradient, losses = launch(student[:0], teacher[:0], "bucket")
    assert gradient.shape == (0, 9) and losses.divergence.shape == (0,)
