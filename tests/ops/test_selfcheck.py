"""Every op is checked in every live backend, healthy ones pass in every dtype, and no wrong value or gradient does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastkd import reference
from fastkd.ops import backend_cpp, backend_torch, selfcheck
from fastkd.ops.row_call import RowCall
from fastkd.ops.selfcheck import Check, Problem, backends, check_ops
from tests.oracle import wrong_gradients

GRADIENTS = {
    "linear_kl_div": ("student_hidden", "student_weight", "student_bias"),
    "linear_cross_entropy": ("hidden", "weight", "bias"),
    "topk_kl_div": ("student_hidden", "student_weight", "student_bias"),
    "kl_div": ("student_logits",),
    "projected_mse": ("student_states", "student_weight", "student_bias"),
    "relation_kl": ("student_q", "student_k"),
}
SIZES: dict[str, Any] = {"vocabulary": 301, "student_hidden": 24, "teacher_hidden": 32, "tokens": 21, "temperature": 2.0}


@pytest.fixture(autouse=True)
def backend() -> None:
    """Override the common fixture: every check names its backend."""


def problem(dtype: str = "float32", **changed: Any) -> Problem:
    return Problem(**{**SIZES, "dtype": dtype, **changed})


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.kind = kind
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return wrong_gradients(gradient)[ctx.kind], None


def break_op(monkeypatch: pytest.MonkeyPatch, op: str, wrong: Any) -> None:
    """Replace a public op where the checks find it; `wrong(op, arguments)` is what it then does."""
    right = getattr(selfcheck, op)
    monkeypatch.setattr(selfcheck, op, functools.wraps(right)(lambda **arguments: wrong(right, arguments)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("temperature", [0.5, 15.0])
def test_all_ops_pass_with_every_gradient_in_every_live_backend(dtype: str, temperature: float) -> None:
    checks = list(check_ops(problem(dtype, temperature=temperature)))
    assert all(check.passed for check in checks), checks
    assert set(GRADIENTS) == set(reference.__all__)
    seen = {(check.op, check.backend): tuple(check.errors) for check in checks}
    on_cpu = ("torch", "cpp") if backend_cpp.is_built() else ("torch",)
    for op, names in GRADIENTS.items():
        for backend in ("torch",) if op == "projected_mse" else on_cpu:
            assert seen.pop((op, backend)) == ("value", *names)
    assert not seen


@pytest.mark.parametrize("kind", ["zero", "scaled by 1 %", "sign-flipped", "row-shuffled"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in GRADIENTS.items() for name in names])
def test_a_wrong_gradient_is_found_and_named(monkeypatch: pytest.MonkeyPatch, op: str, name: str, kind: str) -> None:
    def wrong(right: Any, arguments: dict[str, Any]) -> Any:
        return right(**{**arguments, name: WrongGradient.apply(arguments[name], kind)})

    break_op(monkeypatch, op, wrong)
    monkeypatch.setattr(selfcheck, "_cases", only(op))
    for dtype in ("float32", "bfloat16"):
        checks = list(check_ops(problem(dtype)))
        assert checks and all(check.wrong == (name,) and not check.passed for check in checks)


def only(op: str) -> Any:
    every = selfcheck._cases
    return lambda chosen: (case for case in every(chosen) if case.op.__name__ == op)


@pytest.mark.parametrize("factor", [1.01, 1.0005, float("nan")])
@pytest.mark.parametrize("op", GRADIENTS)
def test_a_wrong_value_is_found_in_16_bits_too(monkeypatch: pytest.MonkeyPatch, op: str, factor: float) -> None:
    def wrong(right: Any, arguments: dict[str, Any]) -> Any:
        loss = right(**arguments)
        return loss + (factor - 1) * loss.detach()

    break_op(monkeypatch, op, wrong)
    checks = list(check_ops(problem("bfloat16")))
    assert {check.op for check in checks if not check.passed} == {op}
    assert all(check.wrong == ("value",) for check in checks if check.op == op)


def test_a_row_kernel_that_is_one_per_cent_off_fails_in_its_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = backend_torch.run

    def wrong(call: RowCall) -> None:
        right(call)
        if call.gradient is not None:
            call.gradient.mul_(1.01)

    monkeypatch.setattr(backend_torch, "run", wrong)
    checks = list(check_ops(problem("bfloat16")))
    failed = {(check.op, check.backend): check.wrong for check in checks if not check.passed}
    assert failed == {(op, "torch"): GRADIENTS[op] for op in GRADIENTS if op != "projected_mse"}


def test_logits_that_are_rounded_to_16_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = backend_torch.run

    def rounded(call: RowCall) -> None:
        for logits in (call.student, call.teacher):
            if isinstance(logits, torch.Tensor):
                logits.copy_(logits.bfloat16())
        right(call)

    monkeypatch.setattr(backend_torch, "run", rounded)
    checks = {(check.op, check.backend): check for check in check_ops(problem("bfloat16"))}
    assert checks["linear_kl_div", "torch"].wrong == ("value", *GRADIENTS["linear_kl_div"])


def test_a_backend_that_raises_fails_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: RowCall) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backend_torch, "run", broken)
    checks = {(check.op, check.backend): check for check in check_ops(problem())}
    assert checks["linear_kl_div", "torch"] == Check("linear_kl_div", "torch", failure="RuntimeError: no such instruction")
    assert not checks["linear_kl_div", "torch"].passed and checks["projected_mse", "torch"].passed


def test_what_is_not_live_is_said_with_its_remedy_and_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_cpp, "is_built", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = backends()
    assert seen["torch"] == "" and "python -m fastkd.ops.backend_cpp" in seen["cpp"]
    assert "needs an NVIDIA GPU" in seen["triton"] and "needs an NVIDIA GPU" in seen["cuda"]
    assert {check.backend for check in check_ops(problem())} == {"torch"}


@pytest.mark.parametrize("changed", [{"vocabulary": 7}, {"tokens": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_bad_sizes_are_refused_by_name(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changed))} is "):
        problem(**changed)
