"""Counts on live ranks what `step_costs.py` predicts: small models, fastkd's own trainer, one process and two over gloo.

Everything is read from the third step of `StageTrainer.run`: collectives as torch's dispatcher sees them, with their sizes; storages of
weights, gradients and moments; what autograd saves; FLOPs by torch's counter, and the head's by its calls, which the counter does not
see. The second step is timed.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastkd.methods.kd import KDOptions, KnowledgeDistillation
from fastkd.methods.objective import Stage
from fastkd.models.language_model import LanguageModel
from fastkd.ops import gemm, linear_logits
from fastkd.ops.linear_kl import linear_kl_div
from fastkd.tasks.text import IGNORE_INDEX, TextBatch
from fastkd.train.config import StageArguments
from fastkd.train.loop import StageTrainer
from fastkd.train.parallel import place
from fastkd.train.ranks import Ranks

from . import step_costs as costs
from .environment import stamp
from .step_costs import Decoder, Setup

ROWS, LENGTH = 3, 20
# An odd vocabulary, so that ranks hold unequal pieces of it.
STUDENT = Decoder(2, 32, 80, 16, 1001, head_size=8)
TEACHER = Decoder(3, 64, 112, 32, 1001, head_size=16)
SMALL = Setup(STUDENT, TEACHER, ROWS * LENGTH, LENGTH)
TIMED = {
    "small": Setup(Decoder(2, 128, 384, 64, 2048, head_size=32), Decoder(2, 256, 768, 128, 2048, head_size=64), 256, 64),
    "large": Setup(Decoder(4, 256, 768, 128, 2048, head_size=64), Decoder(4, 384, 1152, 192, 2048, head_size=96), 256, 64),
}
ROUNDS = 5
ONE_RANK = {
    "1 rank": SMALL,
    "1 rank, accumulation 2": replace(SMALL, accumulation=2),
    "1 rank, bf16": replace(SMALL, bf16=True),
}
DDP = replace(SMALL, world_size=2)
FSDP = replace(DDP, fsdp=True)
TWO_RANKS = {
    "DDP": DDP,
    "DDP, accumulation 2": replace(DDP, accumulation=2),
    "DDP, teacher split": replace(DDP, fsdp_teacher=True),
    "DDP, teacher split, accumulation 2": replace(DDP, fsdp_teacher=True, accumulation=2),
    "FSDP2": FSDP,
    "FSDP2, accumulation 2": replace(FSDP, accumulation=2),
    "FSDP2, teacher split": replace(FSDP, fsdp_teacher=True),
    "FSDP2, teacher split, accumulation 2": replace(FSDP, fsdp_teacher=True, accumulation=2),
    "FSDP2, tied heads, teacher split": replace(
        FSDP, student=replace(STUDENT, tied=True), teacher=replace(TEACHER, tied=True), fsdp_teacher=True
    ),
    "FSDP2, capturing": replace(FSDP, captures=True),
    "FSDP2, bf16": replace(FSDP, bf16=True),
}
_FORMULAS = (
    *("held_weights", "held_gradients", "accumulated_gradients", "held_moments", "held_teacher", "kept_whole"),
    *("weights_16bit", "head_gradient", "backbone_flops", "head_flops"),
)
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
}
"""Operators of c10d: their kind, and which argument is the whole tensor."""
_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}
"""torch's own counts, for the CPU's kernels too."""
_WAITING = ("_wrap_tensor_autograd", "wait_tensor")


class Collectives(TorchDispatchMode):
    """Bytes of all collectives made inside, by kind. The trainer's host sums are in float64, and nothing else is."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators come by here
        name = function.overloadpacket.__name__
        if function.namespace in ("c10d", "_c10d_functional") and name not in _WAITING:
            if name not in _KINDS:
                raise ValueError(f"{name} is a collective that nobody has counted yet; add it to _KINDS, and to the formulas.")
            kind, argument = _KINDS[name]
            given = args[argument][0] if isinstance(args[argument], list | tuple) else args[argument]
            is_host = kind == "all_reduce" and given.dtype == torch.float64
            self.bytes["host" if is_host else kind] += _size(args[argument])
        return function(*args, **(kwargs or {}))


class HeadCalls:
    """FLOPs and logits' bytes of the fused loss, by the calls that it makes."""

    def __init__(self) -> None:
        self.flops = self.buffers = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        multiply, make = gemm.mm_, gemm.row_buffer

        def mm_(out: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            multiply(out, a, b, **options)

        def row_buffer(*arguments: Any) -> Tensor:
            made = make(*arguments)
            self.buffers += _size(made)
            return made

        with mock.patch.object(linear_logits, "mm_", mm_), mock.patch.object(linear_logits, "row_buffer", row_buffer):
            yield


class Watched(KnowledgeDistillation):
    """Counts what happens from the end of its second step to that of its third."""

    steps = forwards = 0

    def __init__(self, student: LanguageModel, teacher: LanguageModel) -> None:
        super().__init__(student, teacher, KDOptions(temperature=1.0, label_weight=0.0), student.vocabulary)
        self.shapes = {tuple(p.shape) for p in student.parameters()}
        self.collectives, self.head, self.inside = Collectives(), HeadCalls(), ExitStack()
        self.flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        self.ends: list[float] = []
        self.alive_first: list[Tensor] = []
        self.accumulated = self.kept_whole = 0
        self.saved: dict[tuple[int, int], Tensor] = {}

    def forward(self, batch: Any, denominator: Any) -> Tensor:
        if self.steps != 2:
            return super().forward(batch, denominator)
        self.forwards += 1
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        alive = [*self._alive(), *gradients]
        if self.forwards == 1:
            self.alive_first = alive
        else:
            known = set(map(id, self.alive_first))
            self.accumulated = sum(_storages(x for x in alive if id(x) not in known).values())
        self.saved = {}
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            loss = super().forward(batch, denominator)
        self.kept_whole = sum(_storages(p for p in self.student.parameters() if not isinstance(p, DTensor)).values())
        return loss

    def _alive(self) -> list[Tensor]:
        """The plain tensors in a parameter's whole shape that Python holds; FSDP2 keeps gradients that are not reduced yet as such."""
        return [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and tuple(x.shape) in self.shapes]

    def _save(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            self.saved[tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()] = tensor
        return tensor

    def end_step(self) -> None:
        self.steps += 1
        self.ends.append(time.perf_counter())
        if self.steps == 2:
            for counting in (self.collectives, self.flops, self.head.counted()):
                self.inside.enter_context(counting)
        elif self.steps == 3:
            self.inside.close()


def count(setup: Setup, ranks: Ranks) -> dict[str, Any]:
    """Three steps of `setup`; what the third had and did on this rank, by the names of `step_costs`, and the seconds of the second."""
    assert setup.teacher is not None
    student, teacher = _model(setup.student), _model(setup.teacher).eval().requires_grad_(False)
    objective = Watched(student, teacher)
    place(objective, ranks, fsdp=setup.fsdp, fsdp_teacher=setup.fsdp_teacher)
    rows = setup.tokens // setup.length
    ids = torch.randint(setup.student.vocabulary, (16 * rows, setup.length), generator=torch.Generator().manual_seed(0))

    def make_batch(indices: Sequence[int], generator: torch.Generator) -> TextBatch:
        chosen = ids[torch.as_tensor(np.asarray(indices))]
        return TextBatch(chosen, torch.ones_like(chosen), torch.full_like(chosen, IGNORE_INDEX))

    lengths = np.full(len(ids), setup.length)
    stage = Stage("step", objective, lengths, make_batch, None, "loss", False, keep="last", captures=setup.captures)
    arguments = StageArguments(
        per_device_train_batch_size=rows, gradient_accumulation_steps=setup.accumulation, max_steps=3, bf16=setup.bf16
    )
    gradients: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.gather(own)[0])
        trainer = StageTrainer(stage, arguments, folder, seed=0, ranks=ranks, fsdp=setup.fsdp)

        def before_update(*_: Any) -> None:
            gradients.clear()
            gradients.update(_storages(p.grad for p in trainer.names if p.grad is not None))

        trainer.optimizer.register_step_pre_hook(before_update)
        trainer.run()
        ranks.barrier()
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    matrices = {shape[::turn] for shape in setup.student.matrices for turn in (1, -1)}
    kept = list(objective.saved.values())
    sixteen = [x for x in kept if x.dtype == torch.bfloat16 and tuple(x.shape) in matrices]
    head = [x for x in kept if tuple(x.shape) == (setup.student.vocabulary, setup.student.width)]
    copies = sum(map(_size, sixteen))
    return {
        "held_weights": sum(_storages(student.parameters()).values()),
        "held_gradients": sum(gradients.values()),
        "accumulated_gradients": objective.accumulated,
        "held_moments": sum(_storages(moments).values()),
        "held_teacher": _teacher_bytes(objective, setup),
        "kept_whole": objective.kept_whole if setup.is_split else 0,
        "weights_16bit": copies,
        "head_gradient": sum(map(_size, head)),
        "activations": sum(size for _, size in objective.saved) - copies - sum(map(_size, head)),
        "logits": objective.head.buffers // setup.accumulation,
        "backbone_flops": objective.flops.get_total_flops() // setup.accumulation,
        "head_flops": objective.head.flops // setup.accumulation,
        "communication": dict(objective.collectives.bytes),
        "buffers": sum(map(_size, student.buffers())),
        "seconds": objective.ends[1] - objective.ends[0],
    }


def compare(case: str, setup: Setup, counted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks of one case. What autograd saves is compared on one rank, where no storage is freed and taken again meanwhile."""
    predicted: dict[str, int] = {name: getattr(costs, name)(setup) for name in _FORMULAS}
    predicted["logits"] = costs.logits(setup, "cpu", None)
    if setup.world_size == 1:
        predicted["activations"] = costs.activations(setup)
    found = dict(counted)
    made = costs.communication(replace(setup, buffers=counted["buffers"]))
    for kind in sorted(made.keys() | counted["communication"].keys()):
        predicted[kind], found[kind] = made[kind], counted["communication"].get(kind, 0)
    return [
        {"case": case, "what": name.replace("_", " "), "predicted": value, "counted": found[name]}
        for name, value in predicted.items()
        if value or found[name]
    ]


def vocabulary_parallel(group: Any) -> list[dict[str, Any]]:
    """Forward and backward of the op over both ranks, each with its rows of both heads."""
    tokens, ranks = SMALL.tokens, dist.get_world_size(group)
    generator = torch.Generator().manual_seed(0)
    vocabulary = 500 + dist.get_rank(group)
    shapes = ((tokens, STUDENT.width), (tokens, TEACHER.width), (vocabulary, STUDENT.width), (vocabulary, TEACHER.width))
    student, teacher, head, teacher_head = (torch.randn(shape, generator=generator) for shape in shapes)
    checks = []
    for divergence, labelled in (("forward_kl", False), ("forward_kl", True), ("tvd", False)):
        with Collectives() as made:
            linear_kl_div(
                student.requires_grad_(),
                head.requires_grad_(),
                teacher,
                teacher_head,
                divergence=divergence,
                labels=torch.zeros(tokens, dtype=torch.int64) if labelled else None,
                label_weight=float(labelled),
                group=group,
            ).backward()  # type: ignore[union-attr]
        predicted = costs.vocabulary_parallel(tokens, STUDENT.width, ranks, labels=labelled, linear=divergence != "tvd")
        case = f"group of {ranks}, {divergence}{', labels' if labelled else ''}"
        checks += [
            {"case": case, "what": kind.replace("_", " "), "predicted": predicted[kind], "counted": made.bytes[kind]}
            for kind in sorted(predicted.keys() | made.bytes.keys())
        ]
    return checks


def timed(ranks: Ranks) -> dict[str, Any]:
    """Median seconds of a step of both sizes, whose rounds alternate."""
    setups = {size: replace(setup, world_size=ranks.world_size) for size, setup in TIMED.items()}
    found: dict[str, list[float]] = {size: [] for size in setups}
    for _ in range(ROUNDS):
        for size, setup in setups.items():
            found[size].append(count(setup, ranks)["seconds"])
    medians = {size: statistics.median(values) for size, values in found.items()}
    ratio = costs.flops(setups["large"]) / costs.flops(setups["small"])
    return {"ranks": ranks.world_size, "seconds": medians, "measured": medians["large"] / medians["small"], "predicted": ratio}


def two_ranks(cases: Mapping[str, Setup], *, rounds: bool = True) -> dict[str, Any]:
    """What two processes count: `checks` of all cases and of the op over a group, and with `rounds` the `times`."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, cases, rounds), nprocs=2)
        return json.loads((Path(folder) / "found.json").read_text())


def _rank(rank: int, folder: str, cases: Mapping[str, Setup], rounds: bool) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    with Ranks.join(use_cpu=True) as ranks:
        checks = [check for name, setup in cases.items() for check in compare(name, setup, count(setup, ranks))]
        checks += vocabulary_parallel(dist.group.WORLD)
        times = [timed(ranks)] if rounds else []
        if ranks.is_main:
            (Path(folder) / "found.json").write_text(json.dumps({"checks": checks, "times": times}))
        ranks.barrier()
    os._exit(0)  # an interpreter that is taken down under threads of torch's engines may abort


def measure() -> dict[str, Any]:
    """All checks and times, with the environment."""
    torch.set_num_threads(1)
    alone = Ranks()
    checks = [check for name, setup in ONE_RANK.items() for check in compare(name, setup, count(setup, alone))]
    times = [timed(alone)]
    found = two_ranks(TWO_RANKS)
    return {
        "claim": "scaling_on_paper",
        "device": "cpu",
        "environment": stamp(torch.device("cpu")),
        "student": asdict(STUDENT),
        "teacher": asdict(TEACHER),
        "tokens": SMALL.tokens,
        "rounds": ROUNDS,
        "checks": checks + found["checks"],
        "times": times + found["times"],
    }


def _model(decoder: Decoder) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=decoder.vocabulary,
        hidden_size=decoder.width,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.width // decoder.head_size,
        num_key_value_heads=decoder.key_value_width // decoder.head_size,
        max_position_embeddings=128,
        tie_word_embeddings=decoder.tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LanguageModel(LlamaForCausalLM(config))


def _teacher_bytes(objective: Watched, setup: Setup) -> int:
    """Weights as the forward pass left them and, if those are gathered, the pieces beside them; and the head that the loss reads."""
    assert objective.teach is not None and objective.teach.weight is not None
    parameters = objective.teach.model.parameters
    sizes = _storages([*parameters(), objective.teach.weight])
    total = sum(sizes.values())
    if setup.teacher_is_split:
        gathered = {name for name, p in objective.teach.model.named_parameters() if not isinstance(p, DTensor)}
        objective.teach.model.model.reshard()
        pieces = (p for name, p in objective.teach.model.named_parameters() if name in gathered and isinstance(p, DTensor))
        total += sum(_storages(pieces).values())
    return total


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of what is stored on this rank, by address."""
    stored = [(x.to_local() if isinstance(x, DTensor) else x).untyped_storage() for x in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in stored}


def _size(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_size, tensors))
