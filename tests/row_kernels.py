"""Row kernels against their oracle: the losses' definitions in float64, gradients by autograd, whatever the logits' dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, RowOutputs, TopK
from tests.oracle import assert_close, assert_within, loss_rounding

DIVERGENCES = ["forward_kl", "reverse_kl", "mixed(0.3)", "tvd", "nla", "jsd(0.3)", "skew_kl(0.1)", "skew_rkl(0.2)"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative L2 error of a gradient: of the arithmetic for the wide dtypes, of rounding to nearest for the narrow ones."""

PLACES = {
    "float64": ("in place", "over it in bfloat16", "bfloat16", "float32", "none"),
    "float32": ("in place", "over it in bfloat16", "over it in float16", "bfloat16", "float32", "none"),
    "bfloat16": ("in place", "bfloat16", "float32", "none"),
    "float16": ("in place", "float16", "float32", "none"),
}
"""Where the gradient of logits of each dtype goes."""

CASES = [(dtype, place) for dtype, places in PLACES.items() for place in places]


def make_logits(count: int, vocabulary: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """A student and a teacher near it, float64."""
    generator = torch.Generator().manual_seed(17 * vocabulary + count)
    student = 3 * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
    return student, student + noise * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)


def make_place(student: Tensor, place: str) -> Tensor | None:
    """The tensor that takes the gradient; one of its own memory lies between columns of 9."""
    if place == "none":
        return None
    if place == "in place":
        return student
    dtype = DTYPES[place.split()[-1]]
    if place.startswith("over it"):
        return student.view(dtype)[:, : student.shape[1]]
    return torch.full((student.shape[0], student.shape[1] + 5), 9.0, dtype=dtype)[:, 2:-3]


def make_outputs(count: int, dtype: torch.dtype, has_teacher: bool, has_labels: bool, statistics: bool) -> RowOutputs:
    def column(wanted: bool) -> Tensor | None:
        return torch.full((count,), torch.nan, dtype=dtype) if wanted else None

    return RowOutputs(
        divergence=column(has_teacher),
        cross_entropy=column(has_labels),
        student_entropy=column(statistics),
        teacher_entropy=column(statistics),
        top1_agreement=column(statistics),
        acceptance=column(statistics),
    )


def oracle(
    student: Tensor,
    teacher: Tensor | None,
    options: RowOptions,
    row_weight: Tensor,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    teacher_rest: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and statistics by name, and the gradient, as `RowCall` defines them. All probabilities must be positive."""
    raw = student.double().requires_grad_()
    student_logits = _transform(raw, options.student)
    losses: dict[str, Tensor] = {}
    total = raw.sum() * 0
    if teacher is not None and options.divergence is not None:
        teacher_logits = _transform(teacher.double(), options.teacher)
        log_q = (student_logits / options.temperature).log_softmax(-1)
        log_p = (teacher_logits / options.temperature).log_softmax(-1)
        rest = None
        if teacher_rest is not None:
            whole = torch.cat((teacher_logits / options.temperature, teacher_rest.double()[:, None]), 1).log_softmax(-1)
            log_p, rest = whole[:, :-1], whole[:, -1].exp()
        losses["divergence"] = options.temperature**2 * _divergence(options.divergence, log_p.exp(), log_q.exp(), rest)
        total = total + row_weight.double() @ losses["divergence"]
        losses["student_entropy"] = -(log_q.exp() * log_q).sum(-1)
        losses["teacher_entropy"] = -(log_p.exp() * log_p).sum(-1)
        if rest is not None:
            losses["teacher_entropy"] -= rest.xlogy(rest)
        losses["top1_agreement"] = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double()
        losses["acceptance"] = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    if labels is not None:
        picked = student_logits.log_softmax(-1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
        losses["cross_entropy"] = torch.where(labels >= 0, -picked, 0.0)
        if label_weight is not None:
            total = total + label_weight.double() @ losses["cross_entropy"]
    (gradient,) = torch.autograd.grad(total, raw)
    return losses, gradient


def check(
    run: Callable[[RowCall], None],
    student: Tensor,
    teacher: Tensor | None,
    options: RowOptions,
    place: str = "in place",
    *,
    statistics: bool = False,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    teacher_rest: Tensor | None = None,
    arithmetic: torch.dtype | None = None,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
) -> None:
    """All that the row kernel `run` makes of these logits, with its gradient in `place`, equals the oracle's for the same values."""
    dtype = arithmetic or (torch.float64 if student.dtype == torch.float64 else torch.float32)
    row_weight = torch.linspace(0.5, 2.0, student.shape[0]).to(dtype)
    label_weight = None if label_weight is None else label_weight.to(dtype)
    biases = [None if bias is None else bias.to(dtype) for bias in (student_bias, teacher_bias)]
    shown = [x if bias is None else x.double() + bias.double() for x, bias in zip((student, teacher), biases, strict=True)]
    teacher_rest = None if teacher_rest is None else teacher_rest.to(dtype)
    expected, truth = oracle(*shown, options, row_weight, labels, label_weight, teacher_rest)
    logits = student.clone()
    gradient = make_place(logits, place)
    outputs = make_outputs(len(student), dtype, teacher is not None, labels is not None, statistics)
    run(
        RowCall(
            student=logits,
            teacher=None if teacher is None else teacher.clone(),
            options=options,
            outputs=outputs,
            row_weight=row_weight,
            labels=labels,
            label_weight=label_weight,
            student_bias=biases[0],
            teacher_bias=biases[1],
            teacher_rest=teacher_rest,
            gradient=gradient,
        )
    )
    assert_outputs(outputs, expected, *shown, options, dtype)
    if gradient is not None:
        assert_close(gradient, truth, tolerance[dtype] + tolerance[gradient.dtype], "gradient")
        if gradient.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
            around = gradient.as_strided((len(gradient), student.shape[1] + 5), gradient.stride(), 0).clone()
            around[:, 2:-3] = 9.0
            assert bool((around == 9.0).all()), "the gradient was written past its rows"


def assert_outputs(
    outputs: RowOutputs,
    expected: Mapping[str, Tensor],
    student: Tensor,
    teacher: Tensor | None,
    options: RowOptions,
    dtype: torch.dtype,
) -> None:
    """What `dtype` made of raw logits is what is expected, to rounding; infinities and NaN are the same."""
    allowed = allowed_errors(expected, student, teacher, options, dtype)
    for name, value in vars(outputs).items():
        if value is not None:
            truth = expected[name]
            finite = truth.isfinite()
            torch.testing.assert_close(
                value[~finite].double(), truth[~finite].double(), equal_nan=True, msg=f"{name}: {value} is not {truth}"
            )
            assert_within(value[finite], truth[finite], allowed[name][finite], name)


def allowed_errors(
    expected: Mapping[str, Tensor], student: Tensor, teacher: Tensor | None, options: RowOptions, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`loss_rounding` of every loss expected of these raw logits, (n,) each."""
    plain = _transform(student.double(), options.student)
    ours = plain / options.temperature
    theirs = ours if teacher is None else _transform(teacher.double(), options.teacher) / options.temperature
    made_of = {"cross_entropy": [plain], "student_entropy": [ours], "teacher_entropy": [theirs]}
    allowed = {}
    for name, truth in expected.items():
        factor = options.temperature**2 if name == "divergence" else 1.0
        allowed[name] = factor * loss_rounding(truth / factor, *made_of.get(name, [ours, theirs]), dtype=dtype)
    return allowed


def check_far_rows(run: Callable[[RowCall], None], tolerance: Mapping[torch.dtype, float] = TOLERANCE) -> None:
    """Rows whose offset passes 2^31 elements though their stride does not; of the 4 GiB between them no page is touched."""
    student, teacher = (x.bfloat16() for x in make_logits(3, 47))
    row_weight = torch.ones(3)
    expected, truth = oracle(student, teacher, RowOptions(), row_weight)
    stride = 2**30 + 8
    memory = torch.empty(2 * stride + 3 * 64, dtype=torch.bfloat16)
    far_student, far_teacher, far_gradient = (memory.as_strided((3, 47), (stride, 1), 64 * i) for i in range(3))
    far_student.copy_(student)
    far_teacher.copy_(teacher)
    outputs = make_outputs(3, torch.float32, has_teacher=True, has_labels=False, statistics=False)
    run(
        RowCall(
            student=far_student,
            teacher=far_teacher,
            options=RowOptions(),
            outputs=outputs,
            row_weight=row_weight,
            gradient=far_gradient,
        )
    )
    assert_outputs(outputs, expected, student, teacher, RowOptions(), torch.float32)
    assert_close(far_gradient, truth, tolerance[torch.bfloat16])


def check_teacher_rest(
    run: Callable[[RowCall], None],
    divergence: str,
    dtype: torch.dtype,
    place: str,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
) -> None:
    """A teacher that has from none of its mass to all but 1e-9 of it on other tokens; with labels and statistics; a certain student."""
    student, teacher = (x.to(dtype) for x in make_logits(6, 61))
    rest = torch.tensor([-torch.inf, -20.0, 0.0, 3.0, 8.0, 25.0])
    kind = Divergence.parse(divergence)
    check(run, student, teacher, RowOptions(kind), place, teacher_rest=rest, tolerance=tolerance)
    labels, weight = torch.tensor([16, -1, 60, 0, 7, 1]), torch.tensor([0.3, 5.0, 1.0, 0.0, 2.0, 1.0])
    options = RowOptions(kind, 2.0, LogitTransform(0.4, 9.0), LogitTransform(0.7))
    others = {"labels": labels, "label_weight": weight, "statistics": True}
    check(run, student, teacher, options, place, teacher_rest=rest, **others, tolerance=tolerance)
    if dtype == torch.float32:  # narrower gradients vanish
        student[:, 5] += 25
        teacher[:, 5] += 12
        check(run, student, teacher, RowOptions(kind), "float32", teacher_rest=rest, tolerance=tolerance)


def _transform(raw: Tensor, transform: LogitTransform) -> Tensor:
    scaled = raw * transform.scale
    return scaled if transform.softcap is None else transform.softcap * torch.tanh(scaled / transform.softcap)


def _divergence(divergence: Divergence, p: Tensor, q: Tensor, rest: Tensor | None = None) -> Tensor:
    """D of p and q (n, V); with `rest` (n,) of an event more, of which the student has none and forward KL knows nothing."""
    kept = p, q
    if rest is not None:
        p, q = torch.cat((p, rest[:, None]), 1), torch.cat((q, torch.zeros_like(rest)[:, None]), 1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0).sum(-1)

    mixing = divergence.mixing or 0.0
    mixture = mixing * p + (1 - mixing) * q
    return {
        "forward_kl": lambda: kl(*kept),
        "reverse_kl": lambda: kl(q, p),
        "mixed": lambda: mixing * kl(*kept) + (1 - mixing) * kl(q, p),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
        "nla": lambda: -torch.minimum(p, q).sum(-1).log(),
        "jsd": lambda: mixing * kl(p, mixture) + (1 - mixing) * kl(q, mixture),
        "skew_kl": lambda: kl(p, mixture),
        "skew_rkl": lambda: kl(q, mixing * q + (1 - mixing) * p),
    }[divergence.kind]()


def topk_divergence(
    logits: Tensor, teacher: TopK, tail: str, divergence: Divergence | None = None, *, temperature: float = 1.0
) -> Tensor:
    """T^2 D per row, (C,), of K + 1 events, from the student's transformed `logits` (C, V) in their dtype: the oracle in float64."""
    q = torch.softmax(logits / temperature, dim=-1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_other = (columns != teacher.ids[:, :, None]).all(1)
    listed_q = q.gather(1, teacher.ids.clamp_min(0)).masked_fill(teacher.ids < 0, 0.0)
    p = teacher.log_probabilities.to(logits.dtype).exp().masked_fill(teacher.ids < 0, 0.0)
    other_p = torch.zeros_like(p[:, :1])
    if tail == "renormalize":
        p = p / p.sum(-1, keepdim=True)
    if tail == "bucket":
        assert teacher.log_tail is not None
        other_p = teacher.log_tail.to(logits.dtype).exp()[:, None]
    events = torch.cat((p, other_p), 1), torch.cat((listed_q, (q * is_other).sum(-1, keepdim=True)), 1)
    return temperature**2 * _divergence(divergence or Divergence("forward_kl"), *events)


def topk_cases(divergences: Sequence[str] = DIVERGENCES) -> list[tuple[str, str]]:
    """Every (tail, divergence) that is defined."""
    finite = [name for name in divergences if not name.startswith(("reverse_kl", "mixed"))]
    return [*(("bucket", name) for name in divergences), *(("renormalize", name) for name in finite), ("zero", "forward_kl")]
