"""The Triton row kernel under the interpreter, against the definitions or the torch backend in float64 on the same inputs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastkd.kernels import rows as kernels
from fastkd.ops import rows
from fastkd.ops.backends import row_kernel
from fastkd.ops.divergence import Divergence
from fastkd.ops.rows import LogitTransform, RowLosses, RowOptions
from tests import row_kernels
from tests.oracle import assert_close, relative_error, wrong_gradients
from tests.row_kernels import CASES, DIVERGENCES, DTYPES, assert_losses, make_place

TOLERANCE = 2e-5
VANISHING = 4e-7
"""What is left in float32 of an element of a gradient that is zero."""
BLOCK = 32
# The interpreter truncates float32 to bfloat16, where the compiled kernel rounds, and gets float64 to bfloat16 wrong.
INTERPRETED = [case for case in CASES if case[0] != "float64" or "bfloat16" not in case[1]]
TRUNCATED = row_kernels.TOLERANCE | {torch.bfloat16: 2**-7}
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def quiet():
    """numpy warns of what the kernel guards against: -inf - -inf, 0 * inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks in a small vocabulary; the adaptor leaves the block to this default."""
    defaults = kernels.softmax_divergence.__kwdefaults__
    monkeypatch.setitem(defaults, "block", BLOCK)


def logits(count: int, vocabulary: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(17 * vocabulary + count)
    student = 3 * torch.randn(count, vocabulary, generator=generator)
    return student, student + noise * torch.randn(count, vocabulary, generator=generator)


def run(kernel, student: Tensor, teacher: Tensor | None, options: RowOptions, labels=None, label_weight=None, gradient=True):
    """The kernel's losses, and its gradient where the student's logits were, if wanted; float64 inputs are the oracle's."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    count = student.shape[0]

    def column(wanted: bool) -> Tensor | None:
        return torch.full((count,), torch.nan, dtype=dtype) if wanted else None

    has_teacher, stats = teacher is not None, options.stats
    out = RowLosses(column(has_teacher), column(labels is not None), column(stats), column(stats), column(stats))
    kernel(
        student,
        teacher,
        options,
        out,
        row_weight=torch.linspace(0.5, 2.0, count).to(dtype),
        labels=labels,
        label_weight=None if label_weight is None else label_weight.to(dtype),
        gradient=student if gradient else None,
    )
    return student, out


def check(student: Tensor, teacher: Tensor | None, options: RowOptions, tolerance: float = TOLERANCE, **settings) -> None:
    """Everything that the Triton kernel returns equals the torch backend's in float64."""
    double = None if teacher is None else teacher.double()
    expected_gradient, expected = run(rows.softmax_divergence_, student.double().clone(), double, options, **settings)
    triton = row_kernel("triton", student.device)
    gradient, losses = run(triton, student.clone(), None if teacher is None else teacher.clone(), options, **settings)
    if settings.get("gradient", True):
        finite = expected_gradient.isfinite()
        torch.testing.assert_close(gradient[~finite].double(), expected_gradient[~finite], equal_nan=True)
        vanishing = 0.0 if student.dtype == torch.float64 else VANISHING
        if not bool(((gradient[finite] - expected_gradient[finite]).abs() <= vanishing).all()):
            assert_close(gradient[finite], expected_gradient[finite], tolerance, "gradient")
    assert_losses(losses, expected, student, teacher, options, torch.float64 if student.dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 15.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence, temperature):
    student, teacher = logits(2, 83)
    check(student, teacher, RowOptions(Divergence.parse(divergence), temperature))


@pytest.mark.parametrize("vocabulary", [1, 7, 32, 33, 70])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_width(divergence, vocabulary):
    student, teacher = logits(2, vocabulary)
    check(student, teacher, RowOptions(Divergence.parse(divergence), 2.0, stats=True))


def test_the_block_that_is_launched(monkeypatch):
    monkeypatch.setitem(kernels.softmax_divergence.__kwdefaults__, "block", kernels.BLOCK)
    for vocabulary in (kernels.BLOCK - 3, 2 * kernels.BLOCK + 1):
        student, teacher = logits(2, vocabulary)
        check(student, teacher, RowOptions(temperature=2.0, stats=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_check_refuses_wrong_gradients(divergence):
    student, teacher = logits(4, 50)
    options = RowOptions(Divergence.parse(divergence))
    truth, _ = run(rows.softmax_divergence_, student.double(), teacher.double(), options)
    for wrong in wrong_gradients(truth).values():
        assert relative_error(wrong, truth) > 100 * TOLERANCE


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_close_student(divergence):
    """Close to its teacher the divergence is what is left of a cancellation, and the gradient too."""
    student, teacher = logits(2, 200, noise=0.02)
    options = RowOptions(Divergence.parse(divergence))
    truth, expected = run(rows.softmax_divergence_, student.double(), teacher.double(), options)
    gradient, losses = run(row_kernel("triton", student.device), student.clone(), teacher, options)
    assert_close(gradient, truth, TOLERANCE, "gradient")
    assert_losses(losses, expected, student, teacher, options, torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_constant_on_the_logits_changes_nothing(divergence):
    student, teacher = logits(2, 50)
    # Multiples of 1/64 stay exact under the shift.
    student, teacher = (student * 64).round() / 64, (teacher * 64).round() / 64
    options = RowOptions(Divergence.parse(divergence), 2.0)
    kernel = row_kernel("triton", student.device)
    gradient, losses = run(kernel, student.clone(), teacher, options)
    shifted_gradient, shifted = run(kernel, student + 60, teacher - 1000, options)
    assert_close(shifted_gradient, gradient, 1e-6)
    assert_close(shifted.divergence, losses.divergence, 1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_labels_and_softcap_and_scale(divergence):
    student, teacher = logits(3, 45)
    options = RowOptions(
        Divergence.parse(divergence), 2.0, student=LogitTransform(1.5, 6.0), teacher=LogitTransform(0.7, 30.0), stats=True
    )
    labels, weight = torch.tensor([16, -1, 44]), torch.tensor([0.3, 5.0, 1.0])
    check(student, teacher, options, labels=labels, label_weight=weight)
    check(student, teacher, replace(options, student=LogitTransform(-0.4), stats=False), labels=labels)


def test_softcap_on_small_and_large_logits():
    """tanh is the kernel's own: it must be right near zero, at its seam and where it saturates."""
    student = torch.tensor([[-1e4, -30.0, -7.6, -7.4, -1.0, -1e-3, 0.0, 1e-6, 0.5, 7.4999, 7.5001, 40.0, 1e5, INFINITY, -INFINITY]])
    check(student, student.flip(1), RowOptions(student=LogitTransform(1.0, 30.0), teacher=LogitTransform(1.0, 50.0)))


def test_labels_alone():
    student, _ = logits(4, 33)
    labels, weight = torch.tensor([32, -1, 0, 7]), torch.tensor([1.0, 1.0, 0.5, 2.0])
    check(student, None, RowOptions(divergence=None), labels=labels, label_weight=weight)
    check(student, None, RowOptions(divergence=None, student=LogitTransform(2.0, 5.0)), labels=labels, label_weight=weight)


def test_a_label_outside_of_the_vocabulary_gives_nan():
    student, _ = logits(2, 20)
    _, losses = run(row_kernel("triton", student.device), student, None, RowOptions(divergence=None), labels=torch.tensor([20, 3]))
    assert losses.cross_entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_gradient_the_logits_are_only_read(divergence):
    student, teacher = logits(2, 40)
    options = RowOptions(Divergence.parse(divergence))
    check(student, teacher, options, gradient=False)
    left, _ = run(row_kernel("triton", student.device), student.clone(), teacher, options, gradient=False)
    assert torch.equal(left, student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_rows(divergence):
    student, teacher = logits(3, 37)
    wide_student, wide_teacher = torch.full((3, 64), 9.0), torch.full((3, 41), 9.0)
    wide_student[:, 5:42], wide_teacher[:, :37] = student, teacher
    options = RowOptions(Divergence.parse(divergence), 2.0)
    truth, expected = run(rows.softmax_divergence_, student.double(), teacher.double(), options)
    gradient, losses = run(row_kernel("triton", student.device), wide_student[:, 5:42], wide_teacher[:, :37], options)
    assert_close(gradient, truth, TOLERANCE)
    assert_losses(losses, expected, student, teacher, options, torch.float32)
    assert torch.equal(wide_student[:, :5], torch.full((3, 5), 9.0)) and torch.equal(wide_student[:, 42:], torch.full((3, 22), 9.0))
    assert torch.equal(wide_teacher[:, :37], teacher)


def test_rows_may_lie_further_apart_than_32_bits_count():
    row_kernels.check_far_rows(row_kernel("triton", torch.device("cpu")), TRUNCATED)


def test_a_stride_along_the_vocabulary_is_refused():
    student, teacher = logits(3, 8)
    with pytest.raises(ValueError, match=r"teacher has strides \(1, 3\).*contiguous"):
        run(row_kernel("triton", student.device), student, teacher.T.contiguous().T, RowOptions())


def test_no_rows():
    gradient, losses = run(row_kernel("triton", torch.device("cpu")), torch.empty(0, 9), torch.empty(0, 9), RowOptions())
    assert gradient.shape == (0, 9) and losses.divergence.shape == (0,)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", ["teacher", "student", "both"])
def test_minus_infinity(divergence, where):
    """Masked tokens: in the first block, whole blocks of them, and the last token."""
    student, teacher = logits(2, 51)
    masked = torch.zeros(2, 51, dtype=torch.bool)
    masked[0, :36], masked[1, 3], masked[1, 14:33], masked[1, 50] = True, True, True, True
    if where != "student":
        teacher = teacher.masked_fill(masked, -INFINITY)
    if where != "teacher":
        student = student.masked_fill(masked, -INFINITY)
    check(student, teacher, RowOptions(Divergence.parse(divergence), 2.0, stats=True))


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_shows(divergence, side, bad):
    student, teacher = logits(3, 40)
    (student if side == "student" else teacher)[1, 37] = bad
    whole, options = logits(3, 40), RowOptions(Divergence.parse(divergence))
    clean_gradient, clean = run(rows.softmax_divergence_, *(x.double() for x in whole), options)
    gradient, losses = run(row_kernel("triton", student.device), student, teacher, options)
    assert losses.divergence.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    others = torch.tensor([0, 2])
    assert_close(gradient[others], clean_gradient[others], TOLERANCE)
    found, expected = (RowLosses(out.divergence[others]) for out in (losses, clean))
    assert_losses(found, expected, *(x[others] for x in whole), options, torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_of_minus_infinity_is_undefined(divergence):
    student, teacher = logits(2, 20)
    student[0] = -INFINITY
    gradient, losses = run(row_kernel("triton", student.device), student, teacher, RowOptions(Divergence.parse(divergence)))
    assert losses.divergence.isnan().tolist() == [True, False]
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64(divergence):
    student, teacher = logits(3, 45)
    options = RowOptions(Divergence.parse(divergence), 15.0, student=LogitTransform(0.3, 30.0), stats=True)
    labels, weight = torch.tensor([1, -1, 44]), torch.full((3,), 0.1)
    check(student.double(), teacher.double(), options, tolerance=1e-11, labels=labels, label_weight=weight)


@pytest.mark.parametrize(("dtype", "place"), INTERPRETED)
def test_every_dtype_and_place_of_the_gradient(dtype, place):
    """Losses are as exact of narrow logits as of wide ones."""
    student, teacher = (x.to(DTYPES[dtype]) for x in row_kernels.make_logits(2, 70))
    labels, weight = torch.tensor([69, 3]), torch.tensor([0.3, 2.0])
    kernel = row_kernel("triton", student.device)
    row_kernels.check(kernel, student, teacher, RowOptions(temperature=2.0), place, tolerance=TRUNCATED)
    row_kernels.check(kernel, student, None, RowOptions(None), place, labels=labels, label_weight=weight, tolerance=TRUNCATED)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_narrow_gradient_over_its_logits_covers_none_that_is_still_to_be_read(divergence):
    student, teacher = (x.float() for x in row_kernels.make_logits(2, 101))
    labels, weight = torch.tensor([70, 100]), torch.tensor([0.3, 2.0])
    kernel, place = row_kernel("triton", student.device), "over it in bfloat16"
    options = RowOptions(Divergence.parse(divergence), 2.0)
    row_kernels.check(kernel, student, teacher, options, place, tolerance=TRUNCATED)
    options = replace(options, student=LogitTransform(1.5, 6.0), stats=True)
    row_kernels.check(kernel, student, teacher, options, place, labels=labels, label_weight=weight, tolerance=TRUNCATED)


@pytest.mark.parametrize(("dtype", "place"), [case for case in CASES if case[0] != "float64"])
def test_one_token_and_no_rows(dtype, place):
    kernel = row_kernel("triton", torch.device("cpu"))
    for shape in ((2, 1), (0, 9)):
        student, teacher = torch.full(shape, 3.0).to(DTYPES[dtype]), torch.zeros(shape).to(DTYPES[dtype])
        gradient, losses = make_place(student, place), RowLosses(torch.full(shape[:1], torch.nan))
        kernel(student, teacher, RowOptions(), losses, row_weight=torch.ones(shape[0]), gradient=gradient)
        assert torch.equal(losses.divergence, torch.zeros(shape[0]))
        assert gradient is None or torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_no_weight_have_no_gradient(divergence):
    student, teacher = logits(2, 70)
    options = RowOptions(Divergence.parse(divergence))
    _, expected = run(rows.softmax_divergence_, student.double(), teacher.double(), options)
    over = student.clone()
    gradient = make_place(over, "over it in bfloat16")
    losses = RowLosses(torch.empty(2))
    kernel = row_kernel("triton", student.device)
    kernel(over, teacher, options, losses, row_weight=torch.zeros(2), gradient=gradient)
    assert torch.count_nonzero(gradient) == 0
    assert_losses(losses, expected, student, teacher, options, torch.float32)


def test_the_backend_says_where_it_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend='triton' needs .* the tensors are on cpu"):
        row_kernel("triton", torch.device("cpu"))
