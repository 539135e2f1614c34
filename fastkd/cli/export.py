"""`fastkd export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import new_folder

if TYPE_CHECKING:
    from ..models.language_model import LanguageModel


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd export", description="Rewrite a student and its tokenizer so that plain transformers opens them, without fastkd."
    )
    parser.add_argument("student", help="folder of a finished student (.../student)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the exported student; it must not exist")
    known = parser.parse_args(argv)
    from ..models.load import load_language_model, load_tokenizer

    write_export(load_language_model(known.student), load_tokenizer(known.student), known.output_dir)
    print(f"Exported to {known.output_dir}: AutoTokenizer and AutoModel open it with no fastkd installed.")
    return 0


def write_export(student: LanguageModel, tokenizer: Any, output_dir: Path) -> None:
    """Export to a new folder; there is never half a model under `output_dir`."""
    from ..models.student import export_student

    if output_dir.exists():
        raise ValueError(f"output_dir {str(output_dir)!r} exists already; name a new folder, nothing is overwritten.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(output_dir) as unfinished:
        export_student(student, tokenizer, unfinished)
