"""What only the C++ backend has: products of 16-bit matrices into float32, variants for processors, logits that it keeps, refusals.

Values of its row kernel in the variant that this machine takes: test_row_call.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops import backend_cpp as cpp
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, TopK
from tests.near_certainty import GAPS, check_near_certainty
from tests.oracle import assert_close
from tests.row_kernels import (
    DIVERGENCES,
    DTYPES,
    TOLERANCE,
    assert_outputs,
    check,
    make_logits,
    make_outputs,
    oracle,
    topk_divergence,
)

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
NARROW = [torch.bfloat16, torch.float16]
LONG = 2500  # more than two of the blocks that forward KL goes by


def make_call(student: Tensor, teacher: Tensor | TopK, **settings) -> RowCall:
    """Forward KL of these very logits, in float32, with weights of one."""
    outputs = make_outputs(len(student), torch.float32, has_teacher=True, has_labels=False, statistics=False)
    defaults = {"options": RowOptions(), "outputs": outputs, "row_weight": torch.ones(len(student))}
    return RowCall(student=student, teacher=teacher, **(defaults | settings))


@pytest.fixture(autouse=True)
def backend():
    """These tests name their backend: once is enough. The variant that the environment asks for comes back at the end of each."""
    yield cpp.extension(build=True) if shutil.which("c++") else None
    cpp._choose_variant.cache_clear()
    cpp.extension(build=False)


def matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False, padding: int = 0) -> Tensor:
    """Random (rows, columns), lying row by row or column by column, `padding` elements apart."""
    outer, inner = (columns, rows) if transposed else (rows, columns)
    generator = torch.Generator().manual_seed(31 * rows + columns)
    lying = torch.randn(outer, inner + padding, generator=generator).to(dtype)[:, :inner]
    return lying.T if transposed else lying


def tiles(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """Let the CPU have tiles (AMX) for these and no others."""
    monkeypatch.setattr(cpp, "_HAS_TILES", {dtype: lambda has=dtype in dtypes: has for dtype in NARROW})


def has_own_product() -> bool:
    """Whether this machine has AVX512-BF16, and may use it."""
    module = cpp.extension(build=True)
    return module.variant() == "avx512" and module.has_bf16_gemm()


@needs_mkl
@pytest.mark.parametrize("with_tiles", [(), (torch.bfloat16,), (torch.bfloat16, torch.float16)], ids=str)
def test_mkl_serves_the_dtypes_that_the_cpu_has_tiles_for_and_fastkd_bfloat16_by_avx512(monkeypatch, with_tiles):
    """Nothing that could differ between two runs on one machine, as a clock would, chooses the arithmetic."""
    tiles(monkeypatch, *with_tiles)
    own = "fastkd" if has_own_product() else None
    assert cpp.multiplier(torch.bfloat16) == ("mkl" if torch.bfloat16 in with_tiles else own)
    assert cpp.multiplier(torch.float16) == ("mkl" if torch.float16 in with_tiles else None)
    assert cpp.multiplier(torch.float32) is None
    assert cpp.sixteen_bit_dtypes() == {dtype for dtype in NARROW if cpp.multiplier(dtype)}


@needs_mkl
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("has_tiles", [False, True])
def test_heads_give_the_same_loss_upcast_or_as_they_are(monkeypatch, dtype, has_tiles):
    tiles(monkeypatch, *(NARROW if has_tiles else ()))
    student, head, teacher, teacher_head = matrix(9, 16, dtype), matrix(203, 16, dtype), matrix(9, 24, dtype), matrix(203, 24, dtype)
    leaves = student.requires_grad_(), head.requires_grad_()
    loss = fastkd.linear_kl_div(*leaves, teacher, teacher_head)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = fastkd.reference.linear_kl_div(*exact, teacher.double(), teacher_head.double())
    assert_close(loss, truth, 2e-5)
    for made, gradient in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True):
        assert_close(made, gradient, 5e-3)


PRODUCTS = {"mkl bfloat16": torch.bfloat16, "mkl float16": torch.float16, "fastkd bfloat16": torch.bfloat16}
# The last two are more than one of the blocks by which fastkd's product goes, along each side.
SHAPES = [(5, 7, 33), (1, 64, 17), (16, 1, 9), (1, 1, 1), (1, 9, 1), (9, 5, 1), (64, 96, 127), (300, 387, 33), (15, 769, 4099)]


@needs_mkl
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_exact(monkeypatch, product, transposed, shape, accumulate):
    """out is strided and holds NaN, which only accumulation may read."""
    (m, k, n), dtype, is_own = shape, PRODUCTS[product], product.startswith("fastkd")
    if is_own and not has_own_product():
        pytest.skip("no AVX512-BF16, or FASTKD_CPU_VARIANT leaves it out")
    tiles(monkeypatch, *(() if is_own else NARROW))
    assert cpp.multiplier(dtype) == product.split()[0]
    for padding in (0, 3):
        a, b = matrix(m, k, dtype, transposed[0], padding), matrix(k, n, dtype, transposed[1], padding)
        wide = torch.full((m, n + 2 * padding), 9.0)
        out = wide[:, padding : padding + n]
        out[:] = matrix(m, n, torch.float32) if accumulate else torch.nan
        truth = a.double() @ b.double() + (out.double() if accumulate else 0.0)
        cpp.mm_16bit_(out, a, b, accumulate)
        assert_close(out, truth, 1e-6)  # float32 sums of exact products
        assert bool((wide[:, :padding] == 9.0).all() and (wide[:, padding + n :] == 9.0).all())


@needs_mkl
@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty_results(shape):
    m, k, n = shape
    cpp.mm_16bit_(torch.empty(m, n), torch.ones(m, k).bfloat16(), torch.ones(k, n).bfloat16(), False)


@needs_mkl
def test_a_sum_of_nothing_is_zero():
    a, b, out = torch.empty(3, 0).bfloat16(), torch.empty(0, 4).bfloat16(), torch.full((3, 4), 2.0)
    cpp.mm_16bit_(out, a, b, True)
    assert torch.equal(out, torch.full((3, 4), 2.0))
    cpp.mm_16bit_(out, a, b, False)
    assert torch.equal(out, torch.zeros(3, 4))


@needs_mkl
def test_products_that_do_not_fit_are_refused():
    a, b, out = torch.ones(3, 4).bfloat16(), torch.ones(4, 5).bfloat16(), torch.empty(3, 5)
    with pytest.raises(RuntimeError, match="two bfloat16 or two float16"):
        cpp.mm_16bit_(out, a, b.half(), False)
    with pytest.raises(RuntimeError, match="two bfloat16 or two float16"):
        cpp.mm_16bit_(out.double(), a, b, False)
    with pytest.raises(RuntimeError, match="shapes"):
        cpp.mm_16bit_(out, a, b[:3], False)
    with pytest.raises(RuntimeError, match="stride 1 along one dimension"):
        cpp.mm_16bit_(out, torch.ones(6, 8).bfloat16()[::2, ::2], b, False)
    with pytest.raises(RuntimeError, match="rows of stride 1"):
        cpp.mm_16bit_(torch.empty(5, 3).T, a, b, False)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def variant(request, backend, monkeypatch):
    """Each in turn is what FASTKD_CPU_VARIANT asked for."""
    if request.param not in backend.variants():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("FASTKD_CPU_VARIANT", request.param)
    cpp._choose_variant.cache_clear()
    cpp.extension(build=False)
    return request.param


def test_the_environment_chooses_the_variant(variant, backend):
    assert backend.variant() == variant


def test_the_best_variant_is_the_default(backend, monkeypatch):
    order = ["avx512", "avx2", "baseline"]
    assert backend.variants() == [name for name in order if name in backend.variants()] and backend.variants()[-1] == "baseline"
    for unset in (None, ""):
        monkeypatch.delenv("FASTKD_CPU_VARIANT", raising=False) if unset is None else monkeypatch.setenv("FASTKD_CPU_VARIANT", unset)
        backend.choose_variant("baseline")
        cpp._choose_variant.cache_clear()
        assert cpp.extension(build=False).variant() == backend.variants()[0]


def test_a_variant_that_the_cpu_lacks_is_refused(backend, monkeypatch):
    """In words at every call, not by an illegal instruction."""

    class WithoutAvx512:
        def variants(self):
            return ["avx2", "baseline"]

    for name, module in (("avx512", WithoutAvx512()), ("sse9", backend)):
        monkeypatch.setenv("FASTKD_CPU_VARIANT", name)
        cpp._choose_variant.cache_clear()
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"FASTKD_CPU_VARIANT is '{name}', and this CPU has .*baseline; choose one of these"):
                cpp._choose_variant(module)
    with pytest.raises(ValueError, match="FASTKD_CPU_VARIANT is 'sse9'"):
        cpp.extension(build=False)
    with pytest.raises(RuntimeError, match="no variant sse9"):
        backend.choose_variant("sse9")


@pytest.mark.parametrize(
    ("dtype", "place"), [("float32", "in place"), ("float32", "over it in bfloat16"), ("float16", "float16"), ("float64", "none")]
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_variant_is_exact(variant, divergence, dtype, place):
    """Widths below, at and beside multiples of a vector, over several blocks, and the paths of labels and of plain forward KL."""
    for vocabulary in (1, 2, 16, 33, 1023, 2049):
        student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, vocabulary))
        plain = RowOptions(Divergence.parse(divergence), 2.0)
        check(cpp.run, student, teacher, plain, place)
        labels, weight = torch.tensor([vocabulary - 1, -1, 0]), torch.tensor([1.0, 1.0, 0.5])
        capped = RowOptions(plain.divergence, 2.0, LogitTransform(1.5, 6.0), LogitTransform(-0.7, 30.0))
        check(cpp.run, student, teacher, capped, place, statistics=True, labels=labels, label_weight=weight)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_variant_is_exact_for_lists(variant, divergence):
    for vocabulary in (2, 33, 2049):
        student, teacher = make_logits(3, vocabulary)
        log_p, ids = (teacher / 2.0).log_softmax(-1).topk(2)
        log_tail = (teacher / 2.0).log_softmax(-1).scatter(1, ids, -torch.inf).logsumexp(-1)
        options = RowOptions(Divergence.parse(divergence), 2.0, LogitTransform(1.5, 6.0))
        logits = student.float().requires_grad_()
        labels, weight = torch.tensor([vocabulary - 1, -1, 0]), torch.tensor([1.0, 1.0, 0.5])
        outputs = make_outputs(3, torch.float32, has_teacher=True, has_labels=True, statistics=False)
        settings = {"options": options, "outputs": outputs, "labels": labels, "label_weight": weight}
        gradient = torch.empty(3, vocabulary)
        lists = TopK(ids, log_p.float(), log_tail.float())
        cpp.run(make_call(logits.detach().clone(), lists, **settings, gradient=gradient))
        exact = options.student.apply(logits.double())
        values = topk_divergence(exact, lists, "bucket", options.divergence, temperature=2.0)
        cross_entropy = torch.nn.functional.cross_entropy(exact, labels, ignore_index=-1, reduction="none")
        (truth,) = torch.autograd.grad(values.sum() + weight.double() @ cross_entropy, logits)
        assert_close(gradient, truth, TOLERANCE[torch.float32])
        expected = {"divergence": values.detach(), "cross_entropy": cross_entropy.detach()}
        assert_outputs(outputs, expected, logits, None, options, torch.float32)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, None])
def test_gradients_of_a_student_that_is_nearly_certain(variant, divergence, gap):
    check_near_certainty(cpp.run, divergence, gap)


def test_variants_differ_by_rounding_alone(backend):
    """Where a CPU has several, they are not one machine code under several names."""
    if len(backend.variants()) == 1:
        pytest.skip("this CPU has the baseline alone")
    student, teacher = (x.float() for x in make_logits(64, 1023))
    found = []
    for name in backend.variants():
        backend.choose_variant(name)
        call = make_call(student.clone(), teacher.clone())
        cpp.run(call)
        found.append(call.outputs.divergence)
    assert not any(torch.equal(found[0], other) for other in found[1:])


def test_a_tie_is_rounded_to_even():
    """Student (1/2, 1/2), teacher (1, 0): the gradient is half the row's weight, here midway between two bfloat16 numbers."""
    half = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    expected = torch.tensor([[-1.0, 1.0], [-1 - 2**-6, 1 + 2**-6]])
    gradient, teacher = torch.empty(2, 2, dtype=torch.bfloat16), torch.tensor([[0.0, -torch.inf]]).repeat(2, 1)
    cpp.run(make_call(torch.zeros(2, 2), teacher, row_weight=2 * half, gradient=gradient))
    assert torch.equal(gradient.float(), expected)


def test_tensors_that_do_not_fit_are_refused():
    call = make_call(*(x.float() for x in make_logits(3, 8)))
    with pytest.raises(RuntimeError, match="stride 1 along the vocabulary"):
        cpp.run(replace(call, student=call.student.T.contiguous().T))
    with pytest.raises(RuntimeError, match="one shape"):
        cpp.run(replace(call, teacher=call.teacher[:, :7]))
    with pytest.raises(RuntimeError, match="got Int"):
        cpp.run(replace(call, gradient=torch.zeros(3, 8, dtype=torch.int32)))
    with pytest.raises(RuntimeError, match="must be contiguous"):
        cpp.run(replace(call, row_weight=torch.ones(6)[::2]))


def test_what_it_does_not_take_is_said(backend, monkeypatch):
    call = make_call(*(x.float() for x in make_logits(3, 8)))
    assert cpp.why_not(call) is None
    assert cpp.why_not(replace(call, student=call.student.to("meta"))) == "it runs on the CPU, and the logits are on meta."
    monkeypatch.setattr(cpp, "_library", SimpleNamespace(get=lambda *, build: None))
    assert cpp.why_not(call) == "it is not compiled: run `python -m fastkd.ops.backend_cpp`, which needs a C++20 compiler."
    assert cpp.why_not(call, build=True) is None


@pytest.mark.parametrize("labels", [None, torch.tensor([2, -1, 0, 1999])], ids=["", "labels"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(0.3)", None])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_logits_that_are_kept_stay_and_give_the_same(dtype, divergence, bias, labels):
    """Bit for bit what is made of logits that may be written to; the caller's stay, and nothing is copied before the kernel."""
    if divergence is None and labels is None:
        pytest.skip("a call without teacher and labels")
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(4, LONG))
    kind = torch.float64 if dtype == "float64" else torch.float32
    biases = dict.fromkeys(("student_bias", "teacher_bias"), torch.linspace(-1, 1, LONG, dtype=kind)) if bias else {}
    results = []
    for keeps in (False, True):
        ours, theirs = (x.clone() for x in (student, teacher))
        outputs = make_outputs(4, kind, divergence is not None, labels is not None, statistics=False)
        call = make_call(
            ours,
            theirs if divergence else None,
            options=RowOptions(Divergence.parse(divergence) if divergence else None, 2.0),
            outputs=outputs,
            row_weight=torch.linspace(0.5, 2, 4, dtype=kind),
            labels=labels,
            label_weight=None if labels is None else torch.ones(4, dtype=kind),
            gradient=torch.empty(4, LONG, dtype=kind),
            keeps_logits=keeps,
            **biases,
        )
        cpp.run(call)
        results.append([x for x in (*vars(outputs).values(), call.gradient) if x is not None])
    assert torch.equal(ours, student) and torch.equal(theirs, teacher)
    assert all(torch.equal(free, kept) for free, kept in zip(*results, strict=True))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.7], ids="scale={}".format)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_biases_are_added_first(dtype, divergence, scale, labels):
    student, teacher = (x.to(dtype) for x in make_logits(4, LONG))
    generator = torch.Generator().manual_seed(5)
    biases = {f"{side}_bias": torch.randn(LONG, generator=generator) for side in ("student", "teacher")}
    options = RowOptions(Divergence.parse(divergence), 2.0, LogitTransform(scale), LogitTransform(1.5))
    settings = {"labels": torch.tensor([-1, 7, -1, 2400]), "label_weight": torch.full((4,), 0.3)} if labels else {}
    check(cpp.run, student, teacher, options, "float64" if dtype == torch.float64 else "float32", **biases, **settings)


@pytest.mark.parametrize("where", ["beginning", "middle", "end"])
def test_blocks_that_no_probability_is_in(where):
    """A masked stretch of the vocabulary, longer than a block, and large logits before or behind it."""
    student, teacher = (x.float() for x in make_logits(4, LONG))
    hidden = {"beginning": slice(0, 1100), "middle": slice(700, 2100), "end": slice(1300, LONG)}[where]
    for logits, sign in ((student, 1), (teacher, -1)):
        logits += sign * torch.linspace(-60, 60, LONG)
        logits[:, hidden] = -torch.inf
    seen = torch.ones(LONG, dtype=torch.bool)
    seen[hidden] = False
    exact = make_call(student[:, seen], teacher[:, seen])
    expected, truth = oracle(exact.student, exact.teacher, exact.options, exact.row_weight)
    call = make_call(student.clone(), teacher.clone(), gradient=torch.empty_like(student))
    cpp.run(call)
    assert not call.gradient[:, hidden].any()
    assert_outputs(call.outputs, expected, exact.student, exact.teacher, exact.options, torch.float32)
    assert_close(call.gradient[:, seen], truth, TOLERANCE[torch.float32])
