"""Match a teacher cache with a stage: what the cache is of, and whether that is what the stage needs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods.cached import CachedLesson, CacheForm, Kind
from ..methods.registry import LessonInputs, StageSpec
from ..methods.stage_data import Rows, TextRows, is_masked, row_lengths, train_fingerprint, train_sequences
from ..methods.teaching import Lesson, Model
from ..models.teacher_cache import TeacherCache, model_hashes
from ..ops.divergence import Divergence
from ..vocab.count import tokenizer_fingerprint
from .batches import BatchOrder, total_steps
from .config import StageArguments, TeacherArguments
from .output import differences
from .schema import ConfigError

log = logging.getLogger("fastkd")

_Contents = Mapping[str, Any]
# What must be the same when a cache is written and when it is read: its name in a sentence, and the settings that decide it.
AGREE: dict[str, tuple[str, Callable[[_Contents], _Contents]]] = {
    "teacher_sha256": ("the teacher's weights", lambda contents: {"teacher_model_name_or_path": contents["teacher"]}),
    "tokenizer_sha256": ("the tokenizer", lambda contents: {}),
    "dataset_fingerprint": ("the training rows", lambda contents: contents.get("data") or {}),
    "kept_vocabulary_sha256": ("the kept vocabulary", lambda contents: {"vocabulary": (contents["vocabulary"] or {}).get("settings")}),
    "rows_sha256": ("the rows that a run reads", lambda contents: contents["read"] or {}),
    "mask_probability": ("the masks", lambda contents: {"options.mask_probability": contents["mask_probability"]}),
    "mask_seed": ("the masks", lambda contents: {"seed": contents["mask_seed"]}),
}


def lesson_of(spec: StageSpec, inputs: LessonInputs) -> Lesson:
    """What the stage asks of its teacher; a stage or options whose answers cannot be cached are refused."""
    check_cacheable(spec)
    assert spec.lesson is not None
    return spec.lesson(inputs)


def check_cacheable(spec: StageSpec) -> None:
    if spec.lesson is None:
        why = "no teacher stands beside what it trains"
        if spec.needs_teacher:
            why = "what it compares is mixed with other rows of the micro-batch (MixUp), or is Q, K and V, too much to keep"
        raise ConfigError(f"stage {spec.name} takes no cached teacher: {why}. Leave out its cache, and set teacher.kind to model.")


def smallest_kind(lesson: Lesson, options: Any, k: int) -> Kind:
    """The kind of cache that is smallest among those that the stage can use."""
    is_forward = Divergence.parse(getattr(options, "divergence", "forward_kl")) == Divergence.parse("forward_kl")
    has_whole = getattr(options, "teacher_mass", "renormalize") != "renormalize"
    return "topk" if lesson.words is not None and len(row_ids(lesson.words)) > k and is_forward and not has_whole else "dense"


def check_form(form: CacheForm, lesson: Lesson, options: Any) -> None:
    """Refuse a top-k cache that the stage cannot use."""
    if lesson.words is None or form.kind == "dense":
        return
    vocabulary = len(row_ids(lesson.words))
    if not 1 <= form.k <= vocabulary:
        raise ValueError(f"k is {form.k}; a top-k cache holds from 1 to all {vocabulary} of the compared tokens.")
    divergence = getattr(options, "divergence", "forward_kl")
    if Divergence.parse(divergence) != Divergence.parse("forward_kl"):
        raise ValueError(f"options.divergence is {divergence}, and of a top-k cache only forward_kl is known; take --kind dense.")
    mass = getattr(options, "teacher_mass", "renormalize")
    if mass != "renormalize":
        raise ValueError(f"options.teacher_mass is {mass}, which needs the teacher's logits of all ids; take --kind dense.")
    if form.temperature != options.temperature:
        raise ValueError(
            f"The teacher cache holds the largest log-probabilities at temperature {form.temperature}, and options.temperature is "
            f"{options.temperature}. Write it again at that temperature, or take --kind dense, which is good for any."
        )


def models_contents(teacher: str, tokenizer: Any) -> dict[str, Any]:
    """The part of a cache's header that says by which models it was made."""
    revision, sha256 = model_hashes(teacher)
    return {
        "teacher": teacher,
        "teacher_revision": revision,
        "teacher_sha256": sha256,
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
    }


def lesson_contents(lesson: Lesson, rows: Rows, model: Model, options: Any, seed: int) -> dict[str, Any]:
    """The part that says what of which rows it holds. model: of the teacher's kind."""
    masks = getattr(options, "mask_probability", 0.0) if isinstance(rows, TextRows) and is_masked(model) else 0.0
    kept = None if lesson.words is None else row_ids(lesson.words)
    return {
        "dataset_fingerprint": train_fingerprint(rows),
        "mask_probability": masks,
        "mask_seed": seed if masks else None,
        "predictions": lesson.predictions,
        "layers": list(lesson.layers),
        "kept_vocabulary": None if kept is None else len(kept),
        "kept_vocabulary_sha256": None if kept is None else hashlib.sha256(kept.numpy().tobytes()).hexdigest(),
    }


def form_contents(form: CacheForm) -> dict[str, Any]:
    """The part that says how predictions and states are stored."""
    convention = {
        "dense": "words: logits after soft-cap and scale, less each token's largest, before any temperature",
        "topk": "words: log-probabilities over the kept vocabulary at `temperature`",
    }[form.kind]
    return {
        "kind": form.kind,
        "k": form.k if form.kind == "topk" else None,
        "temperature": form.temperature,
        "convention": f"{convention}; scores of tasks: logits before any temperature",
        "dtype": str(form.dtype).removeprefix("torch."),
    }


def rows_read(rows: Rows, arguments: StageArguments, seed: int, processes: int) -> np.ndarray:
    """(n,) int64, rising: the training rows that a run reads. One that may leave out steps reads others instead: it may be any."""
    order = BatchOrder(row_lengths(rows), arguments.per_device_train_batch_size, seed, bucket=arguments.group_by_length)
    micro_batches = arguments.gradient_accumulation_steps * processes
    steps = total_steps(arguments.max_steps, arguments.num_train_epochs, order.batches_per_epoch, micro_batches)
    leaves_out = arguments.non_finite == "skip" or arguments.fp16
    return order.rows_of_first(order.batches_per_epoch if leaves_out else steps * micro_batches)


def reading_settings(arguments: StageArguments, seed: int, processes: int) -> dict[str, Any]:
    """What decides `rows_read`, JSON-able."""
    names = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "group_by_length")
    return {**{name: getattr(arguments, name) for name in names}, "seed": seed, "processes": processes}


def check_rows(cache: TeacherCache, rows: Rows, arguments: StageArguments, seed: int, processes: int) -> None:
    """Refuse a cache without all of the rows that the run reads."""
    read, sequences = rows_read(rows, arguments, seed, processes), train_sequences(rows)
    if cache.has(sequences.of(read)).all():
        return
    phrases = differences(cache.contents["read"], reading_settings(arguments, seed, processes))
    raise ValueError(
        f"The teacher cache {cache.folder} holds {cache.contents['rows']} of {len(sequences.first) - 1} training rows, and not all of "
        f"the {len(read)} that this run reads: {'; '.join(phrases)}. Write one with `fastkd cache` by this run's settings and on "
        "as many processes, or with --max_steps -1 for whole epochs."
    )


def read_form(contents: Mapping[str, Any]) -> CacheForm:
    return CacheForm(contents["kind"], getattr(torch, contents["dtype"]), contents["k"] or 0, contents["temperature"])


def settings_contents(arguments: StageArguments, data: str, vocabulary: _Contents | None) -> dict[str, Any]:
    """The part that says by which settings the rows and the `vocabulary` (`RunModels.vocabulary_inputs`) were chosen."""
    return {"data": json.loads(json.dumps({data: asdict(getattr(arguments, data))})), "vocabulary": vocabulary}


def row_ids(rows: slice | Tensor) -> Tensor:
    return torch.arange(rows.stop) if isinstance(rows, slice) else rows.cpu()


def open_cache(arguments: TeacherArguments, expected: Mapping[str, Any], *, check_hashes: bool) -> TeacherCache:
    """The cache of a stage; one that is not whole, or by other models than `expected` (`models_contents`) says, is refused."""
    assert arguments.path is not None
    cache = TeacherCache(arguments.path, check_hashes=check_hashes)
    by_revision = expected["teacher_revision"] is not None and expected["teacher_revision"] == cache.contents["teacher_revision"]
    check_same(cache.folder, cache.contents, {k: v for k, v in expected.items() if k != "teacher_sha256" or not by_revision})
    return cache


def cached_lesson(
    cache: TeacherCache, arguments: TeacherArguments, lesson: Lesson, options: Any, expected: Mapping[str, Any]
) -> CachedLesson:
    """What the stage reads of the cache; one that holds something else than `expected` (`lesson_contents`) says is refused."""
    found = cache.contents
    if lesson.predictions == "none":
        expected = {**expected, "kept_vocabulary_sha256": found["kept_vocabulary_sha256"]}
    elif lesson.predictions != found["predictions"]:
        raise ValueError(
            f"The teacher cache {cache.folder} holds predictions of {found['predictions']}, and this stage learns from "
            f"{lesson.predictions}. Write one for this stage."
        )
    check_same(cache.folder, found, expected)
    if missing := [layer for layer in lesson.layers if layer not in found["layers"]]:
        raise ValueError(
            f"The teacher cache {cache.folder} holds the states of layers {found['layers']}, and this stage compares {missing} too. "
            "Write it again with the layers that the stage has now."
        )
    check_form(read_form(found), lesson, options)
    if expected["mask_probability"]:
        log.info("The teacher is cached, so masks are drawn once a row: they are the same in every epoch.")
    return CachedLesson(cache, lesson, arguments.tail)


def check_same(folder: Path, found: _Contents, expected: _Contents) -> None:
    """Refuse a cache that was `found` to be of something else than `expected`."""
    if (phrase := disagreement(found, expected)) is not None:
        raise ValueError(
            f"The teacher cache {folder} does not fit this run: {phrase}. Write a cache for this run with `fastkd cache`, or give it "
            "what the cache was made for."
        )


def disagreement(found: _Contents, expected: _Contents) -> str | None:
    """Say by which settings the first thing differs on which the cache and the stage do not agree; None if they do."""
    for key, (what, settings) in AGREE.items():
        if key in expected and found[key] != expected[key]:
            return "; ".join(differences(settings(found), settings(expected))) or f"{what} changed, and no setting that it records did"
    return None
