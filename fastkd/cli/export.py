"""`fastkd export`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import doing
from ..store import new_folder
from .arguments import Parser, path, source
from .next import for_model, say_next

DESCRIPTION = """Rewrite a student and its tokenizer so that plain transformers opens them, without fastkd, with a model card of what is
recorded and measured of it."""


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd export", description=DESCRIPTION)
    parser.add_argument("student", type=source, help="folder of a finished student (.../student)")
    parser.add_argument("--output_dir", required=True, type=path, help="folder of the exported student; it must not exist")
    parser.add_argument(
        "--results",
        nargs="+",
        action="extend",
        type=path,
        default=[],
        metavar="FILE",
        help="results.json files that `fastkd eval` wrote of this student, for its card",
    )
    parser.add_argument("--onnx", action="store_true", help="also an ONNX file, compared with torch; encoders only, needs fastkd[onnx]")
    known = parser.parse_args(argv)
    _refuse_existing(known.output_dir)
    from ..models.folder import model_folder
    from ..models.load import load_tokenizer
    from ..models.onnx_export import ONNX_FILE, check_onnx, export_onnx
    from ..models.student import export_student, load_student
    from ..store import write_bytes_synced, write_json_atomic
    from ..train.model_card import CARD_FILE, model_card, read_evaluation
    from ..train.provenance import PROVENANCE_FILE, read_provenance

    if known.onnx:
        check_onnx(known.student)
    evaluations = [read_evaluation(file, known.student) for file in known.results]
    student, tokenizer = load_student(known.student), load_tokenizer(known.student)
    provenance = read_provenance(model_folder(known.student))
    difference = None
    with exporting(known.output_dir) as folder:
        tokenizer = export_student(student, tokenizer, folder)
        if known.onnx:
            difference = export_onnx(student.model, tokenizer, folder / ONNX_FILE)
        name = known.output_dir.resolve().name
        card = model_card(student, name, provenance=provenance, evaluations=evaluations, onnx_difference=difference)
        write_bytes_synced(folder / CARD_FILE, card.encode())
        if provenance is not None:
            write_json_atomic(folder / PROVENANCE_FILE, provenance)
    if difference is not None:
        print(f"{ONNX_FILE} differs from torch by {difference:.1e} (relative).")
    print(f"Exported to {known.output_dir}: AutoTokenizer and AutoModel open it with no fastkd installed.")
    say_next(for_model(known.output_dir))
    return 0


@contextmanager
def exporting(output_dir: Path) -> Iterator[Path]:
    """A folder to fill, which becomes the new folder `output_dir`: there is never half a model under that name."""
    _refuse_existing(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with doing(f"writing the model {output_dir}"), new_folder(output_dir) as unfinished:
        yield unfinished


def _refuse_existing(output_dir: Path) -> None:
    if output_dir.exists():
        raise ValueError(f"output_dir {str(output_dir)!r} exists already; name a new folder, nothing is overwritten.")
