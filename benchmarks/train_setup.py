"""What all sides of `train_throughput.py` train: the cases, their models and rows, made once in a folder, and the clock.

Python's own library is the text. A WordPiece tokenizer of the full vocabulary and the teachers are trained on it for a moment, so that
neither ids nor distributions are noise. No model has dropout, so that two loss curves can be compared step by step.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastkd.methods.objective import Stage
from fastkd.methods.registry import METHODS, StageInputs, build_stage
from fastkd.methods.stage_data import DatasetRows, TextRows, train_sequences
from fastkd.models.filters import FilterBank
from fastkd.models.language_model import LanguageModel
from fastkd.models.load import load_language_model, load_tokenizer, save_model
from fastkd.models.student import build_student, student_config
from fastkd.models.task_model import TaskHead, TaskModel, build_task_model, load_task_model
from fastkd.store import write_json_atomic
from fastkd.tasks.corpus import Corpus
from fastkd.tasks.encoded import encode_task
from fastkd.tasks.labelled import LabelledExample, TaskDataset
from fastkd.tasks.stdlib import stdlib_rows
from fastkd.tasks.text import Masking, collate_text
from fastkd.tasks.tokenized import Layout, TokenRows, tokenize_corpus
from fastkd.train.batches import BatchOrder, counter_torch_generator
from fastkd.train.config import DatasetArguments, RunConfig, Vocabulary, read_config
from fastkd.train.data import load_dataset
from fastkd.train.run import distill
from fastkd.train.schema import from_mapping
from fastkd.train.vocabulary import build_vocab_map

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD = 0
SEED = 0
TASK, TASK_FILE = "stdlib/module", "task.json"
FILTERS = ("teacher_filters", "student_filters")


@dataclass(frozen=True)
class Bert:
    """An encoder of BERT's family."""

    layers: int
    width: int
    heads: int

    def settings(self, **more: Any) -> dict[str, Any]:
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **more,
        }


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    vocabulary: int = 30522
    teacher: Bert = Bert(4, 256, 4)
    """BERT-mini."""
    student: Bert = Bert(2, 128, 2)
    """BERT-tiny."""
    length: int = 128
    """Tokens of the longest row."""
    paragraphs: int = 4096
    """Rows, from the library's text."""
    teacher_steps: int = 40
    warmup_steps: int = 2
    """Before the clock starts."""
    steps: int = 6
    """That are timed."""
    rounds: int = 3

    def in_words(self) -> dict[str, Any]:
        """For the JSON file and its readers."""
        berts = {role: f"BERT of {bert.layers} x {bert.width}" for role, bert in (("teacher", self.teacher), ("student", self.student))}
        kept = ("vocabulary", "length", "paragraphs", "warmup_steps", "steps")
        return berts | {name: getattr(self, name) for name in kept}


QUICK = Size(teacher_steps=8, warmup_steps=1, steps=3, rounds=1)
"""The same models, to see that it works and how the ratios are."""


@dataclass(frozen=True)
class Case:
    """One distillation: what `fastkd train` would be told, and whom it is compared with."""

    title: str
    method: Literal["kd", "glmd", "crild", "ted"]
    stage: str
    rows: Literal["paragraphs", "packed", "task"]
    peer: Literal["Trainer, eager losses", "authors' loop"]
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: float | None = None
    """Share of the vocabulary that the student keeps."""
    batch: int = 32
    """Rows of a step."""
    same_heads: bool = False
    """The student has as many heads as the teacher, because they are compared one by one."""


_KD: dict[str, Any] = {"temperature": 2.0, "label_weight": 0.0}
CASES = {
    "kd": Case("KD, rows of any length", "kd", "distill", "paragraphs", "Trainer, eager losses", _KD),
    "kd_labels": Case(
        "KD and labels, rows of any length", "kd", "distill", "paragraphs", "Trainer, eager losses", {**_KD, "label_weight": 1.0}
    ),
    "kd_packed": Case("KD, packed rows", "kd", "distill", "packed", "Trainer, eager losses", _KD, batch=16),
    "glmd": Case(
        "GLMD, stage pretrain, packed rows", "glmd", "pretrain", "packed", "authors' loop", {"preset": "paper"}, keep=0.5, batch=16
    ),
    "crild": Case("CR-ILD, stage ild", "crild", "ild", "task", "authors' loop", {"preset": "paper_script"}, same_heads=True),
    "ted": Case("TED, stage distill", "ted", "distill", "task", "authors' loop", {"preset": "paper", "teacher_filter_interval": 2}),
}
"""The first is the claim's main case."""


class Training:
    """One case as its folder has it: rows in their order, settings, and the folders of its models."""

    def __init__(self, folder: Path, name: str, size: Size, device: torch.device) -> None:
        self.case, self.size, self.device = CASES[name], size, device
        is_task = self.case.rows == "task"
        self.teacher_folder = folder / ("classifier" if is_task else "teacher") / "train" / "student"
        self.student_folder = folder / name / "student"
        self.filters = {filters: folder / name / filters for filters in FILTERS}
        self.tokenizer: Any = load_tokenizer(str(folder / "tokenizer"))
        self.rows = (
            _task_rows(folder / TASK_FILE, size, self.tokenizer) if is_task else TextRows(TokenRows(folder / self.case.rows), None)
        )
        self.options: Any = from_mapping(METHODS[self.case.method].options, self.case.options)
        self.steps = size.warmup_steps + size.steps
        self.config = self._config(folder)
        self.order = BatchOrder(train_sequences(self.rows).lengths, self.case.batch, SEED, bucket=self.config.group_by_length)

    def _config(self, folder: Path) -> RunConfig:
        return read_config(
            {
                "method": self.case.method,
                "output_dir": str(folder),
                "model_name_or_path": str(self.student_folder),
                "teacher_model_name_or_path": str(self.teacher_folder),
                "per_device_train_batch_size": self.case.batch,
                "max_steps": self.steps,
                "learning_rate": 1e-3,
                "weight_decay": 0.01,
                "adam_beta2": 0.999,
                "adam_epsilon": 1e-8,
                "max_grad_norm": 0.0 if self.case.method == "ted" else 1.0,  # its authors do not clip
                "lr_scheduler_type": "linear",
                "warmup_steps": self.size.warmup_steps,
                "lr_final_ratio": 0.0,
                "group_by_length": self.case.peer != "authors' loop",  # who shuffle rows of all lengths
                "logging_steps": self.steps,
                "use_cpu": self.device.type == "cpu",
                "seed": SEED,
            }
        )

    @property
    def timed_tokens(self) -> int:
        """Tokens, not pads, of the steps that are timed."""
        timed = range(self.size.warmup_steps, self.steps)
        return sum(int(self.order.lengths[self.order.batch(number)].sum()) for number in timed)

    def batch(self, number: int) -> Any:
        """Micro-batch `number`, on the CPU: the rows, pads and masks that fastkd's own loop makes."""
        indices, generator = self.order.batch(number), counter_torch_generator(SEED, number)
        if isinstance(self.rows, DatasetRows):
            return self.rows.train.collate(indices)
        text, masking = self.rows.train, Masking.of(self.tokenizer, self.options.mask_probability)
        return collate_text([text[int(index)] for index in indices], pad_id=PAD, masking=masking, generator=generator)

    def built(self) -> Stage:
        """The stage that `fastkd train` would run."""
        spec = next(spec for spec in METHODS[self.case.method].stages if spec.name == self.case.stage)
        student, teacher = (_load(folder, self.rows) for folder in (self.student_folder, self.teacher_folder))
        return build_stage(
            spec,
            StageInputs(
                student=student,
                teacher=teacher.eval().requires_grad_(False),
                tokenizer=self.tokenizer,
                options=self.options,
                rows=self.rows,
                eval_batch_size=self.case.batch,
                seed=SEED,
                filters=self.filters,
            ),
        )


class Clock:
    """Times and memory of one training, taken by torch's own hook behind every optimizer step, whoever takes the step.

    Inside the with-block, everything is there but gradients, optimizer states and activations.
    """

    def __init__(self, training: Training) -> None:
        self.device, self.warmup, self.last = training.device, training.size.warmup_steps, training.steps
        self.steps, self.seconds, self.before, self.peak = 0, 0.0, 0, 0
        """`before`: bytes in use as the block begins. `peak`: the most since then."""

    def __enter__(self) -> Clock:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.hook = register_optimizer_step_post_hook(lambda *_: self._stepped())
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
        if self.steps != self.last:
            raise RuntimeError(f"{self.steps} optimizer steps were taken, and {self.last} were to be timed.")

    def _stepped(self) -> None:
        self.steps += 1
        if self.steps not in (self.warmup, self.last):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.seconds
        if self.steps == self.last:
            self.peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _high_water_mark()


def _high_water_mark() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def prepare(folder: Path, names: Iterable[str], size: Size) -> None:
    """Make tokenizer, rows, teachers and first students of these cases."""
    paragraphs = _paragraphs()
    tokenizer = _tokenizer(folder / "tokenizer", paragraphs, size.vocabulary)
    corpus = _corpus(paragraphs[: size.paragraphs])
    layouts: dict[str, Layout] = {"paragraphs": "rows", "packed": "packed"}
    for name, layout in layouts.items():
        rows = tokenize_corpus(corpus, tokenizer, max_length=size.length, layout=layout, cache_dir=folder / "tokens")
        (folder / name).symlink_to(rows.folder)
    shared = {"cache_dir": str(folder / "tokens"), "learning_rate": 1e-3, "max_steps": size.teacher_steps, "use_cpu": True}
    distill(
        {
            **shared,
            "method": "lm",
            "output_dir": str(folder / "teacher"),
            "tokenizer_name_or_path": str(folder / "tokenizer"),
            "text": {"path": "stdlib", "max_rows": 8 * size.teacher_steps, "max_length": size.length},
            "student": size.teacher.settings(model_type="bert"),
        }
    )
    if any(CASES[name].rows == "task" for name in names):
        _write_task(folder / TASK_FILE)
        distill(
            {
                **shared,
                "method": "finetune",
                "output_dir": str(folder / "classifier"),
                "model_name_or_path": str(folder / "teacher" / "train" / "student"),
                "dataset": {"task": TASK, "max_length": size.length, "max_eval_rows": 32},
            }
        )
    for name in names:
        _prepare_student(Training(folder, name, size, torch.device("cpu")), corpus, folder / "tokens")


def _prepare_student(training: Training, corpus: Corpus, cache: Path) -> None:
    """New weights, for ted with filters of both models; stage I, which would train these, is left out."""
    case, size = training.case, training.size
    bert = Bert(size.student.layers, size.student.width, (size.teacher if case.same_heads else size.student).heads)
    teacher = _load(training.teacher_folder, training.rows)
    student: LanguageModel | TaskModel
    if isinstance(training.rows, DatasetRows):
        config = student_config(teacher.model.config, bert.settings(), None)
        student = build_task_model(config, _head(training.rows), seed=SEED, pad_id=PAD)
    else:
        assert isinstance(teacher, LanguageModel)
        kept = case.keep and build_vocab_map(Vocabulary(keep=case.keep), training.tokenizer, teacher, corpus, (), cache)
        student = build_student(teacher.model.config, bert.settings(), kept or None, seed=SEED)
    save_model(student, training.tokenizer, training.student_folder)
    if case.method == "ted":
        generator = torch.Generator().manual_seed(SEED)
        own = range(1, bert.layers + 1)
        theirs = [layer * training.options.teacher_filter_interval for layer in own]
        for name, model, layers in zip(FILTERS, (teacher, student), (theirs, own), strict=True):
            FilterBank.of(model, list(layers), generator, filter_width=size.teacher.width).save(training.filters[name])


def _paragraphs() -> list[str]:
    """Paragraphs of the library's sources, blank lines apart and eight words long at least."""
    return [part for row in stdlib_rows("train") for part in row.split("\n\n") if len(part.split()) >= 8]


def _corpus(paragraphs: list[str]) -> Corpus:
    def read(start: int, state: Any) -> Iterator[tuple[None, list[str]]]:
        return ((None, [paragraph]) for paragraph in itertools.islice(paragraphs, start, None))

    return Corpus("paragraphs of Python's library", hashlib.sha256("\0".join(paragraphs).encode()).hexdigest(), read)


def _tokenizer(folder: Path, paragraphs: list[str], vocabulary: int) -> Any:
    """BERT's WordPiece, trained on the spot."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        paragraphs, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    )
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"Python's library has {tokenizer.get_vocab_size()} word pieces here, and {vocabulary} were asked for.")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return fast


def _write_task(path: Path) -> None:
    """Its first examples, so that no process but this one has to read all of the library's functions."""
    dataset = load_dataset(DatasetArguments(task=TASK)).limited("train", 1024)
    examples = [[example.text, example.label] for example in dataset.split("train")]
    write_json_atomic(path, {"label_names": dataset.label_names, "examples": examples})


def _task_rows(path: Path, size: Size, tokenizer: Any) -> DatasetRows:
    task = json.loads(path.read_text(encoding="utf-8"))
    examples = [LabelledExample(text, label=label) for text, label in task["examples"]]
    dataset = TaskDataset(TASK, "classification", {"train": examples, "test": examples[:2]}, ("accuracy",), tuple(task["label_names"]))
    return DatasetRows(dataset, encode_task(dataset, "train", tokenizer, max_length=size.length), None, None)


def _head(rows: DatasetRows) -> TaskHead:
    return TaskHead(rows.dataset.kind, rows.dataset.num_outputs, rows.dataset.label_names)


def _load(folder: Path, rows: TextRows | DatasetRows) -> LanguageModel | TaskModel:
    if isinstance(rows, TextRows):
        return load_language_model(str(folder))
    return load_task_model(str(folder), _head(rows), seed=SEED, pad_id=PAD, needs_head=True)
