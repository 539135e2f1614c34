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
from ..methods.objective import Objective
from ..methods.registry import METHODS, Data, Model, StageInputs, StageSpec, build_stage, check_stages
from ..methods.stage_data import DatasetRows, Rows
from ..models.load import check_row_length, check_same_tokenizer, is_decoder, load_tokenizer, save_model
from ..models.task_model import TaskHead
from ..recipes import config_path
from .config import DatasetArguments, RunConfig, StageArguments, read_config
from .curves import plot_curves
from .data import cloze_rows, dataset_rows, eval_corpus, load_dataset, text_rows, train_corpus
from .log import LOG_FILE, read_log
from .loop import StageResult, StageTrainer
from .output import prepare_output_dir
from .run_models import RESULT_FILE, RunModels
from .schema import ConfigError, from_mapping, load_yaml

log = logging.getLogger("fastkd")
FILTERS_FOLDER = "filters"
# These change what is kept or shown of a run, not what it computes.
_COSMETIC = frozenset({"output_dir", "overwrite_output_dir", "cache_dir", "logging_steps", "save_steps", "save_total_limit"})


@dataclass(frozen=True)
class _PlannedStage:
    spec: StageSpec
    arguments: StageArguments
    options: Any
    data: Data


def distill(config: RunConfig | Mapping[str, Any] | str | Path, *, only_stage: str | None = None) -> dict[str, dict[str, Any]]:
    """Run every stage of `config` that is not finished yet, and return the stages' results. It is a RunConfig, a mapping, or the name
    of a YAML file or of a recipe.

    What `fastkd train` calls. The last stage's student is in output_dir/<stage>/student. Everything that can be refused is refused
    before the first download or step.
    """
    if isinstance(config, (str, Path)):
        config = load_yaml(config_path(str(config)))
    if isinstance(config, Mapping):
        config = read_config(config)
    stages = _plan(config, only_stage)
    output_dir = Path(config.output_dir)
    with prepare_output_dir(output_dir, _identity(config), overwrite=config.overwrite_output_dir):
        run = _Run(config, output_dir, stages)
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
        prefix = f"stages.{spec.name}." if config.stages else ""
        data = [kind for kind in spec.data if getattr(arguments, kind) is not None]
        if not data:
            raise ConfigError(f"{prefix}{' or '.join(spec.data)} is not set, and stage {spec.name} of {config.method} needs it.")
        if len(data) > 1:
            raise ConfigError(f"{prefix}{data[0]} and {prefix}{data[1]} are both set; set one of them to null for stage {spec.name}.")
        if arguments.task is not None and data == ["task"]:
            spec.check_task(arguments.task.cloze)
        wants_teacher = spec.needs_teacher or spec.trains == "teacher"
        if wants_teacher and arguments.teacher_model_name_or_path is None:
            raise ConfigError(f"{prefix}teacher_model_name_or_path is not set, and stage {spec.name} needs a teacher.")
        if spec.captures and arguments.torch_compile:
            raise ConfigError(
                f"{prefix}torch_compile is on, and stage {spec.name} reads states inside the models; set it to false there."
            )
        options: Any = from_mapping(method.options, arguments.options, where=f"{prefix}options")
        planned.append(_PlannedStage(spec, arguments, options, data[0]))
    check_stages(config.method, {stage.spec.name: stage.options for stage in planned}, list(config.stages))
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

    def __init__(self, config: RunConfig, output_dir: Path, stages: Sequence[_PlannedStage]) -> None:
        self.config, self.output_dir, self.stages = config, output_dir, stages
        self.cache_dir = Path(config.cache_dir) if config.cache_dir else output_dir / "cache"
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
        arguments = list(config.stages.values()) or [config]
        teachers = [s.teacher_model_name_or_path for s in arguments if s.teacher_model_name_or_path]
        source = config.tokenizer_name_or_path or next(iter(teachers), None) or config.model_name_or_path
        if source is None:
            raise ConfigError("tokenizer_name_or_path is not set, and there is no teacher to take the tokenizer from.")
        self.tokenizer = load_tokenizer(source)
        for teacher in dict.fromkeys(teachers):
            if teacher != source:
                check_same_tokenizer(load_tokenizer(teacher), self.tokenizer)
        if config.model_name_or_path is not None and config.model_name_or_path != source:
            check_same_tokenizer(self.tokenizer, load_tokenizer(config.model_name_or_path))
        self.models = RunModels(config, output_dir, self.cache_dir, self.tokenizer)
        self.datasets: dict[DatasetArguments, DatasetRows] = {}
        self.cloze_rows: dict[str, Rows] = {}

    def check(self, planned: _PlannedStage) -> None:
        """Refuse what needs no weights to be refused: every stage's models and data are looked at before the first stage starts."""
        arguments, name = planned.arguments, planned.spec.name
        if self.models.finished(name):
            return
        if planned.spec.check_models is not None:
            planned.spec.check_models(*self.models.skeletons(arguments), planned.options)
        if planned.data == "text":
            assert arguments.text is not None
            train_corpus(arguments.text)
            eval_corpus(arguments.text)
            return
        if planned.data == "task":
            teacher = arguments.teacher_model_name_or_path
            causal = self._head(planned) is None and teacher is not None and is_decoder(teacher)
            self.cloze_rows[name] = self._rows(planned, causal=causal)
            return
        dataset = self._dataset(planned).dataset
        if planned.spec.needs_labels and not dataset.is_labelled("train"):
            raise ConfigError(f"stage {name} learns from labels, and {dataset.name} has none; give a labelled task.")

    def stage(self, planned: _PlannedStage) -> dict[str, Any]:
        """Train one stage, or return the result it already has."""
        spec, arguments = planned.spec, planned.arguments
        folder = self.output_dir / spec.name
        if self.models.finished(spec.name):
            log.info("Stage %s is finished already.", spec.name)
            return _read_result(folder)
        folder.mkdir(parents=True, exist_ok=True)
        head = self._head(planned)
        teacher = self.models.teacher(spec, arguments, head) if spec.needs_teacher else None
        student = self.models.trained(spec, arguments, teacher, head)
        rows = self.cloze_rows.get(spec.name) or self._rows(planned, causal=is_decoder(student.model.config))
        for model, role in ((student, spec.trains), (teacher, "teacher")):
            if model is not None:
                check_row_length(model, -(-rows.longest // 8) * 8, role)
                if arguments.torch_compile:
                    model.model.base_model.compile(dynamic=True)
        student.to(self.device)
        stage = build_stage(
            spec,
            StageInputs(
                student=student,
                teacher=None if teacher is None else teacher.to(self.device),
                tokenizer=self.tokenizer,
                options=planned.options,
                rows=rows,
                eval_batch_size=arguments.per_device_eval_batch_size,
                seed=self.config.seed,
                filters={made.parent.name: made for made in self.output_dir.glob(f"*/{FILTERS_FOLDER}")},
            ),
        )
        stage.objective.to(self.device)
        torch.manual_seed(self.config.seed)
        result = StageTrainer(stage, arguments, folder, seed=self.config.seed, device=self.device).run()
        return self._finish(planned, student, stage.objective, result)

    def _head(self, planned: _PlannedStage) -> TaskHead | None:
        """The head of the models in this stage: its own task's, else that of the next stage that has labels; None: the LM's own."""
        task = planned.arguments.task
        if planned.data == "task":
            assert task is not None
            return TaskHead("classification", task.cloze.num_labels) if planned.spec.wants_classifier(task.cloze) else None
        for stage in self.stages[self.stages.index(planned) :]:
            if stage.data == "dataset":
                dataset = self._dataset(stage).dataset
                if dataset.is_labelled("train"):
                    return TaskHead(dataset.kind, dataset.num_outputs, dataset.label_names)
        return None

    def _dataset(self, planned: _PlannedStage) -> DatasetRows:
        """Read and encoded once for all stages that have the same."""
        arguments = planned.arguments.dataset
        assert arguments is not None
        if arguments not in self.datasets:
            self.datasets[arguments] = dataset_rows(arguments, load_dataset(arguments), self.tokenizer)
        return self.datasets[arguments]

    def _rows(self, planned: _PlannedStage, *, causal: bool) -> Rows:
        arguments = planned.arguments
        if planned.data == "dataset":
            return self._dataset(planned)
        if planned.data == "text":
            assert arguments.text is not None
            return text_rows(arguments.text, self.tokenizer, self.cache_dir, causal=causal)
        assert arguments.task is not None
        return cloze_rows(arguments.task, self.tokenizer, causal=causal)

    def _finish(self, planned: _PlannedStage, student: Model, objective: Objective, result: StageResult) -> dict[str, Any]:
        """Save what the stage made under its final name, then the result: a stage is finished when its result is there."""
        spec = planned.spec
        folder = self.output_dir / spec.name
        made = FILTERS_FOLDER if spec.makes == "filters" else spec.trains
        if (folder / made).exists():
            remove_folder(folder / made)
        with new_folder(folder / made) as unfinished:
            if spec.makes == "filters":
                objective.auxiliary()["filters"].save(unfinished)  # type: ignore[operator]
            else:
                save_model(student, self.tokenizer, unfinished)
        _draw(folder)
        summary = {**asdict(result), f"{made}_dir": str(folder / made)}
        write_json_atomic(folder / RESULT_FILE, summary)
        return summary


def _read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT_FILE).read_text())


def _draw(folder: Path) -> None:
    """The curves of a finished stage, from its log."""
    lines = read_log(folder / LOG_FILE)
    for key, name in (("loss", "loss"), ("eval_perplexity", "perplexity"), ("eval_accuracy", "accuracy")):
        points: Sequence[tuple[float, float]] = [(line["step"], float(line[key])) for line in lines if key in line]
        if len(points) > 1:
            plot_curves({name: points}, folder / f"{name}.png", title=folder.name, xlabel="step", ylabel=name)
