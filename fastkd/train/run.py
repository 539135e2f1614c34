"""A whole run: every stage of a method, each from the finished student of the one before, resumable at any instant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..methods.cached import CachedLesson
from ..methods.objective import Share, Stage
from ..methods.registry import METHODS, Data, LessonInputs, StageInputs, StageSpec, build_stage
from ..methods.stage_data import DatasetRows, Rows, TextRows, largest_id, split_fingerprints, train_sequences
from ..methods.teaching import Model
from ..models.filters import reads_last_token
from ..models.folder import one_revision
from ..models.language_model import LanguageModel
from ..models.load import (
    check_padded_vocabulary,
    check_row_length,
    check_same_tokenizer,
    is_decoder,
    known_ids,
    load_tokenizer,
    save_model,
)
from ..models.task_model import TaskHead
from ..models.teacher_cache import HEADER, CachedTeacher, TeacherCache
from ..ops.backends import prefer_backend
from ..recipes import config_path
from ..sealed import Damaged, file_sha256, read_json, read_manifest, remove_sealed, seal
from ..store import new_folder, write_bytes_synced, write_json_atomic
from .batches import counter_torch_generator
from .cached_teacher import (
    cached_lesson,
    check_cacheable,
    check_rows,
    lesson_contents,
    lesson_of,
    models_contents,
    open_cache,
    settings_contents,
)
from .config import DatasetArguments, RunConfig, StageArguments, read_config
from .curves import draw_stage
from .data import cloze_rows, dataset_rows, eval_corpus, load_dataset, text_rows, train_corpus
from .identity import model_digest, run_settings, stage_settings, tokenizer_digest
from .loop import NonFiniteError, StageResult, StageTrainer
from .output import FILTERS_FOLDER, RESULT_FILE, OutputFolder, prepare_output_dir
from .parallel import WholeCopy, place
from .preflight import DOINGS, MemoryEstimate, check_disk, check_memory, explaining_shortage, memory_estimate
from .provenance import PROVENANCE_FILE, provenance
from .ranks import Ranks
from .readme import README_FILE, readme
from .run_models import RunModels
from .schema import ConfigError, from_mapping, load_yaml
from .signals import SignalFlag

log = logging.getLogger("fastkd")


@dataclass(frozen=True)
class PlannedStage:
    spec: StageSpec
    arguments: StageArguments
    options: Any
    data: Data


def distill(config: RunConfig | Mapping[str, Any] | str | Path, *, only_stage: str | None = None) -> dict[str, dict[str, Any]]:
    """Run every stage of `config` that is not finished yet, and return the stages' results. It is a RunConfig, a mapping, or the name
    of a YAML file or of a recipe.

    What `fastkd train` calls; started by torchrun, or by anything that sets its environment, every rank calls it and gets the same
    results. The last stage's student is in `output_dir/STAGE/student`. Everything that can be refused is refused before the first
    download or step.
    """
    if isinstance(config, (str, Path)):
        config = load_yaml(config_path(str(config)))
    if isinstance(config, Mapping):
        config = read_config(config)
    stages = plan_stages(config, only_stage)
    output_dir = Path(config.output_dir)
    with (
        one_revision(),
        Ranks.join(use_cpu=config.use_cpu, timeout_seconds=config.ddp_timeout) as ranks,
        ranks.naming_absentees("the run"),
        SignalFlag(ranks) as flag,
        ranks.on_main(lambda: prepare_output_dir(config.output_dir)) or nullcontext() as held,
    ):
        prefer_backend(config.backend, ranks.device)
        run = Run(config, output_dir, stages, ranks, flag, held)
        ranks.main_first(run.check)
        ranks.on_main(run.claim_all)
        return {planned.spec.name: run.stage(planned) for planned in stages}


def plan_stages(config: RunConfig, only_stage: str | None) -> list[PlannedStage]:
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
        spec.check_stages(options, list(config.stages))
        planned.append(PlannedStage(spec, arguments, options, data[0]))
    return planned


class Run:
    """What the stages of one run share."""

    def __init__(
        self,
        config: RunConfig,
        output_dir: Path,
        stages: Sequence[PlannedStage],
        ranks: Ranks,
        flag: SignalFlag,
        held: OutputFolder | None = None,
    ) -> None:
        """held: the output folder, where the first rank is to train in it."""
        self.config, self.output_dir, self.stages = config, output_dir, stages
        self.ranks, self.flag, self.held = ranks, flag, held
        self.cache_dir = Path(config.cache_dir) if config.cache_dir else output_dir / "cache"
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
        self.models = RunModels(config, output_dir, self.cache_dir, self.tokenizer, flag.poll_alone)
        self.datasets: dict[DatasetArguments, DatasetRows] = {}
        self.cloze_rows: dict[str, Rows] = {}
        self.teacher_caches: dict[str, TeacherCache] = {}
        self.claimed: set[str] = set()

    def claim_all(self) -> None:
        """Refuse an output folder that is another run's, by the settings and the contents of everything that can be read by now."""
        assert self.held is not None
        if not self.config.overwrite_output_dir:
            self._check_finished()
        identities = {
            planned.spec.name: None if self.models.waits(planned.spec) else self._identity(planned) for planned in self.stages
        }
        self.held.claim(run_settings(self.config), identities, overwrite=self.config.overwrite_output_dir)
        if self.config.overwrite_output_dir:
            self._check_finished()
        self.claimed = {name for name, identity in identities.items() if identity is not None}

    def _check_finished(self) -> None:
        """Refuse what finished stages have left if it is not what they made, before another stage starts from it."""
        assert self.held is not None
        for spec in METHODS[self.config.method].stages:
            if self.held.recorded(spec.name) is not None:
                self.held.check_finished(spec.name, _made_name(spec))

    def _claim(self, planned: PlannedStage) -> str:
        """Make a stage's folder this run's; return the digest of its identity."""
        assert self.held is not None
        name = planned.spec.name
        if name not in self.claimed:  # what it starts from was not made then
            self.held.claim(run_settings(self.config), {name: self._identity(planned)})
        (self.output_dir / name).mkdir(parents=True, exist_ok=True)
        return self.held.digest(name)

    def _identity(self, planned: PlannedStage) -> dict[str, Any]:
        """What decides the stage's result; see `identity.py`.

        What a finished stage has read need not be there any more: then the record of it stands.
        """
        spec, arguments, models = planned.spec, planned.arguments, self.models
        sources = models.sources(spec, arguments)
        settings = stage_settings(arguments, asdict(planned.options), planned.data, world_size=self.ranks.world_size)
        parts: dict[str, Callable[[], Any]] = {
            "models": lambda: {what: model_digest(source) for what, source in sources.items()},
            "teacher_cache": lambda: self._cache_digest(planned),
            "rows": lambda: self._row_fingerprints(planned),
            "head": lambda: None if (head := self.head(planned)) is None else asdict(head),
            "vocabulary": lambda: models.vocabulary_inputs() if models.builds_student(spec) else None,
        }
        recorded = None if self.held is None else self.held.recorded(spec.name)
        identity: dict[str, Any] = {"settings": settings, "tokenizer": tokenizer_digest(self.tokenizer)}
        for key, part in parts.items():
            try:
                identity[key] = part()
            except FileNotFoundError as error:
                if recorded is None or not models.finished(spec.name):
                    raise
                log.warning("Stage %s is finished, and its %s cannot be compared any more: %s", spec.name, key, error)
                identity[key] = recorded[key]
        return identity

    def _cache_digest(self, planned: PlannedStage) -> str | None:
        """Hash the header of the cache that stands for the stage's teacher: it has the hashes of all shards. None without one."""
        teacher = planned.arguments.teacher
        if not planned.spec.needs_teacher or teacher.kind != "cache":
            return None
        assert teacher.path is not None
        return file_sha256(Path(teacher.path) / HEADER)

    def _row_fingerprints(self, planned: PlannedStage) -> dict[str, str | None]:
        """Fingerprint the training and the evaluation rows, labels included."""
        arguments = planned.arguments
        if planned.data == "text":
            assert arguments.text is not None
            judged = eval_corpus(arguments.text)
            return {"train": train_corpus(arguments.text).fingerprint, "eval": None if judged is None else judged.fingerprint}
        rows = self.rows(planned, causal=self._reads_causally(planned))
        assert not isinstance(rows, TextRows)
        return split_fingerprints(rows)

    def check(self) -> None:
        """Refuse what needs no weights to be refused: every stage's models and data are looked at before the first stage starts."""
        for planned in self.stages:
            self._check(planned)

    def _check(self, planned: PlannedStage) -> None:
        arguments, name = planned.arguments, planned.spec.name
        if self.models.finished(name) and not self.config.overwrite_output_dir:
            return
        self.models.check_new_student(planned.spec, arguments, self.head(planned))
        if planned.spec.check_models is not None:
            planned.spec.check_models(*self.models.skeletons(arguments), planned.options)
        if planned.spec.needs_teacher and arguments.teacher.kind == "cache":
            check_cacheable(planned.spec)
            models = models_contents(self.models.teacher_source(planned.spec, arguments), self.tokenizer)
            self.teacher_caches[name] = open_cache(arguments.teacher, models, check_hashes=self.ranks.is_main)
        if planned.data == "text":
            assert arguments.text is not None
            train_corpus(arguments.text)
            eval_corpus(arguments.text)
            return
        if planned.data == "task":
            self.rows(planned, causal=self._reads_causally(planned))
            return
        dataset = self._dataset(planned).dataset
        if planned.spec.needs_labels and not dataset.is_labelled("train"):
            raise ConfigError(f"stage {name} learns from labels, and {dataset.name} has none; give a labelled task.")

    def stage(self, planned: PlannedStage) -> dict[str, Any]:
        """Train one stage, or return the result it already has."""
        spec, config, ranks = planned.spec, self.config, self.ranks
        folder = self.output_dir / spec.name
        identity = ranks.gather(ranks.on_main(lambda: self._claim(planned)))[0]
        if ranks.gather(self.models.finished(spec.name))[0]:
            log.info("Stage %s is finished already.", spec.name)
            return self._result(planned)
        stage, estimate = ranks.main_first(lambda: self._build(planned))
        objective = stage.objective
        place(objective, ranks, fsdp=config.fsdp, fsdp_teacher=config.fsdp_teacher)
        made = objective.auxiliary()["filters"] if spec.makes == "filters" else objective.student
        if ranks.world_size > 1 and config.fsdp:
            made = WholeCopy(made, ranks)
        trainer = StageTrainer(
            stage, planned.arguments, folder, seed=config.seed, ranks=ranks, flag=self.flag, fsdp=config.fsdp, identity=identity
        )
        with explaining_shortage(estimate, spec.name):
            result = trainer.run()
        whole = made.gathered() if isinstance(made, WholeCopy) else made
        ranks.on_main(lambda: self._finish(planned, whole, result, identity))
        return self._result(planned)

    def _build(self, planned: PlannedStage) -> tuple[Stage, MemoryEstimate]:
        """A stage with its models and rows, and what its training needs; refused where there is no room for it."""
        spec, arguments = planned.spec, planned.arguments
        head = self.head(planned)
        teacher = self.models.teacher(spec, arguments, head) if spec.needs_teacher else None
        student = self.models.trained(spec, arguments, teacher, head)
        rows = self.rows(planned, causal=reads_last_token(student))
        cached = None
        if isinstance(teacher, CachedTeacher):
            cached = self._cached_lesson(planned, student, teacher, rows)
        for model, role in ((student, spec.trains), (teacher, "teacher")):
            if model is not None and not isinstance(model, CachedTeacher):
                check_padded_vocabulary(model, self.tokenizer, role, largest_id(rows, model, self.tokenizer))
                check_row_length(model, -(-rows.longest // 8) * 8, role)
                if arguments.torch_compile:
                    model.model.base_model.compile(dynamic=True)
        stage = build_stage(
            spec,
            StageInputs(
                student=student,
                teacher=teacher,
                tokenizer=self.tokenizer,
                options=planned.options,
                rows=rows,
                eval_batch_size=arguments.per_device_eval_batch_size,
                seed=self.config.seed,
                cached=cached,
                row_generator=None if cached is None else partial(counter_torch_generator, self.config.seed),
                filters=self.models.filters(spec),
            ),
        )

        return self._with_room(planned, stage, None if isinstance(teacher, CachedTeacher) else teacher, rows)

    def _with_room(self, planned: PlannedStage, stage: Stage, teacher: Model | None, rows: Rows) -> tuple[Stage, MemoryEstimate]:
        """Refuse what does not fit into memory or on the disk, and let what runs out of memory all the same say what it needed."""
        ranks, arguments = self.ranks, planned.arguments
        training, evaluation = (
            memory_estimate(
                doing,
                stage.objective,
                teacher,
                arguments,
                rows.longest,
                ranks.device,
                sequences=int(np.diff(train_sequences(rows).first).max()),
                shards=ranks.world_size if self.config.fsdp else 1,
                teacher_shards=ranks.world_size if self.config.fsdp_teacher else 1,
            )
            for doing in DOINGS
        )
        for estimate in (training, evaluation):
            check_memory(estimate, stage.name, ranks.device)
        if ranks.is_main:
            folder, limit = self.output_dir / stage.name, arguments.save_total_limit
            check_disk(folder, stage.objective, save_total_limit=limit, keeps_best=stage.keep == "best")
        evaluate = stage.evaluate
        if evaluate is None:
            return stage, training

        def explained(share: Share) -> dict[str, float]:
            with explaining_shortage(evaluation, stage.name):
                return evaluate(share)

        return replace(stage, evaluate=explained), training

    def _cached_lesson(self, planned: PlannedStage, student: Model, teacher: CachedTeacher, rows: Rows) -> CachedLesson:
        """What the stage reads of its teacher's cache."""
        spec, options, cache = planned.spec, planned.options, self.teacher_caches[planned.spec.name]
        kept = student.kept if isinstance(student, LanguageModel) else slice(0)
        compared = () if spec.check_models is None else spec.check_models(student.model, teacher.model, options)
        lesson = lesson_of(spec, LessonInputs(options, rows, self.tokenizer, kept, known_ids(teacher, self.tokenizer), compared))
        contents = {
            **lesson_contents(lesson, rows, student, options, self.config.seed),
            **settings_contents(planned.arguments, planned.data, self.models.vocabulary_inputs()),
        }
        found = cached_lesson(cache, planned.arguments.teacher, lesson, options, contents)
        check_rows(cache, rows, planned.arguments, self.config.seed, self.ranks.world_size)
        return found

    def head(self, planned: PlannedStage) -> TaskHead | None:
        """The head of the models in this stage: its own task's, else that of the next stage that has labels; None: the LM's own."""
        task = planned.arguments.task
        if planned.data == "task":
            assert task is not None
            return TaskHead("classification", task.cloze.num_labels) if task.cloze.kind == "classification" else None
        for stage in self.stages[self.stages.index(planned) :]:
            if stage.data == "dataset":
                dataset = self._dataset(stage).dataset
                if dataset.is_labelled("train"):
                    relu = getattr(planned.options, "relu_head", False)
                    return TaskHead(dataset.kind, dataset.num_outputs, dataset.label_names, dataset.own_classes, relu)
        return None

    def _dataset(self, planned: PlannedStage) -> DatasetRows:
        """Read and encoded once for all stages that have the same."""
        arguments = planned.arguments.dataset
        assert arguments is not None
        if arguments not in self.datasets:
            self.datasets[arguments] = dataset_rows(arguments, load_dataset(arguments), self.tokenizer)
        return self.datasets[arguments]

    def rows(self, planned: PlannedStage, *, causal: bool) -> Rows:
        arguments = planned.arguments
        if planned.data == "dataset":
            return self._dataset(planned)
        if planned.data == "text":
            assert arguments.text is not None
            return text_rows(arguments.text, self.tokenizer, self.cache_dir, causal=causal, poll=self.flag.poll_alone)
        assert arguments.task is not None
        if planned.spec.name not in self.cloze_rows:
            self.cloze_rows[planned.spec.name] = cloze_rows(arguments.task, self.tokenizer, causal=causal)
        return self.cloze_rows[planned.spec.name]

    def _reads_causally(self, planned: PlannedStage) -> bool:
        """Whether the model that reads the stage's cloze questions is a decoder, as far as its teacher tells."""
        teacher = planned.arguments.teacher_model_name_or_path
        return self.head(planned) is None and teacher is not None and is_decoder(teacher)

    def _finish(self, planned: PlannedStage, made: Any, result: StageResult, identity: str) -> None:
        """Save what the stage made under its final name, then the result: a stage is finished when its result is there."""
        spec = planned.spec
        folder = self.output_dir / spec.name
        name = _made_name(spec)
        if broken := [name for name, value in made.named_parameters() if not bool(value.isfinite().all())]:
            raise NonFiniteError(
                f"Stage {spec.name} has made weights that are not finite, {', '.join(broken[:3])} among them, and does not save them. "
                f"Lower learning_rate (now {planned.arguments.learning_rate}), or look at weight_decay and adam_epsilon."
            )
        if (folder / name).exists() and read_manifest(folder / name).get("identity") == identity:
            remove_sealed(folder / name)  # a process was killed between this name and the result
        with new_folder(folder / name) as unfinished:
            if spec.makes == "filters":
                made.save(unfinished)
            else:
                save_model(made, self.tokenizer, unfinished)
                write_bytes_synced(unfinished / README_FILE, readme(unfinished, name).encode())
            write_json_atomic(unfinished / PROVENANCE_FILE, provenance(self.config, planned, result, self.ranks, self.output_dir))
            seal(unfinished, {"identity": identity})
        write_json_atomic(folder / RESULT_FILE, {**asdict(result), "identity": identity})
        draw_stage(folder)

    def _result(self, planned: PlannedStage) -> dict[str, Any]:
        """What a finished stage has recorded, and the folder that it made."""
        folder, name = self.output_dir / planned.spec.name, _made_name(planned.spec)
        try:
            result = read_json(folder / RESULT_FILE, "identity", *(f.name for f in fields(StageResult) if f.default is MISSING))
            if not isinstance(result["scores"], dict) or not all(isinstance(result[key], int | float) for key in ("steps", "seconds")):
                raise Damaged(f"{folder / RESULT_FILE} does not hold the result of a stage.")
        except Damaged as damage:
            raise ValueError(f"{damage} Put back a copy, or delete it: the stage then goes on from its newest checkpoint.") from damage
        del result["identity"]
        return {**result, f"{name}_dir": str(folder / name)}


def _made_name(spec: StageSpec) -> str:
    """The folder of what a stage makes, below the stage's own."""
    return FILTERS_FOLDER if spec.makes == "filters" else spec.trains
