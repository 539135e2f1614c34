"""Where the models of a run come from: finished stages, folders and hub names, or a configuration with new weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import new_folder
from ..methods.registry import METHODS, StageSpec
from ..methods.teaching import Model
from ..models.language_model import LanguageModel
from ..models.load import VOCAB_MAP_FOLDER, check_padded_vocabulary, load_config, load_frozen, load_language_model
from ..models.student import build_student, prune_model, student_config
from ..models.task_model import TaskHead, TaskModel, build_task_model, load_task_model
from ..models.teacher_cache import CachedTeacher, read_header
from ..models.truncate import keep_layers, parse_layers
from ..tasks.cloze_task import ClozeTask
from ..tasks.token_rows import pad_id
from ..vocab.map import VocabMap
from .config import RunConfig, StageArguments, TextData
from .data import train_corpus
from .schema import ConfigError
from .vocabulary import build_vocab_map

RESULT_FILE = "result.json"


class RunModels:
    """Loads what each stage of one run trains, and its teacher."""

    def __init__(
        self, config: RunConfig, output_dir: Path, cache_dir: Path, tokenizer: Any, poll: Callable[[], None] = lambda: None
    ) -> None:
        """poll: called now and then while a vocabulary is counted; what it raises ends that."""
        self.config, self.output_dir, self.cache_dir, self.tokenizer, self.poll = config, output_dir, cache_dir, tokenizer, poll

    def finished(self, stage: str) -> bool:
        return (self.output_dir / stage / RESULT_FILE).is_file()

    def teacher_source(self, spec: StageSpec, arguments: StageArguments) -> str:
        """Of the teacher beside the student: what the run itself has trained, else the one that is named."""
        source = self._made_before(spec, "teacher") or arguments.teacher_model_name_or_path
        assert source is not None
        return source

    def teacher(self, spec: StageSpec, arguments: StageArguments, head: TaskHead | None) -> Model | CachedTeacher:
        """The frozen teacher beside the student, or what stands for it where a cache says what it would say."""
        source = self.teacher_source(spec, arguments)
        if arguments.teacher.kind == "cache":
            assert arguments.teacher.path is not None
            return CachedTeacher(source, arguments.teacher.path)
        if head is None:
            teacher: Model = load_frozen(source)
        else:
            teacher = self._task_model(source, head, needs_head=spec.reads_scores).eval().requires_grad_(False)
        check_padded_vocabulary(teacher, self.tokenizer, "teacher")
        return teacher

    def trained(
        self, spec: StageSpec, arguments: StageArguments, teacher: Model | CachedTeacher | None, head: TaskHead | None
    ) -> Model:
        """What the stage trains: the result of the stage before, else the model that is named, or a new student."""
        source = self._made_before(spec, spec.trains)
        if source is None and spec.trains == "teacher":
            source = arguments.teacher_model_name_or_path
        if source is not None:
            dropout = arguments.dropout
            model = load_language_model(source, dropout=dropout) if head is None else self._task_model(source, head, dropout=dropout)
            check_padded_vocabulary(model, self.tokenizer, spec.trains)
            return model
        if teacher is None and arguments.teacher_model_name_or_path is not None and self.config.model_name_or_path is None:
            # A stage without a teacher may still name one: its architecture and rows are what the student is built from.
            teacher = load_frozen(arguments.teacher_model_name_or_path) if head is None else None
        return self._first_student(teacher, arguments) if head is None else self._first_task_student(arguments, head)

    def kept(self, spec: StageSpec, teacher: Model, map_folder: Path) -> slice | Tensor:
        """The teacher's rows behind those of the student that the stage trains, whether it is there yet or not. A map that has to be
        made for that goes to `map_folder`."""
        config = self.config
        made = self._stage_before(spec, "student")
        source = config.model_name_or_path if made is None or not self.finished(made) else str(self.output_dir / made / "student")
        if source is not None and (Path(source) / VOCAB_MAP_FOLDER).is_dir():
            return VocabMap.load(Path(source) / VOCAB_MAP_FOLDER).kept_ids
        vocab_map = self._vocab_map(teacher, map_folder) if isinstance(teacher, LanguageModel) else None
        return slice(len(self.tokenizer)) if vocab_map is None else vocab_map.kept_ids

    def vocabulary_inputs(self) -> dict[str, Any] | None:
        """What the vocabulary map of the run is made of, JSON-able; None without one."""
        if self.config.vocabulary is None:
            return None
        text, tasks = self._counted()
        inputs = {
            "settings": asdict(self.config.vocabulary),
            "corpus": None if text is None else train_corpus(text).fingerprint,
            "tasks": [asdict(task) for task in tasks],
        }
        return json.loads(json.dumps(inputs))

    def skeletons(self, arguments: StageArguments) -> tuple[Any, Any]:
        """Backbones of student and teacher without weights: what can be refused of them is refused before anything is trained."""
        from transformers import AutoModel

        config = self.config
        assert arguments.teacher_model_name_or_path is not None
        teacher_config = load_config(arguments.teacher_model_name_or_path)
        with torch.device("meta"):
            teacher = AutoModel.from_config(teacher_config)
            if config.model_name_or_path is None:
                return AutoModel.from_config(student_config(teacher_config, {**config.student, **arguments.dropout}, None)), teacher
            student = AutoModel.from_config(load_config(config.model_name_or_path, arguments.dropout))
            if config.student_layers is not None:
                student = keep_layers(student, parse_layers(config.student_layers, student))
        return student, teacher

    def _made_before(self, spec: StageSpec, role: str) -> str | None:
        """Folder of the model that the latest stage before this one made in that role; None if the run has no such stage."""
        made = self._stage_before(spec, role)
        if made is None:
            return None
        if not self.finished(made):
            raise ConfigError(f"stage {spec.name} starts from the {role} of {made}, which is not finished; run that first.")
        return str(self.output_dir / made / role)

    def _stage_before(self, spec: StageSpec, role: str) -> str | None:
        """The run's latest stage before this one that makes a model in that role."""
        stages = METHODS[self.config.method].stages
        before = stages[: [stage.name for stage in stages].index(spec.name)]
        return next(
            (s.name for s in reversed(before) if s.name in self.config.stages and s.trains == role and s.makes == "model"), None
        )

    def _task_model(self, source: str, head: TaskHead, **options: Any) -> TaskModel:
        return load_task_model(source, head, seed=self.config.seed, pad_id=pad_id(self.tokenizer), **options)

    def _first_task_student(self, arguments: StageArguments, head: TaskHead) -> TaskModel:
        config = self.config
        if config.vocabulary is not None and not (self.output_dir / VOCAB_MAP_FOLDER).is_dir():
            raise ConfigError(
                "vocabulary is set, and a student for a labelled task keeps the vocabulary that it has; prune the model that it starts "
                "from by `fastkd vocab prune`, or distil on text first."
            )
        if config.model_name_or_path is not None:
            named = self._task_model(config.model_name_or_path, head, dropout=arguments.dropout)
            check_padded_vocabulary(named, self.tokenizer, "student")
            if config.student_layers is not None:
                named.model = keep_layers(named.model, parse_layers(config.student_layers, named.model))
            return named
        teacher = arguments.teacher_model_name_or_path
        base = load_config(teacher) if teacher is not None else base_config(config.student)
        student = student_config(base, {**config.student, **arguments.dropout}, None, len(self.tokenizer))
        return build_task_model(student, head, seed=config.seed, pad_id=pad_id(self.tokenizer))

    def _first_student(self, teacher: Model | CachedTeacher | None, arguments: StageArguments) -> LanguageModel:
        assert not isinstance(teacher, TaskModel)
        config = self.config
        source = config.model_name_or_path
        named = None if source is None else load_language_model(source, dropout=arguments.dropout)
        if named is not None and config.student_layers is not None:
            named = LanguageModel(keep_layers(named.model, parse_layers(config.student_layers, named.model)), named.vocab_map)
        if named is not None and named.vocab_map is not None:
            return named
        vocab_map = self._vocab_map(teacher or named, self.output_dir / VOCAB_MAP_FOLDER)
        if named is None:
            base = teacher.model.config if teacher is not None else base_config(config.student)
            vocabulary = None if vocab_map is not None else len(self.tokenizer)
            return build_student(base, {**config.student, **arguments.dropout}, vocab_map, seed=config.seed, vocabulary=vocabulary)
        check_padded_vocabulary(named, self.tokenizer, "student")
        if vocab_map is not None:
            return prune_model(named.model, vocab_map)
        padding = named.vocabulary - len(self.tokenizer)
        if not padding:
            return named
        tokens = torch.arange(len(self.tokenizer))
        sliced = VocabMap(tokens, torch.cat([tokens, tokens.new_zeros(padding)]))
        return LanguageModel(prune_model(named.model, sliced).model)

    def _counted(self) -> tuple[TextData | None, list[ClozeTask]]:
        """The text whose tokens are counted, and the tasks whose label words are kept."""
        stages = list(self.config.stages.values()) or [self.config]
        text = next((stage.text for stage in stages if stage.text is not None), None)
        return text, [stage.task.cloze for stage in stages if stage.task is not None]

    def _vocab_map(self, rows_of: LanguageModel | CachedTeacher | None, folder: Path) -> VocabMap | None:
        """The run's map, which is kept in `folder` once it is made."""
        if self.config.vocabulary is None:
            return None
        if folder.is_dir():
            return VocabMap.load(folder)
        if rows_of is None:
            raise ConfigError("vocabulary is set, and there is neither a teacher nor a named student whose rows give the stand-ins.")
        vocab_map = self._cached_map(rows_of) if isinstance(rows_of, CachedTeacher) else None
        if vocab_map is None:
            text, tasks = self._counted()
            corpus = None if text is None else train_corpus(text)
            rows = load_frozen(rows_of.name_or_path) if isinstance(rows_of, CachedTeacher) else rows_of
            vocab_map = build_vocab_map(self.config.vocabulary, self.tokenizer, rows, corpus, tasks, self.cache_dir, self.poll)
        with new_folder(folder) as unfinished:
            vocab_map.save(unfinished)
        return vocab_map

    def _cached_map(self, teacher: CachedTeacher) -> VocabMap | None:
        """The map that was made for the cache, if this run would make the same: the teacher's weights are not needed then."""
        folder = teacher.folder / VOCAB_MAP_FOLDER
        same = read_header(teacher.folder)["contents"]["vocabulary"] == self.vocabulary_inputs()
        return VocabMap.load(folder) if same and folder.is_dir() else None


def base_config(overrides: Mapping[str, Any]) -> Any:
    """The configuration of a student's own architecture, where no teacher gives one."""
    from transformers import CONFIG_MAPPING

    kind = str(overrides.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"student.model_type is {kind!r}; without a teacher it must name an architecture that transformers knows.")
    return CONFIG_MAPPING[kind]()
