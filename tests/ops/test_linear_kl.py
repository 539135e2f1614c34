"""linear_kl_div against the float64 oracle: value and every gradient, over every option."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import Divergence
from tests.oracle import assert_close, relative_error, wrong_gradients

TOKENS, STUDENT_VOCAB, TEACHER_VOCAB, STUDENT_WIDTH, TEACHER_WIDTH = 23, 37, 53, 8, 12
DIVERGENCES = ["forward_kl", "reverse_kl", Divergence.mixed(0.3), "tvd", "nla"]
DIVERGENCES += [Divergence.jsd(0.3), Divergence.skew_kl(0.1), Divergence.skew_rkl(0.7)]
NAMES = ["student_hidden", "student_weight", "student_bias"]


def make_inputs(seed: int = 0, dtype: torch.dtype = torch.float64, leading: tuple[int, ...] = (TOKENS,)) -> dict[str, Tensor]:
    """Logits of ordinary size (a few nats of KL), biases of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "student_hidden": normal(*leading, STUDENT_WIDTH),
        "student_weight": normal(STUDENT_VOCAB, STUDENT_WIDTH) * 0.5,
        "teacher_hidden": normal(*leading, TEACHER_WIDTH),
        "teacher_weight": normal(TEACHER_VOCAB, TEACHER_WIDTH) * 0.5,
        "student_bias": normal(STUDENT_VOCAB),
        "teacher_bias": normal(TEACHER_VOCAB),
    }
    for name in NAMES:
        inputs[name].requires_grad_()
    return inputs


def value_and_gradients(function, inputs: dict[str, Tensor], upstream: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    value = function(**inputs, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), list(torch.autograd.grad(value, [inputs[n] for n in NAMES], upstream))


def check(
    options: dict, dtype: torch.dtype, tolerance: float, inputs: dict[str, Tensor] | None = None, upstream: Tensor | None = None
) -> None:
    inputs = inputs or make_inputs(dtype=dtype)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    exact_options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    value, gradients = value_and_gradients(fastkd.linear_kl_div, inputs, upstream, **options)
    truth, true_gradients = value_and_gradients(fastkd.reference.linear_kl_div, exact, upstream, **exact_options)
    assert_close(value, truth, tolerance)
    for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
        assert gradient.dtype == inputs[name].dtype
        assert_close(gradient, true_gradient, tolerance, name)


PRECISIONS = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]
MASK = torch.rand(TOKENS, generator=torch.Generator().manual_seed(5)) > 0.4
LABELS = torch.randint(STUDENT_VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(6)).masked_fill(
    torch.arange(TOKENS) % 5 == 0, -100
)
INDEX = torch.randperm(TEACHER_VOCAB, generator=torch.Generator().manual_seed(7))[:STUDENT_VOCAB]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 15.0])
def test_every_divergence_at_every_temperature(divergence, temperature, dtype, tolerance):
    check({"divergence": divergence, "temperature": temperature, "vocab_index": INDEX, "chunk_size": 7}, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_at_once(divergence, reduction, dtype, tolerance):
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(3)) if reduction == "none" else torch.tensor(-1.7)
    check(
        {
            "divergence": divergence,
            "temperature": 2.0,
            "mask": MASK * torch.linspace(0.5, 2.0, TOKENS, dtype=dtype),
            "vocab_index": INDEX,
            "labels": LABELS,
            "label_weight": 0.6,
            "student_softcap": 3.0,
            "teacher_softcap": 5.0,
            "student_logit_scale": 0.7,
            "teacher_logit_scale": 1.3,
            "reduction": reduction,
            "chunk_size": 5,
        },
        dtype,
        tolerance,
        upstream=upstream,
    )


OPTIONS = {
    "plain": {},
    "bool mask": {"mask": MASK},
    "token weights": {"mask": MASK * torch.linspace(0.1, 3.0, TOKENS)},
    "vocabulary gather": {"vocab_index": INDEX},
    "labels alone count their own tokens": {"labels": LABELS, "label_weight": 1.5, "mask": MASK},
    "denominator": {"denominator": 7.5, "labels": LABELS, "label_weight": 0.5},
    "tensor denominator": {"denominator": torch.tensor(7.5)},
    "student soft-cap": {"student_softcap": 2.0},
    "teacher soft-cap": {"teacher_softcap": 2.0},
    "scales": {"student_logit_scale": 0.25, "teacher_logit_scale": 3.0},
    "sum": {"reduction": "sum", "mask": MASK},
}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_each_option(options, dtype, tolerance):
    check(options, dtype, tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [1, 3, TOKENS - 1, TOKENS, 1000])
def test_the_chunk_changes_nothing(chunk_size, reduction):
    check({"chunk_size": chunk_size, "reduction": reduction, "mask": MASK}, torch.float64, 1e-12)


def test_leading_dims_are_flattened_inside():
    inputs = make_inputs(leading=(3, 2, 4))
    check({"mask": torch.rand(3, 2, 4) > 0.3}, torch.float64, 1e-12, inputs)
    assert fastkd.linear_kl_div(**inputs, reduction="none").shape == (3, 2, 4)


def test_non_contiguous_inputs():
    inputs = make_inputs()
    for name in ("student_hidden", "student_weight", "teacher_hidden"):
        inputs[name] = inputs[name].detach().T.contiguous().T.requires_grad_(inputs[name].requires_grad)
        assert not inputs[name].is_contiguous()
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].detach().repeat_interleave(2)[::2].requires_grad_(inputs[name].requires_grad)
        assert not inputs[name].is_contiguous()
    check({"mask": MASK}, torch.float64, 1e-12, inputs)


def with_teacher_logits(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same inputs, with the teacher's logits in place of its states and head."""
    logits = torch.nn.functional.linear(inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"])
    return {name: x for name, x in inputs.items() if name.startswith("student")} | {"teacher_hidden": logits.to(dtype)}


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"mask": MASK, "reduction": "none"}], ids=[*OPTIONS.keys(), "none"])
def test_logits_for_the_teacher_are_the_head_that_made_them(options, divergence):
    inputs, options = make_inputs(), {**options, "divergence": divergence, "temperature": 2.0, "chunk_size": 5}
    given = with_teacher_logits(inputs, torch.float64)
    truth, true_gradients = value_and_gradients(fastkd.reference.linear_kl_div, inputs, **options)
    for function in (fastkd.linear_kl_div, fastkd.reference.linear_kl_div):
        value, gradients = value_and_gradients(partial(function, teacher_weight=None), given, **options)
        assert_close(value, truth, 1e-11)
        for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
            assert_close(gradient, true_gradient, 1e-11, name)


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_teacher_logits_of_any_dtype(student_dtype, teacher_dtype):
    """They are rounded by whoever stored them, and never again: the oracle reads the same rounded logits in float64."""
    given = with_teacher_logits(make_inputs(), teacher_dtype)
    given |= {name: given[name].detach().to(student_dtype).requires_grad_() for name in NAMES}
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    options = {"mask": MASK, "labels": LABELS, "label_weight": 0.5, "vocab_index": INDEX, "teacher_softcap": 5.0, "chunk_size": 6}
    fused = partial(fastkd.linear_kl_div, teacher_weight=None)
    value, gradients = value_and_gradients(fused, given, **options)
    truth, true_gradients = value_and_gradients(partial(fastkd.reference.linear_kl_div, teacher_weight=None), exact, **options)
    assert value.dtype == (torch.float64 if teacher_dtype == torch.float64 else torch.float32)
    assert_close(value, truth, 2e-5)
    for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
        assert gradient.dtype == student_dtype
        assert_close(gradient, true_gradient, 5e-3 if student_dtype == torch.bfloat16 else 2e-5, name)


def test_teacher_logits_compile_whole():
    given = with_teacher_logits(make_inputs(), torch.float64)
    fused = partial(fastkd.linear_kl_div, teacher_weight=None)
    value, gradients = value_and_gradients(fused, given, mask=MASK)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled_value, compiled_gradients = value_and_gradients(compiled, given, mask=MASK)
    for made, expected in zip([compiled_value, *compiled_gradients], [value, *gradients], strict=True):
        assert_close(made, expected, 1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(divergence, reduction):
    inputs = make_inputs(leading=(4,))
    teacher = {k: v for k, v in inputs.items() if k.startswith("teacher")}

    def loss(student_hidden, student_weight, student_bias):
        return fastkd.linear_kl_div(
            student_hidden,
            student_weight,
            student_bias=student_bias,
            **teacher,
            divergence=divergence,
            temperature=1.5,
            mask=torch.tensor([True, False, True, True]),
            labels=torch.tensor([1, 2, -100, 3]),
            label_weight=0.5,
            student_softcap=4.0,
            reduction=reduction,
            chunk_size=2,
        )

    assert torch.autograd.gradcheck(loss, [inputs[n] for n in NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_the_check_refuses_wrong_gradients(name):
    """A zero, 1 %-scaled, sign-flipped or row-shuffled gradient fails the very check the tests above use."""
    _, gradients = value_and_gradients(fastkd.reference.linear_kl_div, make_inputs(), temperature=2.0)
    truth = gradients[NAMES.index(name)]
    for what, wrong in wrong_gradients(truth).items():
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_close(wrong, truth, 2e-5, what)


@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
def test_small_and_large_divergence_in_float32(kl):
    """Student = teacher + noise; the float32 gradient is measured against float64 on the very same inputs."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(500, 32, generator=generator) * 0.5
    noise = torch.randn(64, 32, generator=generator)

    def gradient(scale: float, function, dtype) -> tuple[Tensor, Tensor]:
        student = (hidden + scale * noise).to(dtype).requires_grad_()
        loss = function(student, weight.to(dtype), hidden.to(dtype), weight.to(dtype))
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    low, high = 0.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle, fastkd.reference.linear_kl_div, torch.float64)[0] < kl else (low, middle)
    truth, true_gradient = gradient(low, fastkd.reference.linear_kl_div, torch.float64)
    assert 0.3 * kl < truth < 3 * kl
    value, value_gradient = gradient(low, fastkd.linear_kl_div, torch.float32)
    assert_close(value, truth, 1e-3 if kl < 1e-3 else 2e-5)
    assert_close(value_gradient, true_gradient, 1e-4 if kl < 1e-3 else 2e-5)


def test_stats_equal_the_reference_and_carry_no_gradient():
    options = {"mask": MASK, "labels": LABELS, "temperature": 2.0, "return_stats": True, "chunk_size": 4}
    loss, stats = fastkd.linear_kl_div(**make_inputs(), **options)
    _, truth = fastkd.reference.linear_kl_div(**make_inputs(), **options)
    for name in ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement", "acceptance"):
        assert_close(getattr(stats, name), getattr(truth, name), 1e-12, name)
        assert not getattr(stats, name).requires_grad
    assert loss.requires_grad


@pytest.mark.parametrize("function", [fastkd.linear_kl_div, fastkd.reference.linear_kl_div], ids=["fast", "reference"])
def test_the_losses_alone_are_those_of_the_statistics(function):
    options = {"mask": MASK, "labels": LABELS, "temperature": 2.0}
    loss, stats = function(**make_inputs(), return_stats="losses", **options)
    value, whole = function(**make_inputs(), return_stats=True, **options)
    assert_close(loss, value, 1e-12)
    assert_close(stats.divergence, whole.divergence, 1e-12)
    assert_close(stats.cross_entropy, whole.cross_entropy, 1e-12)
    assert stats.student_entropy is stats.teacher_entropy is stats.top1_agreement is None


def test_statistics_are_all_or_the_losses():
    with pytest.raises(ValueError, match="return_stats='entropy' is not known; use True, False or 'losses'"):
        fastkd.linear_kl_div(**make_inputs(), return_stats="entropy")


def test_identical_models_give_zero():
    inputs = make_inputs()
    for divergence in DIVERGENCES:
        student = inputs["student_hidden"].detach().requires_grad_()
        weight = inputs["student_weight"].detach()
        loss = fastkd.linear_kl_div(student, weight, student.detach(), weight, divergence=divergence)
        assert abs(loss.item()) < 1e-14
        gradient = torch.autograd.grad(loss, student)[0]
        # |p - q| has a kink there: with logits equal up to rounding its gradient is any of the subgradients.
        assert divergence == "tvd" or gradient.abs().max() < 1e-14


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (3,)])
def test_no_tokens_or_all_masked_give_exact_zeros_with_the_graph(leading, reduction):
    inputs = make_inputs(leading=leading)
    mask = torch.zeros(leading, dtype=torch.bool)
    labels = torch.zeros(leading, dtype=torch.int64)
    loss = fastkd.linear_kl_div(**inputs, mask=mask, labels=labels, label_weight=1.0, reduction=reduction)
    assert loss.shape == (torch.Size(leading) if reduction == "none" else ())
    assert loss.sum().item() == 0.0
    for gradient in torch.autograd.grad(loss.sum(), [inputs[n] for n in NAMES]):
        assert (gradient == 0).all()


def test_retain_graph_gives_the_same_gradient_twice():
    inputs = make_inputs()
    for reduction in ("mean", "none"):
        loss = fastkd.linear_kl_div(**inputs, reduction=reduction).sum()
        first = torch.autograd.grad(loss, inputs["student_weight"], retain_graph=True)[0]
        second = torch.autograd.grad(loss, inputs["student_weight"])[0]
        assert torch.equal(first, second)


@pytest.mark.parametrize("trained", NAMES)
def test_only_what_needs_a_gradient_gets_one(trained):
    inputs = {k: v.detach() for k, v in make_inputs().items()}
    _, truth = value_and_gradients(fastkd.reference.linear_kl_div, make_inputs())
    inputs[trained].requires_grad_()
    gradient = torch.autograd.grad(fastkd.linear_kl_div(**inputs), inputs[trained])[0]
    assert relative_error(gradient, truth[NAMES.index(trained)]) < 1e-12


@pytest.mark.parametrize("name", ["teacher_hidden", "teacher_weight", "teacher_bias"])
def test_a_teacher_that_requires_a_gradient_is_refused(name):
    inputs = make_inputs()
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        fastkd.linear_kl_div(**inputs)
    with torch.no_grad():
        fastkd.linear_kl_div(**inputs)


def test_teacher_logits_that_require_a_gradient_are_refused():
    given = with_teacher_logits(make_inputs(), torch.float64)
    with pytest.raises(ValueError, match="teacher_hidden requires a gradient"):
        fastkd.linear_kl_div(**{**given, "teacher_hidden": given["teacher_hidden"].requires_grad_()}, teacher_weight=None)


def test_the_order_of_tokens_changes_nothing():
    inputs = make_inputs()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(9))
    permuted = {
        k: (x.detach()[order] if k.endswith("hidden") else x.detach()).requires_grad_(x.requires_grad) for k, x in inputs.items()
    }
    value, gradients = value_and_gradients(fastkd.linear_kl_div, inputs, mask=MASK, chunk_size=5)
    other, others = value_and_gradients(fastkd.linear_kl_div, permuted, mask=MASK[order], chunk_size=5)
    assert_close(other, value, 1e-13)
    for name, gradient, permuted_gradient in zip(NAMES, gradients, others, strict=True):
        assert_close(permuted_gradient, gradient[order] if name == "student_hidden" else gradient, 1e-12, name)


def test_a_constant_added_to_all_logits_changes_nothing():
    inputs = make_inputs()
    shifted = {k: (x.detach() + 50.0 if k.endswith("bias") else x.detach()).requires_grad_(x.requires_grad) for k, x in inputs.items()}
    value, gradients = value_and_gradients(fastkd.linear_kl_div, inputs)
    other, others = value_and_gradients(fastkd.linear_kl_div, shifted)
    assert_close(other, value, 1e-12)
    for gradient, shifted_gradient in zip(gradients, others, strict=True):
        assert_close(shifted_gradient, gradient, 1e-11)


@pytest.fixture
def poisoned_memory():
    """torch fills every fresh tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_fresh_memory_is_read(poisoned_memory, reduction, dtype):
    assert torch.empty(3).isnan().all()
    inputs = make_inputs(dtype=dtype)
    options = {"mask": MASK, "labels": LABELS, "label_weight": 0.5, "chunk_size": 4, "reduction": reduction, "return_stats": True}
    loss, stats = fastkd.linear_kl_div(**inputs, **options)
    for x in (loss, *torch.autograd.grad(loss.sum(), [inputs[n] for n in NAMES]), stats.divergence, stats.cross_entropy):
        assert x.isfinite().all()


def test_module_form():
    inputs = make_inputs()
    loss = fastkd.LinearKLDivLoss(temperature=2.0, divergence="reverse_kl")
    assert torch.equal(loss(**inputs, mask=MASK), fastkd.linear_kl_div(**inputs, temperature=2.0, divergence="reverse_kl", mask=MASK))
    assert "temperature=2.0" in repr(loss)


BAD = {
    "temperature": ({"temperature": 0.0}, ValueError, "temperature=0.0"),
    "negative temperature": ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
    "divergence": ({"divergence": "kl"}, ValueError, "'forward_kl'"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction='batchmean'"),
    "mask shape": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
    "mask dtype": ({"mask": torch.ones(TOKENS, dtype=torch.int64)}, TypeError, "torch.bool"),
    "negative mask": ({"mask": -torch.ones(TOKENS)}, ValueError, "negative"),
    "labels alone": ({"labels": LABELS}, ValueError, "pass label_weight=1.0"),
    "label weight alone": ({"label_weight": 1.0}, ValueError, "needs labels"),
    "label dtype": ({"labels": LABELS.int()}, TypeError, "torch.int64"),
    "label range": ({"labels": LABELS.clamp_min(0) + STUDENT_VOCAB, "label_weight": 1.0}, ValueError, "outside the vocabulary of 37"),
    "index shape": ({"vocab_index": INDEX[:-1]}, ValueError, "vocab_index"),
    "index twice": ({"vocab_index": INDEX.clone().index_fill_(0, torch.tensor([3, 9]), int(INDEX[0]))}, ValueError, "3 times"),
    "integer weight": ({"teacher_weight": torch.zeros(TEACHER_VOCAB, TEACHER_WIDTH, dtype=torch.int64)}, TypeError, "floating"),
    "device": ({"teacher_bias": torch.zeros(TEACHER_VOCAB, dtype=torch.float64, device="meta")}, ValueError, "on meta"),
    "teacher device": (
        {
            name: torch.zeros(*shape, dtype=torch.float64, device="meta")
            for name, shape in (
                ("teacher_hidden", (TOKENS, TEACHER_WIDTH)),
                ("teacher_weight", (TEACHER_VOCAB, TEACHER_WIDTH)),
                ("teacher_bias", (TEACHER_VOCAB,)),
            )
        },
        ValueError,
        "move them together",
    ),
    "mask device": ({"mask": torch.ones(TOKENS, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
    "index device": ({"vocab_index": INDEX.to("meta")}, ValueError, "vocab_index is on meta"),
    "filter": ({"grad_filter": 0.0}, ValueError, "grad_filter=0.0"),
    "index range": ({"vocab_index": INDEX + TEACHER_VOCAB}, ValueError, "53 rows"),
    "denominator with sum": ({"denominator": 3.0, "reduction": "sum"}, ValueError, "reduction='mean'"),
    "denominator shape": ({"denominator": torch.ones(2)}, ValueError, "0-dim"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    "budget": ({"memory_budget": -5}, ValueError, "memory_budget=-5"),
    "backend": ({"backend": "metal"}, ValueError, "backend='metal'"),
    "backend not here": ({"backend": "cuda"}, ValueError, "runs on NVIDIA GPUs"),
    "soft-cap": ({"student_softcap": -1.0}, ValueError, "student_softcap=-1.0"),
    "scale": ({"teacher_logit_scale": 0.0}, ValueError, "teacher_logit_scale=0.0"),
    "student weight": ({"student_weight": torch.zeros(STUDENT_VOCAB, 3, dtype=torch.float64)}, ValueError, "student_weight has shape"),
    "teacher bias": ({"teacher_bias": torch.zeros(2, dtype=torch.float64)}, ValueError, "teacher_bias has shape"),
    "bias of given logits": ({"teacher_weight": None}, ValueError, "Add the bias to them"),
    "few given logits": ({"teacher_weight": None, "teacher_bias": None}, ValueError, "only 12"),
    "small teacher": ({"teacher_weight": torch.zeros(5, 12, dtype=torch.float64), "teacher_bias": None}, ValueError, "only 5"),
    "dtypes": ({"student_weight": torch.zeros(STUDENT_VOCAB, STUDENT_WIDTH)}, TypeError, "autocast"),
    "leading dims": ({"teacher_hidden": torch.zeros(4, TEACHER_WIDTH, dtype=torch.float64)}, ValueError, "the same tokens"),
    "not a tensor": ({"student_hidden": [[1.0]]}, TypeError, "student_hidden is a list"),
    "one dim": ({"student_hidden": torch.zeros(STUDENT_WIDTH, dtype=torch.float64)}, ValueError, "leading dim"),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD.values(), ids=BAD.keys())
def test_wrong_arguments_are_refused_with_a_sentence(options, error, text):
    with pytest.raises(error, match=text.replace("(", r"\(")):
        fastkd.linear_kl_div(**{**make_inputs(), **options})


def test_dtensors_are_refused():
    class Sharded(torch.Tensor):
        device_mesh = placements = "somewhere"

    inputs = make_inputs()
    inputs["student_weight"] = inputs["student_weight"].detach().as_subclass(Sharded)
    with pytest.raises(TypeError, match="head module's own forward"):
        fastkd.linear_kl_div(**inputs)
