"""What `fastkd train --help` and `--help-all` show, without torch: keys by group, and the options of the method where it is known."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.config import RunConfig
from ..train.schema import Row, first_sentence, help_text, key_rows, wrapped

METHODS_FILE = Path(__file__).with_name("methods.json")
"""Stages and options of every method, which `make docs` writes from the methods themselves: these cannot be imported without torch."""
_METHODS: dict[str, Any] = json.loads(METHODS_FILE.read_text(encoding="utf-8"))
WIDTH = 80
USAGE = """usage: fastkd train CONFIG [--stage NAME] [--key value ...]
       fastkd train CONFIG --print_config [--all] [--key value ...]
       fastkd train --list [RECIPE]
       torchrun --nproc-per-node N -m fastkd train CONFIG ...

CONFIG is a YAML file or the name of a recipe, such as ted/rte; --list shows
them, or one as it is written. Every stage that is not finished is run, or goes
on from its newest checkpoint. Keys at the top of the file hold for all stages,
and so does --key value, which goes before them; --stages.NAME.key value is for
one. What differs from the defaults is printed by --print_config, with --all
every key.
"""
GROUPS = {
    "run": ("method", "output_dir", "seed"),
    "models": ("teacher_model_name_or_path", "teacher.kind", "model_name_or_path", "student_layers", "student.NAME", "vocabulary.keep"),
    "data, of one kind in each stage": (
        *("text.path", "text.eval_path", "text.max_length", "dataset.task", "dataset.path", "dataset.max_length"),
        *("task.path", "task.cloze.template"),
    ),
    "training": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate"),
        *("lr_scheduler_type", "warmup_steps", "weight_decay", "bf16"),
    ),
    "evaluation, checkpoints and logs": ("eval_steps", "save_steps", "save_total_limit", "logging_steps", "report_to"),
    "machine": ("backend", "use_cpu", "fsdp"),
}
"""The keys that `--help` shows, by group."""


def usual_help(method: str) -> str:
    """One line for each key of `GROUPS`, and for each option of the method if there is one of that name."""
    rows = {row[0]: row for row in key_rows(RunConfig)}
    parts = [USAGE, *(_group(title, [rows[key] for key in keys]) for title, keys in GROUPS.items())]
    if method not in _METHODS:
        parts.append("The method's own options: fastkd train CONFIG --help, or a recipe's name.\n")
    else:
        parts.append(_group(f"options of method {method}, as --options.KEY value", _options(method), flag=""))
    return "\n".join([*parts, "All keys, with their types: fastkd train --help-all"])


def full_help(method: str) -> str:
    """Every key with its type and all that there is to say of it, and the options of the method, or of each if there is none such."""
    parts = [USAGE, help_text(RunConfig, width=WIDTH)]
    for name in [method] if method in _METHODS else _METHODS:
        parts.append(f"\nmethod {name}, stages {', '.join(_METHODS[name]['stages'])}:\n")
        parts.append(wrapped(_options(name, "options."), width=WIDTH) or "none")
    return "\n".join(parts)


def _options(method: str, prefix: str = "") -> list[Row]:
    return [(prefix + key, kind, default, doc) for key, kind, default, doc in _METHODS[method]["options"]]


def _group(title: str, rows: Sequence[Row], flag: str = "--") -> str:
    """A heading, and below it a line for each key, with its default and as much of its meaning as the line takes."""
    flags = [f"  {flag}{key} {default}" for key, _, default, _ in rows]
    column = max(map(len, flags), default=0) + 2
    lines = (f"{flag:<{column}}{_gist(kind, doc, WIDTH - column)}" for flag, (_, kind, _, doc) in zip(flags, rows, strict=True))
    return "\n".join([f"{title}:", *lines, ""])


def _gist(kind: str, doc: str, width: int) -> str:
    """The choices that there are, where the meaning explains them; else its beginning, cut where a clause ends if one does."""
    if doc.partition(":")[0] in kind.split(" | "):
        return kind
    sentence = first_sentence(doc).removesuffix(".")
    if len(sentence) <= width:
        return sentence
    for ending, least in ((r"[.;](?= )", 0), (r"[,:](?= )|(?= \()", width // 2)):
        ends = [end.start() for end in re.finditer(ending, sentence[: width + 1]) if end.start() >= least]
        whole = [sentence[:end] for end in ends if sentence[:end].count("(") == sentence[:end].count(")")]
        if whole:
            return whole[-1]
    return textwrap.shorten(sentence, width, placeholder=" ...")
