"""`RowCall`: what a row kernel is given and what it must do. Every backend takes it; `backend_torch.py` is its plainest implementation.

A backend is a module with two functions: `run(call)`, which fills the call's outputs, and `why_not(call)`, which says in a sentence why
it cannot, or None. Dispatch, `fastkd doctor`, error texts and test skips all read `why_not`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .divergence import Divergence


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's output x: logits = softcap * tanh(scale * x / softcap), or without a soft-cap scale * x."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Raw head outputs of any shape -> logits, in their dtype; perhaps the same memory."""
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


@dataclass(frozen=True)
class RowOptions:
    """The numbers and names of a call.

    `divergence` is None without a teacher. `tail` says how a top-k teacher is completed.
    """

    divergence: Divergence | None = field(default_factory=lambda: Divergence("forward_kl"))
    temperature: float = 1.0
    student: LogitTransform = LogitTransform()
    teacher: LogitTransform = LogitTransform()
    tail: str = "bucket"


@dataclass(frozen=True)
class TopK:
    """C rows of a sparse teacher, at the temperature of the loss. A row lists a token at most once."""

    ids: Tensor
    """(C, K) int64 rows of the student's vocabulary; -1 where a row has fewer than K entries."""
    log_probabilities: Tensor
    """(C, K) log p of `ids`, any floating dtype; ignored where the id is -1."""
    log_tail: Tensor | None = None
    """(C,) log of the mass of all other tokens, -inf for none; needed by tail="bucket" alone."""

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        return TopK(self.ids[rows], self.log_probabilities[rows], None if self.log_tail is None else self.log_tail[rows])


@dataclass(frozen=True, kw_only=True)
class RowOutputs:
    """Where the unweighted results of C rows are written, (C,) each, contiguous, in the row weights' dtype; None: not wanted.

    The four statistics are wanted together or not at all, and only of a dense teacher.
    """

    divergence: Tensor | None = None
    """T^2 D. Given wherever there is a teacher."""
    cross_entropy: Tensor | None = None
    """-log softmax(student)[label] at T = 1, zero without a label. Given wherever there are labels."""
    student_entropy: Tensor | None = None
    """Entropy of softmax(student / T)."""
    teacher_entropy: Tensor | None = None
    """Entropy of softmax(teacher / T), the rest of a `teacher_rest` being one event."""
    top1_agreement: Tensor | None = None
    """1 where both models' first largest logits have the same column, else 0."""
    acceptance: Tensor | None = None
    """sum min(p, q) over the columns, p and q being softmax(teacher / T) and softmax(student / T)."""

    def at(self, rows: slice) -> RowOutputs:
        """Those of some of the rows."""
        return RowOutputs(**{name: None if x is None else x[rows] for name, x in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class RowCall:
    """Fill `outputs`, and `gradient` if it is given with the derivative with respect to `student` of

        sum_i row_weight_i T^2 D(softmax(teacher_i / T), softmax(student_i / T)) + label_weight_i CE(student_i, labels_i)

    over C rows of V logits. They are as the heads' GEMMs wrote them; bias, scale and soft-cap are applied in this order. All arithmetic
    is in the dtype of `row_weight`, float32 or float64. Before the transform's slope, a row of each term's
    gradient sums to zero. Where the student gives its largest logit more than half of its mass (at the term's temperature), that entry
    is minus the sum of the others: a sum of its own parts would cancel where the student is nearly certain.

    With a `TopK` teacher D is over K + 1 events, the listed tokens and any other; `topk_events.py` has it in torch. p_tail, the last
    event's mass, is that of `log_tail` with tail="bucket". It is zero with "renormalize", where the listed p are divided by their sum,
    and with "zero", where they are not.

    With `teacher_rest` the teacher has further tokens: p sums to less than one, and they are one event of mass r = 1 - sum p to which
    the student gives nothing. It adds to D what the divergence gives for q = 0: r / 2 for "tvd", -beta log(beta) r for "jsd",
    -log(alpha) r for "skew_kl". Forward KL, where that is infinite, leaves it out, also as a part of "mixed". The acceptance,
    sum min(p, q), has none of it.
    """

    student: Tensor
    """(C, V) float16, bfloat16, float32 or float64, unit stride along V. Scratch afterwards unless `keeps_logits`."""
    teacher: Tensor | TopK | None
    """(C, V) like `student` but of a dtype of its own; or the K largest entries of every row; or None, labels alone."""
    options: RowOptions
    outputs: RowOutputs
    row_weight: Tensor
    """(C,) contiguous float32 or float64."""
    labels: Tensor | None = None
    """(C,) int64, contiguous, negative where a row has none."""
    label_weight: Tensor | None = None
    """(C,) contiguous; None: the cross-entropy has no part in the gradient."""
    student_bias: Tensor | None = None
    """(V,) contiguous, in the dtype of `row_weight`."""
    teacher_bias: Tensor | None = None
    """(V,) contiguous, in the dtype of `row_weight`."""
    teacher_rest: Tensor | None = None
    """(C,) contiguous, in the dtype of `row_weight`: log sum exp(z / T) of the teacher's tokens without a column; -inf for none."""
    gradient: Tensor | None = None
    """(C, V) of any floating dtype, unit stride along V. Memory of its own, or `student` itself; on a CPU also over `student` in a
    narrower dtype, where each of its rows begins where a row of logits begins."""
    keeps_logits: bool = False
    """Whether both blocks of logits must stay what they are: they are the caller's own."""

    @property
    def wants_statistics(self) -> bool:
        """Whether entropies, agreement and acceptance are asked for."""
        return self.outputs.student_entropy is not None
