"""Where the models of a run come from: finished stages, folders and hub names, or a configuration with new weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.registry import METHODS, StageSpec
from ..methods.teaching import Model
from ..models.cloze_scores import check_label_words
from ..models.folder import VOCAB_MAP_FOLDER
from ..models.language_model import LanguageModel
from ..models.load import known_ids, load_config, load_frozen, load_language_model, load_map, tell_padding
from ..models.prune import prune_model
from ..models.settings import building
from ..models.student import build_student, student_config
from ..models.task_model import TaskHead, TaskModel, build_task_model, load_task_model
from ..models.teacher_cache import CachedTeacher, read_header
from ..models.truncate import keep_layers, parse_layers
from ..recipes import label_words
from ..sealed import Damaged, seal, verify
from ..store import new_folder
from ..tasks.cloze import label_word_ids
from ..tasks.cloze_task import ClozeTask
from ..tasks.token_rows import num_ids, pad_id
from ..vocab.map import VocabMap
from .config import RunConfig, StageArguments, TextData
from .data import train_corpus
from .identity import vocabulary_settings
from .output import FILTERS_FOLDER, LABEL_WORDS, RESULT_FILE, differences
from .schema import ConfigError
from .vocabulary import build_vocab_map, protected_words


class RunModels:
    """Loads what each stage of one run trains, and its teacher."""

    def __init__(
        self, config: RunConfig, output_dir: Path, cache_dir: Path, tokenizer: Any, poll: Callable[[], None] = lambda: None
    ) -> None:
        """poll: called now and then while a vocabulary is counted; what it raises ends that."""
        self.config, self.output_dir, self.cache_dir, self.tokenizer, self.poll = config, output_dir, cache_dir, tokenizer, poll
        vocabulary = config.vocabulary
        self.vocabulary = vocabulary and replace(vocabulary, protected=(*vocabulary.protected, *label_words(config.method)))
        """The kept vocabulary, which has the label words of the tasks that the method has recipes for."""

    def finished(self, stage: str) -> bool:
        return (self.output_dir / stage / RESULT_FILE).is_file()

    def teacher_source(self, spec: StageSpec, arguments: StageArguments) -> str:
        """Name the teacher beside the student: what the run itself has trained, else the one that is given."""
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
            return load_language_model(source, dropout=dropout) if head is None else self._task_model(source, head, dropout=dropout)
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
        if source is not None and (own := load_map(source)) is not None:
            return own.kept_ids
        vocab_map = self._vocab_map(teacher, map_folder) if isinstance(teacher, LanguageModel) else None
        return slice(known_ids(teacher, self.tokenizer)) if vocab_map is None else vocab_map.kept_ids

    def vocabulary_inputs(self) -> dict[str, Any] | None:
        """What the vocabulary map of the run is made of, JSON-able; None without one."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            return None
        text, tasks = self._counted()
        inputs = {
            "settings": vocabulary_settings(vocabulary),
            "corpus": None if text is None or vocabulary.counts is not None else train_corpus(text).fingerprint,
            LABEL_WORDS: sorted({id for task in tasks for id in protected_words(task, self.tokenizer)}),
        }
        return json.loads(json.dumps(inputs))

    def waits(self, spec: StageSpec) -> bool:
        """Whether stages of the run before this one are not finished, whose models it may start from."""
        return not all(self.finished(stage.name) for stage in self._stages_before(spec))

    def sources(self, spec: StageSpec, arguments: StageArguments) -> dict[str, str]:
        """Where the weights that a stage reads lie, by what they are to it.

        A cached teacher is not among them: its cache says what it was.
        """
        named = arguments.teacher_model_name_or_path
        start = self._made_before(spec, spec.trains) or (named if spec.trains == "teacher" else self.config.model_name_or_path)
        found = {"start": start, **{f"filters of {stage}": str(folder) for stage, folder in self.filters(spec).items()}}
        if spec.needs_teacher and arguments.teacher.kind == "model":
            found["teacher"] = self.teacher_source(spec, arguments)
        elif start is None and not (spec.needs_teacher and named is not None and not Path(named).is_dir()):
            # Of a cached teacher on the hub the weights need not be here, and its cache has the revision.
            found["teacher"] = named
        for role in ("teacher", "student"):
            found[f"options.{role}_filters"] = arguments.options.get(f"{role}_filters")
        return {what: source for what, source in found.items() if source is not None}

    def filters(self, spec: StageSpec) -> dict[str, Path]:
        """Folders of the filters that finished stages of the run before this one have made, by stage."""
        made = [stage.name for stage in self._stages_before(spec) if stage.makes == "filters" and self.finished(stage.name)]
        return {name: self.output_dir / name / FILTERS_FOLDER for name in made}

    def builds_student(self, spec: StageSpec) -> bool:
        """Whether the stage begins with a student that no stage of the run has made."""
        return spec.trains == "student" and self._stage_before(spec, "student") is None

    def check_new_student(self, spec: StageSpec, arguments: StageArguments, head: TaskHead | None) -> None:
        """Refuse settings of a new student that make no model, and a named one without its task's words, before any row is read."""
        config = self.config
        if arguments.task is not None and config.model_name_or_path is not None:
            self._check_label_words(arguments.task.cloze, config.model_name_or_path)
        if self.builds_student(spec) and config.model_name_or_path is None:
            self._student_config(arguments, head)

    def _student_config(self, arguments: StageArguments, head: TaskHead | None) -> Any:
        """The configuration of a new student with all of its teacher's ids."""
        config, teacher = self.config, arguments.teacher_model_name_or_path
        base = load_config(teacher) if teacher is not None else base_config(config.student, self.tokenizer)
        rows = num_ids(self.tokenizer) if teacher is None else min(num_ids(self.tokenizer), base.get_text_config().vocab_size)
        return student_config(base, {**config.student, **arguments.dropout}, None, rows, head)

    def _check_label_words(self, task: ClozeTask, student: str) -> None:
        if task.kind == "verbalizer" and (own := load_map(student)) is not None:
            check_label_words(task, torch.tensor(label_word_ids(task, self.tokenizer)), own)

    def skeletons(self, arguments: StageArguments) -> tuple[Any, Any]:
        """Backbones of student and teacher without weights: what can be refused of them is refused before anything is trained."""
        from transformers import AutoModel

        config = self.config
        assert arguments.teacher_model_name_or_path is not None
        name = config.model_name_or_path
        new = self._student_config(arguments, None) if name is None else load_config(name, arguments.dropout)
        with torch.device("meta"):
            teacher, student = (AutoModel.from_config(each) for each in (load_config(arguments.teacher_model_name_or_path), new))
            if name is not None and config.student_layers is not None:
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
        before = reversed(self._stages_before(spec))
        return next((stage.name for stage in before if stage.trains == role and stage.makes == "model"), None)

    def _stages_before(self, spec: StageSpec) -> list[StageSpec]:
        """The run's stages before this one, in the method's order."""
        stages = METHODS[self.config.method].stages
        before = stages[: [stage.name for stage in stages].index(spec.name)]
        return [stage for stage in before if stage.name in self.config.stages]

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
            if config.student_layers is not None:
                named.model = keep_layers(named.model, parse_layers(config.student_layers, named.model))
            return named
        student = self._student_config(arguments, head)
        with building(config.student):
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
        rows = num_ids(self.tokenizer) if teacher is None else known_ids(teacher, self.tokenizer)
        if named is None:
            base = teacher.model.config if teacher is not None else base_config(config.student, self.tokenizer)
            return build_student(base, {**config.student, **arguments.dropout}, vocab_map, seed=config.seed, vocabulary=rows)
        if vocab_map is not None:
            return prune_model(named.model, vocab_map)
        if named.vocabulary <= rows:
            return named
        tell_padding("student", named.vocabulary, rows)
        tokens = torch.arange(rows)
        sliced = VocabMap(tokens, torch.cat([tokens, tokens.new_zeros(named.vocabulary - rows)]))
        return LanguageModel(prune_model(named.model, sliced).model)

    def _counted(self) -> tuple[TextData | None, list[ClozeTask]]:
        """The text whose tokens are counted, and the tasks whose label words are kept."""
        stages = list(self.config.stages.values()) or [self.config]
        text = next((stage.text for stage in stages if stage.text is not None), None)
        return text, [stage.task.cloze for stage in stages if stage.task is not None]

    def _vocab_map(self, rows_of: LanguageModel | CachedTeacher | None, folder: Path) -> VocabMap | None:
        """The run's map, which is kept in `folder` once it is made."""
        if self.vocabulary is None:
            return None
        inputs = self.vocabulary_inputs()
        if folder.exists():
            _check_vocab_map(folder, inputs)
            return VocabMap.load(folder)
        if rows_of is None:
            raise ConfigError("vocabulary is set, and there is neither a teacher nor a named student whose rows give the stand-ins.")
        vocab_map = self._cached_map(rows_of) if isinstance(rows_of, CachedTeacher) else None
        if vocab_map is None:
            text, tasks = self._counted()
            corpus = None if text is None else train_corpus(text)
            rows = load_frozen(rows_of.name_or_path) if isinstance(rows_of, CachedTeacher) else rows_of
            vocab_map = build_vocab_map(self.vocabulary, self.tokenizer, rows, corpus, tasks, self.cache_dir, self.poll)
        with new_folder(folder) as unfinished:
            vocab_map.save(unfinished)
            seal(unfinished, {"vocabulary": inputs})
        return vocab_map

    def _cached_map(self, teacher: CachedTeacher) -> VocabMap | None:
        """The map that was made for the cache, if this run would make the same: the teacher's weights are not needed then."""
        folder = teacher.folder / VOCAB_MAP_FOLDER
        same = read_header(teacher.folder)["contents"]["vocabulary"] == self.vocabulary_inputs()
        return VocabMap.load(folder) if same and folder.is_dir() else None


def _check_vocab_map(folder: Path, inputs: Mapping[str, Any] | None) -> None:
    """Refuse a vocabulary map that is not whole, or was made of something else than `inputs`."""
    try:
        found = verify(folder).get("vocabulary")
    except (Damaged, OSError) as error:
        raise ValueError(f"{folder} is not a vocabulary map that fastkd made for a run ({error}); move it away.") from error
    if changed := differences({"vocabulary": found}, {"vocabulary": inputs}):
        raise ValueError(f"{folder} was made of something else: {'; '.join(changed)}. Put that back, or move the folder away.")


def base_config(overrides: Mapping[str, Any], tokenizer: Any) -> Any:
    """The configuration of a student's own architecture, where no teacher gives one, with the tokenizer's special ids."""
    from transformers import CONFIG_MAPPING

    kind = str(overrides.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"student.model_type is {kind!r}; without a teacher it must name an architecture that transformers knows.")
    config = CONFIG_MAPPING[kind]()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"):
        if hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name))
    return config
