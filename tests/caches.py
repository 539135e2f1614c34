"""Runs whose teachers can be cached, and their caches, in folders of the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastkd.train.cache import write_cache
from fastkd.train.config import read_config
from tests import runs, tiny
from tests.runs import log_lines, settings, write_dataset, write_text


def glmd(folder: Path, make: Any = runs.llama_teacher, **more: Any) -> dict[str, Any]:
    """Word prediction on a kept vocabulary."""
    return settings(
        folder,
        **{
            "teacher_model_name_or_path": make(folder),
            "text": write_text(folder),
            "options": {"temperature": 2.0},
            "stages": {"pretrain": {}},
            "vocabulary": {"keep": 0.5, "multiple_of": 8},
            **more,
        },
    )


def glmd_tasks(folder: Path, make: Any, kind: str, **options: Any) -> dict[str, Any]:
    """Both stages on task inputs, from new weights."""
    config = runs.glmd(folder, make(folder), kind, options={"temperature": 2.0, **options})
    return {**config, "stages": {name: stage for name, stage in config["stages"].items() if name != "pretrain"}}


def kd(folder: Path, make: Any, **more: Any) -> dict[str, Any]:
    return glmd(folder, make, method="kd", stages={"distill": {}}, options={"temperature": 2.0, "label_weight": 0.5}, **more)


def ted_text(folder: Path, make: Any, **options: Any) -> dict[str, Any]:
    chosen = {"layerwise": "lwd", "layer_map": [[1, 2]], **options}
    return glmd(folder, make, method="ted", stages={"distill": {}}, options=chosen)


def ted_task(folder: Path) -> dict[str, Any]:
    """All stages: the teacher that the run makes is cached, and compared through the filters that it makes."""
    return settings(
        folder,
        method="ted",
        teacher_model_name_or_path=runs.bert_teacher(folder),
        dataset=write_dataset(folder),
        options={"layer_map": [[1, 2]]},
        stages={name: {} for name in ("teacher", "student", "teacher_filters", "student_filters", "distill")},
    )


def crild(folder: Path, task: str = "glue/rte", head: str = "SequenceClassification", num_labels: int = 2) -> dict[str, Any]:
    tokenizer = tiny.wordpiece()
    model = tiny.transformer("bert", head, vocab_size=len(tokenizer), num_labels=num_labels)
    return settings(
        folder,
        method="crild",
        teacher_model_name_or_path=tiny.save(folder / "teacher", model, tokenizer),
        dataset=write_dataset(folder, task),
        options={"label_weight": 0.5},
        stages={"kd": {}},
    )


LEARN = ("pretrain", "task_words", "task_scores", "distill", "kd")


def learners(config: dict[str, Any]) -> list[str]:
    """The stages that have a teacher whose answers can be cached."""
    return [name for name in config["stages"] if name in LEARN]


def cached(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The run with the caches of `write_all`."""
    caches = Path(config["output_dir"]).parent / "caches"
    of = {name: {"teacher": {"kind": "cache", "path": str(caches / name), **more}} for name in learners(config)}
    return {**config, "stages": {name: {**stage, **of.get(name, {})} for name, stage in config["stages"].items()}}


def write(config: dict[str, Any], stage: str = "pretrain", *, whole: bool = True, **options: Any) -> Path:
    """Of all rows if `whole`, else of those that the run reads."""
    folder = Path(config["output_dir"]).parent / "caches" / stage
    config = {**config, "max_steps": -1} if whole else config
    write_cache(read_config(config), stage, folder, **{"kind": "dense", "dtype": "float32", "shard_rows": 7, **options})
    return folder


def losses(run: Path, stage: str = "pretrain") -> list[float]:
    return [line["loss"] for line in log_lines(run / stage) if "loss" in line]
