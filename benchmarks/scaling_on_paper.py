"""Memory, communication and time of a training step on more GPUs than there are here: formulas, checked where ranks can be had.

    python -m fastkd.benchmarks.scaling_on_paper [--output FILE]                count on 1 and 2 ranks of this CPU, beside the formulas
    python -m fastkd.benchmarks.scaling_on_paper --write-docs docs/scaling.md   draw the page's tables again

What is counted, and how, stands in `scaling_checks.py`. Bytes and FLOPs that differ from their formula by more than 2 % end the script
with an error. Times of the tables are predictions from the assumptions named below, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.store import write_json_atomic

from .page import write_block
from .report import environment, markdown
from .step_costs import (
    FLOAT32,
    H100_BYTES,
    H200_BYTES,
    LLAMA_8B,
    LLAMA_70B,
    NETWORK,
    NODE,
    NVLINK,
    PEAK,
    UTILISATION,
    Setup,
    accumulated_gradients,
    communication,
    flops,
    memory,
    piece,
    seconds,
    sent,
    vocabulary_parallel,
    while_loading,
    whole,
)

TOLERANCE = 0.02

TABLED = Setup(LLAMA_8B, LLAMA_70B, tokens=2048, length=2048, bf16=True)
CHOICES: dict[str, Setup] = {
    "DDP, teacher whole": TABLED,
    "FSDP2, teacher split": replace(TABLED, fsdp=True, fsdp_teacher=True),
    "DDP, teacher cached": replace(TABLED, teacher=None),
    "FSDP2, teacher cached": replace(TABLED, teacher=None, fsdp=True),
}
WORLD_SIZES = (8, 64, 1024)
ACCUMULATIONS = (1, 16)
GROUPS = (2, 4, 8)
MOVING = {"all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-reduce": "all_reduce"}
TIMES = ("s computing", "s sending", "s one after the other", "s overlapped")
GROUP_MESSAGES = ("all-reduces, MB", "sent, MB")


def tabled(*, accumulation: int = 1) -> Iterator[tuple[str, Setup]]:
    for name, setup in CHOICES.items():
        for ranks in WORLD_SIZES:
            yield name, replace(setup, world_size=ranks, accumulation=accumulation)


def tables() -> str:
    """The predictions of the page."""
    sizes = [whole(model.tensors) / FLOAT32 / 1e9 for model in (LLAMA_8B, LLAMA_70B)]
    parts = [
        f"Student {sizes[0]:.2f}e9 and teacher {sizes[1]:.2f}e9 parameters (the shapes of Llama 3.1), vocabulary "
        f"{LLAMA_8B.vocabulary}, untied heads, bf16 autocast over float32 weights, {TABLED.tokens} tokens (one row) a micro-batch and "
        "rank. GB are 1e9 bytes. What a batch brings along from a cached teacher is left out.\n",
        "**Memory of a rank in a step, GB**, without gradient accumulation. With it, FSDP2's gradients are whole until the last "
        f"micro-batch: {giga(accumulated_gradients(replace(TABLED, accumulation=2)))} GB.\n",
        markdown(["", "ranks", *memory(TABLED), "together", "a step fits", "host of a node, loading"], [*memory_rows()]),
        "**Collectives of an optimizer step of one micro-batch a rank**: GB of the tensors they work on, and GB that each rank sends "
        "if they go around a ring.\n",
        markdown(["", "ranks", *MOVING, "sent"], [*communication_rows()]),
        f"**Time of an optimizer step, predicted**: FLOPs at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s, bytes at "
        f"{NVLINK / 1e9:.0f} GB/s on up to {NODE} GPUs and at {NETWORK / 1e9:.0f} GB/s beyond, all of them assumptions. Latency, "
        "AdamW, evaluation and checkpoints are left out; what does not fit into memory is listed all the same.\n",
        markdown(["", "ranks", "accumulation", "TFLOP a rank", *TIMES, "1000 tokens/s, overlapped"], [*time_rows()]),
        f"**`linear_kl_div(group=...)`**: forward and backward of {TABLED.tokens} tokens with labels, on shards of both heads.\n",
        markdown(["ranks of the group", "both heads, GB", "gradient of the student's, GB", *GROUP_MESSAGES], [*group_rows()]),
    ]
    return "\n".join(parts)


def memory_rows() -> Iterator[list[str]]:
    for name, setup in tabled():
        parts, loading = memory(setup), while_loading(setup)
        total = sum(parts.values())
        yield [name, str(setup.world_size), *map(giga, (*parts.values(), total)), fits(total), giga(loading)]


def communication_rows() -> Iterator[list[str]]:
    for name, setup in tabled():
        made = communication(setup)
        yield [name, str(setup.world_size), *(giga(made[kind]) for kind in MOVING.values()), giga(sent(made, setup.world_size))]


def time_rows() -> Iterator[list[str]]:
    for accumulation in ACCUMULATIONS:
        for name, setup in tabled(accumulation=accumulation):
            computing, sending = seconds(setup)
            overlapped = max(computing, sending)
            times = [f"{x:.2f}" for x in (computing, sending, computing + sending, overlapped)]
            speed = setup.world_size * accumulation * setup.tokens / overlapped
            yield [name, str(setup.world_size), str(accumulation), f"{flops(setup) / 1e12:.0f}", *times, f"{speed / 1e3:.0f}"]


def group_rows() -> Iterator[list[str]]:
    for ranks in GROUPS:
        made = vocabulary_parallel(TABLED.tokens, LLAMA_8B.width, ranks, labels=True)
        heads = (piece([*LLAMA_8B.head, *LLAMA_70B.head], ranks), piece(LLAMA_8B.head, ranks))
        yield [str(ranks), *map(giga, heads), *(f"{size / 1e6:.1f}" for size in (made["all_reduce"], sent(made, ranks)))]


def giga(size: float) -> str:
    return f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:.0f}"


def fits(total: float) -> str:
    """The smaller GPU that has so much, if one has."""
    return "H100 80 GB" if total <= H100_BYTES else "H200 141 GB" if total <= H200_BYTES else "no"


def checked(record: Mapping[str, Any]) -> str:
    """What was counted beside the formulas, from the JSON alone; cases that agree in all share a line."""
    cases: dict[tuple[str, int, int], list[str]] = {}
    for check in record["checks"]:
        cases.setdefault((check["what"], check["predicted"], check["counted"]), []).append(check["case"])
    rows = [
        [what, str(predicted), str(counted), f"{counted / predicted:.4f}", "; ".join(names)]
        for (what, predicted, counted), names in sorted(cases.items(), key=lambda case: case[0][0])
    ]
    times = []
    for row in record["times"]:
        ratios = (row["measured"], row["predicted"], row["measured"] / row["predicted"])
        milliseconds = (f"{1e3 * row['seconds'][size]:.1f}" for size in ("small", "large"))
        times.append([str(row["ranks"]), *milliseconds, *(f"{ratio:.2f}" for ratio in ratios)])
    sizes = "; ".join(
        f"{name}: {', '.join(f'{key} {value}' for key, value in record[name].items())}".replace("_", " ")
        for name in ("student", "teacher")
    )
    parts = [
        f"{environment(record)}; one process, and two over gloo; {record['tokens']} tokens a micro-batch; {sizes}.\n",
        "Bytes (of the first rank) and FLOPs of one step of fastkd's own trainer, counted on live tensors, collectives and products. "
        "Of collectives it is the sizes that torch is given; what a ring sends of them follows from its algorithm and is not measured. "
        "Nor was the memory of gathered layers that pass by. Counted logits include what fills rows up to multiples of 64 bytes.\n",
        markdown(["what", "formula", "counted", "ratio", "cases"], rows),
        f"**Time of a step** of two sizes, in ms: medians of {record['rounds']} interleaved rounds, on a machine that others used too. "
        "The times above rest on FLOPs alone; here one sees how far times follow them, on products as small as these.\n",
        markdown(["ranks", "small", "large", "ratio of times", "ratio of FLOPs", "times / FLOPs"], times),
    ]
    return "\n".join(parts)


def differing(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every check that is further from its formula than TOLERANCE."""
    return [
        f"{check['case']}: {check['what']} is {check['counted']} by count and {check['predicted']} by the formula."
        for check in checks
        if abs(check["counted"] - check["predicted"]) > TOLERANCE * check["predicted"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.scaling_on_paper", description="Costs of a step on many GPUs.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper_scaling.json"), help="the JSON file")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="count nothing; draw the tables of PAGE again")
    known = parser.parse_args(argv)
    try:
        if known.write_docs is not None:
            record = json.loads(known.output.read_text(encoding="utf-8"))
            write_block(known.write_docs, "scaling_on_paper", f"## On paper\n\n{tables()}\n## Checked\n\n{checked(record)}")
            return 0
        from .scaling_checks import measure

        record = measure()
        problems = differing(record["checks"])
        if problems:
            raise ValueError("formulas differ from what was counted. " + " ".join(problems))
        write_json_atomic(known.output, record)
    except (ValueError, OSError) as error:
        print(f"scaling_on_paper: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
