"""What a rounding or an approximation costs: the error of the gradient from a divergence of 1e-4 to 10 nats.

    python -m fastkd.benchmarks.numerics [--output FILE] [--smoke]              measure
    python -m fastkd.benchmarks.numerics --write-docs docs/numerics.md          draw tables and plot again, from the JSON file alone

Student and teacher are float32 and share a head; the student's hidden states are the teacher's plus noise. Of the gradient of the
student's hidden states, the relative L2 error against float64: with logits rounded to 16 bits, with their gradient rounded, with
filtered products, and with 1 / N folded into a float16 gradient. `accuracy.py` measures the same of whole implementations. Nothing is
timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.store import write_bytes_atomic, write_json_atomic

from .accuracy import DIVERGENCES
from .environment import stamp
from .implementations import fused, with_gradients
from .page import write_block
from .problem import Inputs, Shape, close_pair, exact, relative_error
from .report import cell, environment, markdown

SHAPE, SMOKE_SHAPE = Shape(128, 30_522, 256, 256), Shape(16, 500, 16, 16)
TOKENS = (1024, 8192, 65_536)
"""N of a loss that is averaged over N tokens."""
FLOAT16_KL = 1e-2


def gradient(inputs: Inputs, *, logits: torch.dtype = torch.float32, stored: torch.dtype = torch.float32) -> Tensor:
    """d mean KL / d student in float32, with the logits of both models rounded to `logits` and their gradient to `stored`."""
    with torch.no_grad():
        q, p = (
            (hidden @ head.T).to(logits).float().softmax(-1)
            for hidden, head in ((inputs.student, inputs.head), (inputs.teacher, inputs.teacher_head))
        )
        return (q - p).to(stored).float() @ inputs.head / len(q)


def approximate(inputs: Inputs, **options: Any) -> Tensor:
    """The same gradient by `linear_kl_div`."""
    return with_gradients(partial(fused, **options), inputs).student_gradient


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {
    "fastkd": approximate,
    "logits rounded to bfloat16": partial(gradient, logits=torch.bfloat16),
    "logits rounded to float16": partial(gradient, logits=torch.float16),
    "gradient of logits in bfloat16": partial(gradient, stored=torch.bfloat16),
    "gradient of logits in float16": partial(gradient, stored=torch.float16),
    "fastkd, grad_filter=2**-12": partial(approximate, grad_filter=2.0**-12),
    "fastkd, grad_filter=2**-8": partial(approximate, grad_filter=2.0**-8),
}


def measure(smoke: bool) -> dict[str, Any]:
    shape, cpu = SMOKE_SHAPE if smoke else SHAPE, torch.device("cpu")
    results = []
    for target in (1e-3, 1.0) if smoke else DIVERGENCES:
        pair = close_pair(target, shape, torch.float32, cpu)
        truth = exact(pair)
        assert truth.loss is not None
        errors = {name: relative_error(make(pair), truth.student_gradient) for name, make in VARIANTS.items()}
        results.append({"kl": float(truth.loss), "errors": errors})
        print(f"{results[-1]['kl']:.2g} nats", flush=True)
    return {
        "claim": "numerics",
        "device": "cpu",
        "smoke": smoke,
        "environment": stamp(cpu),
        "shape": shape._asdict(),
        "results": results,
        "float16": {"kl": FLOAT16_KL, "results": fold(close_pair(FLOAT16_KL, shape, torch.float32, cpu))},
    }


@torch.no_grad()
def fold(inputs: Inputs) -> list[dict[str, float]]:
    """Measure the error of the logits' gradient of a mean over N tokens in float16: divided by N before it is rounded, and after."""
    truth = (inputs.student.double() @ inputs.head.double().T).softmax(-1)
    truth -= (inputs.teacher.double() @ inputs.teacher_head.double().T).softmax(-1)
    rounded = truth.half().double()
    results = []
    for tokens in TOKENS:
        folded = (truth / tokens).half().double() * tokens
        results.append(
            {
                "tokens": tokens,
                "folded_error": relative_error(folded, truth),
                "folded_lost": 1 - float(folded.abs().sum() / truth.abs().sum()),
                "after_error": relative_error(rounded, truth),
                "after_lost": 1 - float(rounded.abs().sum() / truth.abs().sum()),
            }
        )
    return results


def tables(record: Mapping[str, Any]) -> str:
    """Per variant the error at every divergence; per N what folding it in costs."""
    results, float16 = record["results"], record["float16"]
    head = ["error of the gradient at", *(f"{row['kl']:.2g} nats" for row in results)]
    rows = [[name, *(cell(row["errors"][name], ".1e") for row in results)] for name in results[0]["errors"]]
    fold_head = ["tokens in the mean", "divided before rounding: error", "L1 mass lost", "divided after: error", "L1 mass lost"]
    fold_rows = [
        [
            str(row["tokens"]),
            cell(row["folded_error"], ".1e"),
            f"{row['folded_lost']:.1%}",
            cell(row["after_error"], ".1e"),
            f"{row['after_lost']:.1%}",
        ]
        for row in float16["results"]
    ]
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["shape"].items())
    return (
        f"{environment(record)}; {sizes}.\n\n{markdown(head, rows)}\n"
        f"The gradient of the logits of a mean over N tokens in float16, at {float16['kl']:g} nats:\n\n{markdown(fold_head, fold_rows)}"
    )


def plot(record: Mapping[str, Any]) -> bytes:
    """The errors over the divergence: roundings on the left, what can be chosen on the right."""
    from .plots import _curve, _figure, _png

    names = list(record["results"][0]["errors"])
    figure, panels = _figure(1, 2, height=4.2, sharey=True)
    chosen = [name for name in names if name.startswith("fastkd,")]
    for axes, title, shown in (
        (panels[0], "roundings", [name for name in names if name not in chosen]),
        (panels[1], "approximations that can be asked for", ["fastkd", *chosen]),
    ):
        for index, name in enumerate(shown):
            _curve(axes, [(row["kl"], row["errors"][name]) for row in record["results"]], index, name)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("KL(teacher || student), nats")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("relative L2 error of the gradient")
    return _png(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.numerics", description="What roundings cost the gradient.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/numerics_cpu.json"), help="the JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it works")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="measure nothing; draw PAGE's tables and plot")
    known = parser.parse_args(argv)
    try:
        if known.write_docs is None:
            write_json_atomic(known.output, measure(known.smoke))
        else:
            record = json.loads(known.output.read_text(encoding="utf-8"))
            write_bytes_atomic(known.write_docs.parent / "img" / f"{known.output.stem}.png", plot(record))
            write_block(known.write_docs, "numerics", tables(record))
    except (ValueError, OSError) as error:
        print(f"numerics: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
