"""The Triton relation kernels under the interpreter, through `relation_kl`, against its float64 reference; what they compile to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import fastkd
from fastkd import RelationTarget
from fastkd.kernels import compile as ahead
from fastkd.kernels import relation as kernels
from tests.oracle import assert_close, wrong_gradients

TOLERANCE = 2e-5
BATCH, HEADS, LENGTH = 2, 1, 37
FORMS, REDUCTIONS = ["kl", "cross_entropy"], ["mean", "sum", "none"]
GENERATOR = torch.Generator().manual_seed(3)
# One entry lacks keys in every tile and all of the first one; the other has a single key, in the last tile.
KEY_MASK = torch.rand(BATCH, LENGTH, generator=GENERATOR) > 0.4
KEY_MASK[0, :17], KEY_MASK[1] = False, torch.arange(LENGTH) == LENGTH - 2
QUERY_MASK = torch.rand(BATCH, LENGTH, generator=GENERATOR) > 0.4


@pytest.fixture(autouse=True)
def quiet():
    """numpy warns of NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, of unequal sizes, in a short sequence."""
    monkeypatch.setattr(kernels, "tile", lambda narrow: (32, 16))


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as integers, and multiplies these in a product."""
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def wide(x):
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: multiply(self, wide(a), wide(b), *rest))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """How often the kernels ran: a fall back to another path would pass the other checks."""
    calls = []
    launch = kernels.relation
    monkeypatch.setattr(kernels, "relation", lambda *args, **options: (calls.append(options), launch(*args, **options)))
    return calls


def normal(*shape: int, seed: int) -> Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(batch=BATCH, heads=HEADS, length=LENGTH, sizes=(5, 20), dtype=torch.float32, seed=0) -> list[Tensor]:
    """Student's q and k, then the teacher's, as attention makes them: (batch, sequence, heads, size), transposed."""
    shapes = [(batch, length, heads, size) for size in (sizes[0], sizes[0], sizes[1], sizes[1])]
    return [normal(*shape, seed=seed + i).transpose(1, 2).to(dtype) for i, shape in enumerate(shapes)]


def make_targets(count: int) -> list[RelationTarget]:
    """Masks and head sizes differ; one weight is a tensor."""
    first, second = make_inputs(sizes=(5, 7), seed=20), make_inputs(sizes=(16, 7), seed=30)
    masks = KEY_MASK.flip(1), QUERY_MASK.flip(0)
    targets = [RelationTarget(*first[:2], 0.7, *masks), RelationTarget(second[0], second[0], torch.tensor(0.3), query_mask=masks[1])]
    return targets[:count]


def run(function, inputs: list[Tensor], upstream: Tensor, one_tensor: bool = False, **options) -> tuple[Tensor, list[Tensor]]:
    q, k, *teacher = (x.detach() for x in inputs)
    trained = [q.requires_grad_()] if one_tensor else [q.requires_grad_(), k.requires_grad_()]
    value = function(trained[0], trained[-1], *teacher, **options)
    return value.detach(), list(torch.autograd.grad(value, trained, upstream.to(value.dtype).expand_as(value)))


def check(inputs: list[Tensor], tolerance: float = TOLERANCE, upstream: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients equal the reference's in float64."""
    upstream = torch.tensor(-1.7) if upstream is None else upstream
    value, gradients = run(fastkd.relation_kl, inputs, upstream, backend="triton", **options)
    exact = dict(options)
    exact["targets"] = [replace(t, q=t.q.double(), k=t.k.double()) for t in options.get("targets", ())]
    truth, true_gradients = run(fastkd.reference.relation_kl, [x.double() for x in inputs], upstream, **exact)
    assert value.dtype == torch.float32 and value.shape == truth.shape
    assert_close(value, truth, TOLERANCE)
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == inputs[0].dtype
        assert_close(gradient, true_gradient, tolerance, "gradient")
    return value, gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_form_and_reduction_with_several_targets(reduction, form, launches):
    upstream = normal(BATCH, HEADS, LENGTH, seed=9) if reduction == "none" else torch.tensor(0.3)
    options = {"key_mask": KEY_MASK, "query_mask": QUERY_MASK, "targets": make_targets(2)}
    check(make_inputs(), upstream=upstream, form=form, reduction=reduction, **options)
    passes = 2 if reduction == "none" else 1
    assert [options["add"] for options in launches] == [False, True, True] * passes


@pytest.mark.parametrize("masks", [{}, {"key_mask": KEY_MASK, "query_mask": QUERY_MASK}], ids=["no masks", "masks"])
@pytest.mark.parametrize("length", [1, 15, 16, 32, 33])
def test_lengths(length, masks):
    check(make_inputs(length=length, heads=2 if length < 33 else 1), **{name: mask[:, -length:] for name, mask in masks.items()})


@pytest.mark.parametrize("sizes", [(1, 3), (16, 16), (64, 24), (17, 64), (128, 128)], ids=str)
def test_head_sizes(sizes, launches):
    check(make_inputs(sizes=sizes, length=18))
    assert launches


@pytest.mark.parametrize("masks", [{}, {"key_mask": KEY_MASK}], ids=["none", "keys"])
def test_one_tensor_as_queries_and_keys_has_a_two_sided_gradient(masks):
    q, _, teacher, _ = make_inputs()
    check([q, q, teacher, teacher], one_tensor=True, **masks)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_entry_without_any_key_adds_zero_and_gets_zero(form, reduction):
    mask = KEY_MASK.clone()
    mask[0] = False
    upstream = normal(BATCH, HEADS, LENGTH, seed=9) if reduction == "none" else None
    value, gradients = check(make_inputs(), upstream=upstream, key_mask=mask, form=form, reduction=reduction)
    assert reduction != "none" or (value[0] == 0).all()
    assert all((gradient[0] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(dtype):
    """The scores of 16-bit inputs are float32's. A sum, because the mean's gradient would be subnormal in float16."""
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    targets = [replace(t, q=t.q.to(dtype), k=t.k.to(dtype)) for t in make_targets(2)]
    check(make_inputs(dtype=dtype), tolerance, key_mask=KEY_MASK, targets=targets, reduction="sum")


def test_close_models_in_bfloat16():
    """At 1e-4 nats or so a score or a row's sum in 16 bits would be far off."""
    q, k, *_ = make_inputs(sizes=(32, 1), dtype=torch.bfloat16)
    near = [(x + 0.02 * normal(*x.shape, seed=50 + i)).bfloat16() for i, x in enumerate((q, k))]
    truth = fastkd.reference.relation_kl(*(x.double() for x in (*near, q, k)))
    assert 1e-5 < truth < 1e-2
    upstream = torch.tensor(1.0)
    value, gradients = run(fastkd.relation_kl, [*near, q, k], upstream, backend="triton", reduction="sum")
    truth, true_gradients = run(fastkd.reference.relation_kl, [x.double() for x in (*near, q, k)], upstream, reduction="sum")
    assert_close(value, truth, 1e-3)
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert_close(gradient, true_gradient, 4e-3)


def test_dtypes_may_differ():
    q, k, teacher_q, teacher_k = make_inputs()
    inputs = [q, k, teacher_q.half(), teacher_k.bfloat16()]
    check(inputs, query_mask=QUERY_MASK)


def test_any_strides():
    """Heads first and last, every second column, a broadcast head, and masks that are transposed views."""
    q, k, teacher_q, teacher_k = make_inputs(heads=2)
    q = q.contiguous()
    k = torch.stack([k, torch.full_like(k, 9.0)], -1)[..., 0]
    teacher_q = teacher_q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    teacher_k = teacher_k[:, :1].expand(-1, 2, -1, -1)
    assert [x.stride(-1) == 1 for x in (q, k, teacher_q, teacher_k)] == [True, False, False, True]
    check([q, k, teacher_q, teacher_k], key_mask=KEY_MASK.T.contiguous().T, query_mask=QUERY_MASK.T.contiguous().T)


def test_batch_entries_may_lie_further_apart_than_32_bits_count():
    """Two strides pass 2^31 and one does not; of the 4 GiB between the first entry and the last hardly a page is touched."""
    inputs = make_inputs(batch=3, length=18, sizes=(5, 5), dtype=torch.float16)
    stride, size = 2**30 + 64, 18 * 5
    memory = torch.empty(2 * stride + 4 * size, dtype=torch.float16)
    far = [memory.as_strided(x.shape, (stride, 5, 5, 1), size * i) for i, x in enumerate(inputs)]
    for place, x in zip(far, inputs, strict=True):
        place.copy_(x)
    check(far, 5e-4, reduction="sum")


def test_scores_far_from_zero_change_nothing():
    """A column of ones in the keys shifts a row's scores by what the query has there."""
    q, k, teacher_q, teacher_k = make_inputs(sizes=(4, 4))
    q[..., 3], k[..., 3], teacher_q[..., 3], teacher_k[..., 3] = 100.0, 1.0, -80.0, 1.0
    check([q, k, teacher_q, teacher_k], key_mask=KEY_MASK)


def test_only_what_needs_a_gradient_gets_one(launches):
    inputs = make_inputs()
    for trained in (0, 1):
        own = [x.clone().requires_grad_(i == trained) for i, x in enumerate(inputs)]
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in own]
        gradient = torch.autograd.grad(fastkd.relation_kl(*own, backend="triton"), own[trained])[0]
        assert_close(gradient, torch.autograd.grad(fastkd.reference.relation_kl(*exact), exact[trained])[0], TOLERANCE)
    fastkd.relation_kl(*inputs, backend="triton")
    made = [[options[f"gradient_{name}"] is not None for name in "qk"] for options in launches]
    assert made == [[True, False], [False, True], [False, False]]
    assert launches[-1]["row_statistics"] is None


@pytest.mark.parametrize("shape", [{"batch": 0}, {"heads": 0}, {"length": 0}], ids=str)
def test_nothing_at_all(shape):
    value, gradients = run(fastkd.relation_kl, make_inputs(**shape), torch.tensor(1.0), backend="triton")
    assert value == 0 and all(gradient.numel() == 0 for gradient in gradients)


@pytest.mark.parametrize("side", range(4), ids=["student_q", "student_k", "teacher_q", "teacher_k"])
def test_nan_shows_in_its_own_rows(side):
    inputs = make_inputs()
    inputs[side][1, 0, 20] = torch.nan
    rows = fastkd.relation_kl(*inputs, backend="triton", reduction="none")
    expected = torch.zeros(BATCH, HEADS, LENGTH, dtype=torch.bool)
    expected[1, 0, slice(None) if side % 2 else 20] = True
    assert torch.equal(rows.isnan(), expected)


def test_every_run_gives_the_same_bits():
    options = {"key_mask": KEY_MASK, "targets": make_targets(1), "backend": "triton"}
    (value, gradients), (again, others) = (run(fastkd.relation_kl, make_inputs(), torch.tensor(1.0), **options) for _ in range(2))
    assert torch.equal(value, again) and all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("inputs", [make_inputs(dtype=torch.float64), make_inputs(sizes=(5, 129))], ids=["float64", "size 129"])
def test_the_row_kernel_serves_what_these_kernels_do_not(inputs, launches):
    value = fastkd.relation_kl(*inputs, backend="triton")
    assert_close(value, fastkd.reference.relation_kl(*(x.double() for x in inputs)), TOLERANCE)
    assert not launches


def test_the_check_refuses_wrong_gradients():
    for truth in run(fastkd.reference.relation_kl, [x.double() for x in make_inputs()], torch.tensor(1.0))[1]:
        for what, wrong in wrong_gradients(truth).items():
            with pytest.raises(AssertionError, match="relative L2 error"):
                assert_close(wrong, truth, TOLERANCE, what)


def test_what_dispatch_launches_is_compiled_ahead():
    names = [variant.name for variant in ahead.relation_variants()]
    assert len(names) == len(set(names))
    for kernel in ("rows", "queries", "keys"):
        assert {f"relation {kernel} d{size} {dtype}" for size in (16, 32, 64, 128) for dtype in ("fp32", "bf16")} <= set(names)


PROGRAM = """
import json
from fastkd.kernels import compile as ahead
report = {}
for kernel, size, dtype in (("rows", 64, "bf16"), ("queries", 128, "bf16"), ("keys", 128, "bf16"), ("keys", 64, "fp32")):
    variant = ahead.relation_variant(kernel, size, dtype)
    compiled = variant.compile(90)
    report[variant.name] = {"ttir": compiled.asm["ttir"], **vars(ahead.resources(compiled.asm["cubin"]))}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_spills_and_nothing_is_added_atomically(report):
    for name, took in report.items():
        assert took["spills"] == 0, name
        assert "atomic" not in took["ttir"]


def test_products_have_the_precision_of_their_inputs(report):
    """Precision of scores in float32 and of G with them: ieee, which is no word in the code; of G with 16-bit inputs: TF32."""
    for name, took in report.items():
        products = re.findall(r"tt\.dot [^:]*", took["ttir"])
        assert len(products) == (2 if " rows " in name else 3), name
        narrow = [product for product in products if "tf32" in product]
        assert len(narrow) == ("bf16" in name and " rows " not in name), name


def test_a_pair_is_addressed_in_64_bits(report):
    for name, took in report.items():
        starts = re.findall(r"tt\.addptr %(?:student|teacher)\w+, %\w+ : !tt\.ptr<\w+>, (\w+)", took["ttir"])
        assert starts and set(starts) == {"i64"}, name
