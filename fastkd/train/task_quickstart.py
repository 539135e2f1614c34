"""The quickstart of CR-ILD and TED: from which of eight packages of Python's library does this function come?

An encoder, the teacher, learns the task from all of its labelled functions, once, and is cached. There are few examples for the
student, a smaller encoder with new weights: from the same weights, on the same examples in the same order, it is trained on labels
alone, by plain distillation of the teacher's scores, and by the method; and by the first two once more, for as long as the method took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..methods.stage_data import DatasetRows, dataset_scores
from ..models.load import load_tokenizer
from ..models.student import count_parameters
from ..models.task_model import TaskHead, TaskModel, load_task_model
from ..store import write_bytes_atomic, write_json_atomic
from ..tasks.labelled import TaskDataset
from ..tasks.token_rows import pad_id
from .config import DatasetArguments, RunConfig, read_config
from .curves import plot_curves
from .data import dataset_rows, load_dataset
from .log import LOG_FILE, read_log
from .output import RESULTS_FILE
from .quickstart import CONFIG_FILE, CURVES_FILE, check_quickstart_folders, make_tokenizer
from .run import distill
from .schema import to_yaml

log = logging.getLogger("fastkd")

Method = Literal["crild", "ted"]
TASK = "stdlib/module"
VOCABULARY = 4096
LENGTH = 96
FEW_SAMPLE: int | None = 400
TEACHER_EPOCHS = 6.0
STUDENT_EPOCHS = 20.0
EVAL_STEPS = 52
STUDENTS = ("student_alone", "student_kd", "student_distilled")
EQUAL_TIME = {"student_alone_equal_time": "student_alone", "student_kd_equal_time": "student_kd"}
"""Students that are trained as long as `student_distilled`, by the name of what they are trained like."""
TITLES = {"crild": "CR-ILD", "ted": "TED"}


def task_quickstart(output_dir: Path, method: Method, seed: int = 0) -> dict[str, Any]:
    """Run it all, or what is not finished yet; return what is written to results.json."""
    folder = _folder(output_dir, method, seed)
    check_quickstart_folders(output_dir, folder)
    started = time.perf_counter()
    make_tokenizer(output_dir / "tokenizer", VOCABULARY, encoder=True)
    runs = {"teacher": distill(_teacher_config(output_dir))}
    for name in STUDENTS:
        log.info("Training %s.", name)
        runs[name] = distill(student_config(output_dir, method, seed, name))
    for name, like in EQUAL_TIME.items():
        ratio = max(1.0, _total(runs["student_distilled"], "seconds") / _total(runs[like], "seconds"))
        log.info("Training %s, %.1f times as long.", name, ratio)
        runs[name] = distill(student_config(output_dir, method, seed, name, STUDENT_EPOCHS * ratio))

    folders = {name: list(stages.values())[-1]["student_dir"] for name, stages in runs.items()}
    tokenizer = load_tokenizer(str(output_dir / "tokenizer"))
    test = _test_rows(tokenizer)
    models = {name: _load(folder, test.dataset, tokenizer) for name, folder in folders.items()}
    student = models["student_distilled"]
    summary = {
        "method": method,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "metric": "accuracy on functions of held-out files of the Python standard library: from which of eight packages is it?",
        "higher_is_better": True,
        **{name: dataset_scores(model, test, batch_size=64)["accuracy"] for name, model in models.items()},
        "teacher_parameters": count_parameters(models["teacher"]),
        "student_parameters": count_parameters(student),
        "teacher_vocab": VOCABULARY,
        "student_vocab": student.model.config.vocab_size,
        "student_dir": folders["student_distilled"],
        "steps": {name: _total(stages, "steps") for name, stages in runs.items()},
        "train_seconds": {name: _total(stages, "seconds") for name, stages in runs.items()},
    }
    write_bytes_atomic(folder / CONFIG_FILE, to_yaml(student_config(output_dir, method, seed), defaults=False).encode())
    for place in (folder, output_dir):
        write_json_atomic(place / RESULTS_FILE, summary)
    _draw(folder, method, runs)
    return summary


def student_config(
    output_dir: Path, method: Method, seed: int, name: str = "student_distilled", epochs: float | None = None
) -> RunConfig:
    """What `fastkd train` would run for that student."""
    kind = {"student_alone": "alone", "student_kd": "kd", "student_distilled": method}[EQUAL_TIME.get(name, name)]
    return read_config(
        {
            **_shared(output_dir),
            "dataset": {"task": TASK, "max_length": LENGTH, "few_sample": FEW_SAMPLE},
            "output_dir": str(_folder(output_dir, method, seed) / name),
            "teacher_model_name_or_path": _teacher_dir(output_dir),
            "student": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
            "num_train_epochs": epochs or STUDENT_EPOCHS,
            "learning_rate": 2e-3,
            "eval_steps": EVAL_STEPS,
            "seed": seed,
            # How long "as long as the method" is differs from run to run, so a second call begins it anew.
            "overwrite_output_dir": name in EQUAL_TIME,
            **_METHODS[kind],
        }
    )


_METHODS: dict[str, dict[str, Any]] = {
    "alone": {"method": "finetune"},
    "kd": {"method": "ted", "options": {"layerwise": "none", "kl_alpha": 1.0}, "stages": {"distill": {}}},
    "crild": {"method": "crild", "options": {"label_weight": 1.0}, "stages": {"ild": {}, "kd": {}}},
    "ted": {
        "method": "ted",
        "options": {"kl_alpha": 1.0, "mse_alpha": 20.0, "layer_map": [[1, 2]]},
        "stages": {"student": {}, "teacher_filters": {}, "student_filters": {}, "distill": {}},
    },
}


def _teacher_config(output_dir: Path) -> RunConfig:
    return read_config(
        {
            **_shared(output_dir),
            "method": "finetune",
            "dataset": {"task": TASK, "max_length": LENGTH},
            "output_dir": str(output_dir / "teacher"),
            "tokenizer_name_or_path": str(output_dir / "tokenizer"),
            "student": {
                "model_type": "modernbert",
                "hidden_size": 128,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
                "local_attention": 256,
                "classifier_pooling": "mean",
                **dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"), 0.1),
                **dict.fromkeys(("bos_token_id", "eos_token_id"), None),
                "pad_token_id": 0,
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
            "num_train_epochs": TEACHER_EPOCHS,
            "learning_rate": 2e-3,
            "seed": 0,
        }
    )


def _shared(output_dir: Path) -> dict[str, Any]:
    return {
        "cache_dir": str(output_dir / "cache"),
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "lr_final_ratio": 0.0,
        "logging_steps": 10,
    }


def _folder(output_dir: Path, method: Method, seed: int) -> Path:
    return output_dir / f"{method}-seed-{seed}"


def _teacher_dir(output_dir: Path) -> str:
    return str(output_dir / "teacher" / "train" / "student")


def _total(stages: dict[str, dict[str, Any]], key: str) -> Any:
    return sum(stage[key] for stage in stages.values())


def _test_rows(tokenizer: Any) -> DatasetRows:
    arguments = DatasetArguments(task=TASK, max_length=LENGTH, eval_split="test")
    return dataset_rows(arguments, load_dataset(arguments), tokenizer)


def _load(folder: str, dataset: TaskDataset, tokenizer: Any) -> TaskModel:
    head = TaskHead(dataset.kind, dataset.num_outputs, dataset.label_names)
    return load_task_model(folder, head, seed=0, pad_id=pad_id(tokenizer), needs_head=True)


def _draw(folder: Path, method: Method, runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Draw the accuracy on the validation split over the steps of all stages, one curve a student; runs: results of stages, by name."""
    title = TITLES[method]
    labels = ("labels alone", "plain KD", title, f"labels, as long as {title}", f"plain KD, as long as {title}")
    series = {}
    for name, label in zip((*STUDENTS, *EQUAL_TIME), labels, strict=True):
        points, before = [], 0
        for stage, result in runs[name].items():
            lines = read_log(folder / name / stage / LOG_FILE, strict=False) if "student_dir" in result else []
            points += [(before + line["step"], float(line["eval_accuracy"])) for line in lines if "eval_accuracy" in line]
            before += result["steps"]
        series[label] = points
    xlabel = "step, of all stages one after the other"
    plot_curves(series, folder / CURVES_FILE, title="Student on held-out functions", xlabel=xlabel, ylabel="accuracy")
