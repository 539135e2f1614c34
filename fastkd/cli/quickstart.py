"""`fastkd quickstart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import Parser, path
from .next import say_next
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
    parser.add_argument("--all", action="store_true", help="with --print_config: every key, not only what differs from the defaults")
    known = parser.parse_args(argv)
    output_dir = known.output_dir or Path("runs/quickstart" if known.method == "glmd" else "runs/quickstart-task")
    from ..train.quickstart import CONFIG_FILE, glmd_config, quickstart
    from ..train.schema import to_yaml
    from ..train.task_quickstart import student_config, task_quickstart

    if known.print_config:
        on_text = known.method == "glmd"
        config = glmd_config(output_dir, known.seed) if on_text else student_config(output_dir, known.method, known.seed)
        print(to_yaml(config, defaults=known.all, inherited=not known.all), end="")
        return 0
    if known.all:
        raise ValueError("--all is of --print_config, which is not given; leave it out, or add --print_config.")
    if known.method == "glmd":
        results = quickstart(output_dir, known.seed)
        _show(results, ["perplexity", "kept only"], _perplexities)
        print(
            f"\nPerplexity is over {results['events']} in every row, on files that no"
            "\nmodel has seen: a dropped token counts as its stand-in, and in the second figure"
            f"\nnot at all. The students read {results['student_documents']} files and the teacher all that there are."
            "\nGLMD uses no labels; its teacher's probabilities of the tokens that share a slot"
            "\nadd up (teacher_mass: slots), and the temperature is 1, not the paper's 15."
        )
    else:
        results = task_quickstart(output_dir, known.method, known.seed)
        _show(results, ["accuracy"], lambda results, key: [f"{results[key]:.1%}"])
        print("\nAccuracy is on functions of files that no model has read.\nAll students begin from the same weights.")
    print(f"Results: {output_dir}")
    say_next(
        [
            *([["generate", results["student_dir"], "def read_file("]] if known.method == "glmd" else []),
            ["train", Path(results["student_dir"]).parents[2] / CONFIG_FILE, "--output_dir", "runs/mine"],
        ]
    )
    return 0


def _perplexities(results: dict[str, Any], key: str) -> list[str]:
    return [f"{results[key]:.1f}", f"{results['kept_tokens_only'][key]:.1f}"]


def _show(results: dict[str, Any], columns: list[str], scores: Any) -> None:
    """One row a model: its scores, and what it took."""
    from ..train.readme import for_whom

    title = TITLES[results["method"]]
    rows = {
        "teacher": "teacher",
        "student_alone": "hard labels alone",
        "student_kd": "plain KD",
        "student_distilled": title,
        "student_alone_equal_time": f"hard labels, as long as {title}",
        "student_kd_equal_time": f"plain KD, as long as {title}",
    }
    print()
    print_table(
        ["", *columns, "steps", "train seconds"],
        [
            [label, *scores(results, key), results["steps"][key], f"{results['train_seconds'][key]:.0f}"]
            for key, label in rows.items()
            if key in results
        ],
    )
    print()
    for model, whose in (("teacher", "The teacher has"), ("student", "Each student has")):
        print(f"{whose} {results[f'{model}_parameters']:,} parameters, and a vocabulary of {results[f'{model}_vocab']:,}.")
    print(f"Student: {for_whom(Path(results['student_dir']))}")
