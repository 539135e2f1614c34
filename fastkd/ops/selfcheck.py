"""Which backends are live on this machine, and whether every public op is right in each: the tests' question, asked on the spot.

`fastkd doctor` shows the answers. Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .backends import MODULES, sample_call
from .checks import LARGEST_TEMPERATURE, SMALLEST_TEMPERATURE
from .kl import kl_div
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import linear_kl_div
from .projected_mse import projected_mse
from .relation_kl import relation_kl
from .topk_kl import topk_kl_div

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 2e-3}
"""The largest relative L2 error that is right, by dtype."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The sizes, dtype and temperature that the ops are checked on."""

    vocabulary: int
    student_hidden: int
    teacher_hidden: int
    dtype: str
    temperature: float
    tokens: int

    def __post_init__(self) -> None:
        for name in ("vocabulary", "student_hidden", "teacher_hidden", "tokens"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name} is {getattr(self, name)}; the ops are checked from 8 on.")
        if not SMALLEST_TEMPERATURE <= self.temperature <= LARGEST_TEMPERATURE:
            limits = f"{SMALLEST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}"
            raise ValueError(f"temperature is {self.temperature}; it must be a number from {limits}.")


@dataclass(frozen=True)
class Check:
    """One op in one backend: relative L2 errors of its value and gradients, those that are wrong, or why there are none."""

    op: str
    backend: str
    errors: dict[str, float] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether all errors are within their tolerance."""
        return not self.wrong and not self.failure


@dataclass(frozen=True)
class _Case:
    """A public op and its arguments, all on the CPU: `learned` tensors take gradients."""

    op: Callable[..., Any]
    learned: Mapping[str, Tensor]
    given: Mapping[str, Tensor | None]
    temperature: float | None = None
    backends: tuple[str, ...] = ("torch", "cpp", "triton", "cuda")


def main_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backends(vocabulary: int = 4096) -> dict[str, str]:
    """Why each backend cannot serve rows of so many logits on this machine, and the remedy; empty where it is live."""
    device = main_device()
    reasons = {}
    for name, module in MODULES.items():
        reasons[name] = module.why_not(sample_call(CPU if name == "cpp" else device, vocabulary)) or ""
        if name in ("triton", "cuda") and device.type != "cuda":  # Triton's interpreter is for its own tests
            reasons[name] = "it needs an NVIDIA GPU and torch sees none: install the driver, and torch for CUDA"
    return reasons


def check_ops(problem: Problem, live: Sequence[str] | None = None) -> Iterator[Check]:
    """Check every public op against its float64 reference on the CPU: the C++ backend on the CPU, the others on the GPU if any.

    Args:
        problem: the sizes and numbers.
        live: the backends that are checked; None: every live one.

    Yields:
        A `Check` for every op and backend. What a backend raises is its `failure`.
    """
    if live is None:
        live = [name for name, why_not in backends(problem.vocabulary).items() if not why_not]
    for case in _cases(problem):
        op = case.op.__name__
        truth = _value_and_gradients(getattr(reference, op), case, CPU, torch.float64)
        for backend in (name for name in live if name in case.backends):
            options: dict[str, Any] = {"backend": backend} if len(case.backends) > 1 else {}
            try:
                made = _value_and_gradients(case.op, case, CPU if backend == "cpp" else main_device(), **options)
            except Exception as error:  # one broken backend must not hide what the others do
                yield Check(op, backend, failure=f"{type(error).__name__}: {error}")
                continue
            errors = {name: relative_error(made[name], exact) for name, exact in truth.items()}
            wrong = (name for name, error in errors.items() if not error <= tolerance(name, problem.dtype))  # NaN is wrong too
            yield Check(op, backend, errors, tuple(wrong))


def tolerance(name: str, dtype: str) -> float:
    """What is right at most: a value is never rounded to 16 bits, a gradient is stored in its input's dtype."""
    return TOLERANCE["float32" if name == "value" else dtype]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth||_2 / ||truth||_2 in float64."""
    return float((value.cpu().double() - truth).norm() / truth.norm())


def _cases(problem: Problem) -> Iterator[_Case]:
    """Logits are a few nats at the temperature whatever the width, so that float32's own rounding stays far below the tolerance."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(getattr(torch, problem.dtype))

    tokens, vocabulary, temperature = problem.tokens, problem.vocabulary, problem.temperature
    width, teacher_width = problem.student_hidden, problem.teacher_hidden
    mask = torch.arange(tokens) % 4 > 0
    labels = torch.randint(vocabulary, (tokens,), generator=generator).masked_fill(~mask, -100)
    hidden, weight, bias = normal(tokens, width), normal(vocabulary, width, scale=3 * width**-0.5), normal(vocabulary)
    student = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias}
    states = normal(tokens, teacher_width)
    teacher_weight = normal(vocabulary, teacher_width, scale=3 * temperature * teacher_width**-0.5)
    teacher = {"teacher_hidden": states, "teacher_weight": teacher_weight, "mask": mask}
    yield _Case(linear_kl_div, student, teacher, temperature)

    head = {"hidden": hidden, "weight": weight, "bias": bias}
    yield _Case(linear_cross_entropy, head, {"labels": labels}, backends=("torch", "cpp", "triton"))

    logits = normal(tokens, vocabulary, scale=3 * temperature)
    top, ids = (logits.double() / temperature).log_softmax(-1).topk(min(64, vocabulary // 2))
    tail = torch.log1p(-top.exp().sum(-1)).float()
    known = {"topk_ids": ids, "topk_logprobs": top.float(), "tail_logprob": tail, "mask": mask}
    yield _Case(topk_kl_div, student, known, temperature, backends=("torch", "cpp", "triton"))

    close = logits + normal(tokens, vocabulary, scale=0.3 * temperature)  # a student 0.05 nats from its teacher
    yield _Case(kl_div, {"student_logits": close}, {"teacher_logits": logits, "mask": mask}, temperature)

    filter_weight, filter_bias = normal(teacher_width, width, scale=width**-0.5), normal(teacher_width)
    filtered = {"student_states": hidden, "student_weight": filter_weight, "student_bias": filter_bias}
    target = {"teacher_states": states, "teacher_weight": None, "mask": mask}
    yield _Case(projected_mse, filtered, target, backends=("torch",))

    heads, length = max(1, min(width, teacher_width) // 64), tokens // 2
    ours, theirs = ([normal(2, heads, length, size // heads) for _ in range(2)] for size in (width, teacher_width))
    target = {"teacher_q": theirs[0], "teacher_k": theirs[1], "key_mask": mask[: 2 * length].view(2, length)}
    yield _Case(relation_kl, {"student_q": ours[0], "student_k": ours[1]}, target)


def _value_and_gradients(
    function: Callable[..., Any], case: _Case, device: torch.device, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """The loss ("value") and the gradient of every learned input, of inputs in `dtype` (None: their own) on `device`."""

    def moved(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None)

    learned = {name: moved(x).detach().requires_grad_() for name, x in case.learned.items()}
    given = {name: None if x is None else moved(x) for name, x in case.given.items()}
    if case.temperature is not None:
        options["temperature"] = case.temperature
    loss = function(**learned, **given, **options)
    # Scaled as by a loss scaler, or float16 could not hold the gradients: 2^16 for the default 256 tokens, and they carry T.
    scale = 256 * next(iter(learned.values())).shape[-2] / (case.temperature or 1)
    gradients = torch.autograd.grad(loss * scale, list(learned.values()))
    return {"value": loss.detach(), **dict(zip(learned, gradients, strict=True))}
