"""The Triton row kernel under the interpreter, against the definitions or the torch backend in float64 on the same inputs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastkd.kernels import rows as kernels
from fastkd.ops import backend_torch
from fastkd.ops.backend_triton import run
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, RowOutputs
from fastkd.ops.row_check import check as probe
from tests import row_kernels
from tests.near_certainty import GAPS, check_near_certainty
from tests.oracle import assert_close, relative_error, wrong_gradients
from tests.row_kernels import CASES, DIVERGENCES, DTYPES, assert_outputs, make_outputs, make_place, oracle
from tests.row_kinds import CPU, KINDS

TOLERANCE = 2e-5
VANISHING = 4e-7
"""What is left in float32 of an element of a gradient that is zero."""
BLOCK = 32
# The interpreter truncates float32 to bfloat16, where the compiled kernel rounds, and gets float64 to bfloat16 wrong.
INTERPRETED = [case for case in CASES if case[0] != "float64" or "bfloat16" not in case[1]]
TRUNCATED = row_kernels.TOLERANCE | {torch.bfloat16: 2**-7}
INFINITY = float("inf")
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def quiet():
    """numpy warns of what the kernel guards against: -inf - -inf, 0 * inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def block(monkeypatch):
    """Many blocks in a small vocabulary; the backend leaves the block to this default."""

    def choose(size: int) -> None:
        monkeypatch.setitem(kernels.softmax_divergence.__kwdefaults__, "block", size)

    choose(BLOCK)
    return choose


def logits(count: int, vocabulary: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    student, teacher = row_kernels.make_logits(count, vocabulary, noise)
    return student.float(), teacher.float()


def options_of(divergence: str, temperature: float = 1.0) -> RowOptions:
    return RowOptions(Divergence.parse(divergence), temperature)


def make_call(student: Tensor, teacher: Tensor | None, options: RowOptions, statistics: bool = False, **settings) -> RowCall:
    """In float64 for float64 logits, else float32; the gradient lies where the student's logits do, if no other is given."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    labels, label_weight = settings.get("labels"), settings.pop("label_weight", None)
    return RowCall(
        student=student,
        teacher=teacher,
        options=options,
        outputs=make_outputs(len(student), dtype, teacher is not None, labels is not None, statistics),
        row_weight=torch.linspace(0.5, 2.0, len(student)).to(dtype),
        label_weight=None if label_weight is None else label_weight.to(dtype),
        **{"gradient": student} | settings,
    )


def made(kernel, *arguments, **settings) -> tuple[Tensor, RowOutputs]:
    """The gradient and the outputs of a kernel's run."""
    call = make_call(*arguments, **settings)
    kernel(call)
    return call.gradient, call.outputs


def truth_of(student: Tensor, teacher: Tensor | None, *arguments, **settings) -> tuple[Tensor, RowOutputs]:
    double = student.to(torch.float64, copy=True)
    return made(backend_torch.run, double, None if teacher is None else teacher.double(), *arguments, **settings)


def check(student: Tensor, teacher: Tensor | None, options: RowOptions, tolerance: float = TOLERANCE, **settings) -> None:
    """All that the Triton kernel makes of these logits equals what the torch backend makes of them in float64."""
    truth, expected = truth_of(student, teacher, options, **settings)
    gradient, outputs = made(run, student.clone(), None if teacher is None else teacher.clone(), options, **settings)
    finite = truth.isfinite()
    torch.testing.assert_close(gradient[~finite].double(), truth[~finite], equal_nan=True)
    vanishing = 0.0 if student.dtype == torch.float64 else VANISHING
    if not bool(((gradient[finite] - truth[finite]).abs() <= vanishing).all()):
        assert_close(gradient[finite], truth[finite], tolerance, "gradient")
    assert_same(outputs, expected, student, teacher, options)


def assert_same(outputs: RowOutputs, expected: RowOutputs, student: Tensor, teacher: Tensor | None, options: RowOptions) -> None:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    assert_outputs(outputs, {name: x for name, x in vars(expected).items() if x is not None}, student, teacher, options, dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 15.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence, temperature):
    check(*logits(2, 83), options_of(divergence, temperature))


@pytest.mark.parametrize("vocabulary", [1, 7, 32, 33, 70, 96])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_width(divergence, vocabulary):
    check(*logits(2, vocabulary), options_of(divergence, 2.0), statistics=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(0.3)"])
def test_the_block_that_is_launched(divergence, block):
    block(kernels.BLOCK)
    for vocabulary in (kernels.BLOCK - 3, 2 * kernels.BLOCK, 2 * kernels.BLOCK + 1):
        check(*logits(1, vocabulary), options_of(divergence, 2.0), statistics=True)


@pytest.mark.parametrize("kind", ["soft-caps", "float16"])
def test_the_check_that_users_machines_make_passes(kind, block):
    block(kernels.BLOCK)
    assert probe(run, KINDS[kind], CPU) is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_check_refuses_wrong_gradients(divergence):
    truth, _ = truth_of(*logits(4, 50), options_of(divergence))
    for wrong in wrong_gradients(truth).values():
        assert relative_error(wrong, truth) > 100 * TOLERANCE


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_close_student(divergence):
    """Close to its teacher the divergence is what is left of a cancellation, and the gradient too."""
    (student, teacher), options = logits(2, 200, noise=0.02), options_of(divergence)
    truth, expected = truth_of(student, teacher, options)
    gradient, outputs = made(run, student.clone(), teacher, options)
    assert_close(gradient, truth, TOLERANCE, "gradient")
    assert_same(outputs, expected, student, teacher, options)


@pytest.mark.parametrize("gap", GAPS[2::2])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, None])
def test_gradients_of_a_student_that_is_nearly_certain(divergence, gap, block):
    block(1024)
    check_near_certainty(run, divergence, gap)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rounding_of_many_entries_never_lands_in_one(divergence, block):
    """A diffuse student's entry at the peak is its own: minus the sum of the others would gather all their rounding."""
    block(kernels.BLOCK)
    student, teacher = (0.3 * x + 200 for x in logits(1, 60000))
    options = options_of(divergence, 2.0)
    truth, _ = truth_of(student, teacher, options)
    gradient, _ = made(run, student.clone(), teacher, options)
    assert_close(gradient, truth, 3e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_constant_on_the_logits_changes_nothing(divergence):
    # Multiples of 1/64 stay exact under the shift.
    student, teacher = ((x * 64).round() / 64 for x in logits(2, 50))
    gradient, outputs = made(run, student.clone(), teacher, options_of(divergence, 2.0))
    shifted_gradient, shifted = made(run, student + 60, teacher - 1000, options_of(divergence, 2.0))
    assert_close(shifted_gradient, gradient, 1e-6)
    assert_close(shifted.divergence, outputs.divergence, 1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_labels_and_softcap_and_scale_and_biases(divergence):
    student, teacher = logits(3, 45)
    options = replace(options_of(divergence, 2.0), student=LogitTransform(1.5, 6.0), teacher=LogitTransform(0.7, 30.0))
    labels, weight = torch.tensor([16, -1, 44]), torch.tensor([0.3, 5.0, 1.0])
    bias, other = logits(2, 45)[0]
    check(student, teacher, options, labels=labels, label_weight=weight, statistics=True)
    check(student, teacher, replace(options, student=LogitTransform(-0.4)), labels=labels, student_bias=bias)
    row_kernels.check(run, student, teacher, options, labels=labels, label_weight=weight, student_bias=bias, teacher_bias=other)


@pytest.mark.parametrize("vocabulary", [40, 41])
def test_biases_of_rows_that_are_aligned_or_not(vocabulary):
    """A vector of 16 bytes starts at any multiple of 16 bytes and nowhere else: what is read must not depend on it."""
    student, teacher = logits(3, vocabulary)
    bias, other = logits(2, vocabulary)[0]
    for begin in (0, 1):
        biases = {"student_bias": torch.cat((bias[:begin], bias))[begin:], "teacher_bias": torch.cat((other[:begin], other))[begin:]}
        row_kernels.check(run, student, teacher, RowOptions(temperature=2.0), statistics=True, **biases)


@pytest.mark.parametrize(("dtype", "place"), [case for case in INTERPRETED if case[0] != "float64"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_with_tokens_that_have_no_column(divergence, dtype, place):
    row_kernels.check_teacher_rest(run, divergence, DTYPES[dtype], place, TRUNCATED)


def test_softcap_on_small_and_large_logits():
    """tanh is the kernel's own: it must be right near zero, at its seam and where it saturates."""
    student = torch.tensor([[-1e4, -30.0, -7.6, -7.4, -1.0, -1e-3, 0.0, 1e-6, 0.5, 7.4999, 7.5001, 40.0, 1e5, INFINITY, -INFINITY]])
    check(student, student.flip(1), RowOptions(student=LogitTransform(1.0, 30.0), teacher=LogitTransform(1.0, 50.0)))


def test_labels_alone():
    student, _ = logits(4, 33)
    labels, weight = torch.tensor([32, -1, 0, 7]), torch.tensor([1.0, 1.0, 0.5, 2.0])
    check(student, None, RowOptions(divergence=None), labels=labels, label_weight=weight)
    check(student, None, RowOptions(None, 3.0, student=LogitTransform(2.0, 5.0)), labels=labels, label_weight=weight)


def test_a_label_outside_of_the_vocabulary_gives_nan():
    student, _ = logits(2, 20)
    _, outputs = made(run, student, None, RowOptions(divergence=None), labels=torch.tensor([20, 3]), gradient=None)
    assert outputs.cross_entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_gradient_the_logits_are_only_read(divergence):
    student, teacher = logits(2, 40)
    left = student.clone()
    _, outputs = made(run, left, teacher, options_of(divergence), gradient=None, statistics=True)
    _, expected = truth_of(student, teacher, options_of(divergence), statistics=True)
    assert torch.equal(left, student)
    assert_same(outputs, expected, student, teacher, options_of(divergence))


@pytest.mark.parametrize("start", [5, 8], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_rows(divergence, start):
    (student, teacher), end = logits(3, 37), start + 37
    wide_student, wide_teacher = torch.full((3, 64), 9.0), torch.full((3, 44), 9.0)
    wide_student[:, start:end], wide_teacher[:, :37] = student, teacher
    truth, expected = truth_of(student, teacher, options_of(divergence, 2.0))
    gradient, outputs = made(run, wide_student[:, start:end], wide_teacher[:, :37], options_of(divergence, 2.0))
    assert kernels.vector_size(gradient, wide_teacher) == (4 if start == 8 else 1)
    assert_close(gradient, truth, TOLERANCE)
    assert_same(outputs, expected, student, teacher, options_of(divergence, 2.0))
    assert (wide_student[:, :start] == 9).all() and (wide_student[:, end:] == 9).all() and (wide_teacher[:, 37:] == 9).all()
    assert torch.equal(wide_teacher[:, :37], teacher)


def test_rows_may_lie_further_apart_than_32_bits_count():
    row_kernels.check_far_rows(run, TRUNCATED)


def test_no_rows():
    gradient, outputs = made(run, torch.empty(0, 9), torch.empty(0, 9), RowOptions())
    assert gradient.shape == (0, 9) and outputs.divergence.shape == (0,)


@pytest.mark.parametrize(
    ("where", "lowest"), [("teacher", -INFINITY), ("student", -INFINITY), ("both", -INFINITY), ("both", LOWEST)], ids=str
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens(divergence, where, lowest):
    """In the first block, whole blocks of them, and the last token."""
    student, teacher = logits(2, 51)
    masked = torch.zeros(2, 51, dtype=torch.bool)
    masked[0, :36], masked[1, 3], masked[1, 14:33], masked[1, 50] = True, True, True, True
    if where != "student":
        teacher = teacher.masked_fill(masked, lowest)
    if where != "teacher":
        student = student.masked_fill(masked, lowest)
    truth, expected = truth_of(student, teacher, options_of(divergence, 2.0), statistics=True)
    gradient, outputs = made(run, student.clone(), teacher, options_of(divergence, 2.0), statistics=True)
    finite = truth.isfinite()
    assert_close(gradient[finite], truth[finite], TOLERANCE)
    assert not gradient[~finite].isfinite().any()
    for name, value in vars(outputs).items():
        if value is not None:
            torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_shows(divergence, side, bad):
    (student, teacher), whole, options = logits(3, 40), logits(3, 40), options_of(divergence)
    (student if side == "student" else teacher)[1, 37] = bad
    clean_gradient, clean = truth_of(*whole, options)
    gradient, outputs = made(run, student, teacher, options)
    assert outputs.divergence.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    others = torch.tensor([0, 2])
    assert_close(gradient[others], clean_gradient[others], TOLERANCE)
    found, expected = (RowOutputs(divergence=out.divergence[others]) for out in (outputs, clean))
    assert_same(found, expected, *(x[others] for x in whole), options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_of_minus_infinity_is_undefined(divergence):
    student, teacher = logits(2, 20)
    student[0] = -INFINITY
    gradient, outputs = made(run, student, teacher, options_of(divergence))
    assert outputs.divergence.isnan().tolist() == [True, False]
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(0.3)"])
@pytest.mark.parametrize("ties", [(3, 5), (3, 40), (40, 69), (3, 69), (2, 3, 35, 68)], ids=str)
def test_the_first_of_equal_logits_is_the_top_one(divergence, ties):
    """In one lane or several, in one block, two, or the last part; passes go through the row in either direction."""
    student, teacher = (x.clamp(-6, 6) for x in logits(3, 70))
    student[:, ties], teacher[0, ties[0]], teacher[1, ties[1]], teacher[2, ties] = 9.0, 9.0, 9.0, 9.0
    _, outputs = made(run, student, teacher, options_of(divergence), statistics=True)
    assert outputs.top1_agreement.tolist() == [1, 0, 1]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64(divergence):
    student, teacher = logits(3, 45)
    options = replace(options_of(divergence, 15.0), student=LogitTransform(0.3, 30.0))
    labels, weight = torch.tensor([1, -1, 44]), torch.full((3,), 0.1)
    double = student.double(), teacher.double()
    check(*double, options, tolerance=1e-11, statistics=True, labels=labels, label_weight=weight)


@pytest.mark.parametrize(("dtype", "place"), INTERPRETED)
def test_every_dtype_and_place_of_the_gradient(dtype, place):
    """Losses are as exact of narrow logits as of wide ones."""
    student, teacher = (x.to(DTYPES[dtype]) for x in row_kernels.make_logits(2, 70))
    labels, weight = torch.tensor([69, 3]), torch.tensor([0.3, 2.0])
    row_kernels.check(run, student, teacher, RowOptions(temperature=2.0), place, tolerance=TRUNCATED)
    row_kernels.check(run, student, None, RowOptions(None), place, labels=labels, label_weight=weight, tolerance=TRUNCATED)


@pytest.mark.parametrize("vocabulary", [64, 70])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float64")])
def test_models_of_different_dtypes(dtypes, vocabulary):
    student, teacher = (x.to(DTYPES[dtype]) for x, dtype in zip(row_kernels.make_logits(2, vocabulary), dtypes, strict=True))
    for place in ("in place", "float32"):
        row_kernels.check(run, student, teacher, RowOptions(temperature=2.0), place, statistics=True, tolerance=TRUNCATED)


def test_float64_arithmetic_of_float32_logits():
    student, teacher = logits(2, 70)
    row_kernels.check(run, student, teacher, RowOptions(temperature=2.0), "float64", arithmetic=torch.float64)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_narrow_gradient_over_its_logits_covers_none_that_is_still_to_be_read(divergence):
    """In the interpreter, whose programs are sequential; a certain student's entry comes last."""
    student, teacher = logits(2, 101)
    student[1, 40] += 20
    labels, weight = torch.tensor([70, 100]), torch.tensor([0.3, 2.0])
    place, options = "over it in bfloat16", options_of(divergence, 2.0)
    row_kernels.check(run, student, teacher, options, place, tolerance=TRUNCATED)
    options = replace(options, student=LogitTransform(1.5, 6.0))
    settings = {"labels": labels, "label_weight": weight, "statistics": True}
    row_kernels.check(run, student, teacher, options, place, tolerance=TRUNCATED, **settings)


@pytest.mark.parametrize(("dtype", "place"), [case for case in CASES if case[0] != "float64"])
def test_one_token_and_no_rows(dtype, place):
    for shape in ((2, 1), (0, 9)):
        student, teacher = torch.full(shape, 3.0).to(DTYPES[dtype]), torch.zeros(shape).to(DTYPES[dtype])
        gradient, outputs = made(run, student, teacher, RowOptions(), gradient=make_place(student, place))
        assert torch.equal(outputs.divergence, torch.zeros(shape[0]))
        assert gradient is None or torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_no_weight_have_no_gradient(divergence):
    (student, teacher), options = logits(2, 70), options_of(divergence)
    expected, _ = oracle(student, teacher, options, torch.ones(2))
    call = replace(make_call(student.clone(), teacher, options), row_weight=torch.zeros(2))
    run(call)
    assert torch.count_nonzero(call.gradient) == 0
    assert_outputs(call.outputs, expected, student, teacher, options, torch.float32)
