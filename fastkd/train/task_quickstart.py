"""The quickstart of CR-ILD and TED: from which package of Python's library does this function come?

A tokenizer and a small decoder (the teacher) are made once and cached: pre-trained on the library's files, but for those that hold the
task's evaluation and test functions, and fine-tuned on the task. A student of some of the pre-trained layers is then trained from the
same weights on the same examples in the same order: on labels alone, by plain distillation of the teacher's scores, and by the method;
and on labels once more for as long as the method took.
"""

from __future__ import annotations

import json
import logging
import sysconfig
import time
from pathlib import Path
from typing import Any, Literal

from ..files import write_bytes_atomic, write_json_atomic
from ..methods.stage_data import dataset_scores
from ..models.load import load_tokenizer
from ..models.student import count_parameters
from ..models.task_model import TaskHead, TaskModel, load_task_model
from ..tasks import stdlib
from ..tasks.stdlib_tasks import which_module
from ..tasks.token_rows import pad_id
from .config import DatasetArguments, RunConfig, read_config
from .curves import plot_curves
from .data import dataset_rows, load_dataset
from .log import LOG_FILE, read_log
from .quickstart import make_tokenizer
from .run import distill

log = logging.getLogger("fastkd")

Method = Literal["crild", "ted"]
TASK = "stdlib/module"
VOCABULARY = 4096
LENGTH = 64
TEACHER_LAYERS = 4
STUDENT_LAYERS = "first:1"
PRETRAIN_STEPS = 900
TEACHER_EPOCHS = 4
STUDENT_EPOCHS = 4
STUDENTS = ("student_alone", "student_kd", "student_distilled", "student_alone_equal_time")
TITLES = {"crild": "CR-ILD", "ted": "TED"}


def task_quickstart(output_dir: Path, method: Method, seed: int = 0) -> dict[str, Any]:
    """Run it all, or what is not finished yet; return what is written to results.json."""
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    make_tokenizer(output_dir / "tokenizer", VOCABULARY)
    _write_corpus(output_dir / "corpus.jsonl")
    pretrained = distill(_pretrained_config(output_dir))["train"]
    teacher_result = distill(_teacher_config(output_dir))["train"]
    folder = output_dir / f"{method}-seed-{seed}"
    runs = {}
    for name in STUDENTS[:3]:
        log.info("Training %s.", name)
        runs[name] = distill(student_config(output_dir, method, seed, name))
    seconds = {name: sum(stage["seconds"] for stage in stages.values()) for name, stages in runs.items()}
    epochs = max(1.0, seconds["student_distilled"] / seconds["student_alone"]) * STUDENT_EPOCHS
    log.info("Training student_alone_equal_time for %.1f epochs.", epochs)
    runs[STUDENTS[3]] = distill(student_config(output_dir, method, seed, STUDENTS[3], epochs, overwrite=True))
    seconds[STUDENTS[3]] = runs[STUDENTS[3]]["train"]["seconds"]

    folders = {"teacher": teacher_result["student_dir"], **{name: _last(stages)["student_dir"] for name, stages in runs.items()}}
    models = {name: _load(output_dir, path) for name, path in folders.items()}
    scores = {name: _test_accuracy(output_dir, model) for name, model in models.items()}
    student = models["student_distilled"]
    summary = {
        "method": method,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "metric": "accuracy on functions of held-out files of the Python standard library: which of eight packages is it from?",
        "higher_is_better": True,
        **scores,
        "teacher_parameters": count_parameters(models["teacher"]),
        "student_parameters": count_parameters(student),
        "teacher_vocab": VOCABULARY,
        "student_vocab": student.model.config.vocab_size,
        "student_dir": folders["student_distilled"],
        "steps": {
            "teacher": pretrained["steps"] + teacher_result["steps"],
            **{name: sum(stage["steps"] for stage in stages.values()) for name, stages in runs.items()},
        },
        "train_seconds": {"teacher": pretrained["seconds"] + teacher_result["seconds"], **seconds},
    }
    _draw(folder, method)
    write_json_atomic(folder / "results.json", summary)
    write_json_atomic(output_dir / "results.json", summary)
    return summary


def _write_corpus(path: Path) -> None:
    """The library's training files without those of the task's evaluation and test functions, which no model is to read before."""
    if path.is_file():
        return
    task = which_module()
    held_out = {example.group for split in ("validation", "test") for example in task.split(split)}
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in stdlib.stdlib_files("train") if file.relative_to(root).as_posix() not in held_out]
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    write_bytes_atomic(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


def _shared(output_dir: Path) -> dict[str, Any]:
    return {
        "cache_dir": str(output_dir / "cache"),
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "lr_final_ratio": 0.0,
        "logging_steps": 10,
    }


def _pretrained_config(output_dir: Path) -> RunConfig:
    return read_config(
        {
            **_shared(output_dir),
            "method": "lm",
            "output_dir": str(output_dir / "pretrained"),
            "tokenizer_name_or_path": str(output_dir / "tokenizer"),
            "text": {"path": str(output_dir / "corpus.jsonl"), "max_length": 128},
            "student": {
                "model_type": "llama",
                "hidden_size": 160,
                "intermediate_size": 448,
                "num_hidden_layers": TEACHER_LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
                "bos_token_id": None,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            "per_device_train_batch_size": 8,
            "max_steps": PRETRAIN_STEPS,
            "learning_rate": 4e-3,
            "weight_decay": 0.1,
            "seed": 0,
        }
    )


def _task(output_dir: Path) -> dict[str, Any]:
    return {**_shared(output_dir), "dataset": {"task": TASK, "max_length": LENGTH}}


def _pretrained_dir(output_dir: Path) -> str:
    return str(output_dir / "pretrained" / "train" / "student")


def _teacher_config(output_dir: Path) -> RunConfig:
    return read_config(
        {
            **_task(output_dir),
            "method": "finetune",
            "output_dir": str(output_dir / "teacher"),
            "model_name_or_path": _pretrained_dir(output_dir),
            "num_train_epochs": TEACHER_EPOCHS,
            "learning_rate": 1e-3,
            "seed": 0,
        }
    )


def student_config(
    output_dir: Path,
    method: Method,
    seed: int,
    name: str = "student_distilled",
    epochs: float = STUDENT_EPOCHS,
    *,
    overwrite: bool = False,
) -> RunConfig:
    """What `fastkd train` would run for that student."""
    kind = {"student_kd": "kd", "student_distilled": method}.get(name, "alone")
    return read_config(
        {
            **_task(output_dir),
            "output_dir": str(output_dir / f"{method}-seed-{seed}" / name),
            "teacher_model_name_or_path": str(output_dir / "teacher" / "train" / "student"),
            "model_name_or_path": _pretrained_dir(output_dir),
            "student_layers": STUDENT_LAYERS,
            "num_train_epochs": epochs,
            "learning_rate": 2e-3,
            "seed": seed,
            "overwrite_output_dir": overwrite,
            **_METHODS[kind],
        }
    )


_METHODS: dict[str, dict[str, Any]] = {
    "alone": {"method": "finetune", "teacher_model_name_or_path": None},
    "kd": {"method": "ted", "options": {"layerwise": "none", "kl_alpha": 1.0}, "stages": {"distill": {}}},
    "crild": {"method": "crild", "options": {"label_weight": 1.0}, "stages": {"ild": {}, "kd": {}}},
    "ted": {
        "method": "ted",
        "options": {"kl_alpha": 1.0, "mse_alpha": 20.0, "teacher_filter_interval": TEACHER_LAYERS},
        "stages": {
            "student": {},
            "teacher_filters": {"num_train_epochs": 1},
            "student_filters": {"num_train_epochs": 1},
            "distill": {},
        },
    },
}


def _last(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return list(stages.values())[-1]


def _arguments(split: str) -> DatasetArguments:
    return DatasetArguments(task=TASK, max_length=LENGTH, eval_split=split)


def _load(output_dir: Path, folder: str) -> TaskModel:
    dataset = load_dataset(_arguments("test"))
    head = TaskHead(dataset.kind, dataset.num_outputs, dataset.label_names)
    tokenizer = load_tokenizer(str(output_dir / "tokenizer"))
    return load_task_model(folder, head, seed=0, pad_id=pad_id(tokenizer), needs_head=True)


def _test_accuracy(output_dir: Path, model: TaskModel) -> float:
    arguments = _arguments("test")
    rows = dataset_rows(arguments, load_dataset(arguments), load_tokenizer(str(output_dir / "tokenizer")))
    return dataset_scores(model, rows, 64)["accuracy"]


def _draw(folder: Path, method: Method) -> None:
    """Accuracy on the validation split over the epochs of the last stage, one curve a student."""
    labels = ("labels alone", "plain KD", TITLES[method], f"labels, as long as {TITLES[method]}")
    series = {}
    for name, label in zip(STUDENTS, labels, strict=True):
        last = max((folder / name).glob(f"*/{LOG_FILE}"), key=lambda path: path.stat().st_mtime_ns)
        series[label] = [(x["step"], float(x["eval_accuracy"])) for x in read_log(last) if "eval_accuracy" in x]
    plot_curves(series, folder / "curves.png", title="Student on held-out functions", xlabel="step", ylabel="accuracy")
