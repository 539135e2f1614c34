"""Floor 5, train: finished models beside each other: a student, its teacher and baselines, on a labelled task or on text.

Models go by name in one mapping, the student as "student" and its teacher, if there is one, as "teacher". Every model has its own
scores; with a teacher every other one is also compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..methods.comparison import Judged, judge
from ..methods.stage_data import task_outputs
from ..models.language_model import LanguageModel
from ..models.load import check_padded_vocabulary, check_row_length, load_config, load_frozen, load_tokenizer
from ..models.student import count_parameters
from ..models.task_model import TaskHead, TaskModel, load_task_model
from ..ops.kl import kl_div
from ..store import write_json_atomic
from ..tasks.encoded import EncodedTask, encode_task
from ..tasks.labelled import TaskDataset
from ..tasks.metrics import CALIBRATION_BINS, calibration_error
from ..tasks.sources import matching_files
from ..tasks.text import Masking, TextBatch, collate_text
from ..tasks.token_rows import pad_id
from ..tasks.tokenized import TokenRows
from ..vocab.map import VocabMap
from .config import DatasetArguments, TextData
from .curves import plot_bars, plot_curves
from .data import eval_corpus, load_dataset, tokenized
from .log import Progress
from .output import RESULTS_FILE, check_results
from .provenance import versions

SCORES_FILE, DIVERGENCE_FILE = "scores.png", "divergence.png"
TEACHER = "teacher"
MASK_PROBABILITY = 0.15
TITLES = {
    "calibration_error": "calibration error",
    "teacher_agreement": "agreement with teacher",
    "teacher_divergence": "KL from teacher, nats",
}
"""Of the scores that are not the task's own."""


def evaluate_on_task(
    models: Mapping[str, str], arguments: DatasetArguments, *, batch_size: int = 32, use_cpu: bool = False
) -> dict[str, Any]:
    """The metrics of a labelled task on one of its splits, for models fine-tuned on it.

    Of classes and choices also the calibration error, and beside a teacher the share of equal predictions (of answers, too) and the
    mean KL(teacher || model) over examples. Each model reads the examples by its own tokenizer.

    Args:
        models: folder or hub name of each model, by name.
        arguments: the task; `eval_split` None is its first labelled one besides train.

    Raises:
        ValueError: before anything is evaluated; among others, for a model without a trained head for the task.
    """
    dataset = load_dataset(arguments)
    split = _labelled_split(dataset, arguments.eval_split)
    if arguments.max_eval_rows is not None:
        dataset = dataset.limited(split, arguments.max_eval_rows)
    head = TaskHead(dataset.kind, dataset.num_outputs, dataset.label_names)
    judged = {name: _load_task_model(name, source, head, dataset, split, arguments) for name, source in models.items()}
    outputs, predictions = {}, {}
    for name, (model, rows) in judged.items():
        outputs[name] = task_outputs(model.to(_device(use_cpu)), rows, batch_size)
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
    data = {"task": dataset.name, "split": split, "examples": len(labels), "fingerprint": dataset.fingerprint}
    keys = ("path", "max_length", "doc_stride", "max_answer_length", "max_eval_rows")
    return _evaluation(data, {**{key: getattr(arguments, key) for key in keys}, "batch_size": batch_size}, results)


def evaluate_on_text(models: Mapping[str, str], text: TextData, *, batch_size: int = 32, use_cpu: bool = False) -> dict[str, Any]:
    """Perplexity and calibration error of next (decoders) or masked (encoders) tokens of a text, for models of one tokenizer.

    With a model on a kept vocabulary among them, all are judged on its slots: what a model over all ids says of them is summed. Beside
    a teacher also the share of equal likeliest tokens and the mean KL(teacher || model), over the ids that all models have rows for,
    in all and by position: that of the token, from 1, at which a prediction is made (of its successor, or of what is masked there).

    Args:
        models: folder or hub name of each model, by name.
        text: the corpus at `path`; `eval_split` None is "train" for files, which have no other, and "test" for all else.

    Raises:
        ValueError: before anything is evaluated; among others, for models of several tokenizers or vocabulary maps.
    """
    text = replace(text, eval_split=text.eval_split or ("train" if matching_files(text.path) else "test"))
    corpus = eval_corpus(text)
    assert corpus is not None
    tokenizer = _shared_tokenizer(models)
    judged = {name: _load_language_model(name, source, tokenizer) for name, source in models.items()}
    first = next(iter(judged.values())).model
    fold = _shared_map({name: each.model for name, each in judged.items()})
    with TemporaryDirectory(prefix="fastkd-eval-") as folder:
        rows = tokenized(corpus, text, tokenizer, Path(folder), causal=first.causal)
        for name, each in judged.items():
            check_row_length(each.model, int(rows.lengths.max()), name, "--max_length")
            each.model.to(_device(use_cpu))
        kept = slice(len(tokenizer)) if fold is None else fold.kept_ids
        batches = _batches(rows, tokenizer, batch_size, causal=first.causal)
        positions = judge(judged, batches, teacher=TEACHER if TEACHER in judged else None, fold=fold, kept=kept)
    results = {name: {**_described(models[name], each.model), **each.summary(positions)} for name, each in judged.items()}
    data = {
        "text": text.path,
        "split": text.eval_split,
        "rows": len(rows),
        "predictions": len(positions),
        "predicted": "next tokens" if first.causal else "masked tokens",
        "events": "tokens" if fold is None else f"{fold.num_kept} slots of the kept vocabulary",
        "fingerprint": rows.fingerprint,
    }
    keys = ("name", "text_column", "max_length", "layout", "max_eval_rows")
    settings = {**{key: getattr(text, key) for key in keys}, "batch_size": batch_size}
    return _evaluation(data, settings if first.causal else {**settings, "mask_probability": MASK_PROBABILITY}, results)


def check_folder(output_dir: Path) -> None:
    """Refuse a folder with results or plots that `write_evaluation` would replace and has not written."""
    check_results(output_dir, ("data", "models", "settings"), [SCORES_FILE, DIVERGENCE_FILE])


def write_evaluation(evaluation: Mapping[str, Any], output_dir: Path) -> None:
    """Into an existing folder: results.json, scores.png and, for text beside a teacher, divergence.png; the plots need matplotlib."""
    write_json_atomic(output_dir / RESULTS_FILE, evaluation)
    panels: dict[str, dict[str, float]] = {}
    for name, result in evaluation["models"].items():
        for score, value in result["scores"].items():
            panels.setdefault(TITLES.get(score, score), {})[name] = value
    data = evaluation["data"]
    title = f"{data.get('task') or data['text']}, {data['split']}"
    series = {
        name: [(float(np.mean(part["positions"])), part["divergence"]) for part in result["divergence_by_position"]]
        for name, result in evaluation["models"].items()
        if "divergence_by_position" in result
    }
    if plot_bars(panels, output_dir / SCORES_FILE, title=title) is not None and series:
        plot_curves(
            series, output_dir / DIVERGENCE_FILE, title=title, xlabel="position in the row", ylabel=TITLES["teacher_divergence"]
        )


def _batches(rows: TokenRows, tokenizer: Any, batch_size: int, *, causal: bool) -> Iterator[TextBatch]:
    masking = None if causal else Masking.of(tokenizer, MASK_PROBABILITY)
    with Progress(len(rows), description="eval") as progress:
        for start in range(0, len(rows), batch_size):
            chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            # Seeded as evaluation within a run is: the same batches have the same tokens masked.
            generator = torch.Generator().manual_seed(start)
            yield collate_text(chosen, pad_id=pad_id(tokenizer), masking=masking, generator=generator)
            progress.update(len(chosen))


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
    check_padded_vocabulary(model, tokenizer, name)
    rows = encode_task(
        dataset,
        split,
        tokenizer,
        max_length=arguments.max_length,
        doc_stride=arguments.doc_stride,
        max_answer_length=arguments.max_answer_length,
    )
    check_row_length(model, int(rows.lengths.max()), name, "--max_length")
    return model.eval().requires_grad_(False), rows


def _load_language_model(name: str, source: str, tokenizer: Any) -> Judged:
    _check_words_head(name, source)
    model = load_frozen(source)
    check_padded_vocabulary(model, tokenizer, name)
    return Judged(model)


def _check_words_head(name: str, source: str) -> None:
    """Refuse a model whose head for words would be new."""
    from transformers.models.auto import modeling_auto

    tables = ("MASKED_LM", "CAUSAL_LM", "PRETRAINING")
    known = {head for table in tables for head in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()}
    saved: Sequence[str] = load_config(source).architectures or ()
    if saved and not known & {*saved}:
        raise ValueError(
            f"The {name}, {source}, was saved as {', '.join(saved)}, which has no head for words to judge on text; evaluate it on its "
            "task, or give a masked or causal language model."
        )


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
        if name not in maps and model.vocabulary != fold.vocab_size:
            raise ValueError(
                f"The {name} has {model.vocabulary} vocabulary rows, and the {owner}'s vocabulary was cut from {fold.vocab_size}; give "
                "models with as many rows."
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
