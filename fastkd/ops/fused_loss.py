"""The pass that every logit loss makes: chunk by chunk, logits in, losses and gradients out, one chunk of logits alive.

Nothing but numbers of tokens is allocated inside its loop, and the host waits for nothing in it. Masked tokens are packed out before
it, which reads their number from the device once; while a CUDA graph is captured, where nothing can be read, they stay in with weight
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .backends import choose, replace_failed
from .checks import check_function_weights, check_token_values, compute_dtype
from .given_logits import GivenLogits
from .grad_filter import GradFilter
from .gradient_in_forward import Arguments, Inputs, Results, pack, register, unpack
from .linear_logits import LinearGradients, LinearLogits, gradient_dtype
from .options import LossOptions
from .plan import Plan, plan_chunks
from .row_call import RowCall, RowOutputs, TopK
from .teacher_logits import Teacher, make_teacher
from .teacher_mass import KeptTokens
from .token_weights import TokenWeights, token_weights
from .topk_lists import write_list_statistics


@dataclass(frozen=True)
class LossStats:
    """Per-token values in the shape of the leading dims, zero where masked; no gradient flows. Nats; `divergence` carries T^2 if
    the loss does.

    Entropies are those of the tempered distributions; `top1_agreement` is 1 where both models rank the same token first;
    `acceptance` is sum min(p, q), the share of the student's tokens that speculative decoding would accept at that temperature. With
    `grad_filter`, `columns_kept` is the share of the vocabulary that the token's chunk kept, and `dropped_mass` the share of the L1
    norm of the token's logit gradient in the columns that were replaced by their mean; both are zero where no gradient was made.

    Of a top-k teacher, `listed_mass` is the student's mass on the token's list at the temperature of the loss, and `topk_overlap` the
    share of the list that is among the student's own as many largest logits. With student_support="listed" there are the entropies
    and the agreement of the two distributions over the list instead.

    Where the student lacks tokens of the teacher, by `vocab_index`, `vocab_slots` or `teacher_mass="full"`, `kept_mass` is the share of
    the teacher's tempered softmax over its whole vocabulary that falls on tokens which the student has, and `teacher_top1_kept` is 1
    where the first of its largest logits is one of theirs.
    """

    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None
    acceptance: Tensor | None = None
    columns_kept: Tensor | None = None
    dropped_mass: Tensor | None = None
    listed_mass: Tensor | None = None
    topk_overlap: Tensor | None = None
    kept_mass: Tensor | None = None
    teacher_top1_kept: Tensor | None = None


_STATISTICS = tuple(field.name for field in fields(LossStats))
TokenWeight = Callable[[Tensor, LossStats], Tensor]
"""(losses (C,), statistics of (C,)) -> weights (C,)."""
_token_weight: ContextVar[TokenWeight | None] = ContextVar("token_weight", default=None)
"""That of the call in progress: an operator takes no functions. Only calls that make their gradients in the forward pass have one."""


def fused_loss(
    student: Mapping[str, Tensor | None],
    teacher: Mapping[str, Tensor | None],
    options: LossOptions,
    leading: torch.Size,
    *,
    vocab_index: Tensor | None = None,
    vocab_slots: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    denominator: Tensor | None = None,
    token_weight: TokenWeight | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """What the public losses return, from arguments that they have checked and flattened.

    Args:
        student: "logits" (N, V), or "hidden" (N, H), "weight" (V, H) and "bias" (V,) or None.
        teacher: the same under names that begin with "teacher_"; or "topk_ids", "topk_logprobs" and "tail_logprob"; or nothing.
        options: the numbers and names.
        leading: shape of per-token results.
        vocab_index: (V,) int64 or None.
        vocab_slots: (V_t,) int64, with teacher_mass="slots" alone.
        mask: (N,) bool or float weights, or None.
        labels: (N,) int64 or None.
        denominator: () float64, (2,) with the labels' own, or None.
        token_weight: of a student with a head alone, and not with reduction="none".
    """
    constants = {**teacher, "vocab_index": vocab_index, "vocab_slots": vocab_slots}
    constants |= {"mask": mask, "labels": labels, "denominator": denominator}
    deferred = "logits" in student or options.reduction == "none"
    loss: Tensor
    arguments = pack(student, constants, options.to_text(), deferred=deferred)
    loss, _, statistics, _ = _operator(*arguments) if token_weight is None else _weighted(token_weight, arguments)
    if options.reduction == "none":
        loss = loss.view(leading)
    if not options.statistics:
        return loss
    rows = dict(zip(_STATISTICS, statistics.detach().view(len(_STATISTICS), *leading), strict=True))
    known = _known(options, has_teacher=bool(teacher), has_labels=labels is not None)
    if options.statistics == "all":
        known += ("columns_kept", "dropped_mass") if options.grad_filter is not None else ()
        known += ("kept_mass", "teacher_top1_kept") if vocab_index is not None or options.teacher_mass != "renormalize" else ()
    return loss, LossStats(**{name: rows[name] for name in known})


def _weighted(token_weight: TokenWeight, arguments: Arguments) -> Results:
    reset = _token_weight.set(token_weight)
    try:
        results: Results = _operator(*arguments)
        return results
    finally:
        _token_weight.reset(reset)


def _known(options: LossOptions, *, has_teacher: bool, has_labels: bool) -> tuple[str, ...]:
    """Names of the statistics that row kernels and lists tell."""
    known = ("divergence",) * has_teacher + ("cross_entropy",) * has_labels
    if options.statistics == "all":
        known += _OF_PAIRS if options.has_dense_teacher else _OF_LISTS if options.tail is not None else ()
    return known


@dataclass(frozen=True)
class _Pass:
    """What one pass works on: sources of logits, where results go, and how much at a time."""

    options: LossOptions
    tokens: int
    weights: TokenWeights
    plan: Plan
    student: LinearLogits | GivenLogits
    teacher: Teacher
    kept: KeptTokens | None
    """Takes the teacher's logits, where statistics of them are wanted that `teacher` does not make itself."""
    gradients: LinearGradients | GivenLogits
    """Takes the gradient of the student's logits, where one is made."""
    statistics: dict[str, Tensor]
    """By the names of `LossStats`, (n,) each."""
    token_weight: TokenWeight | None

    def weigh(self, part: slice) -> None:
        """Multiply the weights of `part` by what `token_weight` makes of its losses and statistics."""
        assert self.token_weight is not None
        weights, has_teacher = self.weights, self.teacher is not None
        known = _known(self.options, has_teacher=has_teacher, has_labels=weights.labels is not None)
        told = LossStats(**{name: self.statistics[name][part] for name in known})
        if told.divergence is not None:
            told = replace(told, divergence=told.divergence * self.options.told_factor)
        losses = torch.zeros_like(weights.token[part]) if told.divergence is None else told.divergence.clone()
        if told.cross_entropy is not None:
            losses += self.options.label_weight * told.cross_entropy
        reset = _token_weight.set(None)  # of this call, and of none that the function makes
        try:
            with torch.no_grad():
                factor = self.token_weight(losses, told)
        finally:
            _token_weight.reset(reset)
        check_function_weights(factor, losses)
        weights.token[part] *= factor
        if weights.label is not None:
            weights.label[part] *= factor

    def call(self, part: slice, logits: Tensor, gradient: Tensor | None) -> RowCall:
        """The row kernel's call for `part`, of which the student's `logits` are given and the teacher's are made here."""
        weights, teacher, statistics = self.weights, self.teacher, self.statistics
        dense, rows = None if isinstance(teacher, TopK) else teacher, self.options.rows
        if isinstance(teacher, TopK) and self.options.statistics == "all":
            told = (statistics[name][part] for name in _OF_LISTS)
            write_list_statistics(logits, self.student.bias, rows.student, rows.temperature, teacher.ids[part], *told)
        taught = teacher[part] if isinstance(teacher, TopK) else None if dense is None else dense.logits(part)
        if self.kept is not None:
            assert isinstance(taught, Tensor) and dense is not None
            self.kept.tell(part, taught, dense.bias)
        wanted = {"divergence": teacher is not None, "cross_entropy": weights.labels is not None}
        wanted |= dict.fromkeys(_OF_PAIRS, dense is not None and self.options.statistics == "all")
        return RowCall(
            student=logits,
            teacher=taught,
            options=rows,
            outputs=RowOutputs(**{name: statistics[name][part] for name, is_wanted in wanted.items() if is_wanted}),
            row_weight=weights.token[part],
            labels=None if weights.labels is None else weights.labels[part],
            label_weight=None if weights.label is None else weights.label[part],
            student_bias=self.student.bias,
            teacher_bias=None if dense is None else dense.bias,
            teacher_rest=None if dense is None or dense.rest is None else dense.rest[part],
            gradient=gradient,
            keeps_logits=any(isinstance(x, GivenLogits) and x.is_read_in_place for x in (self.student, teacher)),
        )


_OF_PAIRS = ("student_entropy", "teacher_entropy", "top1_agreement", "acceptance")
_OF_LISTS = ("listed_mass", "topk_overlap")


def _make(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    """Make the pass; statistics are (S, N) in the order of `LossStats`."""
    inputs = unpack(student, constants, upstream, needs_grad, call)
    work = _prepare(inputs)
    plan, run = work.plan, None
    for chunk in plan.backward_chunks():
        for part in plan.forward_parts(chunk):
            logits = work.student.logits(part)
            for rows in plan.teacher_parts(part):
                inside = slice(rows.start - part.start, rows.stop - part.start)
                row_call = work.call(rows, logits[inside], work.gradients.target(chunk, rows) if inputs.makes_gradients else None)
                # The backend is chosen by the first call, and all others are like it.
                run = run or choose(work.options.backend, row_call)
                losses_alone = [] if work.token_weight is None else [replace(row_call, gradient=None, keeps_logits=True)]
                for each in (*losses_alone, row_call):
                    try:
                        run(each)
                    except RuntimeError as error:
                        run = replace_failed(run, work.options.backend, each, error)
                        run(each)
                    if each is not row_call:
                        work.weigh(rows)
        if inputs.makes_gradients:
            work.gradients.collect(chunk)
    return _finish(inputs, work)


def _prepare(inputs: Inputs) -> _Pass:
    options, constants, student = LossOptions.from_text(inputs.options), inputs.constants, inputs.student
    mask, labels, denominator = (constants.get(name) for name in ("mask", "labels", "denominator"))
    own = next(iter(student.values()))
    tokens, vocabulary = own.shape[0], own.shape[1] if "logits" in student else student["weight"].shape[0]
    check_token_values(options, vocabulary, mask, labels, denominator)
    dtype = _compute_dtype(inputs)
    weights = token_weights(options, tokens, dtype, own.device, mask, labels, denominator)
    if own.is_cuda:
        weights = weights.with_exact_scale()
    if inputs.upstream is not None:
        weights = weights.times(inputs.upstream.to(dtype), linear="logits" not in student)
    token_weight = _token_weight.get()
    if token_weight is not None:
        weights = replace(weights, token=weights.token.clone())  # which may be the caller's mask, and is written to
    plan = _plan(inputs, options, weights.token.numel(), vocabulary, dtype)
    statistics = dict(zip(_STATISTICS, own.new_zeros(len(_STATISTICS), plan.tokens, dtype=dtype), strict=True))
    source: LinearLogits | GivenLogits
    gradients: LinearGradients | GivenLogits
    if "logits" in student:
        source = gradients = GivenLogits(own, weights.valid, plan.forward_tokens, needs_grad=inputs.makes_gradients)
    else:
        bias = student.get("bias")
        source = LinearLogits(own, student["weight"], bias, weights.valid, plan.forward_tokens, dtype, options.operand)
        grad_filter = None
        if options.grad_filter is not None:
            told = (statistics["columns_kept"], statistics["dropped_mass"]) if options.statistics == "all" else None
            grad_filter = GradFilter(options.grad_filter, told)
        gradients = LinearGradients(source, plan, inputs.needs_grad, grad_filter)
    told = (statistics["kept_mass"], statistics["teacher_top1_kept"]) if options.statistics == "all" else None
    teacher, kept = make_teacher(constants, weights.valid, plan, dtype, options, told)
    return _Pass(options, tokens, weights, plan, source, teacher, kept, gradients, statistics, token_weight)


def _finish(inputs: Inputs, work: _Pass) -> Results:
    weights, tokens, statistics = work.weights, work.tokens, work.statistics
    if isinstance(work.gradients, GivenLogits):
        gradients, scale = {"logits": work.gradients.gradient}, weights.scale.new_empty(0)
    else:
        gradients, scale = work.gradients.gradients(weights.valid, tokens), weights.scale
    losses = statistics["divergence"], statistics["cross_entropy"]
    total = weights.total(None if work.teacher is None else losses[0], None if weights.labels is None else losses[1])
    loss = weights.spread(total, tokens) if work.options.reduction == "none" else total.sum() * weights.scale
    losses[0].mul_(work.options.told_factor)
    spread = weights.spread(torch.stack(list(statistics.values())), tokens)
    return loss, scale, spread, [gradients[name] for name in inputs.student]


def _compute_dtype(inputs: Inputs) -> torch.dtype:
    names = ("teacher_logits", "teacher_hidden", "topk_ids")
    return compute_dtype(next(iter(inputs.student.values())), *(inputs.constants[name] for name in names if name in inputs.constants))


def _plan(inputs: Inputs, options: LossOptions, tokens: int, vocabulary: int, dtype: torch.dtype) -> Plan:
    weight = inputs.student.get("weight")
    own = next(iter(inputs.student.values()))
    operand = options.operand or own.dtype
    return plan_chunks(
        tokens,
        vocabulary,
        device=own.device,
        element_size=dtype.itemsize,
        gradient_size=min(operand.itemsize, dtype.itemsize),
        hidden_size=0 if weight is None or not inputs.needs_grad["weight"] else weight.shape[1],
        has_teacher=options.has_dense_teacher,
        chunk_size=options.chunk_size,
        memory_budget=options.memory_budget,
    )


def _fake(student: list[Tensor], constants: list[Tensor], upstream: Tensor | None, needs_grad: list[bool], call: str) -> Results:
    inputs = unpack(student, constants, upstream, needs_grad, call)
    options, own = LossOptions.from_text(inputs.options), student[0]
    dtype, tokens = _compute_dtype(inputs), own.shape[0]
    kept = own.dtype if "logits" in inputs.student else gradient_dtype(own, options.operand or own.dtype, dtype)
    gradients = [x.new_empty(x.shape if inputs.needs_grad[name] else 0, dtype=kept) for name, x in inputs.student.items()]
    loss = own.new_empty(tokens if options.reduction == "none" else (), dtype=dtype)
    scale = own.new_empty(0 if "logits" in inputs.student else (), dtype=dtype)
    return loss, scale, own.new_empty(len(_STATISTICS), tokens, dtype=dtype), gradients


_operator = register("fused_loss", _make, _fake)
