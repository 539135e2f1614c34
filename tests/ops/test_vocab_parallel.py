"""linear_kl_div over a group of processes, each with a shard of both heads, against the dense loss in one.

A process takes seconds to start, so three are started once, run all cases (two of them as a pair, or all three) and write down what
they found. Every test judges the record of its case.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastkd
from tests.ops.test_linear_kl import DIVERGENCES, LABELS, MASK, NAMES, STUDENT_VOCAB, TEACHER_VOCAB, TOKENS, make_inputs
from tests.oracle import assert_close, relative_error

TIMEOUT = 120.0
SIZES = {2: (30, 7), 3: (20, 5, 12)}
"""Rows of each process's shard."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
WEIGHTS = MASK * torch.linspace(0.5, 2.0, TOKENS)
EVERYTHING = {
    "mask": WEIGHTS,
    "labels": LABELS,
    "label_weight": 0.6,
    "student_softcap": 3.0,
    "teacher_softcap": 5.0,
    "student_logit_scale": 0.7,
    "teacher_logit_scale": 1.3,
    "chunk_size": 5,
}
EXACT = {
    f"{divergence}, T={temperature:g}, {dtype}": (dtype, {**EVERYTHING, "divergence": divergence, "temperature": temperature})
    for divergence, temperature, dtype in product(DIVERGENCES, (1.0, 2.0), (torch.float64, torch.float32))
}
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float64, {}),
    "mask": (torch.float64, {"mask": MASK}),
    "sum": (torch.float64, {"reduction": "sum", "mask": MASK, "labels": LABELS, "label_weight": 0.5}),
    "denominator": (torch.float64, {"denominator": 7.5, "labels": LABELS, "label_weight": 0.5}),
    "tensor denominator": (torch.float64, {"denominator": torch.tensor(7.5)}),
    "budget": (torch.float64, {"memory_budget": 2000}),
    "torch backend": (torch.float64, {"backend": "torch"}),
    "all masked": (torch.float64, {"mask": torch.zeros(TOKENS, dtype=torch.bool)}),
    "bfloat16": (torch.bfloat16, {"mask": MASK}),
} | {
    f"none, {divergence}": (torch.float64, {**EVERYTHING, "divergence": divergence, "temperature": 2.0, "reduction": "none"})
    for divergence in DIVERGENCES
}

CASES = EXACT | OPTIONS


@contextmanager
def all_reduces(*, silent: bool = False) -> Iterator[list[tuple[str, int]]]:
    """Every all-reduce made inside, as (operation, elements); `silent`: they are not made."""
    real, seen = dist.all_reduce, []

    def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        seen.append((str(op).rsplit(".")[-1], tensor.numel()))
        if not silent:
            real(tensor, op, group)

    dist.all_reduce = counted
    try:
        yield seen
    finally:
        dist.all_reduce = real


def vocab_parallel_reference(
    student_hidden: Tensor,
    student_weights: Sequence[Tensor],
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weights: Sequence[Tensor] | None,
    *,
    student_biases: Sequence[Tensor] | None = None,
    teacher_biases: Sequence[Tensor] | None = None,
    **options: Any,
) -> Any:
    """The same value from all shards in one process: the dense loss on the concatenated ones, by plain torch in the inputs' dtype."""

    def logits(hidden: Any, weights: Sequence[Tensor] | None, biases: Sequence[Tensor] | None) -> Tensor:
        if weights is None:
            return torch.cat(list(hidden), -1)
        return torch.nn.functional.linear(hidden, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))

    student = logits(student_hidden, student_weights, student_biases)
    return fastkd.reference.kl_div(student, logits(teacher_hidden, teacher_weights, teacher_biases), **options)


class Member:
    """One process of the group: its shard, and what it finds."""

    def __init__(self, group: Any, rank: int, sizes: tuple[int, ...]) -> None:
        self.group, self.rank, self.sizes = group, rank, sizes
        start = sum(sizes[:rank])
        self.rows = slice(start, start + sizes[rank])

    def shard(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: (x if k.endswith("hidden") else x[self.rows]).detach().requires_grad_(x.requires_grad) for k, x in inputs.items()}

    def truth(self, inputs: dict[str, Tensor], options: dict[str, Any], upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss over the whole vocabulary, in float64; gradients of this process's shard."""
        exact = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in inputs.items()}

        def split(name: str) -> tuple[Tensor, ...]:
            return exact[name][:STUDENT_VOCAB].split(self.sizes)

        value = vocab_parallel_reference(
            exact["student_hidden"],
            split("student_weight"),
            exact["teacher_hidden"],
            split("teacher_weight"),
            student_biases=split("student_bias"),
            teacher_biases=split("teacher_bias"),
            **options,
        )
        hidden, *head = torch.autograd.grad(value, [exact[n] for n in NAMES], upstream.expand(value.shape))
        return value.detach(), [hidden, *(x[self.rows] for x in head)]

    def errors(self, dtype: torch.dtype, options: dict[str, Any], *, silent: bool = False) -> dict[str, float]:
        """Relative errors of the value and of every gradient; `silent`: without the all-reduce of the backward pass."""
        inputs = make_inputs(dtype=dtype)
        upstream = torch.tensor(-1.7, dtype=torch.float64)
        if options.get("reduction") == "none":
            upstream = torch.linspace(-2.0, 3.0, TOKENS, dtype=torch.float64)
        value, gradients = self.truth(inputs, options, upstream)
        shard = self.shard(inputs)
        made = fastkd.linear_kl_div(**shard, **options, group=self.group)
        with all_reduces(silent=silent):
            own = torch.autograd.grad(made, [shard[n] for n in NAMES], upstream.to(made.dtype).expand(made.shape))
        pairs = zip(["value", *NAMES], [made, *own], [value, *gradients], strict=True)
        return {name: relative_error(x, exact) for name, x, exact in pairs}

    def teacher_logits(self, dtype: torch.dtype) -> dict[str, float]:
        """`teacher_weight=None`: columns of logits that somebody stored in `dtype`."""
        inputs = make_inputs()
        logits = torch.nn.functional.linear(inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"]).to(dtype)
        shard = {k: x for k, x in self.shard(inputs).items() if k.startswith("student")}
        own = logits[:, self.rows]
        made = fastkd.linear_kl_div(**shard, teacher_hidden=own, teacher_weight=None, mask=MASK, group=self.group)
        truth = vocab_parallel_reference(
            inputs["student_hidden"],
            inputs["student_weight"].split(self.sizes),
            logits[:, :STUDENT_VOCAB].double().split(self.sizes, -1),
            None,
            student_biases=inputs["student_bias"].split(self.sizes),
            mask=MASK,
        )
        gradient, exact = (torch.autograd.grad(x, y["student_hidden"])[0] for x, y in ((made, shard), (truth, inputs)))
        return {"value": relative_error(made, truth), "student_hidden": relative_error(gradient, exact)}

    def collectives(self, divergence: Any, *, reduction: str = "mean", trained: tuple[str, ...] = tuple(NAMES)) -> dict[str, Any]:
        """All-reduces of three chunks, and of backward, made twice."""
        shard = self.shard(make_inputs())
        for name in NAMES:
            shard[name].requires_grad_(name in trained)
        with all_reduces() as forward:
            loss = fastkd.linear_kl_div(**shard, divergence=divergence, chunk_size=8, reduction=reduction, group=self.group).sum()
        tensors = [shard[n] for n in trained]
        with all_reduces() as backward:
            first = torch.autograd.grad(loss, tensors, retain_graph=True)
            second = torch.autograd.grad(loss, tensors)
        same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        return {"forward": forward, "backward": backward, "same": same}

    def no_tokens(self) -> dict[str, Any]:
        shard = self.shard(make_inputs(leading=(0,)))
        with all_reduces() as seen:
            loss = fastkd.linear_kl_div(**shard, group=self.group)
            loss.backward()
        return {"value": loss.item(), "zero": not bool(shard["student_weight"].grad.any()), "all_reduces": seen}

    def far_apart(self) -> dict[str, Any]:
        """Impossible tokens: one process's whole shard is -inf in both models for some tokens, and NaN for another."""
        inputs = make_inputs()
        student, teacher = (
            (inputs[f"{m}_hidden"] @ inputs[f"{m}_weight"].T)[:, :STUDENT_VOCAB].detach() for m in ("student", "teacher")
        )
        banned = torch.arange(STUDENT_VOCAB) >= self.sizes[0]
        logits = teacher.masked_fill(banned & (torch.arange(TOKENS) % 2 == 0)[:, None], -torch.inf)
        head = torch.eye(STUDENT_VOCAB, dtype=torch.float64)
        arguments = (student.clone().requires_grad_(), head[self.rows], logits[:, self.rows], None)
        values = {}
        for divergence in ("forward_kl", "jsd(0.5)", "tvd"):
            made = fastkd.linear_kl_div(*arguments, divergence=divergence, group=self.group)
            exact = student.clone().requires_grad_()
            truth = fastkd.kl_div(exact, logits, divergence=divergence)
            gradients = torch.autograd.grad(made, arguments[0])[0], torch.autograd.grad(truth, exact)[0]
            values[divergence] = max(relative_error(made, truth), relative_error(*gradients))
        poisoned = logits[:, self.rows].clone()
        if self.rank == 1:
            poisoned[3, 2] = torch.nan
        loss = fastkd.linear_kl_div(*arguments[:2], poisoned, None, group=self.group)
        return {"errors": values, "nan": bool(loss.isnan())}

    def refusals(self) -> dict[str, str]:
        shard = self.shard(make_inputs())
        last = self.rank == len(self.sizes) - 1
        empty = {k: x[:0] for k, x in shard.items() if not k.endswith("hidden")}
        attempts: dict[str, dict[str, Any]] = {
            "one shard is empty": empty if last else {},
            "teacher's shard is shorter": {k: shard[k][:-1] for k in ("teacher_weight", "teacher_bias")} if last else {},
            "masks differ": {"mask": MASK if last else ~MASK},
            "tokens differ": {k: x[:-1] for k, x in shard.items() if k.endswith("hidden")} if last else {},
            "label beyond all shards": {"labels": torch.full((TOKENS,), STUDENT_VOCAB), "label_weight": 1.0},
            "vocab_index": {"vocab_index": torch.arange(self.sizes[self.rank])},
            "return_stats": {"return_stats": True},
            "grad_filter": {"grad_filter": 0.1},
            "backend": {"backend": "cpp"},
            "group": {"group": "world"},
        }
        found = {}
        for name, changed in attempts.items():
            try:
                fastkd.linear_kl_div(**{"group": self.group, **shard, **changed})
            except (ValueError, TypeError) as error:
                found[name] = str(error)
        return found

    def second_derivative(self) -> str:
        shard = self.shard(make_inputs())
        loss = fastkd.linear_kl_div(**shard, group=self.group)
        (gradient,) = torch.autograd.grad(loss, shard["student_hidden"], create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""


def run_pair(member: Member) -> dict[str, Any]:
    found: dict[str, Any] = {name: member.errors(dtype, options) for name, (dtype, options) in CASES.items()}
    found |= {f"teacher logits, {dtype}": member.teacher_logits(dtype) for dtype in (torch.float64, torch.bfloat16)}
    found |= {f"collectives, {divergence}": member.collectives(divergence) for divergence in DIVERGENCES}
    return found | {
        "collectives, none": member.collectives("jsd(0.5)", reduction="none"),
        "collectives, head": member.collectives("forward_kl", trained=("student_weight", "student_bias")),
        "silent": member.errors(torch.float64, EVERYTHING, silent=True),
        "no tokens": member.no_tokens(),
        "far apart": member.far_apart(),
        "refusals": member.refusals(),
        "second derivative": member.second_derivative(),
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    three = Member(dist.group.WORLD, rank, SIZES[3])
    found = {f"three, {name}": three.errors(dtype, options) for name, (dtype, options) in EXACT.items()}
    pair = dist.new_group([0, 1])
    if rank < 2:
        found |= run_pair(Member(pair, rank, SIZES[2]))
    else:
        with pytest.raises(TypeError, match="a member of"):
            fastkd.linear_kl_div(**make_inputs(), group=pair)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What every process found."""
    folder = tmp_path_factory.mktemp("group")
    context = mp.spawn(work, (str(folder),), nprocs=3, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"The processes were not done after {TIMEOUT:g} s: a collective that not all of them called?")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.fixture
def pair(found) -> list[dict[str, Any]]:
    return found[:2]


@pytest.fixture
def backend():
    """A shard of the vocabulary has the torch backend alone, so that no test runs twice."""


def judge(members: list[dict[str, Any]], name: str, tolerance: float) -> None:
    for rank, found in enumerate(members):
        for what, error in found[name].items():
            assert error <= tolerance, f"{name}, rank {rank}, {what}: relative error {error:.3g} > {tolerance:g}"


@pytest.mark.parametrize("name", CASES)
def test_a_pair_equals_the_dense_loss(pair, name):
    judge(pair, name, TOLERANCE[CASES[name][0]])


@pytest.mark.parametrize("name", EXACT)
def test_three_uneven_shards_equal_the_dense_loss(found, name):
    judge(found, f"three, {name}", TOLERANCE[EXACT[name][0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_shards_of_teacher_logits(pair, dtype):
    judge(pair, f"teacher logits, {dtype}", 1e-12)


def test_the_check_sees_a_hidden_gradient_that_was_not_summed(pair):
    for member in pair:
        errors = member["silent"]
        assert errors["student_hidden"] > 0.05
        assert max(error for name, error in errors.items() if name != "student_hidden") < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_collectives_are_two_or_three_a_chunk_and_one_in_backward(pair, divergence):
    first, second, chunks = 8, TOKENS % 8, 2
    assert chunks * first + second == TOKENS
    is_linear = divergence in ("forward_kl", "reverse_kl")
    last = [] if is_linear else [3 if divergence == "nla" else 2]  # numbers a token of a third all-reduce
    expected = []
    for tokens in (first, first, second):
        expected += [["MAX", 2 * tokens], ["SUM", 3 * tokens], *(["SUM", numbers * tokens] for numbers in last)]
    for member in pair:
        seen = member[f"collectives, {divergence}"]
        assert seen["forward"] == expected
        # One for each of two backward passes: of the hidden states' gradient alone.
        assert seen["backward"] == [["SUM", 8 * TOKENS]] * 2
        assert seen["same"]


def test_the_gradient_of_the_head_needs_no_collective(pair):
    for member in pair:
        assert member["collectives, head"]["backward"] == []


def test_losses_of_tokens_need_no_collective_for_their_logits_in_backward(pair):
    for member in pair:
        assert member["collectives, none"]["backward"] == [["SUM", 8 * TOKENS]] * 2
        assert member["collectives, none"]["same"]


def test_no_tokens_are_an_exact_zero_with_the_graph_connected(pair):
    for member in pair:
        assert member["no tokens"] == {"value": 0.0, "zero": True, "all_reduces": [["SUM", 0]]}


def test_impossible_tokens_add_nothing_and_nan_is_seen_by_all(pair):
    for member in pair:
        assert max(member["far apart"]["errors"].values()) < 1e-12
        assert member["far apart"]["nan"]


SENTENCES = {
    "one shard is empty": "must hold at least one row",
    "teacher's shard is shorter": "[30, 7] vocabulary rows of the student and [30, 6] of the teacher",
    "masks differ": "the same mask",
    "tokens differ": "[23, 22] tokens",
    "label beyond all shards": "outside the vocabulary of 37",
    "vocab_index": "teacher_weight[vocab_index[shard]]",
    "return_stats": "return_stats is not available",
    "grad_filter": "grad_filter=0.1 is not available",
    "backend": "backend='cpp' has no kernel",
    "group": "group is a str",
}


@pytest.mark.parametrize(("name", "sentence"), SENTENCES.items())
def test_what_is_wrong_is_refused_by_every_process(pair, name, sentence):
    for member in pair:
        assert sentence in member["refusals"][name]


def test_a_second_derivative_is_refused(pair):
    for member in pair:
        assert "cannot be differentiated twice" in member["second derivative"]


def test_the_reference_is_the_dense_reference():
    inputs = make_inputs()
    assert STUDENT_VOCAB < TEACHER_VOCAB
    shards = {k: x[:STUDENT_VOCAB].split(SIZES[3]) for k, x in inputs.items() if not k.endswith("hidden")}
    value = vocab_parallel_reference(
        inputs["student_hidden"],
        shards["student_weight"],
        inputs["teacher_hidden"],
        shards["teacher_weight"],
        student_biases=shards["student_bias"],
        teacher_biases=shards["teacher_bias"],
        mask=MASK,
    )
    assert_close(value, fastkd.reference.linear_kl_div(**inputs, mask=MASK), 1e-14)


def test_a_vocabulary_map_deals_its_slots_to_the_processes():
    counts = torch.arange(50).flip(0)
    vocabulary = fastkd.VocabMap.from_counts(counts, 23, multiple_of=1)
    shards = [vocabulary.shard(rank, 4) for rank in range(4)]
    assert [len(x) for x in shards] == [6, 6, 6, 5]
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(23))
    loads = [int(counts[vocabulary.decode_ids(x)].sum()) for x in shards]
    assert max(loads) - min(loads) <= int(counts.max())
    # A slot's label is its position in the shards one behind the other.
    positions = torch.cat(shards).argsort()
    assert positions[shards[2][3]] == 6 + 6 + 3
    for rank, size in ((4, 4), (-1, 4), (0, 24)):
        with pytest.raises(ValueError, match="no more processes than slots"):
            vocabulary.shard(rank, size)
