"""`fastkd quickstart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import Parser, path
from .table import print_table

TITLES = {"glmd": "GLMD", "crild": "CR-ILD", "ted": "TED"}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="fastkd quickstart",
        description="Train a teacher on Python's own library and distil a student: by glmd on half its vocabulary, by crild and ted on "
        "a task, which is to tell the package that a function is from.",
    )
    parser.add_argument("--method", choices=list(TITLES), default="glmd", help="the method that distils (default: glmd)")
    parser.add_argument("--output_dir", type=path, help="default: runs/quickstart for glmd, runs/quickstart-task for crild and ted")
    parser.add_argument("--seed", type=int, default=0, help="of the students' weights and data order (default: 0)")
    parser.add_argument("--print_config", action="store_true", help="print the YAML that `fastkd train` would run for the same student")
    known = parser.parse_args(argv)
    output_dir = known.output_dir or Path("runs/quickstart" if known.method == "glmd" else "runs/quickstart-task")
    from ..train.quickstart import glmd_config, quickstart
    from ..train.schema import to_yaml
    from ..train.task_quickstart import student_config, task_quickstart

    if known.print_config:
        on_text = known.method == "glmd"
        config = glmd_config(output_dir, known.seed) if on_text else student_config(output_dir, known.method, known.seed)
        print(to_yaml(config), end="")
        return 0
    if known.method == "glmd":
        _show(quickstart(output_dir, known.seed), ["perplexity", "kept tokens only"], _perplexities)
        print(
            "\nPerplexity is over the same mapped tokens in every row, on files no model has seen: a dropped token counts as its"
            "\nstand-in, and in the second figure not at all. GLMD uses no labels, and its teacher says nothing of dropped tokens."
            "\nThe temperature here is 1: the paper's 15 asks for far longer training than a demo has."
        )
    else:
        _show(task_quickstart(output_dir, known.method, known.seed), ["accuracy"], lambda results, key: [f"{results[key]:.1%}"])
        print("\nAccuracy is on functions of files that no model has read. All students begin from the same weights.")
    print(f"Results: {output_dir}")
    return 0


def _perplexities(results: dict[str, Any], key: str) -> list[str]:
    return [f"{results[key]:.1f}", f"{results['kept_tokens_only'][key]:.1f}"]


def _show(results: dict[str, Any], columns: list[str], scores: Any) -> None:
    """One row a model: its scores, and what it took."""
    title = TITLES[results["method"]]
    rows = {
        "teacher": "teacher",
        "student_alone": "student, hard labels alone",
        "student_kd": "student, plain KD",
        "student_distilled": f"student, {title}",
        "student_alone_equal_time": f"student, hard labels, as long as {title}",
        "student_kd_equal_time": f"student, plain KD, as long as {title}",
    }
    print()
    print_table(
        ["", *columns, "steps", "train seconds", "parameters", "vocabulary"],
        [
            [
                label,
                *scores(results, key),
                results["steps"][key],
                f"{results['train_seconds'][key]:.0f}",
                results["teacher_parameters" if key == "teacher" else "student_parameters"],
                results["teacher_vocab" if key == "teacher" else "student_vocab"],
            ]
            for key, label in rows.items()
            if key in results
        ],
    )
    print(f"\nStudent: {results['student_dir']}")
