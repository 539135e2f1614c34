"""`fastkd quickstart`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .table import print_table

ROWS = (
    ("teacher", "teacher"),
    ("student_alone", "student, hard labels alone"),
    ("student_kd", "student, plain full-vocabulary KD"),
    ("student_distilled", "student, GLMD"),
    ("student_alone_equal_time", "student, hard labels, as long as GLMD"),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd quickstart", description="Train a teacher on Python's own library and distil a student on half its vocabulary."
    )
    parser.add_argument("--method", choices=["glmd"], default="glmd", help="the method that distils (default: glmd)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--seed", type=int, default=0, help="of the students' weights and data order (default: 0)")
    parser.add_argument("--print_config", action="store_true", help="print the YAML that `fastkd train` would run for the same student")
    known = parser.parse_args(argv)
    from ..train.quickstart import glmd_config, quickstart
    from ..train.schema import to_yaml

    if known.print_config:
        print(to_yaml(glmd_config(known.output_dir, known.seed)), end="")
        return 0
    results = quickstart(known.output_dir, known.seed)
    print()
    print_table(
        ["", "perplexity", "kept tokens only", "steps", "train seconds", "parameters", "vocabulary"],
        [
            [
                label,
                f"{results[key]:.1f}",
                f"{results['kept_tokens_only'][key]:.1f}",
                results["steps"][key],
                f"{results['train_seconds'][key]:.0f}",
                results["teacher_parameters" if key == "teacher" else "student_parameters"],
                results["teacher_vocab" if key == "teacher" else "student_vocab"],
            ]
            for key, label in ROWS
        ],
    )
    print(
        "\nPerplexity is over the same mapped tokens in every row, on files no model has seen: a dropped token counts as its stand-in."
        "\nThe second figure leaves dropped tokens out. GLMD uses no labels, and its teacher says nothing of dropped tokens."
        "\nThe temperature here is 1: the paper's 15 asks for far longer training than a demo has."
        f"\nStudent: {results['student_dir']}   curves and results.json: {known.output_dir}"
    )
    return 0
