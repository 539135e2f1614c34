"""What a student on half of the vocabulary learns by each `teacher_mass`, beside plain KD and hard labels: perplexities of three seeds.

    python -m fastkd.benchmarks.teacher_mass [--runs DIR] [--output FILE]               measure: twenty minutes of two cores
    python -m fastkd.benchmarks.teacher_mass --quick                                    a few steps, to see that it works
    python -m fastkd.benchmarks.teacher_mass --write-docs docs/methods/glmd.md          draw the table again, from the JSON file alone

Models, documents and steps are the quickstart's: the teacher is trained once, on all documents, and the students have few. All
students of a seed begin from the same weights and read the same rows in the same order. Stopped, the same command goes on where it was;
after each student it writes the JSON file anew. In the output folder of `fastkd quickstart` (`--runs runs/quickstart`) its teacher
serves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from fastkd.store import write_json_atomic
from fastkd.train.quickstart import STUDENT_DOCUMENTS, STUDENT_STEPS

from .environment import stamp
from .grad_filter import LENGTH, _held_out
from .page import write_block
from .report import environment, markdown


@dataclass(frozen=True)
class Row:
    """How a student is trained."""

    title: str
    method: Literal["glmd", "kd", "lm"]
    options: Mapping[str, Any] = field(default_factory=dict)


ROWS = {
    "hard_labels": Row("hard labels", "lm"),
    "kd_labels": Row("plain KD over all ids, with labels", "kd", {"temperature": 1.0, "label_weight": 1.0}),
    "kd": Row("plain KD over all ids, without labels", "kd", {"temperature": 1.0, "label_weight": 0.0}),
    "glmd_renormalize": Row("GLMD, `renormalize`", "glmd", {"temperature": 1.0}),
    "glmd_full": Row("GLMD, `full`", "glmd", {"temperature": 1.0, "teacher_mass": "full"}),
    "glmd_slots": Row("GLMD, `slots`", "glmd", {"temperature": 1.0, "teacher_mass": "slots"}),
}


@dataclass(frozen=True)
class Size:
    """How much is trained and judged."""

    seeds: tuple[int, ...] = (0, 1, 2)
    documents: int = STUDENT_DOCUMENTS
    """Of the library's, for the students."""
    steps: int = STUDENT_STEPS
    teacher_steps: int | None = None
    """None: the quickstart's."""
    test_rows: int = 400


QUICK = Size(seeds=(0,), documents=20, steps=3, teacher_steps=3, test_rows=8)


def measure(runs: Path, size: Size, output: Path) -> None:
    """Train and judge every student, seed by seed; the record is on the disk before the next one begins."""
    from fastkd.methods.perplexity import events, perplexity
    from fastkd.models.load import load_frozen
    from fastkd.train.quickstart import VOCABULARY, make_tokenizer, teacher_config
    from fastkd.train.run import distill

    runs.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(runs / "tokenizer", VOCABULARY)
    config = teacher_config(runs)
    made = distill(config if size.teacher_steps is None else replace(config, max_steps=size.teacher_steps))["train"]
    teacher = load_frozen(made["student_dir"])
    batches = _held_out(str(tokenizer), runs / "cache" / "tokens", size.test_rows * LENGTH, torch.device("cpu"))
    record: dict[str, Any] = {
        "claim": "teacher_mass",
        "device": "cpu",
        "environment": stamp(torch.device("cpu")),
        "size": asdict(size),
        "results": [],
    }
    kept = None
    for seed in size.seeds:
        for name in ROWS:
            (trained,) = distill(student_config(runs, name, seed, size)).values()
            student = load_frozen(trained["student_dir"])
            assert student.vocab_map is not None
            if kept is None:
                kept = student.vocab_map
                record["events"] = events(kept, kept.vocab_size)
                record["teacher"] = {
                    "perplexity": perplexity(teacher, batches, fold=kept),
                    "kept_tokens_only": perplexity(teacher, batches, kept_only=kept),
                    "steps": made["steps"],
                }
            assert student.vocab_map.fingerprint == kept.fingerprint, "students of other slots are not comparable"
            scores = {
                "perplexity": perplexity(student, batches),
                "kept_tokens_only": perplexity(student, batches, kept_only=kept),
            }
            result = {"row": name, "seed": seed, **scores, "steps": trained["steps"], "train_seconds": trained["seconds"]}
            record["results"].append(result)
            write_json_atomic(output, record)
            print(f"seed {seed}, {name}: {scores}, {trained['seconds']:.0f} s", flush=True)


def student_config(runs: Path, name: str, seed: int, size: Size) -> Any:
    """What `fastkd train` would run for a student. All keep what glmd keeps, the label words of its recipes too: slots are the same."""
    from fastkd.recipes import label_words
    from fastkd.train.quickstart import glmd_config

    row, config = ROWS[name], glmd_config(runs, seed)
    assert config.text is not None and config.vocabulary is not None
    return replace(
        config,
        method=row.method,
        options=dict(row.options),
        output_dir=str(runs / f"{size.documents}-documents" / f"seed-{seed}" / name),
        text=replace(config.text, max_rows=size.documents),
        vocabulary=replace(config.vocabulary, protected=label_words("glmd")),
        max_steps=size.steps,
        eval_steps=size.steps,
        save_steps=max(1, size.steps // 3),
    )


def table(record: Mapping[str, Any]) -> str:
    """A row a student: means of the seeds, and each."""
    size, teacher = record["size"], record["teacher"]
    metrics = {"perplexity": "perplexity", "kept_tokens_only": "kept tokens only", "train_seconds": "training, s"}
    body = [["teacher", *(f"{teacher[metric]:.1f}" if metric in teacher else "" for metric in metrics)]]
    for name, row in ROWS.items():
        results = [result for result in record["results"] if result["row"] == name]
        columns = {metric: [result[metric] for result in results] for metric in metrics}
        if results:
            body.append([row.title, *(_mean(values, seconds=metric == "train_seconds") for metric, values in columns.items())])
    return f"""{environment(record)}.

Perplexity over {record["events"]} on held-out files of Python's library, {size["test_rows"]} rows; {size["steps"]} steps on
{size["documents"]} documents, the teacher {teacher["steps"]} on all. Mean of seeds {", ".join(map(str, size["seeds"]))} (each).

{markdown(["student", *metrics.values()], body)}"""


def _mean(values: Sequence[float], *, seconds: bool) -> str:
    return f"{fmean(values):.0f}" if seconds else f"{fmean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.teacher_mass", description="What each teacher_mass gives.")
    parser.add_argument("--runs", type=Path, default=Path("runs/teacher_mass"), help="models and runs (default: runs/teacher_mass)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/teacher_mass.json"), help="the JSON file")
    parser.add_argument("--quick", action="store_true", help="a few steps in temporary folders: to see that it works; prints the table")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="measure nothing; draw the table of PAGE from the JSON file")
    known = parser.parse_args(argv)
    try:
        if known.write_docs is not None:
            write_block(known.write_docs, "teacher_mass", table(_read(known.output)))
        elif known.quick:
            with TemporaryDirectory(prefix="fastkd-quick-") as folder:
                measure(Path(folder), QUICK, Path(folder) / "teacher_mass.json")
                print(table(_read(Path(folder) / "teacher_mass.json")))
        else:
            measure(known.runs, Size(), known.output)
    except (ValueError, OSError) as error:
        print(f"teacher_mass: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    sys.exit(main())
