"""What a top-k teacher costs and saves: how far `topk_kl_div` with each of its tails is from the KL of the whole distributions.

    python -m fastkd.benchmarks.topk_bias [--pair DIR] [--output FILE]      measure
    python -m fastkd.benchmarks.topk_bias --write-docs docs/topk.md         draw the table again, from the JSON file alone

On held-out text of a small teacher and student, trained on Python's own library (in DIR, once: minutes), and on teachers whose
probabilities fall as a power of the rank, with students that differ from them by noise. Of every list of k tokens and tail: the bias
of the loss, and the error of the gradient of the student's logits, against the full KL in float64; exact, and with log-probabilities
stored in bfloat16. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops import backend_torch
from fastkd.ops.checks import TAILS
from fastkd.ops.row_call import RowCall, RowOptions, RowOutputs, TopK
from fastkd.store import write_json_atomic

from .environment import stamp
from .grad_filter import _held_out, _hidden
from .page import write_block
from .report import environment, markdown

LISTED = (16, 64, 256)
REAL_TOKENS = 1024
ZIPF_TOKENS, ZIPF_VOCABULARY = 128, 32_768
EXPONENTS = (2.0, 1.3, 1.0, 0.7)
"""p(rank) ~ rank^-exponent."""
DIVERGENCES = (1.0, 0.1)
"""Nats between a synthetic teacher and its student."""
BLOCK = 64


class Pair(NamedTuple):
    """Logits (N, V) of teacher and student in float64."""

    name: str
    teacher: Tensor
    student: Tensor


class Sums:
    """Sums of losses and gradients against the true ones, over blocks of tokens."""

    def __init__(self) -> None:
        self.loss = self.true_loss = self.product = self.square = self.true_square = self.distance = 0.0

    def add(self, loss: Tensor, gradient: Tensor, true_loss: Tensor, truth: Tensor) -> None:
        self.loss += float(loss.sum())
        self.true_loss += float(true_loss.sum())
        self.product += float((gradient * truth).sum())
        self.square += float(gradient.square().sum())
        self.true_square += float(truth.square().sum())
        self.distance += float((gradient - truth).square().sum())

    def report(self) -> dict[str, float]:
        return {
            "bias": self.loss / self.true_loss - 1.0,
            "gradient_error": (self.distance / self.true_square) ** 0.5,
            "gradient_cosine": self.product / (self.square * self.true_square) ** 0.5,
        }


def measure(pair_folder: Path) -> dict[str, Any]:
    results = []
    for pair in [trained_pair(pair_folder), *zipf_pairs()]:
        results.append(compare(pair))
        print(f"{pair.name}: entropy {results[-1]['entropy']:.2f}, KL {results[-1]['kl']:.3f} nats", flush=True)
    return {"claim": "topk_bias", "device": "cpu", "environment": stamp(torch.device("cpu")), "results": results}


@torch.no_grad()
def compare(pair: Pair) -> dict[str, Any]:
    """All lists and tails against the full KL."""
    tokens, vocabulary = pair.teacher.shape
    sums = {case: Sums() for case in product(LISTED, TAILS, ("exact", "stored"))}
    dense, entropy, tail_mass = Sums(), 0.0, dict.fromkeys(LISTED, 0.0)
    for start in range(0, tokens, BLOCK):
        student = pair.student[start : start + BLOCK]
        log_p, log_q = pair.teacher[start : start + BLOCK].log_softmax(-1), student.log_softmax(-1)
        truth = (log_p.exp() * (log_p - log_q)).sum(-1), log_q.exp() - log_p.exp()
        entropy -= float((log_p.exp() * log_p).sum())
        stored = pair.teacher[start : start + BLOCK].bfloat16().double().log_softmax(-1)
        dense.add((stored.exp() * (stored - log_q)).sum(-1), log_q.exp() - stored.exp(), *truth)
        for listed in LISTED:
            values, ids = log_p.topk(listed)
            log_tail = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
            tail_mass[listed] += float(log_tail.exp().sum())
            teachers = {"exact": TopK(ids, values, log_tail), "stored": TopK(ids, values.bfloat16(), log_tail.float())}
            for tail, (precision, teacher) in product(TAILS, teachers.items()):
                sums[listed, tail, precision].add(*sparse(student, teacher, tail), *truth)
    return {
        "teacher": pair.name,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "entropy": entropy / tokens,
        "kl": dense.true_loss / tokens,
        "dense_bfloat16": {"bytes_per_token": 2 * vocabulary, **dense.report()},
        "lists": [
            {
                "k": listed,
                # An int32 id and a bfloat16 log-probability each, and a float32 tail.
                "bytes_per_token": listed * (4 + 2) + 4,
                "tail_mass": tail_mass[listed] / tokens,
                **{tail: {precision: sums[listed, tail, precision].report() for precision in ("exact", "stored")} for tail in TAILS},
            }
            for listed in LISTED
        ],
    }


def sparse(student: Tensor, teacher: TopK, tail: str) -> tuple[Tensor, Tensor]:
    """Each token's loss, and its gradient with respect to the student's logits."""
    loss, gradient = student.new_empty(len(student)), torch.empty_like(student)
    options = RowOptions(tail=tail)
    outputs, ones = RowOutputs(divergence=loss), torch.ones_like(loss)
    backend_torch.run(RowCall(student=student, teacher=teacher, options=options, outputs=outputs, row_weight=ones, gradient=gradient))
    return loss, gradient


def zipf_pairs() -> Iterator[Pair]:
    """The order of the tokens is that of their ranks, which no divergence depends on."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, ZIPF_VOCABULARY + 1, dtype=torch.float64)
    for exponent, target in product(EXPONENTS, DIVERGENCES):
        teacher = (-exponent * ranks.log()).expand(ZIPF_TOKENS, -1)
        noise = torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
        scale = (2 * target) ** 0.5
        for _ in range(8):  # the divergence grows about as the square of the noise
            scale *= (target / float(_kl(teacher, teacher + scale * noise))) ** 0.5
        yield Pair(f"Zipf, exponent {exponent:g}", teacher, teacher + scale * noise)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    log_p = teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1).mean()


def trained_pair(folder: Path) -> Pair:
    """Logits of held-out files, from models trained once."""
    from fastkd.models.load import load_frozen

    teacher_folder, student_folder = folder / "teacher" / "train" / "student", folder / "student" / "distill" / "student"
    if not teacher_folder.is_dir() or not student_folder.is_dir():
        train(folder)
    batches = _held_out(str(teacher_folder), folder / "cache" / "tokens", REAL_TOKENS, torch.device("cpu"))
    logits = []
    for model in (load_frozen(str(teacher_folder)), load_frozen(str(student_folder))):
        logits.append(_hidden(model, batches, torch.float64) @ model.head.weight.double().T)
    return Pair("language models on Python's library", *logits)


def train(folder: Path) -> None:
    """A teacher of two layers from hard labels, and a narrower student over the same ids from it."""
    from fastkd.train.quickstart import LENGTH, VOCABULARY, make_tokenizer
    from fastkd.train.run import distill

    tokenizer = make_tokenizer(folder / "tokenizer", VOCABULARY)
    shared = {
        "cache_dir": str(folder / "cache"),
        "text": {"path": "stdlib", "train_split": "train", "eval_split": "dev", "max_length": LENGTH, "max_eval_rows": 60},
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": 0,
    }
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    teacher = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 512, **sizes}
    tokens = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    distill(
        {
            **shared,
            "method": "lm",
            "output_dir": str(folder / "teacher"),
            "tokenizer_name_or_path": str(tokenizer),
            "student": {**teacher, **tokens},
            "max_steps": 400,
        }
    )
    distill(
        {
            **shared,
            "method": "kd",
            "output_dir": str(folder / "student"),
            "teacher_model_name_or_path": str(folder / "teacher" / "train" / "student"),
            "student": {**sizes, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16},
            "options": {"temperature": 1.0, "label_weight": 0.0},
            "max_steps": 300,
        }
    )


def table(record: Mapping[str, Any]) -> str:
    """Per teacher and k: bytes, tail mass, and of the three tails the bias and the gradient's error, from what is stored."""
    parts = [f"{environment(record)}.\n"]
    head = ["k", "bytes a token", "tail mass", *(f"bias, {tail}" for tail in TAILS), *(f"gradient error, {tail}" for tail in TAILS)]
    for result in record["results"]:
        dense = result["dense_bfloat16"]
        parts.append(
            f"**{result['teacher']}**: vocabulary {result['vocabulary']}, {result['tokens']} tokens, teacher's entropy "
            f"{result['entropy']:.2f} nats, KL to the student {result['kl']:.2f} nats. All logits in bfloat16: "
            f"{dense['bytes_per_token']} bytes a token, bias {signed(dense['bias'])}, "
            f"gradient error {percent(dense['gradient_error'])}.\n"
        )
        rows = [
            [
                str(row["k"]),
                str(row["bytes_per_token"]),
                percent(row["tail_mass"]),
                *(signed(row[tail]["stored"]["bias"]) for tail in TAILS),
                *(percent(row[tail]["stored"]["gradient_error"]) for tail in TAILS),
            ]
            for row in result["lists"]
        ]
        parts.append(markdown(head, rows))
    return "\n".join(parts)


def percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def signed(value: float) -> str:
    return f"{100 * value:+.2g} %" if abs(value) < 0.995 else f"{100 * value:+.0f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.topk_bias", description="The bias of top-k teachers.")
    parser.add_argument("--pair", type=Path, default=Path("runs/topk_bias"), help="the trained models (default: runs/topk_bias)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/topk_bias.json"), help="the JSON file")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="measure nothing; draw the table of PAGE from the JSON file")
    known = parser.parse_args(argv)
    try:
        if known.write_docs is None:
            write_json_atomic(known.output, measure(known.pair))
        else:
            record = json.loads(known.output.read_text(encoding="utf-8"))
            write_block(known.write_docs, "topk_bias", table(record))
    except (ValueError, OSError) as error:
        print(f"topk_bias: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
