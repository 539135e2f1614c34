"""The problem that is timed, and pairs of student and teacher at a chosen divergence with their exact gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    student_width: int
    teacher_width: int


GPU_SHAPES = (Shape(8192, 128_256, 2048, 4096), Shape(8192, 151_936, 896, 3584), Shape(8192, 30_522, 384, 768))
"""Heads of Llama 3, Qwen 2.5 and BERT: a wide student, a narrow one, and one whose vocabulary 16 does not divide."""


class Inputs(NamedTuple):
    """Arguments of a linear loss. The first two take gradients."""

    student: Tensor  # (N, H_s)
    head: Tensor  # (V, H_s)
    teacher: Tensor  # (N, H_t)
    teacher_head: Tensor  # (V, H_t)

    def first(self, tokens: int) -> Inputs:
        """The same heads and the first tokens."""
        return self._replace(student=self.student.detach()[:tokens].requires_grad_(), teacher=self.teacher[:tokens])


class Outcome(NamedTuple):
    """What an implementation makes of them; `loss` is None where it is not the divergence itself."""

    loss: Tensor | None
    student_gradient: Tensor
    head_gradient: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits of a standard deviation of a few nats; teacher and student have nothing in common, which no timing depends on."""
    normal = _Normal(dtype, device, seed=0)
    student = normal(shape.tokens, shape.student_width).requires_grad_()
    head = normal(shape.vocabulary, shape.student_width, scale=0.05).requires_grad_()
    return Inputs(student, head, normal(shape.tokens, shape.teacher_width), normal(shape.vocabulary, shape.teacher_width, scale=0.05))


def close_pair(target: float, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """student = teacher + noise with one head for both, and just so much noise that KL(teacher || student) is `target` nats to 5 %."""
    normal = _Normal(dtype, device, seed=1)
    teacher = normal(shape.tokens, shape.student_width)
    head = normal(shape.vocabulary, shape.student_width, scale=0.3)
    direction = normal(shape.tokens, shape.student_width)
    noise = 0.01
    for _ in range(20):
        student = teacher + noise * direction
        pair = Inputs(student.requires_grad_(), head.detach().requires_grad_(), teacher, head)
        found = float(exact_loss(pair).mean())
        if abs(found / target - 1) < 0.05:
            return pair
        noise *= (target / found) ** 0.5  # the divergence grows with the square of a small noise, more slowly than that of a large one
    raise ValueError(f"No noise gives a divergence of {target} nats at {shape}; the last one tried gives {found}.")


@torch.no_grad()
def exact_loss(inputs: Inputs) -> Tensor:
    """KL(teacher || student) of each token in float64, (N,)."""
    log_q, log_p = _exact_log_softmax(inputs.student, inputs.head), _exact_log_softmax(inputs.teacher, inputs.teacher_head)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def exact(inputs: Inputs) -> Outcome:
    """The mean forward KL and its gradients in float64, by their formulas: dL/dz = (q - p) / N."""
    log_q, log_p = _exact_log_softmax(inputs.student, inputs.head), _exact_log_softmax(inputs.teacher, inputs.teacher_head)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    gradient = log_q.exp_().sub_(log_p.exp_()).div_(len(log_q))
    return Outcome(loss, gradient @ inputs.head.double(), gradient.T @ inputs.student.double())


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth||_2 / ||truth||_2 in float64."""
    return float((value.double() - truth).norm() / truth.norm())


def _exact_log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
    return (hidden.double() @ head.double().T).log_softmax(-1)


class _Normal:
    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).mul_(scale).to(self.dtype)
