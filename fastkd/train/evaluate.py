"""Score finished models beside each other: a student, its teacher and baselines, on a labelled task or on text.

Models go by name in one mapping, the student as "student" and its teacher, if there is one, as "teacher". Every model has its own
scores; with a teacher every other one is also compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..methods.comparison import Judged, judge
from ..methods.perplexity import events
from ..methods.stage_data import TextRows, largest_id, task_outputs
from ..models.language_model import LanguageModel
from ..models.load import (
    check_padded_vocabulary,
    check_row_length,
    class_names,
    known_ids,
    load_config,
    load_frozen,
    load_tokenizer,
)
from ..models.student import count_parameters
from ..models.task_model import TaskHead, TaskModel, load_task_model
from ..ops.kl import kl_div
from ..store import write_json_atomic
from ..tasks.corpus import Corpus
from ..tasks.encoded import EncodedTask, encode_task
from ..tasks.labelled import TaskDataset
from ..tasks.metrics import CALIBRATION_BINS, calibration_error
from ..tasks.own_task import OwnKind, is_one_split
from ..tasks.sources import matching_files
from ..tasks.text import IGNORE_INDEX, Masking, TextBatch, collate_text
from ..tasks.token_bytes import token_bytes
from ..tasks.token_rows import num_ids, pad_id, padded
from ..tasks.tokenized import TokenRows
from ..vocab.map import VocabMap
from .config import DatasetArguments, TextData
from .curves import plot_bars, plot_curves
from .data import eval_corpus, layout_of, load_evaluated, tokenized
from .log import Progress
from .output import RESULTS_FILE, check_results
from .provenance import source as data_source
from .provenance import versions

SCORES_FILE, DIVERGENCE_FILE = "scores.png", "divergence.png"
TEACHER = "teacher"
MASK_PROBABILITY = 0.15
TITLES = {
    "bits_per_byte": "bits per byte",
    "calibration_error": "calibration error",
    "teacher_agreement": "agreement with teacher",
    "teacher_divergence": "KL from teacher, nats",
}
"""Titles of the scores that are not the task's own."""


def evaluate_on_task(
    models: Mapping[str, str], arguments: DatasetArguments, *, batch_size: int = 32, use_cpu: bool = False
) -> dict[str, Any]:
    """The metrics of a labelled task on one of its splits, for models fine-tuned on it.

    Of classes and choices also the calibration error, and beside a teacher the share of equal predictions (of answers, too) and the
    mean KL(teacher || model) over examples. Each model reads the examples by its own tokenizer.

    Args:
        models: folder or hub name of each model, by name.
        arguments: the task; `eval_split` None is its first labelled one besides train. Of labelled rows of one's own, the models tell
            the classes.

    Raises:
        ValueError: before anything is evaluated; among others, for a model without a trained head for the task.
    """
    kind, classes = _own_outputs(models, arguments.kind) if arguments.task is None else ("classification", ())
    dataset = load_evaluated(arguments, kind, classes)
    split = _labelled_split(dataset, arguments.eval_split)
    if arguments.max_eval_rows is not None:
        dataset = dataset.limited(split, arguments.max_eval_rows)
    head = TaskHead(dataset.kind, dataset.num_outputs, dataset.label_names, dataset.own_classes)
    judged = {name: _load_task_model(name, source, head, dataset, split, arguments) for name, source in models.items()}
    outputs, predictions = {}, {}
    for name, (model, rows) in judged.items():
        with Progress(len(rows), description=f"eval {name}", unit="rows") as progress:
            outputs[name] = task_outputs(model.to(_device(use_cpu)), rows, batch_size, tell=progress.update)
        predictions[name] = rows.predictions(outputs[name])
        model.cpu()
    labels: list[Any] = [example.label for example in dataset.split(split)]
    has_classes = dataset.kind in ("classification", "multiple_choice")
    compared = {*models} - {TEACHER} if TEACHER in models and dataset.kind != "regression" else set()
    results = {}
    for name, (model, _) in judged.items():
        scores = dataset.score(split, predictions[name])
        if has_classes:
            confidence = torch.stack(outputs[name]).softmax(-1).amax(-1).clamp(max=1.0)
            scores["calibration_error"] = calibration_error(confidence, np.equal(predictions[name], labels))
        if name in compared:
            pairs = zip(predictions[name], predictions[TEACHER], strict=True)
            scores["teacher_agreement"] = float(np.mean([ours == theirs for ours, theirs in pairs]))
        if name in compared and has_classes:
            divergence = kl_div(torch.stack(outputs[name]), torch.stack(outputs[TEACHER]))
            assert isinstance(divergence, torch.Tensor)
            scores["teacher_divergence"] = divergence.item()
        results[name] = {**_described(models[name], model), "scores": scores}
    data = {
        **({"dataset": dataset.name} if arguments.task is None else {"task": dataset.name}),
        "place": data_source(arguments.path),
        "split": None if arguments.task is None and is_one_split(dataset.name) else split,
        "examples": len(labels),
        "classes": dataset.label_names,
        "fingerprint": dataset.split_fingerprint(split),
    }
    of_rows = ("path", "text_columns", "label_column", "max_eval_rows")
    keys = (*of_rows, "max_length", "pad_to_max_length", "doc_stride", "max_answer_length")
    return _evaluation(data, {**{key: getattr(arguments, key) for key in keys}, "batch_size": batch_size}, results)


def evaluate_on_text(models: Mapping[str, str], text: TextData, *, batch_size: int = 32, use_cpu: bool = False) -> dict[str, Any]:
    """Perplexity, bits per byte and calibration error of next (decoders) or masked (encoders) tokens of a text, for models of one
    tokenizer.

    With a model on a kept vocabulary among them, all are judged on its slots: what a model over all ids says of them is summed. Bits
    per byte then are those that name the slots, fewer than the text's: nobody says which of a slot's tokens stands there. Beside
    a teacher also the share of equal likeliest tokens and the mean KL(teacher || model), over the ids that all models have rows for,
    in all and by position: that of the token, from 1, at which a prediction is made (of its successor, or of what is masked there).

    Args:
        models: folder or hub name of each model, by name.
        text: the corpus at `path`; `eval_split` None is all of files, which have no splits, and "test" for all else.

    Raises:
        ValueError: before anything is evaluated; among others, for models of several tokenizers or vocabulary maps.
    """
    split = text.eval_split or (None if matching_files(text.path) else "test")
    text = replace(text, eval_split=split or "train")
    corpus = eval_corpus(text)
    assert corpus is not None
    tokenizer = _shared_tokenizer(models)
    judged = {name: Judged(load_frozen(source)) for name, source in models.items()}
    first = next(iter(judged.values())).model
    fold = _shared_map({name: each.model for name, each in judged.items()})
    with TemporaryDirectory(prefix="fastkd-eval-") as folder:
        rows = tokenized(corpus, text, tokenizer, Path(folder), causal=first.causal)
        for name, each in judged.items():
            check_padded_vocabulary(each.model, tokenizer, name, largest_id(TextRows(rows, None), each.model, tokenizer))
            check_row_length(each.model, int(rows.lengths.max()), name, "--max_length")
            each.model.to(_device(use_cpu))
        kept = slice(min(known_ids(each.model, tokenizer) for each in judged.values())) if fold is None else fold.kept_ids
        batches = _batches(rows, corpus, text, tokenizer, batch_size, causal=first.causal)
        asked = judge(judged, batches, teacher=TEACHER if TEACHER in judged else None, fold=fold, kept=kept)
    results = {name: {**_described(models[name], each.model), **each.summary(asked)} for name, each in judged.items()}
    data = {
        "text": text.path,
        "split": split,
        "rows": len(rows),
        "predictions": len(asked.positions),
        "bytes": asked.text_bytes,
        "predicted": "next tokens" if first.causal else "masked tokens",
        "events": events(fold, num_ids(tokenizer)),
        "fingerprint": rows.fingerprint,
    }
    keys = ("name", "text_column", "max_length", "layout", "max_eval_rows")
    settings = {**{key: getattr(text, key) for key in keys}, "batch_size": batch_size}
    evaluation = _evaluation(data, settings if first.causal else {**settings, "mask_probability": MASK_PROBABILITY}, results)
    evaluation["bits_per_byte"] = f"the perplexity's bits over the {asked.text_bytes} bytes that the predicted tokens cover"
    if fold is not None:
        evaluation["bits_per_byte"] += (
            ", naming slots and not tokens: fewer than the text's own, which an exported student has, or a model without a mapped one "
            "beside it"
        )
    return evaluation


def check_folder(output_dir: Path) -> None:
    """Refuse a folder with results or plots that `write_evaluation` would replace and has not written."""
    check_results(output_dir, ("data", "models", "settings"), [SCORES_FILE, DIVERGENCE_FILE])


def data_name(evaluation: Mapping[str, Any]) -> str:
    """Name what the models were judged on: a text, labelled rows of one's own, a task, or the copy of one."""
    data, path = evaluation["data"], evaluation["settings"].get("path")
    if "task" not in data:
        return str(data.get("dataset") or data["text"])
    return str(data["task"]) if path is None else f"{data['task']} (the copy at {path})"


def write_evaluation(evaluation: Mapping[str, Any], output_dir: Path) -> None:
    """Into an existing folder: results.json, scores.png and, for text beside a teacher, divergence.png; the plots need matplotlib."""
    write_json_atomic(output_dir / RESULTS_FILE, evaluation)
    panels: dict[str, dict[str, float]] = {}
    for name, result in evaluation["models"].items():
        for score, value in result["scores"].items():
            title = TITLES.get(score, score)
            over = f"\nover {evaluation['data']['events']}" if score in ("perplexity", "bits_per_byte") else ""
            panels.setdefault(f"{title}{over}", {})[name] = value
    data = evaluation["data"]
    title = ", ".join(filter(None, [data_name(evaluation), data["split"]]))
    series = {
        name: [(float(np.mean(part["positions"])), part["divergence"]) for part in result["divergence_by_position"]]
        for name, result in evaluation["models"].items()
        if "divergence_by_position" in result
    }
    if plot_bars(panels, output_dir / SCORES_FILE, title=title) is not None and series:
        plot_curves(
            series,
            output_dir / DIVERGENCE_FILE,
            title=title,
            xlabel="position in the row",
            ylabel=TITLES["teacher_divergence"],
            places={name: place for place, name in enumerate(evaluation["models"])},
        )


def _batches(
    rows: TokenRows, corpus: Corpus, text: TextData, tokenizer: Any, batch_size: int, *, causal: bool
) -> Iterator[tuple[TextBatch, int]]:
    """Batches, each with the bytes of text that the tokens cover which it has predicted."""
    masking = None if causal else Masking.of(tokenizer, MASK_PROBABILITY)
    layout = layout_of(text, causal=causal)
    counts = token_bytes(corpus.rows(), tokenizer, layout=layout, max_length=text.max_length)
    row_bytes = np.split(counts, np.cumsum(rows.lengths))
    with Progress(len(rows), description="eval", unit="rows") as progress:
        for start in range(0, len(rows), batch_size):
            chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            # Seeded as evaluation within a run is: the same batches have the same tokens masked.
            generator = torch.Generator().manual_seed(start)
            batch = collate_text(chosen, pad_id=pad_id(tokenizer), masking=masking, generator=generator)
            covered = padded(row_bytes[start : start + len(chosen)], batch.labels.shape[1] + causal, 0)[:, int(causal) :]
            yield batch, int(covered[batch.labels != IGNORE_INDEX].sum())
            progress.update(len(chosen))


def _own_outputs(models: Mapping[str, str], wanted: OwnKind | None) -> tuple[OwnKind, tuple[str, ...]]:
    """What models predict of labelled rows of one's own: values, or the classes, as the first model that names them has them; the
    classes of models that have no names go by their indices."""
    named: list[tuple[str, ...]] = []
    for name, source in models.items():
        config: Any = load_config(source)
        _check_no_other_head(name, source, config)
        named.append(tuple(str(config.id2label[index]) for index in sorted(config.id2label)))
    kind: OwnKind = "regression" if len(named[0]) == 1 else "classification"
    if wanted not in (None, kind):
        raise ValueError(f"kind is {wanted!r}, and the {next(iter(models))} was made for {kind}; leave kind out.")
    has_names = (names for names in named if not all(name.startswith("LABEL_") for name in names))
    classes = next(has_names, tuple(map(str, range(len(named[0])))))
    return kind, classes if kind == "classification" else ()


def _check_no_other_head(name: str, source: str, config: Any) -> None:
    """Refuse a model that was saved with a head for something else than one label or value of a whole text."""
    others = class_names("MASKED_LM", "CAUSAL_LM", "PRETRAINING", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")
    saved = others & {*(config.architectures or ())}
    if saved or config.problem_type == "multi_label_classification":
        what = f"was saved as {saved.pop()}" if saved else "gives a text several labels (multi-label classification)"
        raise ValueError(
            f"The {name}, {source}, {what}, and is to give every text one class or one value; fine-tune it on such labels first, by "
            "method finetune or a stage that trains the teacher."
        )


def _labelled_split(dataset: TaskDataset, wanted: str | None) -> str:
    labelled = [split for split in dataset.splits if dataset.kind != "unlabelled" and dataset.is_labelled(split)]
    split = next((split for split in labelled if split != "train"), None) if wanted is None else wanted
    if split is None or (dataset.split(split) and split not in labelled):
        where = "" if split is None else f" in split {split!r}"
        raise ValueError(f"{dataset.name} has no labels to judge by{where}; labelled are {', '.join(labelled) or 'none'}.")
    return split


def _load_task_model(
    name: str, source: str, head: TaskHead, dataset: TaskDataset, split: str, arguments: DatasetArguments
) -> tuple[TaskModel, EncodedTask]:
    """The model, and the split's examples as it reads them."""
    tokenizer = load_tokenizer(source)
    model = load_task_model(source, head, seed=0, pad_id=pad_id(tokenizer), needs_head=True)
    rows = encode_task(
        dataset,
        split,
        tokenizer,
        max_length=arguments.max_length,
        pad_to_max_length=arguments.pad_to_max_length,
        doc_stride=arguments.doc_stride,
        max_answer_length=arguments.max_answer_length,
    )
    check_padded_vocabulary(model, tokenizer, name, max(rows.largest_id, rows.pad_id))
    check_row_length(model, int(rows.lengths.max()), name, "--max_length")
    return model.eval().requires_grad_(False), rows


def _shared_tokenizer(models: Mapping[str, str]) -> Any:
    (first, tokenizer), *others = ((name, load_tokenizer(source)) for name, source in models.items())
    for name, other in others:
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"The {first} and the {name} have different tokenizers ({len(tokenizer)} and {len(other)} tokens), so they predict "
                "different things. Compare models of one tokenizer; in place of an exported student give the folder that it was "
                "exported from, which has its teacher's."
            )
    return tokenizer


def _shared_map(models: Mapping[str, LanguageModel]) -> VocabMap | None:
    """The one vocabulary map of all models that have one, onto which every other model can be folded."""
    if len({model.causal for model in models.values()}) > 1:
        raise ValueError(f"{', '.join(models)} are decoders and encoders, which predict different tokens; compare models of one kind.")
    maps = {name: model.vocab_map for name, model in models.items() if model.vocab_map is not None}
    if not maps:
        return None
    owner, fold = next(iter(maps.items()))
    for name, model in models.items():
        if name in maps and maps[name].fingerprint != fold.fingerprint:
            raise ValueError(
                f"The {owner} and the {name} keep different parts of the vocabulary, so they cannot be judged on the same events; "
                "evaluate them apart."
            )
        if name not in maps and model.vocabulary <= int(fold.kept_ids.max()):
            raise ValueError(
                f"The {name} has {model.vocabulary} vocabulary rows, and the {owner} keeps the id {int(fold.kept_ids.max())}; give "
                "models with a row for every id that is kept."
            )
    return fold


def _device(use_cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def _described(source: str, model: TaskModel | LanguageModel) -> dict[str, Any]:
    return {
        "model_name_or_path": source,
        "parameters": count_parameters(model),
        "vocabulary": model.model.get_input_embeddings().weight.shape[0],
        "has_vocab_map": model.vocab_map is not None,
    }


def _evaluation(data: dict[str, Any], settings: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": data,
        "settings": settings,
        "calibration_error": f"expected calibration error of the likeliest prediction, {CALIBRATION_BINS} bins of equal width",
        "versions": versions(),
        "models": models,
    }
