"""Labelled rows of one's own, as people have them: CSV files of classes by name, of pairs, and of values."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tests import tiny

FEELINGS = ("negative", "neutral", "positive")
KINDS = ("classes", "pairs", "values")


def write_own(folder: Path, kind: str = "classes", *, split: str | None = None, rows: int = 18) -> dict[str, Any]:
    """`dataset` of a configuration: train.csv and dev.csv, and test.csv beside them."""
    columns = {"classes": ("text", "label"), "pairs": ("premise", "hypothesis", "gold"), "values": ("text", "score")}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("train", "dev", "test")):
        lines = tiny.lines()[300 + 50 * number :]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in range(rows):
                texts = lines[2 * row : 2 * row + len(columns) - 1]
                writer.writerow([*texts, row / 4 if kind == "values" else FEELINGS[(row + number + 1) % 3]])
    options: dict[str, Any] = {"text_columns": list(columns[:-1]), "label_column": columns[-1], "max_length": 32}
    return {"path": str(folder / "train.csv"), "eval_path": str(folder / "dev.csv"), **options}
