"""Everybody's forward KL from hidden states and heads, with its gradients: the floor, what one writes first, fastkd, and the peers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.ops.backends import sample_call
from fastkd.ops.gemm import row_buffer
from fastkd.ops.plan import plan_chunks
from fastkd.ops.probe import verdict
from fastkd.ops.selfcheck import backends

from .problem import Inputs, Outcome

Implementation = Callable[[Inputs], Outcome]

FLOOR = "GEMMs alone"
FLOOR_FLOAT32_LOGITS = "GEMMs alone, float32 logits"
COMPILED = "torch.compile of eager"
_BACKENDS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton", "cuda")}


def implementations(device: torch.device, *, compiles: bool = True) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Those that this machine has, the floor first; and why each of the others is left out. `compiles`: torch.compile among them."""
    found: dict[str, Implementation] = {FLOOR: gemms_alone}
    left_out: dict[str, str] = {}
    if device.type == "cuda":
        found[FLOOR_FLOAT32_LOGITS] = partial(gemms_alone, logits_dtype=torch.float32)
    found["eager"] = partial(with_gradients, eager)
    if compiles:
        found[COMPILED] = partial(with_gradients, torch.compile(eager, dynamic=False))
    backends, unavailable = live_backends(device)
    found |= {f"fastkd {name}": partial(with_gradients, partial(fused, backend=name)) for name in backends}
    left_out |= {f"fastkd {name}": reason for name, reason in unavailable.items()}
    has_cross_entropy = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    peers: tuple[tuple[str, Implementation, str], ...] = (
        ("Liger LigerFusedLinearJSDLoss", partial(with_gradients, liger_chunked), _absent("liger_kernel")),
        (
            "Liger fused_linear_jsd",
            partial(with_gradients, liger_fused),
            _absent("liger_kernel") or ("" if device.type == "cuda" else "it is Triton and needs a GPU"),
        ),
        ("TRL chunked divergence", partial(with_gradients, trl_chunked), _absent("trl")),
        ("torch F.linear_cross_entropy", torch_cross_entropy, "" if has_cross_entropy else f"torch {torch.__version__} has it not"),
    )
    for name, implementation, reason in peers:
        if reason:
            left_out[name] = reason
        else:
            found[name] = implementation
    return found, left_out


def _absent(package: str) -> str:
    return "" if find_spec(package) else f"{package.replace('_', '-')} is not installed"


def live_backends(device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """fastkd's backends that run on `device`, and why the others of that kind of device do not."""
    reasons = {
        name: reason or verdict(name, sample_call(device)) for name, reason in backends().items() if name in _BACKENDS[device.type]
    }
    return tuple(name for name, reason in reasons.items() if not reason), {name: reason for name, reason in reasons.items() if reason}


def gemms_alone(inputs: Inputs, logits_dtype: torch.dtype | None = None) -> Outcome:
    """The four dense products: the floor. Its "gradients" are those of no loss.

    On a GPU all tokens are one chunk, however many the plan makes; on a CPU, where larger ones leave the cache, the plan's are taken.

    Logits stand for their gradient, as numbers of ordinary size: a CPU is slow on the denormal ones that fresh memory holds.
    logits_dtype: of both models' logits, if it is not that of the inputs (GPUs alone).
    """
    with torch.no_grad():
        student, head, teacher, teacher_head = inputs
        tokens, vocabulary = len(student), len(head)
        chunk_size = tokens if student.is_cuda else None
        plan = plan_chunks(tokens, vocabulary, chunk_size=chunk_size)
        dtype = logits_dtype or student.dtype
        logits, other = (row_buffer(plan.backward_tokens, vocabulary, dtype, student.device)[:, :vocabulary] for _ in range(2))
        gradient = logits if logits_dtype is None else torch.randn_like(logits, dtype=student.dtype)
        wider = {} if logits_dtype is None else {"out_dtype": logits_dtype}
        grad_student, grad_head = torch.empty_like(student), torch.empty_like(head)
        for rows in plan.backward_chunks():
            size = rows.stop - rows.start
            torch.mm(student[rows], head.T, out=logits[:size], **wider)
            torch.mm(teacher[rows], teacher_head.T, out=other[:size], **wider)
            torch.mm(gradient[:size], head, out=grad_student[rows])
            if rows.start == 0:
                torch.mm(gradient[:size].T, student[rows], out=grad_head)
            else:
                grad_head.addmm_(gradient[:size].T, student[rows])
    return Outcome(None, grad_student, grad_head)


def with_gradients(loss: Callable[..., Tensor], inputs: Inputs) -> Outcome:
    """`loss` of the inputs, forward and backward."""
    value = loss(*inputs)
    return Outcome(value.detach(), *torch.autograd.grad(value, (inputs.student, inputs.head)))


def eager(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """What one writes first: all logits, float32 softmax."""
    log_q = F.linear(student, head).float().log_softmax(-1)
    log_p = F.linear(teacher, teacher_head).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def fused(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, **options: Any) -> Tensor:
    loss = fastkd.linear_kl_div(student, head, teacher, teacher_head, **options)
    assert isinstance(loss, Tensor)
    return loss


def liger_chunked(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """Liger's chunked loss at beta = 0: forward KL alone. Compiled on a GPU, as it comes; not on the CPU, as TRL calls it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=student.is_cuda)
    return loss(student, head, teacher, teacher_head, torch.zeros(len(student), dtype=torch.int64, device=student.device))


def liger_fused(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """Liger's Triton loss at beta = 0: forward KL."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(student, head, teacher, teacher_head, None)


def trl_chunked(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """TRL's chunked divergence at beta = 0: forward KL; without a GPU its pure torch twin."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, 0.0)[0].mean()


def torch_cross_entropy(inputs: Inputs) -> Outcome:
    """torch's chunked linear cross-entropy with the teacher's probabilities, all of them, as targets: the same gradient.

    Its value is the divergence plus the teacher's entropy. torch 2.13 warns that it makes all logits after all for such targets.
    """
    student, head, teacher, teacher_head = inputs
    with torch.no_grad():
        targets = F.linear(teacher, teacher_head).float().softmax(-1).to(student.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss = F.linear_cross_entropy(student, head, targets, options=torch.nn.LinearCrossEntropyOptions())
    return Outcome(None, *torch.autograd.grad(loss, (student, head)))
