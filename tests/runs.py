"""A tiny run: a corpus, a task, teachers and the configuration of every method, in a folder of the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastkd.train.log import LOG_FILE, read_log
from tests import tiny

WORDS = ("if", "for")
TIMES = {"seconds", "tokens_per_second", "peak_memory_mb"}
"""What of a log or a result is not the same in two runs of one thing."""


def write_text(folder: Path, train: int = 48, dev: int = 12) -> dict[str, Any]:
    """`text` of a configuration: train.txt and dev.txt."""
    for name, lines in (("train", tiny.lines()[:train]), ("dev", tiny.lines()[train : train + dev])):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return {"path": str(folder / "train.txt"), "eval_path": str(folder / "dev.txt"), "max_length": 32}


def write_task(folder: Path, kind: str = "verbalizer", rows: int = 24) -> dict[str, Any]:
    """`task` of a configuration: rows of Python, of which the label says whether a parenthesis is in them."""
    for name, lines in (("task", tiny.lines()[300 : 300 + rows]), ("task-dev", tiny.lines()[400:416])):
        examples = [{"text": line, "label": int("(" in line)} for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    cloze: dict[str, Any] = {
        "verbalizer": {"kind": kind, "template": "{text} so {mask}", "label_words": list(WORDS)},
        "choices": {"kind": kind, "template": "{text} so {choice}", "choices": ["return self", "for key in keys"]},
        "classification": {"kind": kind, "template": "{text}", "labels": [0, 1]},
    }[kind]
    return {"path": str(folder / "task.jsonl"), "eval_path": str(folder / "task-dev.jsonl"), "cloze": {**cloze, "max_length": 40}}


def bert_teacher(folder: Path, seed: int = 1, **settings: Any) -> str:
    tokenizer = tiny.wordpiece()
    return tiny.save(folder / f"bert-{seed}", tiny.bert(len(tokenizer), seed, **settings), tokenizer)


def llama_teacher(folder: Path, seed: int = 1, **settings: Any) -> str:
    tokenizer = tiny.byte_level()
    return tiny.save(folder / f"llama-{seed}", tiny.llama(len(tokenizer), seed, **settings), tokenizer)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What every test run shares; `more` goes over it."""
    return {
        "method": "glmd",
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "student": {"num_hidden_layers": 1},
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.003,
        "logging_steps": 1,
        **more,
    }


def glmd(folder: Path, teacher: str, kind: str = "verbalizer", **more: Any) -> dict[str, Any]:
    """All stages of GLMD that the kind of task has."""
    stages = ["pretrain", *(["task_words"] if kind != "classification" else []), "task_scores"]
    return settings(
        folder,
        **{
            "teacher_model_name_or_path": teacher,
            "text": write_text(folder),
            "task": write_task(folder, kind),
            "vocabulary": {"keep": 0.5, "multiple_of": 8},
            "options": {"temperature": 2.0},
            "stages": {name: {} for name in stages},
            **more,
        },
    )


def weights(result: dict[str, Any] | str | Path) -> dict[str, torch.Tensor]:
    """The student's tensors as they are on disk."""
    folder = result["student_dir"] if isinstance(result, dict) else result
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """A stage's log without what depends on the clock."""
    return [timeless(line) for line in read_log(folder / LOG_FILE)]
