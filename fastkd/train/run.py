"""A whole run: every stage of a method, each from the finished student of the one before, resumable at any instant."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import new_folder, remove_folder, write_json_atomic
from ..methods.registry import METHODS, Model, StageInputs, StageSpec, build_stage
from ..models.classifier import load_classifier
from ..models.language_model import LanguageModel
from ..models.load import (
    VOCAB_MAP_FOLDER,
    auto_class,
    check_padded_vocabulary,
    check_row_length,
    check_same_tokenizer,
    load_config,
    load_frozen,
    load_language_model,
    load_tokenizer,
    save_model,
)
from ..models.student import build_student, prune_model
from ..vocab.map import VocabMap
from .config import RunConfig, StageArguments, read_config
from .curves import plot_curves
from .data import eval_corpus, longest_row, task_rows, text_rows, train_corpus
from .log import LOG_FILE, read_log
from .loop import StageResult, StageTrainer
from .output import prepare_output_dir
from .schema import ConfigError, from_mapping, load_yaml
from .vocabulary import build_vocab_map

log = logging.getLogger("fastkd")
RESULT_FILE = "result.json"
STUDENT_FOLDER = "student"
# These change what is kept or shown of a run, not what it computes.
_COSMETIC = frozenset({"output_dir", "overwrite_output_dir", "cache_dir", "logging_steps", "save_steps", "save_total_limit"})


@dataclass(frozen=True)
class _PlannedStage:
    spec: StageSpec
    arguments: StageArguments
    options: Any
    teacher: str | None


def distill(config: RunConfig | Mapping[str, Any] | str | Path, *, only_stage: str | None = None) -> dict[str, dict[str, Any]]:
    """Run every stage of `config` (a RunConfig, a mapping, or a YAML file) that is not finished yet; return the stages' results.

    What `fastkd train` calls. The last stage's student is in output_dir/<stage>/student. Everything that can be refused is refused
    before the first download or step.
    """
    if isinstance(config, (str, Path)):
        config = load_yaml(config)
    if isinstance(config, Mapping):
        config = read_config(config)
    stages = _plan(config, only_stage)
    output_dir = Path(config.output_dir)
    with prepare_output_dir(output_dir, _identity(config), overwrite=config.overwrite_output_dir):
        run = _Run(config, output_dir)
        for planned in stages:
            run.check(planned)
        results = {}
        for planned in stages:
            results[planned.spec.name] = run.stage(planned)
        return results


def _plan(config: RunConfig, only_stage: str | None) -> list[_PlannedStage]:
    """The stages to run, in the method's order, each with what it needs; what is missing is named by its key."""
    method = METHODS[config.method]
    known = [spec.name for spec in method.stages]
    asked: dict[str, StageArguments] = {**config.stages} or {known[0]: config}
    for name in [*asked, *([only_stage] if only_stage else [])]:
        if name not in known:
            raise ConfigError(f"stages.{name}: method {config.method} has no such stage; it has {', '.join(known)}.")
    if only_stage is not None and only_stage not in asked:
        raise ConfigError(f"stage {only_stage} is not configured; the file has {', '.join(asked)}.")
    planned = []
    for spec in method.stages:
        if spec.name not in asked or (only_stage is not None and spec.name != only_stage):
            continue
        arguments = asked[spec.name]
        where = f"stages.{spec.name}" if config.stages else ""
        prefix = f"{where}." if where else ""
        if getattr(arguments, spec.data) is None:
            raise ConfigError(f"{prefix}{spec.data} is not set, and stage {spec.name} of {config.method} needs it.")
        if spec.data == "task" and arguments.task is not None:
            spec.check_task(arguments.task.cloze)
        if spec.needs_teacher and arguments.teacher_model_name_or_path is None:
            raise ConfigError(f"{prefix}teacher_model_name_or_path is not set, and stage {spec.name} needs a teacher.")
        options: Any = from_mapping(method.options, arguments.options, where=f"{prefix}options")
        planned.append(_PlannedStage(spec, arguments, options, arguments.teacher_model_name_or_path if spec.needs_teacher else None))
    return planned


def _identity(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that decides the result."""
    identity = {key: value for key, value in asdict(config).items() if key not in _COSMETIC}
    identity["stages"] = {
        name: {key: value for key, value in stage.items() if key not in _COSMETIC} for name, stage in identity["stages"].items()
    }
    return identity


class _Run:
    """What the stages of one run share."""

    def __init__(self, config: RunConfig, output_dir: Path) -> None:
        self.config, self.output_dir = config, output_dir
        self.cache_dir = Path(config.cache_dir) if config.cache_dir else output_dir / "cache"
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
        stages = list(config.stages.values()) or [config]
        teachers = [s.teacher_model_name_or_path for s in stages if s.teacher_model_name_or_path]
        source = config.tokenizer_name_or_path or next(iter(teachers), None) or config.model_name_or_path
        if source is None:
            raise ConfigError("tokenizer_name_or_path is not set, and there is no teacher to take the tokenizer from.")
        self.tokenizer = load_tokenizer(source)
        for teacher in dict.fromkeys(teachers):
            if teacher != source:
                check_same_tokenizer(load_tokenizer(teacher), self.tokenizer)
        if config.model_name_or_path is not None and config.model_name_or_path != source:
            check_same_tokenizer(self.tokenizer, load_tokenizer(config.model_name_or_path))

    def check(self, planned: _PlannedStage) -> None:
        """Refuse what needs no model to be refused: every stage's data are opened before the first stage starts."""
        arguments = planned.arguments
        if self._finished(planned.spec.name):
            return
        if planned.spec.data == "text":
            assert arguments.text is not None
            train_corpus(arguments.text)
            eval_corpus(arguments.text)
        else:
            assert arguments.task is not None and planned.teacher is not None
            classifier = planned.spec.wants_classifier(arguments.task.cloze)
            self._rows(planned, causal=not classifier and auto_class(load_config(planned.teacher)).__name__ == "AutoModelForCausalLM")

    def _finished(self, stage: str) -> bool:
        return (self.output_dir / stage / RESULT_FILE).is_file()

    def stage(self, planned: _PlannedStage) -> dict[str, Any]:
        """Train one stage, or return the result it already has."""
        spec, arguments = planned.spec, planned.arguments
        folder = self.output_dir / spec.name
        if self._finished(spec.name):
            log.info("Stage %s is finished already.", spec.name)
            return _read_result(folder)
        folder.mkdir(parents=True, exist_ok=True)
        task = arguments.task.cloze if spec.data == "task" and arguments.task is not None else None
        classifier = spec.wants_classifier(task)
        teacher: Model | None = None
        if planned.teacher is not None:
            if classifier:
                assert task is not None
                teacher = load_classifier(planned.teacher, task.num_labels, seed=self.config.seed).eval().requires_grad_(False)
            else:
                teacher = load_frozen(planned.teacher)
            check_padded_vocabulary(teacher, self.tokenizer, "teacher")
        student = self._student(planned, teacher, classifier, task.num_labels if task is not None else 0)
        causal = isinstance(student, LanguageModel) and student.causal
        rows, eval_rows = self._rows(planned, causal)
        longest = max(longest_row(rows), 0 if eval_rows is None else longest_row(eval_rows))
        for model, role in ((student, "student"), (teacher, "teacher")):
            if model is not None:
                check_row_length(model, longest, role)
        if arguments.torch_compile:
            for model in (student, teacher):
                if model is not None:
                    model.model.base_model.compile(dynamic=True)
        student.to(self.device)
        stage = build_stage(
            self.config.method,
            spec,
            StageInputs(
                student=student,
                teacher=None if teacher is None else teacher.to(self.device),
                tokenizer=self.tokenizer,
                options=planned.options,
                rows=rows,
                eval_rows=eval_rows,
                task=task,
                eval_batch_size=arguments.per_device_eval_batch_size,
            ),
        )
        torch.manual_seed(self.config.seed)
        result = StageTrainer(stage, arguments, folder, seed=self.config.seed, device=self.device).run()
        return self._finish(folder, student, result)

    def _rows(self, planned: _PlannedStage, causal: bool) -> tuple[Any, Any]:
        arguments = planned.arguments
        if planned.spec.data == "text":
            assert arguments.text is not None
            text = text_rows(arguments.text, self.tokenizer, self.cache_dir, causal=causal)
            return text.train, text.eval
        assert arguments.task is not None
        return task_rows(arguments.task, self.tokenizer, causal=causal)

    def _student(self, planned: _PlannedStage, teacher: Model | None, classifier: bool, num_labels: int) -> Model:
        """The finished student of the stage before; else the model named, or a new one."""
        names = [spec.name for spec in METHODS[self.config.method].stages]
        before = [name for name in names[: names.index(planned.spec.name)] if name in self.config.stages]
        if before:
            if not self._finished(before[-1]):
                raise ConfigError(
                    f"stage {planned.spec.name} starts from the student of {before[-1]}, which is not finished; run that first."
                )
            source = str(self.output_dir / before[-1] / STUDENT_FOLDER)
            return load_classifier(source, num_labels, seed=self.config.seed) if classifier else load_language_model(source)
        if classifier:
            if self.config.model_name_or_path is None:
                raise ConfigError("stage task_scores on a classification task starts from a trained student: run pretrain first.")
            return load_classifier(self.config.model_name_or_path, num_labels, seed=self.config.seed)
        if teacher is None and planned.arguments.teacher_model_name_or_path is not None:
            # A method without a teacher may still name one: its architecture and rows are what the student is built from.
            teacher = load_frozen(planned.arguments.teacher_model_name_or_path)
        assert teacher is None or isinstance(teacher, LanguageModel)
        return self._first_student(teacher)

    def _first_student(self, teacher: LanguageModel | None) -> LanguageModel:
        config = self.config
        named = None if config.model_name_or_path is None else load_language_model(config.model_name_or_path)
        if named is not None and named.vocab_map is not None:
            return named
        vocab_map = self._vocab_map(teacher or named)
        if named is None:
            base = teacher.model.config if teacher is not None else _base_config(config.student)
            vocabulary = None if vocab_map is not None else len(self.tokenizer)
            return build_student(base, config.student, vocab_map, seed=config.seed, vocabulary=vocabulary)
        check_padded_vocabulary(named, self.tokenizer, "student")
        if vocab_map is not None:
            return prune_model(named.model, vocab_map)
        padding = named.vocabulary - len(self.tokenizer)
        if not padding:
            return named
        tokens = torch.arange(len(self.tokenizer))
        sliced = VocabMap(tokens, torch.cat([tokens, tokens.new_zeros(padding)]))
        return LanguageModel(prune_model(named.model, sliced).model)

    def _vocab_map(self, rows_of: LanguageModel | None) -> VocabMap | None:
        if self.config.vocabulary is None:
            return None
        folder = self.output_dir / VOCAB_MAP_FOLDER
        if folder.is_dir():
            return VocabMap.load(folder)
        if rows_of is None:
            raise ConfigError("vocabulary is set, and there is neither a teacher nor a named student whose rows give the stand-ins.")
        stages = list(self.config.stages.values()) or [self.config]
        texts = [stage.text for stage in stages if stage.text is not None]
        corpus = train_corpus(texts[0]) if texts else None
        tasks = [stage.task.cloze for stage in stages if stage.task is not None]
        vocab_map = build_vocab_map(self.config.vocabulary, self.tokenizer, rows_of, corpus, tasks, self.cache_dir)
        with new_folder(folder) as unfinished:
            vocab_map.save(unfinished)
        return vocab_map

    def _finish(self, folder: Path, student: Model, result: StageResult) -> dict[str, Any]:
        """Save the student under its final name, then the result: a stage is finished when its result is there."""
        final = folder / STUDENT_FOLDER
        if final.exists():
            remove_folder(final)
        with new_folder(final) as unfinished:
            save_model(student, self.tokenizer, unfinished)
        _draw(folder)
        summary = {**asdict(result), "student_dir": str(final)}
        write_json_atomic(folder / RESULT_FILE, summary)
        return summary


def _base_config(overrides: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = str(overrides.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"student.model_type is {kind!r}; without a teacher it must name an architecture that transformers knows.")
    return CONFIG_MAPPING[kind]()


def _read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT_FILE).read_text())


def _draw(folder: Path) -> None:
    """The curves of a finished stage, from its log."""
    lines = read_log(folder / LOG_FILE)
    for key, name in (("loss", "loss"), ("eval_perplexity", "perplexity"), ("eval_accuracy", "accuracy")):
        points: Sequence[tuple[float, float]] = [(line["step"], float(line[key])) for line in lines if key in line]
        if len(points) > 1:
            plot_curves({name: points}, folder / f"{name}.png", title=folder.name, xlabel="step", ylabel=name)
