"""What the quickstart found, of three seeds: tables and a picture, from the JSON files alone.

    python -m fastkd.benchmarks.quickstart_tables readme --write-docs README.md           means of the three methods
    python -m fastkd.benchmarks.quickstart_tables glmd --write-docs docs/quickstart.md    perplexities of GLMD and its baselines
    python -m fastkd.benchmarks.quickstart_tables tasks --write-docs docs/quickstart.md   accuracies of TED, CR-ILD and their baselines

`make docs` also draws docs/quickstart.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastkd.train.curves import plot_bars

from .claim import RESULTS
from .page import write_block
from .report import markdown

SEEDS = (0, 1, 2)
GLMD = {
    "teacher": "teacher",
    "student_alone": "student, hard labels alone",
    "student_alone_equal_time": "student, hard labels, for as long as GLMD took",
    "student_kd": "student, plain full-vocabulary KD, with labels",
    "student_kd_equal_time": "student, plain KD, for as long as GLMD took",
    "student_distilled": "**student, GLMD, no labels**",
}
TASKS = {
    "teacher": "teacher ({teacher} k parameters, 2555 labelled examples)",
    "student_alone": "student ({student} k, 400 examples), hard labels alone",
    "student_kd": "student, plain KD",
    "student_distilled": "**student, the method**",
    "student_alone_equal_time": "student, hard labels, for as long as the method took",
    "student_kd_equal_time": "student, plain KD, for as long as the method took",
}
"""The numbers of examples are the task's, and in no result."""
SHORT = {
    "teacher": "teacher",
    "student_alone": "hard labels, as many steps",
    "student_alone_equal_time": "hard labels, as long",
    "student_kd": "plain KD, as many steps",
    "student_kd_equal_time": "plain KD, as long",
    "student_distilled": "**the method**",
}


def read_results(folder: Path, method: str) -> list[Mapping[str, Any]]:
    """What `make quickstart` wrote of every seed."""
    stem = "quickstart" if method == "glmd" else f"quickstart_{method}"
    found = [json.loads((folder / f"{stem}_seed{seed}.json").read_text(encoding="utf-8")) for seed in SEEDS]
    return [record.get("results", record) for record in found]


def glmd_table(folder: Path) -> str:
    results = read_results(folder, "glmd")
    rows = [[title, *(f"{x[key]:.1f} ({x['kept_tokens_only'][key]:.1f})" for x in results)] for key, title in GLMD.items()]
    return markdown(["perplexity (kept tokens only)", *(f"seed {seed}" for seed in SEEDS)], rows)


def tasks_table(folder: Path) -> str:
    ted, crild = read_results(folder, "ted"), read_results(folder, "crild")
    sizes = {model: f"{ted[0][f'{model}_parameters'] / 1e3:.0f}" for model in ("teacher", "student")}
    rows = []
    for key, title in TASKS.items():
        ours, theirs = (_percentages([result[key] for result in results]) for results in (ted, crild))
        rows.append([title.format(**sizes), ours, "the same" if ours == theirs and key != "teacher" else theirs])
    return markdown([f"test accuracy, mean of seeds {', '.join(map(str, SEEDS))} (each)", "TED", "CR-ILD"], rows)


def readme_table(folder: Path) -> str:
    results = {method: read_results(folder, method) for method in ("glmd", "ted", "crild")}
    head = ["student, mean of three seeds", "GLMD: perplexity (lower is better)", "TED: accuracy", "CR-ILD: accuracy"]
    units = {"glmd": 1.0, "ted": 100.0, "crild": 100.0}
    rows = [
        [title, *(f"{units[method] * fmean(result[key] for result in found):.1f}" for method, found in results.items())]
        for key, title in SHORT.items()
    ]
    return markdown(head, rows)


def _percentages(values: Sequence[float]) -> str:
    """The mean, and each of them unless all are equal."""
    mean = f"{100 * sum(values) / len(values):.1f}"
    return mean if len({*values}) == 1 else f"{mean} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def draw(folder: Path, path: Path) -> None:
    """The perplexities as bars, a panel a seed; needs matplotlib."""
    panels = {
        f"seed {seed}": {title.strip("*"): result[key] for key, title in GLMD.items()}
        for seed, result in zip(SEEDS, read_results(folder, "glmd"), strict=True)
    }
    plot_bars(panels, path, title="Quickstart: perplexity on held-out files (lower is better)")


TABLES: dict[str, Callable[[Path], str]] = {"glmd": glmd_table, "tasks": tasks_table, "readme": readme_table}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.quickstart_tables", description="The quickstart's tables.")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the JSON files (default: {RESULTS})")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", required=True, help="page whose table is written again")
    known = parser.parse_args(argv)
    try:
        write_block(known.write_docs, f"quickstart_tables {known.table}", TABLES[known.table](known.results))
    except (ValueError, OSError) as error:
        print(f"quickstart_tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
