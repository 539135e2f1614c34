"""The configuration of a run. Keys are those of `transformers.TrainingArguments` where one exists.

The docstring under a field is its help text, its line in the docs and its comment in YAML. No torch here: `--help` stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..tasks.cloze_task import ClozeTask
from .paths import PATHS, is_path, with_homes
from .schedule import learning_rate_factor, resolve_warmup
from .schema import ConfigError, apply_flags, from_mapping

_HAVE_ROWS = ("stdlib", ".jsonl", ".json", ".parquet", ".csv")
_MOST_SECONDS = 2**31 - 1
_MOST_EPOCHS = 2**31
_LEAST_EPSILON = 2.0**-126  # the smallest that float32 holds in full: less is 0 there, and 0 / 0 for a weight without a gradient


def _check_paths(config: Any) -> None:
    for name, value in vars(config).items():
        if name in PATHS and value is not None and not is_path(value):
            raise ValueError(f"{name} is {value!r}, which names nothing; give a path or name, or leave the key out.")
        if name in PATHS and str(value).startswith("~"):
            raise ValueError(f"{name} is {value!r}, and ~ is expanded in files and flags alone; give os.path.expanduser({value!r}).")


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Unlabeled text."""

    path: str
    """Hub name, folder of Dataset.save_to_disk, file or glob (.jsonl .parquet .txt .csv), or "stdlib": Python's own library."""
    name: str | None = None
    """Configuration of a hub dataset."""
    train_split: str = "train"
    """Split that is trained on."""
    eval_split: str | None = None
    """Split that is judged on; without one and without eval_path, the last weights are kept."""
    eval_path: str | None = None
    """Where the evaluation rows are, if not at path; its split is eval_split, or "train" for a plain file."""
    text_column: str = "text"
    """Column that holds the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What a row of text is in .txt files: the whole file with its line ends (several, if it is longer than a million characters), what
    stands between blank lines, or each line that is not blank."""
    streaming: bool = False
    """Read the corpus as a stream while it is tokenised; the tokenised rows are cached on disk either way."""
    max_rows: int | None = None
    """At most this many rows of text to train on."""
    max_eval_rows: int | None = None
    """At most this many rows of text to judge on."""
    max_length: int = 256
    """Tokens in a training row."""
    layout: Literal["packed", "rows", "auto"] = "auto"
    """packed: documents are joined and cut into full rows; rows: one row per text. auto: packed for decoders, rows for encoders."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that is null or no string is refused, or left out and counted. Files that cannot be read are always refused."""
    max_bad_rows: int = 1000
    """With on_bad_row: skip, more bad rows than these are refused after all."""

    def __post_init__(self) -> None:
        _check_paths(self)
        _at_least(1, self, "max_rows", "max_eval_rows", "max_bad_rows")
        _at_least(2, self, "max_length")
        paths = [path for path in (self.path, self.eval_path) if path is not None]
        if self.documents != "file" and all(path.endswith(_HAVE_ROWS) for path in paths):
            raise ValueError(
                f"documents is {self.documents!r}, which says how .txt files are cut, and {' and '.join(map(repr, paths))} "
                "have rows of their own; leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Task examples, turned into cloze inputs by a template."""

    path: str
    """Hub name, folder of Dataset.save_to_disk, or file (.jsonl .json .parquet .csv)."""
    name: str | None = None
    """Configuration of a hub dataset."""
    train_split: str = "train"
    """Split that is trained on."""
    eval_split: str = "validation"
    """Split that selects the best weights."""
    eval_path: str | None = None
    """Where the evaluation rows are, if not at path; its split is "train" for a plain file."""
    max_rows: int | None = None
    """At most this many training rows."""
    max_eval_rows: int | None = None
    """At most this many evaluation rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row without text in a column of the template is refused, or left out and counted."""
    max_bad_rows: int = 1000
    """With on_bad_row: skip, more bad rows than these in one split are refused after all."""
    cloze: ClozeTask
    """How a row becomes inputs and scores."""

    def __post_init__(self) -> None:
        _check_paths(self)
        _at_least(1, self, "max_rows", "max_eval_rows", "max_bad_rows")


@dataclass(frozen=True, kw_only=True)
class DatasetArguments:
    """Labelled examples without a template: of a known task, read as its benchmark has them, or own rows."""

    task: str | None = None
    """Which task: glue/rte, super_glue/boolq, squad_v2, ..., stdlib/module, stdlib/docstring, stdlib/which_docstring (made from
    Python's own library), or for stages without labels stdlib/pairs, or pairs (the rows at path); null: the labelled rows at path."""
    path: str | None = None
    """With a task, the folder or hub name of a copy; null: the hub's own. For own rows, a file or glob (.csv .jsonl .parquet), a folder
    with a file of each split or of save_to_disk, or a hub name; its split train is trained on."""
    eval_path: str | None = None
    """Own rows: where the evaluation rows are, if not at path."""
    eval_split: str | None = None
    """Split that selects the best weights; null: the task's first besides train, of own rows validation (a file has no splits)."""
    text_columns: tuple[str, ...] = ("text",)
    """Own rows and pairs: the column of the text, or of both texts."""
    label_column: str = "label"
    """Own rows: the column of the label, a name or a number."""
    kind: Literal["classification", "regression"] | None = None
    """Own rows: labels are classes, or values to predict; null: values if all are numbers and one is a float, as 4.5 is."""
    max_length: int = 128
    """Tokens in a row; longer texts are cut."""
    pad_to_max_length: bool = False
    """Pad every batch to max_length, as CR-ILD's code does; false: to its longest row. Losses that count pads depend on it."""
    doc_stride: int = 128
    """Question answering: tokens that neighbouring windows of a context share."""
    max_answer_length: int = 30
    """Question answering: tokens of the longest answer."""
    few_sample: int | None = None
    """Train on so many examples alone, drawn by sample_seed."""
    label_noise: float = 0.0
    """Share of training labels that are replaced by another one, drawn by sample_seed."""
    sample_seed: int = 0
    """Seed of few_sample and label_noise: the same examples whatever the run's seed."""
    max_eval_rows: int | None = None
    """At most this many evaluation examples."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row without text, or with a label or an answer that cannot be, is refused, or left out of its split and counted."""
    max_bad_rows: int = 1000
    """With on_bad_row: skip, more bad rows than these in one split are refused after all."""

    @staticmethod
    def faults_of(data: Mapping[str, Any]) -> list[str]:
        """What several label columns ask for."""
        several = isinstance(data.get("label_column"), list | tuple)
        return ["label_column names several columns, and multi-label classification is not supported: a row has one label"] * several

    def __post_init__(self) -> None:
        _check_paths(self)
        _at_least(1, self, "max_bad_rows")
        _at_least(2, self, "few_sample", "max_eval_rows")
        _at_least(8, self, "max_length")
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"text_columns has {len(self.text_columns)} names; give the column of the text, or of both texts.")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is {self.label_noise}; it is a share of the labels, between 0 and 1.")
        if self.task is None and self.path is None:
            raise ValueError("task is not set, and neither is path; name a task, or by path the labelled rows of your own.")
        if self.task is None and self.label_column in self.text_columns:
            raise ValueError(f"label_column is {self.label_column!r}, which is among text_columns too; name the label's own column.")
        of_own_rows: dict[str, Any] = {"text_columns": ("text",), "eval_path": None, "label_column": "label", "kind": None}
        for name, default in of_own_rows.items():
            is_read = self.task is None or (self.task == "pairs" and name == "text_columns")
            if not is_read and getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which task {self.task} does not read; leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which part of the teacher's vocabulary the student keeps."""

    keep: int | float = 0.5
    """Share of the tokenizer's ids (below 1) or their number, rounded up to multiple_of; most frequent first."""
    multiple_of: int = 128
    """The kept number is a multiple of this."""
    protected: tuple[str, ...] = ()
    """Words that are always kept, with every token they have, beside special and byte tokens and the label words of the tasks that the
    run or the method's recipes have."""
    stand_ins: Literal["dot", "cosine", "euclidean", "unk"] = "dot"
    """Which kept id the student reads for a dropped one: the most similar row of the teacher's head, or the unknown token."""
    counts: str | None = None
    """Folder written by `fastkd vocab count`; without it the training text of the first stage is counted."""

    def __post_init__(self) -> None:
        _check_paths(self)
        if not self.keep > 0 or (isinstance(self.keep, float) and self.keep >= 1):
            raise ValueError(f"keep is {self.keep}; give a share between 0 and 1 (0.5 keeps half), or a whole number of ids.")
        _at_least(1, self, "multiple_of")


@dataclass(frozen=True, kw_only=True)
class TeacherArguments:
    """Whether the teacher is asked at every step, or once beforehand by `fastkd cache`."""

    kind: Literal["model", "cache"] = "model"
    """model: the teacher runs beside the student. cache: what it has said of every training row is read from path, and it is not
    loaded; an encoder's masks are then drawn once a row and are the same in every epoch."""
    path: str | None = None
    """cache: the folder that `fastkd cache` has written for this stage."""
    tail: Literal["bucket", "renormalize", "zero"] = "bucket"
    """What becomes of the teacher's mass outside of a top-k cache. bucket: one event more; renormalize: it is spread over the k;
    zero: it is left out."""

    def __post_init__(self) -> None:
        _check_paths(self)
        if self.kind == "cache" and self.path is None:
            raise ValueError("path is not set, and kind is cache; give the folder that `fastkd cache` has written for this stage.")


@dataclass(frozen=True, kw_only=True)
class StageArguments:
    """What one stage needs; keys at the top of a file hold for every stage that does not set its own."""

    text: TextData | None = None
    """Unlabeled text (stages on text)."""
    task: TaskData | None = None
    """Task examples in a template (glmd's stages on a task)."""
    dataset: DatasetArguments | None = None
    """Labelled examples, of a known task or own ones (finetune, crild, ted)."""
    teacher_model_name_or_path: str | None = None
    """Folder or hub name of the teacher; task stages want the one fine-tuned on the task."""
    teacher: TeacherArguments = TeacherArguments()
    """Whether the teacher is run or read from a cache."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own options, such as temperature; docs/configuration.md lists them per method."""
    dropout: dict[str, float] = field(default_factory=dict)
    """Dropout probabilities of the model that is trained, by their names in its configuration, such as hidden_dropout_prob; what is not
    named stays as the model has it."""
    per_device_train_batch_size: int = 16
    """Rows (examples, in task stages) in a micro-batch."""
    per_device_eval_batch_size: int = 16
    """Rows in an evaluation batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step; the loss is normalised over all of their tokens at once."""
    max_steps: int = -1
    """Optimizer steps; -1: num_train_epochs decides."""
    num_train_epochs: float = 3.0
    """Passes over the rows when max_steps is -1."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decay of weight matrices and embeddings; biases and norms have none."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.98
    """AdamW's second beta; the authors use 0.98 in pretrain and 0.999 in task stages."""
    adam_epsilon: float = 1e-6
    """AdamW's epsilon."""
    bias_correction: bool = True
    """AdamW's division of both moments by 1 - beta^step; false: none, as in BertAdam, the optimizer of CR-ILD's code."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0: not clipped."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after its warm-up."""
    warmup_steps: int | float = 0.05
    """Steps of linear warm-up; below 1 a share of the decay."""
    lr_decay_steps: int | float = 1.0
    """Steps until the final rate, which then stays; at most 1.0 as a share of all steps (the authors' pretrain: 0.8)."""
    lr_final_ratio: float = 0.05
    """Final learning rate as a share of the peak (the authors: 0.05 in pretrain, 0.1 in task stages)."""
    bf16: bool = False
    """Autocast to bfloat16."""
    fp16: bool = False
    """Autocast to float16 with a loss scaler (GPU)."""
    torch_compile: bool = False
    """Compile both backbones."""
    group_by_length: bool = True
    """Rows of similar length share a batch, so that little is padding."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    report_to: Literal["none", "tensorboard"] = "none"
    """tensorboard: the log's numbers go to STAGE/tensorboard too (extra: tensorboard)."""
    profile_steps: int = 0
    """Trace this many optimizer steps, behind two that warm up: STAGE/profile has the trace, and the shares of time are shown."""
    eval_steps: int | None = None
    """Steps between evaluations; null: once an epoch, or at the end when max_steps is set."""
    save_steps: int | None = None
    """Steps between checkpoints; null: at every evaluation."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy of the tensors in host memory (not with fsdp)."""
    save_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (a full disk): stop, or go on with a warning until the next; the stage's last one must be."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite, the weights stay as they are; then stop, or skip the step's rows and go on."""
    max_skipped_steps: int = 10
    """Stop after more than so many skipped steps in a row; those in which fp16's loss scale is being found do not count."""

    def __post_init__(self) -> None:
        _check_paths(self)
        _at_least(
            1,
            self,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "max_skipped_steps",
        )
        _at_least(0, self, "profile_steps")
        for name, probability in self.dropout.items():
            if not 0 <= probability < 1 or "drop" not in name:
                raise ValueError(
                    f"dropout.{name} is {probability}; name a dropout of the model's configuration, and give it from 0 to below 1."
                )
        for name in ("learning_rate", "adam_epsilon", "num_train_epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number > 0.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "lr_decay_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number >= 0.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1).")
        if not 0 <= self.lr_final_ratio <= 1:
            raise ValueError(f"lr_final_ratio is {self.lr_final_ratio}; it is a share of the peak, between 0 and 1.")
        if self.adam_epsilon < _LEAST_EPSILON:
            raise ValueError(f"adam_epsilon is {self.adam_epsilon}; it must be at least {_LEAST_EPSILON:.2g}, or it is 0 in float32.")
        if self.num_train_epochs > _MOST_EPOCHS:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; it must be at most {_MOST_EPOCHS}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}; give a number >= 1, or -1 for num_train_epochs to decide.")
        warmup_steps = resolve_warmup(self.warmup_steps, total_steps=1)
        learning_rate_factor(self.lr_scheduler_type, 0, total_steps=1, warmup_steps=warmup_steps)  # raises what does not fit
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both on; choose one.")


@dataclass(frozen=True, kw_only=True)
class RunConfig(StageArguments):
    """A whole run of a method."""

    method: Literal["glmd", "crild", "ted", "kd", "lm", "finetune"]
    """glmd: word prediction and task scores from a teacher; crild: relations and states of the last layer, with consistency; ted:
    layers through task-aware filters; kd: plain full-vocabulary distillation; lm and finetune: hard labels alone, of text or a task."""
    output_dir: str
    """Where everything of the run goes; each stage has its folder, with its finished student in student/."""
    model_name_or_path: str | None = None
    """Folder or hub name to start the student from; null: a new one is built from `student`."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer, where there is no teacher to take it from."""
    student_layers: str | tuple[int, ...] | None = None
    """Layers of model_name_or_path that the student keeps: first:6, every:2 (the 2nd, 4th, ...), or a list of their numbers from 1."""
    student: dict[str, Any] = field(default_factory=dict)
    """Settings of a new student over the teacher's configuration, such as num_hidden_layers; model_type makes another architecture."""
    vocabulary: Vocabulary | None = None
    """The kept vocabulary; null: the student keeps all of it."""
    stages: dict[str, StageArguments] = field(default_factory=dict)
    """Stages to run and what they set for themselves; empty: the method's first. glmd has pretrain, task_words, task_scores; crild
    teacher, ild, kd; ted teacher, student, teacher_filters, student_filters, distill."""
    seed: int = 0
    """Seed of new weights, of the order of the data, and of masking."""
    use_cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    backend: Literal["auto", "torch", "cpp", "triton", "cuda"] = "auto"
    """Kernels of the losses: auto takes the fastest that is right on this machine; FASTKD_BACKEND in the environment comes first."""
    fsdp: bool = False
    """Under torchrun: split the student, its gradients and its optimizer over the ranks (FSDP2); false: whole on each (DDP)."""
    fsdp_teacher: bool = False
    """Split the teacher too, but for its head."""
    ddp_timeout: int = 1800
    """Seconds after which a rank that does not come is given up, and named; writing a checkpoint may take no longer."""
    cache_dir: str | None = None
    """Where tokenised corpora and counts are kept between runs; null: output_dir/cache."""
    overwrite_output_dir: bool = False
    """Start anew in an output_dir that holds another run, deleting it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None and not self.student:
            raise ValueError(
                "neither model_name_or_path nor student is set, so there is no student to train. Name a model to start from, or give "
                "the settings of a new one, such as student: {num_hidden_layers: 2}."
            )
        _at_least(1, self, "ddp_timeout")
        if self.ddp_timeout > _MOST_SECONDS:
            raise ValueError(f"ddp_timeout is {self.ddp_timeout}; it must be at most {_MOST_SECONDS} seconds.")
        if self.fsdp and any(stage.async_save or stage.fp16 or stage.torch_compile for stage in (self, *self.stages.values())):
            raise ValueError("fsdp goes neither with async_save, nor with fp16 (take bf16), nor with torch_compile; turn them off.")
        if self.student_layers is not None and self.model_name_or_path is None:
            raise ValueError("student_layers picks layers of model_name_or_path, which is not set; name the model to take them from.")


STAGE_KEYS = frozenset(f.name for f in fields(StageArguments))


def read_config(data: Mapping[str, Any], flags: Sequence[str] = ()) -> RunConfig:
    """A RunConfig from YAML data and command-line flags.

    Keys at the top hold for every stage that does not set its own; a flag (`--max_steps 10`) overrides every stage, and a flag for one
    stage (`--stages.pretrain.max_steps 10`) overrides that.
    """
    top = {key: value for key, value in data.items() if key in STAGE_KEYS}
    flagged = apply_flags({}, flags, RunConfig)
    flagged_top = {key: value for key, value in flagged.items() if key in STAGE_KEYS}
    stages, flagged_stages = _stages(data), _stages(flagged)
    merged = _merge(data, flagged)
    merged["stages"] = {
        name: _merge(top, stages.get(name) or {}, flagged_top, flagged_stages.get(name) or {}) for name in {**stages, **flagged_stages}
    }
    return from_mapping(RunConfig, with_homes(merged))


def _stages(data: Mapping[str, Any]) -> Mapping[str, Any]:
    stages = data.get("stages") or {}
    if not isinstance(stages, Mapping) or not all(stage is None or isinstance(stage, Mapping) for stage in stages.values()):
        raise ConfigError("stages must map a stage's name to its settings, such as {pretrain: {max_steps: 1000}}.")
    return stages


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; mappings inside are merged key by key."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            result[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def _at_least(least: int, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
