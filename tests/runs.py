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
TIMES = {"seconds", "tokens_per_second", "peak_memory_mb", "log_bytes"}
"""What of a log or a result is not the same in two runs of one thing."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""`student` of a configuration, in place of the teacher's architecture."""


def write_text(folder: Path, train: int = 48, dev: int = 12) -> dict[str, Any]:
    """`text` of a configuration: train.txt and dev.txt, of which every line is a document."""
    for name, lines in (("train", tiny.lines()[:train]), ("dev", tiny.lines()[train : train + dev])):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return {"path": str(folder / "train.txt"), "eval_path": str(folder / "dev.txt"), "documents": "line", "max_length": 32}


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


def write_dataset(folder: Path, task: str = "glue/rte", rows: int = 24) -> dict[str, Any]:
    """`dataset` of a configuration: a local copy of a benchmark's task, made of rows of Python."""
    lines = tiny.lines()[300 : 300 + 2 * rows]
    pairs = [{"sentence1": first, "sentence2": second} for first, second in zip(lines[::2], lines[1::2], strict=True)]
    make = {
        "glue/rte": lambda i, pair: {**pair, "label": i % 2},
        "glue/stsb": lambda i, pair: {**pair, "label": float(i % 6)},
        "super_glue/copa": lambda i, pair: {
            "premise": pair["sentence1"],
            "question": ("cause", "effect")[i % 2],
            "choice1": pair["sentence2"],
            "choice2": "return self",
            "label": i % 2,
        },
        "squad_v2": lambda i, pair: {
            "question": f"what is row {i}?",
            "context": f"{pair['sentence1']} {pair['sentence2']}",
            "answers": {"text": [pair["sentence2"]], "answer_start": [len(pair["sentence1"]) + 1]}
            if i % 3
            else {"text": [], "answer_start": []},
        },
    }[task]
    copy = folder / task.replace("/", "-")
    copy.mkdir(exist_ok=True)
    examples = [make(i, pair) for i, pair in enumerate(pairs)]
    for split, part in (("train", examples[: rows - 8]), ("validation", examples[rows - 8 :])):
        (copy / f"{split}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in part))
    return {"task": task, "path": str(copy), "max_length": 32, "doc_stride": 8}


def bert_teacher(folder: Path, seed: int = 1, **settings: Any) -> str:
    tokenizer = tiny.wordpiece()
    return tiny.save(folder / f"bert-{seed}", tiny.bert(len(tokenizer), seed, **settings), tokenizer)


def bert_classifier(folder: Path, seed: int = 1, vocabulary: int | None = None, num_labels: int = 2, **settings: Any) -> str:
    """A BERT with a head for a task, as fine-tuning leaves it."""
    from transformers import BertForSequenceClassification

    tokenizer = tiny.wordpiece()
    config = tiny.bert(vocabulary or len(tokenizer), seed, num_labels=num_labels, **settings).config
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config).eval()
    return tiny.save(folder / f"bert-classifier-{seed}-{vocabulary}-{num_labels}", model, tokenizer)


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
    last = bert_classifier(folder) if kind == "classification" else teacher
    return settings(
        folder,
        **{
            "teacher_model_name_or_path": teacher,
            "text": write_text(folder),
            "task": write_task(folder, kind),
            "vocabulary": {"keep": 0.5, "multiple_of": 8},
            "options": {"temperature": 2.0},
            "stages": {**{name: {} for name in stages}, "task_scores": {"teacher_model_name_or_path": last}},
            **more,
        },
    )


def weights(result: dict[str, Any] | str | Path) -> dict[str, torch.Tensor]:
    """The student's tensors as they are on disk."""
    folder = result["student_dir"] if isinstance(result, dict) else result
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def trained(output_dir: Path) -> list[str]:
    """The names of the students and checkpoints that a run has left."""
    return [path.name for path in output_dir.rglob("*") if path.name == "student" or path.name.startswith("checkpoint-")]


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """A stage's log without what depends on the clock."""
    return [timeless(line) for line in read_log(folder / LOG_FILE)]
