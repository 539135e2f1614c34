"""What a distillation step costs a rank: bytes of memory and of collectives, FLOPs, and time from stated assumptions.

Formulas of a configuration and of fastkd as it is, for `scaling_on_paper.py`. `scaling_checks.py` counts the same on live ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastkd.ops.plan import GPU_BUDGET_LIMIT, plan_chunks

Shape = tuple[int, ...]
FLOAT32 = 4
"""Bytes of a weight, a gradient, a moment and a logit: bf16 is autocast, and weights stay in float32, the teacher's too."""
HOST_NUMBERS = 4
"""What ranks sum on the host in a step, in float64: a signal's mark, tokens, and both denominators of `kd`."""

PEAK = 989e12
"""FLOP/s of an H100 or H200 SXM, dense bfloat16 (NVIDIA's H100 datasheet)."""
UTILISATION = 0.4
"""Assumption: the share of PEAK that a step reaches while it computes. Llama 3 reports 38 to 43 % (arXiv:2407.21783)."""
H100_BYTES, H200_BYTES = 80e9, 141e9
NODE = 8
"""Assumption: GPUs of a node."""
NVLINK = 450e9
"""Bytes/s and direction of a GPU inside of a node (NVLink 4, 900 GB/s both ways; the same datasheet)."""
NETWORK = 50e9
"""Assumption: bytes/s of a GPU between nodes, one 400 Gb/s adapter each."""


@dataclass(frozen=True)
class Decoder:
    """A Llama-like decoder: grouped-query attention, a gated MLP, RMSNorm, no biases."""

    layers: int
    width: int
    intermediate: int
    key_value_width: int
    vocabulary: int
    head_size: int = 128
    tied: bool = False

    @property
    def matrices(self) -> list[Shape]:
        """Shapes of one layer's weights: q, k, v, o; gate, up, down."""
        width, inner, keys = self.width, self.intermediate, self.key_value_width
        attention = [(width, width), (keys, width), (keys, width), (width, width)]
        return [*attention, (inner, width), (inner, width), (width, inner)]

    @property
    def layer(self) -> list[Shape]:
        return [*self.matrices, (self.width,), (self.width,)]

    @property
    def root(self) -> list[Shape]:
        """What is in no layer and no head of its own: the embedding and the last norm."""
        return [(self.vocabulary, self.width), (self.width,)]

    @property
    def head(self) -> list[Shape]:
        return [] if self.tied else [(self.vocabulary, self.width)]

    @property
    def tensors(self) -> list[Shape]:
        return [*self.layer * self.layers, *self.root, *self.head]


LLAMA_8B = Decoder(32, 4096, 14336, 1024, 128256)
LLAMA_70B = Decoder(80, 8192, 28672, 1024, 128256)
"""The published shapes of Llama 3.1."""


@dataclass(frozen=True)
class Setup:
    """Distillation of method `kd` with a linear-sum divergence over the whole vocabulary, by AdamW.

    Attributes:
        teacher: None: its words come from a cache.
        tokens: Of a micro-batch of one rank, none of them padding.
        length: Of a row.
        captures: The method reads states inside of layers, so FSDP2 keeps them whole from forward to backward.
        buffers: Bytes of the student's buffers, which DDP broadcasts.
    """

    student: Decoder
    teacher: Decoder | None
    tokens: int
    length: int
    world_size: int = 1
    accumulation: int = 1
    fsdp: bool = False
    fsdp_teacher: bool = False
    captures: bool = False
    bf16: bool = False
    buffers: int = 0

    @property
    def is_split(self) -> bool:
        return self.fsdp and self.world_size > 1

    @property
    def teacher_is_split(self) -> bool:
        return self.fsdp_teacher and self.teacher is not None and self.world_size > 1


def whole(shapes: Sequence[Shape]) -> int:
    return FLOAT32 * sum(map(math.prod, shapes))


def piece(shapes: Sequence[Shape], ranks: int) -> int:
    """Bytes of the largest rank's rows: FSDP2 splits the first dimension and rounds up."""
    return FLOAT32 * sum(-(-rows // ranks) * math.prod(rest) for rows, *rest in shapes)


def held_weights(setup: Setup) -> int:
    tensors = setup.student.tensors
    return piece(tensors, setup.world_size) if setup.is_split else whole(tensors)


def held_moments(setup: Setup) -> int:
    return 2 * held_weights(setup)


def held_gradients(setup: Setup) -> int:
    """When AdamW reads them."""
    return held_weights(setup)


def accumulated_gradients(setup: Setup) -> int:
    """Between the micro-batches of a step: FSDP2 reduces after the last one alone, and until then they are whole."""
    return whole(setup.student.tensors) if setup.accumulation > 1 else 0


def held_teacher(setup: Setup) -> int:
    """In pieces but for the head, which the loss reads whole; embedding and last norm are whole once they were gathered."""
    teacher = setup.teacher
    if teacher is None:
        return 0
    if not setup.teacher_is_split:
        return whole(teacher.tensors)
    ranks, head = setup.world_size, (teacher.vocabulary, teacher.width)
    root = [shape for shape in teacher.root if not (teacher.tied and shape == head)]
    return piece([*teacher.layer * teacher.layers, *root], ranks) + ranks * piece(root, ranks) + whole([head])


def kept_whole(setup: Setup) -> int:
    """Gathered weights of the student that stay from forward to backward."""
    if not setup.is_split:
        return 0
    student, ranks = setup.student, setup.world_size
    kept = [*student.root, *student.head, *(student.layer * student.layers if setup.captures else [])]
    return ranks * piece(kept, ranks)


def passing_units(setup: Setup) -> int:
    """Roughly, beside `kept_whole`: two gathered units, the one in use and the next, of the largest kind."""
    models = [setup.student] * (setup.is_split and not setup.captures) + [setup.teacher] * setup.teacher_is_split
    return max((2 * whole(model.layer) for model in models if model is not None), default=0)


def weights_16bit(setup: Setup) -> int:
    """Autocast's copies of the layers' matrices, which backward reads: whole on every rank, with FSDP2 too."""
    return setup.bf16 * setup.student.layers * whole(setup.student.matrices) // 2


def activations(setup: Setup) -> int:
    """What backward reads beside weights; without gradient checkpointing, with attention that keeps no scores.

    A layer keeps of each token, in float32, the inputs of both norms, what they were scaled to and the factors; and in the dtype of
    the products what enters each of them, q, k, v, and the four states of the MLP. Under autocast what enters q, k, v, gate and up is
    cast for each of them; else q, k and v share one, and gate and up.
    """
    student, size = setup.student, 2 if setup.bf16 else FLOAT32
    width, keys, inner = student.width, student.key_value_width, student.intermediate
    entering = 5 if setup.bf16 else 2
    norms, heads = 2 * (2 * width + 1) * FLOAT32, width // student.head_size * FLOAT32
    layer = norms + heads + size * (entering * width + 2 * width + 2 * keys + 4 * inner)
    last_norm, hidden_gradient, ids = (2 * width + 1) * FLOAT32, width * FLOAT32, 8
    rotary = 2 * setup.length * student.head_size * FLOAT32
    return setup.tokens * (student.layers * layer + last_norm + hidden_gradient + ids) + rotary


def head_gradient(setup: Setup) -> int:
    """The op's float32 sum, made in the forward pass and there until backward."""
    return whole([(setup.student.vocabulary, setup.student.width)])


def logits(setup: Setup, device: str = "cuda", budget: int | None = GPU_BUDGET_LIMIT) -> int:
    """Those of a chunk. The default budget is that of a GPU with 50 GB or more."""
    rows, vocabulary, has_teacher = setup.tokens, setup.student.vocabulary, setup.teacher is not None
    return plan_chunks(rows, vocabulary, device=device, has_teacher=has_teacher, memory_budget=budget).buffer_bytes


def memory(setup: Setup) -> dict[str, int]:
    """Bytes of one rank at their highest, in the order of the table."""
    return {
        "weights": held_weights(setup),
        "AdamW": held_moments(setup),
        "gradients": max(held_gradients(setup), accumulated_gradients(setup)),
        "teacher": held_teacher(setup),
        "16-bit copies": weights_16bit(setup),
        "gathered": kept_whole(setup) + passing_units(setup),
        "head's gradient": head_gradient(setup),
        "logits": logits(setup),
        "activations": activations(setup),
    }


def while_loading(setup: Setup) -> int:
    """Host memory of a node: each of its ranks loads student and teacher whole, and gives its device what is to be there."""
    return min(NODE, setup.world_size) * _loaded(setup)


def _loaded(setup: Setup) -> int:
    return whole(setup.student.tensors) + (0 if setup.teacher is None else whole(setup.teacher.tensors))


def communication(setup: Setup) -> Counter[str]:
    """Bytes of the tensors that an optimizer step's collectives work on, by kind: of the whole one where ranks have pieces.

    "host" is the all-reduce of the processes' own numbers, over gloo.
    """
    total: Counter[str] = Counter()
    student, ranks = setup.student, setup.world_size
    if ranks == 1:
        return total
    total["host"] = 8 * HOST_NUMBERS
    # The loss; one number a tensor: its norm (FSDP2), or whether it was used (DDP).
    total["all_reduce"] = FLOAT32 + FLOAT32 * len(student.tensors)
    if setup.fsdp:
        # The root, and a head of its own, stay whole until backward. Layers are gathered again.
        times = 1 if setup.captures else 2
        kept, passing = piece([*student.root, *student.head], ranks), piece(student.layer, ranks) * student.layers
        total["all_gather"] = setup.accumulation * ranks * (kept + times * passing)
        total["reduce_scatter"] = ranks * piece(student.tensors, ranks)
    else:
        total["all_reduce"] += whole(student.tensors)
        total["broadcast"] = setup.buffers
    if setup.teacher is not None and setup.teacher_is_split:
        teacher = setup.teacher
        total["all_gather"] += setup.accumulation * ranks * piece(teacher.layer, ranks) * teacher.layers
    return +total


def vocabulary_parallel(tokens: int, width: int, ranks: int, *, labels: bool = False, linear: bool = True) -> Counter[str]:
    """The same for one forward and backward of `linear_kl_div(group=...)`. linear: forward_kl and reverse_kl."""
    numbers = 2 + (5 if labels else 3) + (0 if linear else 2)
    return Counter(all_reduce=FLOAT32 * tokens * (numbers + width), all_gather=ranks * 6 * 8)


def sent(collectives: Mapping[str, int], ranks: int) -> float:
    """Bytes that each rank sends when these are made around a ring."""
    share = (ranks - 1) / ranks
    factors = {"host": 2 * share, "all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "broadcast": 1.0}
    return sum(factors[kind] * size for kind, size in collectives.items())


def backbone_flops(setup: Setup) -> int:
    """Operations of one rank and micro-batch, below the heads: forward and backward of the student, forward of the teacher.

    A product takes one GEMM forward and two backward, attention's two products are five in a backward pass that makes the scores
    again; a causal mask saves nothing here.
    """

    def products(model: Decoder) -> int:
        return 2 * setup.tokens * model.layers * sum(map(math.prod, model.matrices))

    def attention(model: Decoder) -> int:
        return 2 * setup.tokens * setup.length * model.width * model.layers

    teacher = 0 if setup.teacher is None else products(setup.teacher) + 2 * attention(setup.teacher)
    return 3 * products(setup.student) + 7 * attention(setup.student) + teacher


def head_flops(setup: Setup) -> int:
    """Three GEMMs of the student's head and one of the teacher's, whose rows are the same."""
    widths = 3 * setup.student.width + (0 if setup.teacher is None else setup.teacher.width)
    return 2 * setup.tokens * setup.student.vocabulary * widths


def flops(setup: Setup) -> int:
    """Operations of one rank in an optimizer step."""
    return setup.accumulation * (backbone_flops(setup) + head_flops(setup))


def seconds(setup: Setup) -> tuple[float, float]:
    """Seconds of an optimizer step: computing and communicating. Without overlap they add up; overlapped, the longer counts."""
    bandwidth = NVLINK if setup.world_size <= NODE else NETWORK
    return flops(setup) / (PEAK * UTILISATION), sent(communication(setup), setup.world_size) / bandwidth
