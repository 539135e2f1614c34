"""`fastkd eval`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..sealed import MANIFEST_FILE
from ..train.config import DatasetArguments, TextData
from .arguments import Parser, path, positive, source
from .next import EVAL_LIMITS, EVAL_ROWS, EVAL_TEXT, say_next
from .table import print_table

DESCRIPTION = """Judge a model beside its teacher and baselines: on a labelled task by the task's own metrics, on labelled rows of your
own (--path without --task), or on text by perplexity. Models are folders or hub names: students with their vocabulary map, exported
ones, and any other of transformers."""


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd eval", description=DESCRIPTION)
    parser.add_argument("model", type=source, metavar="MODEL", help="the model that is judged")
    parser.add_argument("--teacher", type=source, help="its teacher; the others are also compared with it")
    parser.add_argument(
        "--baseline",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="models to judge beside it, each with its name",
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--task", help="glue/rte, super_glue/boolq, squad_v2, ..., stdlib/module: a task that the models are trained for")
    data.add_argument(
        "--text", type=source, metavar="PATH", help="hub name, folder, file or glob of text, or stdlib: for language models"
    )
    parser.add_argument(
        "--path", type=source, help="with --task the folder or hub name of a copy; alone, labelled rows: a file, folder or hub name"
    )
    parser.add_argument("--text_columns", type=_names, help="rows: column of the text, or of both texts as a,b (default: text)")
    parser.add_argument("--label_column", help="rows: column of the label (default: label)")
    parser.add_argument("--name", help="text: configuration of a hub dataset")
    parser.add_argument("--text_column", help="text: column that holds the text (default: text)")
    parser.add_argument(
        "--documents", choices=("file", "paragraph", "line"), help="text: what a document of .txt files is (default: file)"
    )
    parser.add_argument("--split", help="default: a task's first besides train, validation of rows, test of a text, and all of a file")
    parser.add_argument("--max_rows", type=positive, help="at most this many examples, or rows of text")
    parser.add_argument("--max_length", type=positive, help="tokens in a row (default: 128 of a task, 256 of text)")
    parser.add_argument("--batch_size", type=positive, default=32, help="rows in a batch (default: 32)")
    parser.add_argument("--output_dir", type=path, help="where results.json and the plots go (default: only the table is printed)")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    known = parser.parse_args(argv)
    models = _models(known)
    with _output_folder(known.output_dir):
        evaluation = _evaluated(models, known)
    _show(evaluation)
    if known.output_dir is not None:
        from ..train.evaluate import write_evaluation

        write_evaluation(evaluation, known.output_dir)
        print(f"Results: {known.output_dir}")
    else:
        print("Nothing was written; --output_dir DIR keeps the scores and draws them.")
    if evaluation["data"].get("predicted") == "next tokens":
        print(f"More tasks, by lm-evaluation-harness (pip install 'lm_eval[hf]'):\n  {_lm_eval(evaluation['models']['student'])}")
    if known.output_dir is not None and (Path(known.model) / MANIFEST_FILE).is_file():  # as a run leaves its students
        results = ["--results", known.output_dir / "results.json"]
        say_next([["export", known.model, "--output_dir", f"{known.model.rstrip('/')}-exported", *results]])
    return 0


@contextmanager
def _output_folder(folder: Path | None) -> Iterator[None]:
    """Make the folder before the work, so that one that cannot be, or holds other results, is refused; a new one goes if that fails."""
    is_new = folder is not None and not folder.exists()
    if folder is not None:
        from ..train.evaluate import check_folder

        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if folder is not None and is_new:
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()
        raise


def _evaluated(models: Mapping[str, str], known: argparse.Namespace) -> dict[str, Any]:
    limits, of_rows, of_text = (_given(known, flags) for flags in (EVAL_LIMITS, EVAL_ROWS, EVAL_TEXT))
    if known.text is None:
        if known.task is None and known.path is None:
            raise ValueError("there is nothing to judge on; name a task by --task, labelled rows by --path, or a text by --text.")
        _refuse("path" if known.task is None else "task", of_text)
        arguments = DatasetArguments(task=known.task, **of_rows, **limits)
        from ..train.evaluate import evaluate_on_task

        return evaluate_on_task(models, arguments, batch_size=known.batch_size, use_cpu=known.use_cpu)
    _refuse("text", of_rows)
    text = TextData(path=known.text, **of_text, **limits)
    from ..train.evaluate import evaluate_on_text

    return evaluate_on_text(models, text, batch_size=known.batch_size, use_cpu=known.use_cpu)


def _models(known: argparse.Namespace) -> dict[str, str]:
    """Teacher, student and baselines by name."""
    models = {} if known.teacher is None else {"teacher": known.teacher}
    models["student"] = known.model
    for given in known.baseline:
        name, _, folder = given.partition("=")
        if not name or not folder:
            raise ValueError(f"--baseline is {given!r}; give a name and a folder or hub name, such as kd=runs/kd/pretrain/student.")
        if name in ("teacher", *models):
            raise ValueError(f"--baseline {given!r} has a name that is taken; give every model another one.")
        models[name] = source(folder)
    return models


def _given(known: argparse.Namespace, keys: Mapping[str, str]) -> dict[str, Any]:
    """What was given of these flags, by the keys that they set."""
    return {key: getattr(known, flag) for flag, key in keys.items() if getattr(known, flag) is not None}


def _names(text: str) -> tuple[str, ...]:
    """Names between commas, as a list of `fastkd train` has them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _refuse(kind: str, others: Mapping[str, Any]) -> None:
    for name in others:
        raise ValueError(f"--{name} does not go with --{kind}; leave it out.")


def _show(evaluation: Mapping[str, Any]) -> None:
    from ..train.evaluate import TITLES, data_name

    models, data = evaluation["models"], evaluation["data"]
    scores = list(dict.fromkeys(score for result in models.values() for score in result["scores"]))
    print_table(
        ["", *(TITLES.get(score, score) for score in scores), "parameters", "vocabulary"],
        [
            [
                name,
                *(f"{result['scores'][score]:.4g}" if score in result["scores"] else "-" for score in scores),
                result["parameters"],
                result["vocabulary"],
            ]
            for name, result in models.items()
        ],
    )
    if "examples" in data:
        split = "" if data["split"] is None else f", split {data['split']}"
        classes = f" of the classes {', '.join(data['classes'])}" if data["classes"] else ""
        print(f"\n{data_name(evaluation)}{split}: {data['examples']} examples{classes}.")
    else:
        split = "" if data["split"] is None else f", split {data['split']}"
        print(f"\n{data['text']}{split}: {data['predictions']} {data['predicted']}, judged over {data['events']}.")
        print(f"Bits per byte: {evaluation['bits_per_byte']}.")
    if "calibration_error" in scores:
        print(f"Calibration error: {evaluation['calibration_error']}.")


def _lm_eval(student: Mapping[str, Any]) -> str:
    """The command that runs lm-evaluation-harness on the student, exported first if it has a vocabulary map."""
    folder = student["model_name_or_path"]
    run = "lm_eval --model hf --model_args {} --tasks lambada_openai,arc_easy --batch_size auto"
    if not student["has_vocab_map"]:
        return run.format(shlex.quote(f"pretrained={folder}"))
    exported = f"{folder.rstrip('/')}-exported"
    export = f"fastkd export {shlex.quote(folder)} --output_dir {shlex.quote(exported)}"
    return f"{export} && {run.format(shlex.quote(f'pretrained={exported}'))}"
