"""What a cached teacher costs and gives: writing it beside the teacher's own forward, reading it, and training from it.

    python -m fastkd.benchmarks.teacher_cache [--output FILE] [--quick]     measure: three minutes of one core
    python -m fastkd.benchmarks.teacher_cache --write-docs docs/cache.md    draw the table again, from the JSON file alone

A small decoder, trained for a moment on Python's own library so that its distributions are not noise, is the teacher of a glmd
`pretrain` stage whose student keeps half of the vocabulary. In interleaved rounds: `write_cache` in every form beside the teacher's
forward over the same rows; random micro-batches from every cache; and the stage, with the teacher and with every cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.store import write_json_atomic

from .environment import stamp
from .page import write_block
from .report import environment, markdown
from .runner import Case, Run, Timing, interleaved, stopwatch

FORMS: dict[str, dict[str, Any]] = {
    "dense, float32": {"dtype": "float32"},
    "dense, bfloat16": {"dtype": "bfloat16"},
    "topk, `k` 64, bfloat16": {"dtype": "bfloat16", "kind": "topk", "k": 64},
}
"""What `write_cache` takes."""
ONLINE, STATES, LOGITS = "online", "states", "logits"
STAGE = "pretrain"
LENGTH, BATCH = 128, 8


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    vocabulary: int = 8192
    teacher: tuple[int, int] = (3, 160)
    """Layers and width."""
    student: tuple[int, int] = (2, 96)
    teacher_files: int = 300
    teacher_steps: int = 60
    files: int = 30
    """How many of the library's, whose rows are cached and trained on for an epoch."""
    rounds: int = 3


QUICK = Size(600, (1, 32), (1, 16), teacher_files=4, teacher_steps=2, files=4, rounds=1)
"""To see that it works, not how fast it is."""


class Measured:
    """The stage, its teacher and its caches, in a folder."""

    def __init__(self, folder: Path, size: Size) -> None:
        from fastkd.models.load import load_frozen, load_tokenizer
        from fastkd.tasks.text import collate_text
        from fastkd.train.config import read_config
        from fastkd.train.data import text_rows

        self.folder = folder
        self.config = _stage(folder, size)
        config = read_config(self.config)
        assert config.teacher_model_name_or_path is not None and config.text is not None
        self.teacher = load_frozen(config.teacher_model_name_or_path)
        tokenizer = load_tokenizer(config.teacher_model_name_or_path)
        self.rows = text_rows(config.text, tokenizer, folder / "cache", causal=True).train
        rows, width = [self.rows[i] for i in range(len(self.rows))], config.per_device_eval_batch_size
        parts = [rows[start : start + width] for start in range(0, len(rows), width)]
        self.batches = [collate_text(part, pad_id=0, masking=None, generator=torch.Generator()) for part in parts]
        self.random = np.random.default_rng(0)
        self.written: dict[str, Any] = {}
        """The last `CacheSummary`, by form."""
        self.losses: dict[str, list[float]] = {}
        """Losses of every step of the last run, by teacher."""

    def cache(self, form: str) -> Path:
        return self.folder / "caches" / str(list(FORMS).index(form))

    def remove(self, form: str) -> None:
        shutil.rmtree(self.cache(form), ignore_errors=True)

    def write(self, form: str) -> float:
        """Seconds of the teacher and the shards, as the command says them: without reading models and hashing them."""
        from fastkd.train.cache import write_cache
        from fastkd.train.config import read_config

        self.written[form] = write_cache(read_config(self.config), STAGE, self.cache(form), **FORMS[form])
        return self.written[form].seconds

    @torch.no_grad()
    def forward(self, kept: int) -> None:
        """The teacher alone, to its last states and from there to the logits of `kept` tokens."""
        weight = self.teacher.head.weight[:kept]

        def at_head(hidden: Tensor, *_: Any) -> Tensor:
            return hidden @ weight.T if kept else hidden

        for batch in self.batches:
            self.teacher(batch.input_ids, batch.attention_mask, at_head)

    def read(self, cache: Any) -> None:
        """All rows once, in random micro-batches, from the page cache of the system."""
        order = self.random.permutation(len(self.rows))
        for start in range(0, len(order), BATCH):
            cache.outputs(cache.names, order[start : start + BATCH], LENGTH)

    def train(self, teacher: str) -> float:
        """Seconds of all steps of an epoch, reading included."""
        from fastkd.train.log import LOG_FILE, read_log
        from fastkd.train.run import distill

        given = {"teacher": {"kind": "cache", "path": str(self.cache(teacher))}} if teacher in FORMS else {}
        result = distill({**self.config, **given})[STAGE]
        self.losses[teacher] = [line["loss"] for line in read_log(self.folder / "run" / STAGE / LOG_FILE) if "loss" in line]
        return result["seconds"]


def measure(size: Size) -> dict[str, Any]:
    from fastkd.models.teacher_cache import TeacherCache

    torch.set_num_threads(1)
    clock = stopwatch(torch.device("cpu"))
    with TemporaryDirectory() as folder:
        measured = Measured(Path(folder), size)
        measured.write(some := next(iter(FORMS)))
        kept = TeacherCache(measured.cache(some)).contents["kept_vocabulary"]
        forward = {STATES: partial(clock, partial(measured.forward, 0)), LOGITS: partial(clock, partial(measured.forward, kept))}
        cases = {name: Case(run) for name, run in forward.items()}
        cases |= {form: Case(partial(measured.write, form), partial(measured.remove, form)) for form in FORMS}
        writing = interleaved(cases, _reported, repeats=size.rounds)
        caches = {form: TeacherCache(measured.cache(form)) for form in FORMS}
        reading = interleaved({form: Case(partial(measured.read, cache)) for form, cache in caches.items()}, clock, repeats=size.rounds)
        training = interleaved({name: Case(partial(measured.train, name)) for name in (ONLINE, *FORMS)}, _reported, repeats=size.rounds)
    tokens = int(measured.rows.lengths.sum())

    def speed(timing: Timing) -> dict[str, Any]:
        return {"tokens_per_second": tokens / timing.median, "seconds": asdict(timing)}

    online = measured.losses[ONLINE]
    return {
        "claim": "teacher_cache",
        "device": "cpu",
        "environment": stamp(torch.device("cpu")),
        "repeats": size.rounds,
        "shape": {**asdict(size), "kept": kept, "tokens": tokens, "steps": len(online), "length": LENGTH, "batch": BATCH},
        "forward": {name: speed(writing[name]) for name in forward},
        "online": {"training": speed(training[ONLINE]), "losses": online},
        "results": [
            {
                "form": form,
                "bytes_per_token": measured.written[form].bytes / tokens,
                "writing": speed(writing[form]),
                "reading": speed(reading[form]),
                "training": speed(training[form]),
                "loss_differences": [found / true - 1.0 for found, true in zip(measured.losses[form], online, strict=True)],
            }
            for form in FORMS
        ],
    }


def _reported(run: Run) -> float:
    """The stopwatch of cases that say themselves how long they took."""
    seconds = run()
    assert isinstance(seconds, float)
    return seconds


def _stage(folder: Path, size: Size) -> dict[str, Any]:
    """The configuration of the stage, whose teacher is trained here."""
    from fastkd.train.quickstart import make_tokenizer
    from fastkd.train.run import distill

    shared = {
        "cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 5e-3,
        "adam_beta2": 0.98,
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 0,
    }
    ids = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    distill(
        {
            **shared,
            "method": "lm",
            "output_dir": str(folder / "teacher"),
            "tokenizer_name_or_path": str(make_tokenizer(folder / "tokenizer", size.vocabulary)),
            "text": _text(size.teacher_files),
            "student": {"model_type": "llama", "max_position_embeddings": LENGTH, **_sizes(*size.teacher), **ids},
            "max_steps": size.teacher_steps,
        }
    )
    return {
        **shared,
        "method": "glmd",
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "teacher_model_name_or_path": str(folder / "teacher" / "train" / "student"),
        "text": _text(size.files),
        "vocabulary": {"keep": 0.5},
        "student": _sizes(*size.student),
        "options": {"temperature": 1.0},
        "stages": {STAGE: {}},
        "num_train_epochs": 1,
    }


def _text(files: int) -> dict[str, Any]:
    return {"path": "stdlib", "train_split": "train", "max_length": LENGTH, "max_rows": files}


def _sizes(layers: int, width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "head_dim": width // 4}
    return {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, **sizes}


def table(record: Mapping[str, Any]) -> str:
    """What was measured, and a row a form beside the teacher itself."""
    shape, forward, online = record["shape"], record["forward"], record["online"]
    to_states, to_logits = (forward[name]["tokens_per_second"] for name in (STATES, LOGITS))
    teacher, student = ("{} layers, {} wide".format(*shape[role]) for role in ("teacher", "student"))
    head = ["", "bytes a token", "written, tokens/s", "of the forward", "read, tokens/s", "trained on, tokens/s", "loss"]
    rows = [["teacher online", "", "", "", "", f"{online['training']['tokens_per_second']:.0f}", ""]]
    for result in record["results"]:
        written, read, trained = (result[name]["tokens_per_second"] for name in ("writing", "reading", "training"))
        rows.append(
            [
                result["form"],
                f"{result['bytes_per_token']:.0f}",
                f"{written:.0f}",
                f"{100 * written / to_logits:.0f} %",
                f"{read:.0f}",
                f"{trained:.0f}",
                f"{max(map(abs, result['loss_differences'])):.1g}",
            ]
        )
    return f"""{environment(record)}.

Decoders on Python's own library: the teacher has {teacher}, the student {student} and {shape["kept"]} of {shape["vocabulary"]} tokens.
{shape["tokens"]} tokens in rows of {shape["length"]}, {shape["batch"]} rows a step; medians of {record["repeats"]} interleaved rounds.
The teacher's forward alone does {to_states:.0f} tokens/s to its last states, and {to_logits:.0f} to the logits of the kept tokens,
of which the table says how much is left when they are written. Loss: the largest relative difference of a step's loss to that of the
online run, over {shape["steps"]} steps.

{markdown(head, rows)}"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd.benchmarks.teacher_cache", description="What a cached teacher costs.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/teacher_cache.json"), help="the JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny models: to see that it works, not how fast it is")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="measure nothing; draw the table of PAGE from the JSON file")
    known = parser.parse_args(argv)
    try:
        if known.write_docs is None:
            write_json_atomic(known.output, measure(QUICK if known.quick else Size()))
        else:
            write_block(known.write_docs, "teacher_cache", table(json.loads(known.output.read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        print(f"teacher_cache: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
