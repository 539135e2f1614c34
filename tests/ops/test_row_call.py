"""The row kernels that run on the CPU, called as the losses call them, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd.ops import backend_cpp, backend_torch
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, RowOutputs
from tests.oracle import relative_error, wrong_gradients
from tests.row_kernels import (
    CASES,
    DIVERGENCES,
    DTYPES,
    TOLERANCE,
    allowed_errors,
    assert_outputs,
    check,
    check_far_rows,
    check_teacher_rest,
    make_logits,
    make_outputs,
    make_place,
    oracle,
)

INFINITY = float("inf")
SINGLE = [case for case in CASES if case[0] != "float64"]


@pytest.fixture
def run(backend):
    return {"torch": backend_torch, "cpp": backend_cpp}[backend].run


def call(run, student: Tensor, teacher: Tensor, gradient: Tensor | None, row_weight: float = 1.0, options: RowOptions | None = None):
    """The kernel's divergences, with every row of one weight."""
    outputs = make_outputs(len(student), torch.float32, has_teacher=True, has_labels=False, statistics=False)
    weight, options = torch.full((len(student),), row_weight), options or RowOptions()
    run(RowCall(student=student, teacher=teacher, options=options, outputs=outputs, row_weight=weight, gradient=gradient))
    return outputs.divergence


@pytest.mark.parametrize(("dtype", "place"), CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_dtype_and_place_of_the_gradient(run, divergence, dtype, place):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(4, 83))
    check(run, student, teacher, RowOptions(Divergence.parse(divergence)), place)


@pytest.mark.parametrize(("dtype", "place"), [("float32", "over it in bfloat16"), ("bfloat16", "bfloat16"), ("float64", "in place")])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(run, divergence, temperature, dtype, place):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(5, 61))
    labels, weight = torch.tensor([16, -1, 60, 0, 7]), torch.tensor([0.3, 5.0, 1.0, 0.0, 2.0])
    options = RowOptions(Divergence.parse(divergence), temperature, LogitTransform(1.5, 6.0), LogitTransform(-0.7, 30.0))
    check(run, student, teacher, options, place, labels=labels, label_weight=weight, statistics=True)
    options = RowOptions(Divergence.parse(divergence), temperature, LogitTransform(0.4), LogitTransform(0.7))
    check(run, student, teacher, options, place)


@pytest.mark.parametrize(("dtype", "place"), CASES)
def test_labels_alone(run, dtype, place):
    student = make_logits(4, 33)[0].to(DTYPES[dtype])
    labels, weight = torch.tensor([32, -1, 0, 7]), torch.tensor([1.0, 1.0, 0.5, 2.0])
    for transform in (LogitTransform(), LogitTransform(2.0, 5.0)):
        check(run, student, None, RowOptions(None, student=transform), place, labels=labels, label_weight=weight)


@pytest.mark.parametrize(("dtype", "place"), CASES)
@pytest.mark.parametrize("vocabulary", [2, 7, 33, 1023, 2049])
def test_every_width(run, vocabulary, dtype, place):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, vocabulary))
    check(run, student, teacher, RowOptions(temperature=2.0), place)
    check(run, student, teacher, RowOptions(Divergence.jsd(0.5), 2.0), place, statistics=True)


@pytest.mark.parametrize(("dtype", "place"), SINGLE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one(run, divergence, dtype, place):
    """Nothing can differ: zero, up to the rounding of the logarithm of the mixing weight."""
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, 1))
    rows, options = (student.clone(), teacher.clone()), RowOptions(Divergence.parse(divergence))
    gradient = make_place(student, place)
    found = call(run, student, teacher, gradient, options=options)
    assert_outputs(RowOutputs(divergence=found), {"divergence": torch.zeros(3)}, *rows, options, torch.float32)
    assert gradient is None or gradient.abs().max() < 2e-7


def test_the_dtype_of_the_weights_is_that_of_the_arithmetic(run):
    """Logits of 16 bits are exact in float64, so the losses are as exact as float64 is; float64 logits serve float32 weights."""
    student, teacher = make_logits(3, 47)
    options = RowOptions(Divergence.skew_kl(0.1), 2.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check(run, student.to(dtype), teacher.to(dtype), options, "none", arithmetic=torch.float64, statistics=True)
    check(run, student, teacher, options, "in place", arithmetic=torch.float32, statistics=True)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_the_models_may_differ_in_dtype(run, student_dtype, teacher_dtype):
    student, teacher = make_logits(3, 47)
    check(run, student.to(DTYPES[student_dtype]), teacher.to(DTYPES[teacher_dtype]), RowOptions(), arithmetic=torch.float32)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_narrow_gradient_is_the_wide_one_rounded_to_nearest(run, divergence, narrow):
    """Bit for bit, wherever it is written, NaN too."""
    options = RowOptions(Divergence.parse(divergence))
    student, teacher = (x.float() for x in make_logits(6, 1500))
    student[2, 1400] = torch.nan
    wide, beside, over = torch.empty_like(student), torch.empty_like(student, dtype=narrow), student.clone()
    above = over.view(narrow)[:, :1500]
    for logits, gradient in ((student.clone(), wide), (student.clone(), beside), (over, above)):
        call(run, logits, teacher.clone(), gradient, options=options)
    assert wide[2].isnan().all() and wide[[0, 1, 3, 4, 5]].isfinite().all()
    for gradient in (beside, above):
        torch.testing.assert_close(gradient, wide.to(narrow), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "place"), SINGLE)
def test_no_rows(run, dtype, place):
    student, teacher = (torch.empty(0, 9, dtype=DTYPES[dtype]) for _ in range(2))
    assert call(run, student, teacher, make_place(student, place)).shape == (0,)


@pytest.mark.parametrize(("dtype", "place"), [case for case in SINGLE if case[1] != "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_no_weight_have_no_gradient(run, divergence, dtype, place):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, 47))
    rows, options = (student.clone(), teacher.clone()), RowOptions(Divergence.parse(divergence))
    expected, _ = oracle(*rows, options, torch.zeros(3))
    gradient = make_place(student, place)
    found = call(run, student, teacher, gradient, row_weight=0.0, options=options)
    assert torch.count_nonzero(gradient) == 0
    assert_outputs(RowOutputs(divergence=found), expected, *rows, options, torch.float32)


@pytest.mark.parametrize(("dtype", "place"), [case for case in SINGLE if case[1] != "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_neither_model_may_say(run, divergence, dtype, place):
    """-inf in both rows leaves the same loss over the other tokens, and no gradient."""
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, 47))
    allowed = torch.ones(47, dtype=torch.bool)
    allowed[[0, 5, 31, 32, 33, 46]] = False
    options = RowOptions(Divergence.parse(divergence))
    rows = student[:, allowed], teacher[:, allowed]
    expected, truth = oracle(*rows, options, torch.ones(3))
    student[:, ~allowed], teacher[:, ~allowed] = -INFINITY, -INFINITY
    gradient = make_place(student, place)
    found = call(run, student, teacher, gradient, options=options)
    assert_outputs(RowOutputs(divergence=found), expected, *rows, options, torch.float32)
    assert relative_error(gradient[:, allowed], truth) < TOLERANCE[torch.float32] + TOLERANCE[gradient.dtype]
    assert torch.count_nonzero(gradient[:, ~allowed]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_logits_may_lie_apart(run, dtype):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, 47))
    wide = [torch.full((3, 60), 9.0, dtype=DTYPES[dtype]) for _ in range(2)]
    for block, values in zip(wide, (student, teacher), strict=True):
        block[:, 5:52] = values
    _, truth = oracle(student, teacher, RowOptions(), torch.ones(3))
    call(run, wide[0][:, 5:52], wide[1][:, 5:52], wide[0][:, 5:52])
    assert relative_error(wide[0][:, 5:52], truth) < TOLERANCE[DTYPES[dtype]]
    for block in wide:
        assert bool((block[:, :5] == 9.0).all() and (block[:, 52:] == 9.0).all())


def test_rows_may_lie_further_apart_than_32_bits_count(run):
    check_far_rows(run)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_check_refuses_wrong_gradients(divergence):
    """Not even what bfloat16 leaves of a gradient may be mistaken for a wrong one."""
    student, teacher = make_logits(4, 83)
    _, truth = oracle(student, teacher, RowOptions(Divergence.parse(divergence)), torch.ones(4))
    for wrong in wrong_gradients(truth).values():
        assert relative_error(wrong, truth) > 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [7, 83, 2049, 30522, 128256])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_check_refuses_wrong_losses(divergence, vocabulary, temperature):
    """At every width: none of them is what float32 may leave."""
    student, teacher = make_logits(3, vocabulary)
    options = RowOptions(Divergence.parse(divergence), temperature)
    expected, _ = oracle(student, teacher, options, torch.ones(3), torch.zeros(3, dtype=torch.int64))
    allowed = allowed_errors(expected, student, teacher, options, torch.float32)
    for name in ("divergence", "cross_entropy", "student_entropy", "teacher_entropy"):
        truth = expected[name].detach()
        for wrong in wrong_gradients(truth).values():
            assert bool(((wrong - truth).abs() > allowed[name]).any()), name


@pytest.mark.parametrize(("dtype", "place"), CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_with_tokens_that_have_no_column(run, divergence, dtype, place):
    check_teacher_rest(run, divergence, DTYPES[dtype], place)
