"""Claim: with `grad_filter`, backward products on a part of the vocabulary beat the dense floor on a really trained pair.

Teacher and student are those that `fastkd quickstart` trained, the tokens are held-out text. For thresholds from 2^-4 to 2^-16: the
share of columns kept, the time beside the four dense GEMMs alone and beside fastkd without the filter in the same rounds, and what the
gradients lose against the unfiltered ones.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd

from .claim import Settings, main
from .implementations import FLOOR, fused, gemms_alone, with_gradients
from .problem import Inputs, Shape, close_pair, relative_error
from .runner import Case, interleaved, stopwatch

THRESHOLDS = tuple(2.0**-power for power in (4, 5, 6, 7, 8, 10, 12, 14, 16))
UNFILTERED = "fastkd, unfiltered"
TOKENS, LENGTH, BATCH = 4096, 128, 8


def measure(settings: Settings) -> dict[str, Any]:
    dtype = settings.choose(cpu=torch.float32, cuda=torch.bfloat16, smoke=torch.float32)
    thresholds = settings.choose(cpu=THRESHOLDS, cuda=THRESHOLDS, smoke=(2.0**-8, 2.0**-12))
    if settings.pair is not None:
        inputs, options = load_pair(settings.pair, dtype, settings.device, settings.choose(cpu=TOKENS, cuda=TOKENS, smoke=64))
    elif settings.smoke:
        inputs, options = close_pair(1.0, Shape(64, 500, 16, 16), dtype, settings.device), {}
    else:
        raise ValueError("grad_filter is measured on a trained pair: --pair DIR, the output folder of `fastkd quickstart`.")
    cases = {FLOOR: Case(partial(gemms_alone, inputs)), UNFILTERED: Case(partial(with_gradients, partial(fused, **options), inputs))}
    cases |= {str(eps): Case(partial(with_gradients, partial(fused, **options, grad_filter=eps), inputs)) for eps in thresholds}
    timings = interleaved(cases, stopwatch(settings.device), repeats=settings.repeats, budget=settings.budget)
    _, *exact = with_gradients(partial(fused, **options), inputs)
    results = []
    for eps in thresholds:
        loss, stats = fastkd.linear_kl_div(*inputs, **options, grad_filter=eps, return_stats=True)
        assert stats.columns_kept is not None and stats.dropped_mass is not None
        made = torch.autograd.grad(loss, (inputs.student, inputs.head))
        seconds = timings[str(eps)].median
        row = {
            "threshold": eps,
            "seconds": asdict(timings[str(eps)]),
            "ratio_to_gemms": seconds / timings[FLOOR].median,
            "ratio_to_unfiltered": seconds / timings[UNFILTERED].median,
            "columns_kept": float(stats.columns_kept.mean()),
            "dropped_mass": float(stats.dropped_mass.mean()),
        }
        for name, gradient, truth in zip(("student", "head"), made, exact, strict=True):
            row[f"{name}_cosine"] = float(torch.cosine_similarity(gradient.double().flatten(), truth.double().flatten(), dim=0))
            row[f"{name}_error"] = relative_error(gradient, truth.double())
        results.append(row)
        print(f"  {eps:.3g}: {row['columns_kept']:.1%} of columns, {row['ratio_to_gemms']:.2f} x GEMMs alone", flush=True)
    return {
        "shape": Shape(len(inputs.student), len(inputs.head), inputs.head.shape[1], inputs.teacher_head.shape[1])._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "floor": asdict(timings[FLOOR]),
        "unfiltered": asdict(timings[UNFILTERED]) | {"ratio_to_gemms": timings[UNFILTERED].median / timings[FLOOR].median},
        "results": results,
    }


def load_pair(folder: Path, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[Inputs, dict[str, Any]]:
    """Hidden states of held-out text and heads of the quickstart's teacher and GLMD student, the teacher's over the student's kept ids;
    and what `linear_kl_div` must know of both models beside them."""
    from fastkd.models.load import load_frozen

    teacher_folder = folder / "teacher" / "train" / "student"
    student_folders = sorted(folder.glob("seed-*/student_distilled/*/student"))
    if not teacher_folder.is_dir() or not student_folders:
        raise ValueError(f"--pair {folder} holds no trained teacher and GLMD student; give the output folder of `fastkd quickstart`.")
    teacher, student = load_frozen(str(teacher_folder)).to(device), load_frozen(str(student_folders[0])).to(device)
    batches = _held_out(str(student_folders[0]), folder / "cache" / "tokens", tokens, device)
    rows: Any = slice(student.vocabulary) if student.vocab_map is None else student.vocab_map.kept_ids.to(device)
    inputs = Inputs(
        _hidden(student, batches, dtype).requires_grad_(),
        student.head.weight.to(dtype).detach().clone().requires_grad_(),
        _hidden(teacher, batches, dtype),
        teacher.head.weight[rows].to(dtype),
    )
    biases = {"student_bias": student.head.bias, "teacher_bias": None if teacher.head.bias is None else teacher.head.bias[rows]}
    return inputs, {**student.logit_options("student"), **teacher.logit_options("teacher"), **biases}


def _held_out(tokenizer_folder: str, cache: Path, tokens: int, device: torch.device) -> list[Any]:
    from fastkd.models.load import load_tokenizer
    from fastkd.tasks.corpus import open_corpus
    from fastkd.tasks.text import collate_text
    from fastkd.tasks.tokenized import tokenize_corpus

    tokenizer: Any = load_tokenizer(tokenizer_folder)
    rows = tokenize_corpus(open_corpus("stdlib", split="test"), tokenizer, max_length=LENGTH, layout="packed", cache_dir=cache)
    taken = [rows[i] for i in range(max(1, tokens // LENGTH))]
    pad_id, generator = tokenizer.pad_token_id or 0, torch.Generator()
    batches = [
        collate_text(taken[i : i + BATCH], pad_id=pad_id, masking=None, generator=generator) for i in range(0, len(taken), BATCH)
    ]
    return [batch.to(device) for batch in batches]


@torch.no_grad()
def _hidden(model: Any, batches: list[Any], dtype: torch.dtype) -> Tensor:
    """(N, H): what stands before the model's head at every token."""
    states = [model(x.input_ids, x.attention_mask, lambda hidden, weight, bias: hidden)[x.attention_mask.bool()] for x in batches]
    return torch.cat(states).to(dtype)


if __name__ == "__main__":
    sys.exit(main("grad_filter"))
