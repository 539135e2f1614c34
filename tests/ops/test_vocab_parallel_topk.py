"""topk_kl_div over two processes, each with a shard of the head, against the loss of the whole head in one.

The processes are started once, run all cases and write down what they found. Every test judges the record of its case.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from tests.ops.test_linear_kl import LABELS, MASK, NAMES, STUDENT_VOCAB, STUDENT_WIDTH, TOKENS, make_inputs
from tests.oracle import relative_error
from tests.ranks import spawn
from tests.row_kernels import DIVERGENCES, topk_cases

SIZES = (30, 7)
ENTRIES = 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
WEIGHTS = MASK * torch.linspace(0.5, 2.0, TOKENS)
EVERYTHING = {
    "mask": WEIGHTS,
    "labels": LABELS,
    "label_weight": 0.6,
    "student_softcap": 3.0,
    "student_logit_scale": 0.7,
    "temperature": 2.0,
    "chunk_size": 5,
    "return_stats": True,
}
LISTED = {"tail": "renormalize", "student_support": "listed"}
LOSSES = [{"tail": tail, "divergence": divergence} for tail, divergence in topk_cases()]
LOSSES += [{**LISTED, "divergence": divergence} for divergence in DIVERGENCES]
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    f"{' '.join(loss.values())}, {reduction}, {dtype}": (dtype, {**EVERYTHING, **loss, "reduction": reduction})
    for loss, reduction, dtype in product(LOSSES, ("mean", "none"), (torch.float64, torch.float32))
} | {
    "plain": (torch.float64, {}),
    "sum": (torch.float64, {"reduction": "sum", "mask": MASK, "labels": LABELS, "label_weight": 0.5}),
    "denominator": (torch.float64, {"denominator": 7.5, "labels": LABELS, "label_weight": 0.5}),
    "listed, denominator": (torch.float64, {**LISTED, "denominator": 7.5, "labels": LABELS, "label_weight": 0.5}),
    "budget": (torch.float64, {"memory_budget": 2000}),
    "labels that are only told of": (torch.float64, {"labels": LABELS, "return_stats": True}),
    "losses are told": (torch.float64, {"labels": LABELS, "return_stats": "losses"}),
    "lists at another temperature": (torch.float64, {"tail": "renormalize", "topk_temperature": 3.0}),
    "both at another temperature": (torch.float64, {**LISTED, "topk_temperature": 3.0}),
    "all masked": (torch.float64, {"mask": torch.zeros(TOKENS, dtype=torch.bool)}),
    "bfloat16": (torch.bfloat16, {"mask": MASK}),
    "listed, bfloat16": (torch.bfloat16, {**LISTED, "mask": MASK}),
}


def make_lists(entries: int = ENTRIES) -> dict[str, Tensor]:
    """Ids of both shards, some missing, in no order, and the rest's mass."""
    generator = torch.Generator().manual_seed(11)
    log_p = (3 * torch.randn(TOKENS, STUDENT_VOCAB, generator=generator, dtype=torch.float64)).log_softmax(-1)
    values, ids = log_p.topk(entries)
    order = torch.randperm(entries, generator=generator)
    missing = torch.arange(TOKENS)[:, None] % 3 > torch.arange(entries)
    tail = torch.cat((log_p.scatter(1, ids, -torch.inf), values.masked_fill(~missing, -torch.inf)), 1).logsumexp(-1)
    ids = ids.masked_fill(missing, -1)
    return {"topk_ids": ids[:, order], "topk_logprobs": values[:, order], "tail_logprob": tail}


@contextmanager
def collectives():
    """Every collective made inside, as (operation, elements)."""
    real, seen = (dist.all_reduce, dist.all_gather), []

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        seen.append((str(op).rsplit(".")[-1], tensor.numel()))
        real[0](tensor, op, group)

    def all_gather(tensors: list[Tensor], tensor: Tensor, group: Any = None) -> None:
        seen.append(("gather", tensor.numel()))
        real[1](tensors, tensor, group)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield seen
    finally:
        dist.all_reduce, dist.all_gather = real


class Member:
    """One process of the group: its rows of the head, and what it finds."""

    def __init__(self, rank: int) -> None:
        self.rank, self.group = rank, dist.group.WORLD
        self.rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))

    def shard(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        student = {name: x for name, x in make_inputs(dtype=dtype).items() if name in NAMES}
        return {k: (x if k.endswith("hidden") else x[self.rows]).detach().requires_grad_() for k, x in student.items()}

    def errors(self, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, float]:
        """Relative errors of the value, of every gradient and of every statistic, against float64 over the whole head."""
        exact = {name: x.detach().double().requires_grad_() for name, x in make_inputs(dtype=dtype).items() if name in NAMES}
        upstream = torch.tensor(-1.7, dtype=torch.float64)
        if options.get("reduction") == "none":
            upstream = torch.linspace(-2.0, 3.0, TOKENS, dtype=torch.float64)
        truth, made = fastkd.reference.topk_kl_div(**exact, **make_lists(), **options), None
        shard = self.shard(dtype)
        made = fastkd.topk_kl_div(**shard, **make_lists(), **options, group=self.group)
        found: dict[str, float] = {}
        if options.get("return_stats"):
            (truth, expected), (made, told) = truth, made
            for name, x in vars(expected).items():
                assert (x is None) == (getattr(told, name) is None), name
                if x is not None:
                    found[name] = relative_error(getattr(told, name), x)
        hidden, *head = torch.autograd.grad(truth, [exact[n] for n in NAMES], upstream.expand(truth.shape))
        own = torch.autograd.grad(made, [shard[n] for n in NAMES], upstream.to(made.dtype).expand(made.shape))
        pairs = zip(["value", *NAMES], [made, *own], [truth, hidden, *(x[self.rows] for x in head)], strict=True)
        return found | {name: relative_error(x, y) for name, x, y in pairs}

    def collectives(self, *, labels: bool = False, trained: tuple[str, ...] = tuple(NAMES), **options: Any) -> dict[str, Any]:
        """Collectives of forward, in three chunks, and of backward, made twice."""
        shard = self.shard()
        for name in NAMES:
            shard[name].requires_grad_(name in trained)
        given = {"labels": LABELS, "label_weight": 0.5} if labels else {}
        with collectives() as forward:
            loss = fastkd.topk_kl_div(**shard, **make_lists(), **given, **options, chunk_size=8, group=self.group)
            loss = loss[0] if isinstance(loss, tuple) else loss
        with collectives() as backward:
            first = torch.autograd.grad(loss.sum(), [shard[n] for n in trained], retain_graph=True)
            second = torch.autograd.grad(loss.sum(), [shard[n] for n in trained])
        same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        return {"forward": forward, "backward": backward, "same": same}

    def whole_list(self) -> dict[str, float]:
        """Every id is listed, so that nothing is left beside the list in any shard."""
        lists = make_lists(STUDENT_VOCAB)
        lists = {**lists, "tail_logprob": torch.full_like(lists["tail_logprob"], -torch.inf)}
        exact = {name: x for name, x in make_inputs().items() if name in NAMES}
        shard = self.shard()
        truth, made = fastkd.reference.topk_kl_div(**exact, **lists), fastkd.topk_kl_div(**shard, **lists, group=self.group)
        gradients = (torch.autograd.grad(x, y["student_hidden"])[0] for x, y in ((made, shard), (truth, exact)))
        return {"value": relative_error(made, truth), "student_hidden": relative_error(*gradients)}

    def nan(self) -> bool:
        """A NaN in the other process's shard is seen."""
        shard = {name: x.detach().clone() for name, x in self.shard().items()}
        if self.rank == 1:
            shard["student_bias"][0] = torch.nan
        return bool(fastkd.topk_kl_div(**shard, **make_lists(), group=self.group).isnan())

    def refusals(self) -> dict[str, str]:
        last, lists = self.rank == 1, make_lists()
        attempts: dict[str, dict[str, Any]] = {
            "lists of several lengths": {name: lists[name][:, :-1] for name in ("topk_ids", "topk_logprobs")} if last else {},
            "an id beyond all shards": {"topk_ids": lists["topk_ids"].clamp_min(0) + STUDENT_VOCAB},
            "masks differ": {"mask": MASK if last else ~MASK},
            "grad_filter": {"grad_filter": 0.1},
            "backend": {"backend": "cpp"},
            "group": {"group": "world"},
        }
        found = {}
        for (name, changed), support in product(attempts.items(), ("full", "listed")):
            of_support = LISTED if support == "listed" else {}
            try:
                fastkd.topk_kl_div(**{"group": self.group, **self.shard(), **lists, **of_support, **changed})
            except (ValueError, TypeError) as error:
                found[f"{name}, {support}"] = str(error)
        return found

    def second_derivative(self, **options: Any) -> str:
        shard = self.shard()
        loss = fastkd.topk_kl_div(**shard, **make_lists(), **options, group=self.group)
        (gradient,) = torch.autograd.grad(loss, shard["student_hidden"], create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""


def work(rank: int, folder: str) -> None:
    member = Member(rank)
    found: dict[str, Any] = {name: member.errors(dtype, options) for name, (dtype, options) in CASES.items()}
    found |= {
        "collectives": member.collectives(),
        "collectives, jsd with labels": member.collectives(divergence="jsd(0.3)", labels=True),
        "collectives, statistics": member.collectives(return_stats=True),
        "collectives, none": member.collectives(reduction="none"),
        "collectives, head": member.collectives(trained=("student_weight", "student_bias")),
        "collectives, listed": member.collectives(**LISTED, return_stats=True),
        "collectives, listed head": member.collectives(**LISTED, trained=("student_weight", "student_bias")),
        "collectives, listed with labels": member.collectives(**LISTED, labels=True),
        "whole list": member.whole_list(),
        "nan": member.nan(),
        "refusals": member.refusals(),
        "second derivative": [member.second_derivative(), member.second_derivative(**LISTED)],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What every process found."""
    folder = tmp_path_factory.mktemp("group")
    spawn(work, str(folder), seconds=120.0)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def backend():
    """A shard of the vocabulary has the torch backend alone, so that no test runs twice."""


@pytest.mark.parametrize("name", CASES)
def test_two_uneven_shards_equal_the_whole_head(found, name):
    for rank, member in enumerate(found):
        for what, error in member[name].items():
            assert error <= TOLERANCE[CASES[name][0]], f"rank {rank}, {what}: relative error {error:.3g}"


def test_nothing_beside_the_list(found):
    assert max(max(member["whole list"].values()) for member in found) < 1e-12


def test_nan_is_seen_by_all(found):
    assert [member["nan"] for member in found] == [True, True]


CHUNKS = (8, 8, TOKENS % 8)
SIZES_ARE_AGREED = ["gather", 6]
HIDDEN = ["SUM", STUDENT_WIDTH * TOKENS]


def of_chunks(numbers: int, *, overlap: bool = False) -> list[list[Any]]:
    made = [[["MAX", n], ["SUM", numbers * n], *([["gather", ENTRIES * n]] if overlap else [])] for n in CHUNKS]
    return [SIZES_ARE_AGREED, *(x for chunk in made for x in chunk)]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("collectives", of_chunks(ENTRIES + 1), [HIDDEN]),
        ("collectives, jsd with labels", of_chunks(ENTRIES + 3), [HIDDEN]),
        ("collectives, statistics", of_chunks(ENTRIES + 1, overlap=True), [HIDDEN]),
        ("collectives, none", of_chunks(ENTRIES + 1), [HIDDEN]),
        ("collectives, head", of_chunks(ENTRIES + 1), []),
        ("collectives, listed", [SIZES_ARE_AGREED, ["SUM", ENTRIES * TOKENS]], [HIDDEN]),
        ("collectives, listed head", [SIZES_ARE_AGREED, ["SUM", ENTRIES * TOKENS]], []),
        (
            "collectives, listed with labels",
            [SIZES_ARE_AGREED, ["SUM", ENTRIES * TOKENS], *of_chunks(ENTRIES + 3)],
            [HIDDEN, HIDDEN],
        ),
    ],
)
def test_collectives_and_what_they_carry(found, name, forward, backward):
    """Two a chunk, whatever the divergence; for lists alone one in all. Backward takes the hidden states' gradient alone."""
    for member in found:
        assert member[name] == {"forward": forward, "backward": backward * 2, "same": True}


SENTENCES = {
    "lists of several lengths": "lists of [5, 4] entries",
    "an id beyond all shards": "outside the student's 37 rows",
    "masks differ": "the same mask",
    "grad_filter": "grad_filter=0.1",
    "backend": "backend='cpp' has no kernel",
    "group": "group is a str",
}


@pytest.mark.parametrize("support", ["full", "listed"])
@pytest.mark.parametrize(("name", "sentence"), SENTENCES.items())
def test_what_is_wrong_is_refused_by_every_process(found, name, sentence, support):
    for member in found:
        assert sentence in member["refusals"][f"{name}, {support}"]


def test_a_second_derivative_is_refused(found):
    for member in found:
        assert all("cannot be differentiated twice" in sentence for sentence in member["second derivative"])
