"""topk_kl_div against the float64 oracle, and against the dense loss where the list holds everything."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops import listed_logits
from fastkd.ops.linear_logits import LinearLogits
from tests.ops.test_linear_kl import LABELS, MASK, NAMES, STUDENT_VOCAB, STUDENT_WIDTH, TOKENS, make_inputs
from tests.oracle import assert_close, relative_error, wrong_gradients
from tests.row_kernels import DIVERGENCES, topk_cases

TAILS = ["bucket", "renormalize", "zero"]


def make_teacher(entries: int, temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs()
    logits = torch.nn.functional.linear(inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"])[:, :STUDENT_VOCAB]
    log_p = (logits / temperature).log_softmax(-1)
    values, ids = log_p.topk(entries)
    tail = log_p.scatter(1, ids, -math.inf).logsumexp(-1)
    return ids, values.to(dtype), tail.to(dtype)


def make_student(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {k: v for k, v in make_inputs(dtype=dtype).items() if k.startswith("student")}


def make_lists(entries: int, temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """`make_teacher`, of whose entries some are missing and hold nonsense; their mass is in the tail."""
    ids, log_p, tail = make_teacher(entries, temperature)
    missing = torch.arange(TOKENS)[:, None] % 4 > torch.arange(entries)
    tail = torch.cat((log_p.masked_fill(~missing, -math.inf), tail[:, None]), -1).logsumexp(-1)
    ids, log_p = ids.masked_fill(missing, -1), log_p.masked_fill(missing, math.nan)
    return {"topk_ids": ids, "topk_logprobs": log_p.to(dtype), "tail_logprob": tail.to(dtype)}


LISTED = {"tail": "renormalize", "student_support": "listed"}
LOSSES = [{"tail": tail, "divergence": divergence} for tail, divergence in topk_cases()]
LOSSES += [{**LISTED, "divergence": divergence} for divergence in DIVERGENCES]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: " ".join(loss.values()))
WEIGHTS = MASK * torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)
EVERYTHING = {
    "mask": WEIGHTS,
    "labels": LABELS,
    "label_weight": 0.6,
    "student_softcap": 3.0,
    "student_logit_scale": 0.7,
    "temperature": 2.0,
}


def check(loss: dict, lists: dict[str, Tensor], options: dict, dtype: torch.dtype, tolerance: float, **steering) -> None:
    """Value, statistics and every gradient against float64, of inputs that are rounded to `dtype` in both."""
    student, lists = make_student(dtype), {k: x.to(dtype) if x.is_floating_point() else x for k, x in lists.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in student.items()}
    options = {**loss, **options, "return_stats": True}
    value, stats = fastkd.topk_kl_div(**student, **lists, **options, **steering)
    exact_lists = {k: x.double() if x.is_floating_point() else x for k, x in lists.items()}
    truth, true_stats = fastkd.reference.topk_kl_div(**exact, **exact_lists, **options)
    assert_close(value, truth, tolerance)
    for name, exact_statistic in vars(true_stats).items():
        assert (getattr(stats, name) is None) == (exact_statistic is None), name
        if exact_statistic is not None:
            assert_close(getattr(stats, name), exact_statistic, tolerance, name)
    upstream = torch.tensor(-1.7) if value.dim() == 0 else torch.randn(TOKENS, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(value, [student[n] for n in NAMES], upstream.to(value.dtype))
    true_gradients = torch.autograd.grad(truth, [exact[n] for n in NAMES], upstream.to(truth.dtype))
    for name, gradient, true_gradient in zip(NAMES, gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, true_gradient, tolerance, name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_loss
def test_everything_at_once(loss, reduction, dtype, tolerance):
    check(loss, make_lists(5, 2.0), {**EVERYTHING, "reduction": reduction}, dtype, tolerance, chunk_size=5)


@pytest.mark.parametrize(("temperature", "tolerance"), [(0.5, 2e-5), (1.0, 2e-5), (15.0, 1e-4)])
@every_loss
def test_every_temperature(loss, temperature, tolerance):
    """At 15 the divergence is so small that its float32 is good to 1e-4, as `LARGEST_TEMPERATURE` says."""
    check(loss, make_lists(5, temperature), {"temperature": temperature}, torch.float32, tolerance)


OPTIONS = {
    "plain": {},
    "bool mask": {"mask": MASK},
    "labels alone count their own tokens": {"labels": LABELS, "label_weight": 1.5, "mask": MASK},
    "labels that are only told of": {"labels": LABELS},
    "denominator": {"denominator": 7.5, "labels": LABELS, "label_weight": 0.5},
    "tensor denominator": {"denominator": torch.tensor(7.5)},
    "soft-cap": {"student_softcap": 2.0},
    "negative scale": {"student_logit_scale": -0.25},
    "all masked": {"mask": torch.zeros(TOKENS, dtype=torch.bool)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("loss", [{"divergence": "jsd(0.3)"}, {**LISTED, "divergence": "reverse_kl"}], ids=["bucket", "listed"])
def test_each_option(loss, options):
    check(loss, make_lists(5), options, torch.float64, 1e-11)


@pytest.mark.parametrize("made_at", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("loss", [{"tail": "renormalize"}, LISTED], ids=["full", "listed"])
def test_a_list_at_another_temperature_is_that_of_the_loss(loss, made_at):
    """Renormalised, it is what would have been listed at the temperature of the loss."""
    options = {**loss, "temperature": 2.0, "mask": MASK}
    check(options, make_lists(5, made_at), {"topk_temperature": made_at}, torch.float64, 1e-11)
    own, student = make_lists(5, 2.0), make_student()
    value = fastkd.topk_kl_div(**student, **make_lists(5, made_at), **options, topk_temperature=made_at)
    assert_close(value, fastkd.topk_kl_div(**student, **own, **options), 1e-11)
    if made_at != 2.0:
        assert relative_error(fastkd.topk_kl_div(**student, **make_lists(5, made_at), **options), value) > 1e-3


@pytest.mark.parametrize("noise", [0.5, 0.03])
@every_loss
def test_16_bit_students_down_to_a_divergence_of_4e_4(loss, noise):
    """The teacher is the student's own logits with noise."""
    student = {name: x.bfloat16().detach().requires_grad_() for name, x in make_student().items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in student.items()}
    logits = torch.nn.functional.linear(exact["student_hidden"], exact["student_weight"], exact["student_bias"]).detach()
    logits = logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    log_p, ids = logits.log_softmax(-1).topk(8)
    tail = logits.log_softmax(-1).scatter(1, ids, -math.inf).logsumexp(-1).float()
    lists = {"topk_ids": ids, "topk_logprobs": log_p.float(), "tail_logprob": tail}
    value = fastkd.topk_kl_div(**student, **lists, **loss)
    truth = fastkd.reference.topk_kl_div(**exact, **{**lists, "topk_logprobs": log_p.float().double()}, **loss)
    assert_close(value, truth, 2e-3 if noise < 0.1 else 1e-5)
    pairs = (torch.autograd.grad(x, [y[n] for n in NAMES]) for x, y in ((value, student), (truth, exact)))
    for name, gradient, true_gradient in zip(NAMES, *pairs, strict=True):
        assert_close(gradient, true_gradient, 5e-3, name)


@every_loss
def test_gradcheck(loss):
    hidden, weight, bias = (make_student()[name][:4].detach().requires_grad_() for name in NAMES)
    lists = {name: x[:4] % 4 if name == "topk_ids" else x[:4] for name, x in make_lists(1).items()}
    lists["topk_ids"] = torch.tensor([[0, 2], [3, -1], [1, 3], [2, 0]])
    lists["topk_logprobs"] = torch.tensor([[-1.0, -1.5], [-0.7, 0.0], [-2.0, -1.2], [-1.4, -0.6]], dtype=torch.float64)
    lists["tail_logprob"] = torch.log1p(-lists["topk_logprobs"].masked_fill(lists["topk_ids"] < 0, -math.inf).exp().sum(-1))
    labels = {"labels": torch.tensor([1, -100, 0, 3]), "label_weight": 0.5}

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastkd.topk_kl_div(hidden, weight, **lists, **loss, **labels, student_bias=bias, temperature=2.0, reduction="none")

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


@pytest.mark.parametrize("loss", [{"divergence": "jsd(0.3)"}, {**LISTED, "divergence": "jsd(0.3)"}], ids=["bucket", "listed"])
def test_triton_gives_the_same(loss, monkeypatch):
    """Under its interpreter, which has a kernel for lists, and for logits some of which are -inf on both sides."""
    monkeypatch.setenv("FASTKD_BACKEND", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check(loss, make_lists(5, 2.0), EVERYTHING, torch.float32, 2e-5, backend="triton")


@pytest.mark.parametrize("wrong", ["zero", "scaled by 1 %", "sign-flipped", "row-shuffled"])
def test_the_check_refuses_wrong_gradients(wrong, monkeypatch):
    right = listed_logits.GatheredRows.gradients

    def broken(*arguments):
        return {name: wrong_gradients(x)[wrong] if x.numel() else x for name, x in right(*arguments).items()}

    monkeypatch.setattr(listed_logits.GatheredRows, "gradients", broken)
    with pytest.raises(AssertionError, match="student_hidden: relative"):
        check(LISTED, make_lists(5), {}, torch.float64, 1e-5)


@pytest.mark.parametrize("chunk", [{"chunk_size": 1}, {"chunk_size": 7}, {"memory_budget": 3 * 5 * STUDENT_WIDTH * 8}], ids=str)
def test_rows_of_the_head_are_gathered_for_a_few_tokens_at_a_time(chunk, monkeypatch):
    """And no logits of the whole vocabulary are made."""
    gathered, right = [], listed_logits.GatheredRows._parts

    def counted(self):
        for part in right(self):
            gathered.append(part[-1].numel())
            yield part

    monkeypatch.setattr(listed_logits.GatheredRows, "_parts", counted)
    monkeypatch.setattr(LinearLogits, "__init__", None)
    check({**LISTED, "divergence": "jsd(0.3)"}, make_lists(5), {"mask": MASK}, torch.float64, 1e-11, **chunk)
    tokens, count = chunk.get("chunk_size", 3), int(MASK.sum())
    sizes = [min(tokens, count - start) * 5 * STUDENT_WIDTH for start in range(0, count, tokens)]
    assert gathered == 2 * sizes


def test_rows_that_no_token_lists_get_no_gradient():
    student, lists = make_student(), {name: x[:6] for name, x in make_lists(5).items()}
    student["student_hidden"] = student["student_hidden"][:6].detach()
    fastkd.topk_kl_div(**student, **lists, **LISTED).backward()
    is_listed = torch.zeros(STUDENT_VOCAB, dtype=torch.bool)
    is_listed[lists["topk_ids"].clamp_min(0)[lists["topk_ids"] >= 0]] = True
    assert 0 < is_listed.sum() < STUDENT_VOCAB
    for name in ("student_weight", "student_bias"):
        assert torch.equal(student[name].grad.reshape(STUDENT_VOCAB, -1).any(-1), is_listed)


def test_the_lists_of_everything_compare_as_the_vocabulary():
    """With everything listed, nothing is outside, and all ways of comparing are one."""
    lists = dict(zip(("topk_ids", "topk_logprobs", "tail_logprob"), make_teacher(STUDENT_VOCAB, 2.0), strict=True))
    dense = fastkd.linear_kl_div(**make_inputs(), divergence="jsd(0.3)", temperature=2.0)
    for loss in ({}, {"tail": "renormalize"}, LISTED):
        assert_close(fastkd.topk_kl_div(**make_student(), **lists, **loss, divergence="jsd(0.3)", temperature=2.0), dense, 1e-11)


def test_nothing_listed_cannot_be_renormalised():
    lists = make_lists(5)
    lists["topk_ids"][2] = -1
    for loss in ({"tail": "renormalize"}, LISTED):
        values = fastkd.topk_kl_div(**make_student(), **lists, **loss, reduction="none")
        assert values.isnan().nonzero().tolist() == [[2]]


COMPILED = {"bucket": {}, "listed": LISTED, "listed with labels": {**LISTED, "labels": LABELS, "label_weight": 0.5}}


@pytest.mark.parametrize("loss", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiler_takes_it_whole(loss, reduction):
    student, lists = make_student(torch.float32), make_lists(5, dtype=torch.float32)
    options = {**loss, "mask": MASK, "reduction": reduction}
    compiled = torch.compile(fastkd.topk_kl_div, fullgraph=True, backend="aot_eager")
    value, expected = compiled(**student, **lists, **options), fastkd.topk_kl_div(**student, **lists, **options)
    assert torch.equal(value, expected)
    one, other = (torch.autograd.grad(x.sum(), [student[n] for n in NAMES]) for x in (value, expected))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("loss", [{"divergence": "jsd(0.3)"}, {**LISTED, "divergence": "jsd(0.3)"}], ids=["bucket", "listed"])
def test_autocast_rounds_operands_and_no_logits(loss):
    student, lists = make_student(torch.float32), make_lists(5, dtype=torch.float32)
    exact = {name: x.detach().bfloat16().double().requires_grad_() for name, x in student.items()}
    exact["student_bias"] = student["student_bias"].detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = fastkd.topk_kl_div(**student, **lists, **loss)
    truth = fastkd.reference.topk_kl_div(**exact, **lists, **loss)
    assert value.dtype == torch.float32
    assert_close(value, truth, 2e-6)
    pairs = (torch.autograd.grad(x, [y[n] for n in NAMES]) for x, y in ((value, student), (truth, exact)))
    for name, gradient, true_gradient in zip(NAMES, *pairs, strict=True):
        assert_close(gradient, true_gradient, 5e-3 if loss.get("tail") is None else 2e-5, name)


@pytest.mark.parametrize("loss", [{"divergence": "reverse_kl"}, {**LISTED, "divergence": "reverse_kl"}], ids=["bucket", "listed"])
def test_a_masked_token_may_hold_anything(loss):
    found = []
    for spoils in (False, True):
        student, lists = make_student(), make_lists(5)
        if spoils:
            student["student_hidden"] = student["student_hidden"].detach().masked_fill(~MASK[:, None], math.nan).requires_grad_()
            lists["topk_logprobs"], lists["tail_logprob"] = lists["topk_logprobs"].clone(), lists["tail_logprob"].clone()
            lists["topk_logprobs"][~MASK], lists["tail_logprob"][~MASK] = math.nan, 3.0
        value = fastkd.topk_kl_div(**student, **lists, **loss, mask=MASK)
        found.append([value, *torch.autograd.grad(value, [student[n] for n in NAMES])])
    assert found[0][0].isfinite() and all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("loss", [{}, LISTED], ids=["bucket", "listed"])
def test_no_tokens_are_an_exact_zero_with_the_graph_connected(loss):
    student = make_student()
    student["student_hidden"] = student["student_hidden"].detach()[:0].requires_grad_()
    value = fastkd.topk_kl_div(**student, **{name: x[:0] for name, x in make_lists(5).items()}, **loss)
    assert value.item() == 0.0
    assert not any(x.any() for x in torch.autograd.grad(value, [student[n] for n in NAMES]))


def test_a_second_derivative_is_refused():
    for options in ({}, LISTED):
        student = make_student()
        loss = fastkd.topk_kl_div(**student, **make_lists(5), **options)
        (gradient,) = torch.autograd.grad(loss, student["student_hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()


def test_statistics_of_a_list():
    """Mass and overlap by hand: the student's three largest of five ids are 4, 1 and 0."""
    hidden = torch.eye(3, 5, dtype=torch.float64) + 1.0
    head = torch.diag(torch.tensor([2.0, 3.0, 0.5, 1.0, 4.0], dtype=torch.float64))
    ids = torch.tensor([[4, 1, 2], [3, 2, -1], [1, 4, 0]])
    log_p = torch.full((3, 3), math.log(0.25), dtype=torch.float64)
    _, stats = fastkd.topk_kl_div(hidden, head, ids, log_p, tail="renormalize", temperature=2.0, return_stats=True)
    q = ((hidden @ head) / 2.0).softmax(-1)
    mass = [sum(float(q[row, i]) for i in listed if i >= 0) for row, listed in enumerate(ids.tolist())]
    own = [set(order[:count].tolist()) for order, count in zip(q.argsort(-1, descending=True), (3, 2, 3), strict=True)]
    overlap = [len(own[row] & set(ids[row].tolist())) / count for row, count in enumerate((3, 2, 3))]
    assert stats.listed_mass.tolist() == pytest.approx(mass, rel=1e-12)
    assert stats.topk_overlap.tolist() == pytest.approx(overlap) and len(set(overlap)) > 1
    _, losses = fastkd.topk_kl_div(hidden, head, ids, log_p, tail="renormalize", return_stats="losses")
    assert losses.divergence is not None and losses.listed_mass is None and losses.topk_overlap is None


@pytest.mark.parametrize("tail", TAILS)
def test_a_list_of_everything_is_the_dense_loss(tail):
    inputs = make_inputs()
    options = {"labels": LABELS, "label_weight": 0.5, "student_softcap": 4.0, "student_logit_scale": 0.8, "temperature": 2.0}
    dense = fastkd.linear_kl_div(**inputs, **options)
    sparse, stats = fastkd.topk_kl_div(
        **make_student(),
        **dict(zip(("topk_ids", "topk_logprobs", "tail_logprob"), make_teacher(STUDENT_VOCAB, 2.0), strict=True)),
        tail=tail,
        **options,
        return_stats=True,
    )
    assert_close(sparse, dense, 1e-11)
    assert stats.divergence is not None and stats.cross_entropy is not None and stats.student_entropy is None


def test_the_bucket_never_exceeds_the_full_divergence_and_grows_with_the_list():
    full = fastkd.linear_kl_div(**make_inputs())
    values = [
        fastkd.topk_kl_div(
            make_student()["student_hidden"],
            make_student()["student_weight"],
            *make_teacher(k),
            student_bias=make_student()["student_bias"],
        )
        for k in (1, 3, 10, 30)
    ]
    assert all(a < b for a, b in zip(values, [*values[1:], full], strict=True))


def test_leading_dims_and_16_bit_student():
    student = {k: v.bfloat16() for k, v in make_student().items()}
    hidden = student.pop("student_hidden")[:22].view(2, 11, -1).detach().requires_grad_()
    ids, log_p, log_tail = (x[:22].view(2, 11, *x.shape[1:]) for x in make_teacher(4, dtype=torch.float32))
    loss = fastkd.topk_kl_div(
        hidden, student["student_weight"], ids, log_p, log_tail, student_bias=student["student_bias"], reduction="none"
    )
    assert loss.shape == (2, 11)
    exact = hidden.detach().double().requires_grad_()
    truth = fastkd.reference.topk_kl_div(
        exact,
        student["student_weight"].double(),
        ids,
        log_p.double(),
        log_tail.double(),
        student_bias=student["student_bias"].double(),
        reduction="none",
    )
    assert_close(loss, truth, 1e-5)
    assert relative_error(torch.autograd.grad(loss.sum(), hidden)[0], torch.autograd.grad(truth.sum(), exact)[0]) < 5e-3


IDS, LOG_P, LOG_TAIL = make_teacher(4)
BAD = {
    "tail": ({"tail": "all"}, ValueError, "tail='all'"),
    "no tail": ({"tail_logprob": None}, ValueError, "needs tail_logprob"),
    "ids dtype": ({"topk_ids": IDS.int()}, ValueError, "torch.int64"),
    "ids leading": ({"topk_ids": IDS[:-1]}, ValueError, "leading dims"),
    "ids range": ({"topk_ids": IDS + STUDENT_VOCAB}, ValueError, "outside the student's 37 rows"),
    "ids twice": ({"topk_ids": IDS[:, :1].expand(-1, 4)}, ValueError, "twice at row 0"),
    "shape": ({"topk_logprobs": LOG_P[:, :3]}, ValueError, "topk_logprobs has shape"),
    "tail shape": ({"tail_logprob": LOG_TAIL[:3]}, ValueError, "tail_logprob has shape"),
    "requires grad": ({"topk_logprobs": LOG_P.clone().requires_grad_()}, ValueError, "requires a gradient"),
    "device": ({"topk_logprobs": LOG_P.to("meta")}, ValueError, "on meta"),
    "support": ({"student_support": "some"}, ValueError, "student_support='some'"),
    "support of a bucket": ({"student_support": "listed"}, ValueError, "tail='bucket' does not renormalize the teacher's"),
    "divergence": ({"divergence": "kl"}, ValueError, "divergence='kl' is not known"),
    "part of a divergence": ({"tail": "zero", "divergence": "jsd(0.5)"}, ValueError, r"'jsd\(0.5\)' needs all of the teacher's mass"),
    "infinite": (
        {"tail": "renormalize", "divergence": "reverse_kl"},
        ValueError,
        "'reverse_kl' is infinite .*student_support='listed'",
    ),
    "other temperature": ({"topk_temperature": 2.0}, ValueError, "topk_temperature=2.0 is not temperature=1.0"),
    "no temperature": ({"topk_temperature": 0.0, "tail": "renormalize"}, ValueError, "topk_temperature=0.0"),
    "grad_filter": ({**LISTED, "grad_filter": 0.1}, ValueError, "grad_filter=0.1 leaves out columns"),
    "ids range, listed": ({**LISTED, "topk_ids": IDS + STUDENT_VOCAB}, ValueError, "outside the student's 37 rows"),
    "ids twice, listed": ({**LISTED, "topk_ids": IDS[:, :1].expand(-1, 4)}, ValueError, "twice at row 0"),
    "probabilities, listed": ({**LISTED, "topk_logprobs": LOG_P.exp()}, ValueError, "topk_logprobs holds"),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD.values(), ids=BAD.keys())
def test_wrong_arguments_are_refused_with_a_sentence(options, error, text):
    given = {"topk_ids": IDS, "topk_logprobs": LOG_P, "tail_logprob": LOG_TAIL, **options}
    with pytest.raises(error, match=text):
        fastkd.topk_kl_div(**make_student(), **given)


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_no_distribution_is_refused(tail):
    """Logits, probabilities, and a tail that counts the list again; ids that are not there and masked tokens may hold anything."""
    ids, log_p, log_tail = make_teacher(4)

    def loss(ids=ids, log_p=log_p, log_tail=log_tail, **options):
        return fastkd.topk_kl_div(**make_student(), topk_ids=ids, topk_logprobs=log_p, tail_logprob=log_tail, tail=tail, **options)

    high = log_p.clone()
    high[3, 2] = 0.5
    with pytest.raises(ValueError, match=r"topk_logprobs holds 0.5 at row 3"):
        loss(log_p=high)
    with pytest.raises(ValueError, match=r"topk_logprobs holds .* at row 0"):
        loss(log_p=log_p.exp())
    with pytest.raises(ValueError, match=r"tail_logprob holds .* at row 0"):
        loss(log_tail=log_tail + 40.0)
    with pytest.raises(ValueError, match=r"topk_logprobs and tail_logprob hold probabilities that sum to .* at row 0"):
        loss(log_tail=torch.zeros_like(log_tail))
    with pytest.raises(ValueError, match=r"topk_logprobs.* hold probabilities that sum to 1.47152 at row 0"):
        loss(log_p=torch.full_like(log_p, -1.0), log_tail=torch.full_like(log_tail, -math.inf))
    is_high = torch.arange(TOKENS) == 3
    assert torch.equal(loss(log_p=high, mask=~is_high), loss(mask=~is_high))
    missing = is_high[:, None] & (torch.arange(4) == 2)
    assert torch.equal(loss(ids=ids.masked_fill(missing, -1), log_p=high), loss(ids=ids.masked_fill(missing, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounded_distributions_are_no_mistake(dtype):
    """Even where every logarithm was rounded up: of a bfloat16 by up to one 256th of it."""
    ids = torch.arange(37).expand(TOKENS, 37)
    log_p = torch.full((TOKENS, 37), -math.log(37)).mul(1 - torch.finfo(dtype).eps / 2).to(dtype)
    loss = fastkd.topk_kl_div(**make_student(), topk_ids=ids, topk_logprobs=log_p, tail="renormalize")
    assert loss.isfinite()
    sure = torch.full((TOKENS, 1), 1e-3).to(dtype)
    assert fastkd.topk_kl_div(**make_student(), topk_ids=ids[:, :1], topk_logprobs=sure, tail="renormalize").isfinite()


def test_missing_entries_add_nothing():
    ids, log_p, log_tail = make_teacher(4)
    missing = torch.arange(TOKENS)[:, None] % 4 > torch.arange(4)
    tail = torch.cat((log_p.masked_fill(~missing, -math.inf), log_tail[:, None]), -1).logsumexp(-1)
    padded = fastkd.topk_kl_div(
        **make_student(), topk_ids=ids.masked_fill(missing, -1), topk_logprobs=log_p, tail_logprob=tail, reduction="none"
    )
    full = fastkd.topk_kl_div(**make_student(), topk_ids=ids, topk_logprobs=log_p, tail_logprob=log_tail, reduction="none")
    assert_close(padded[::4], full[::4], 1e-12)
    assert (padded < full + 1e-12).all() and relative_error(padded, full) > 1e-3
