"""Floor 5, train: the frozen teacher of a stage, run once over the training rows, its outputs written as a cache. Resumable."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods.cached import CacheForm, Kind, to_cache
from ..methods.registry import LessonInputs
from ..methods.stage_data import MakeBatch, Sequences, batch_maker, train_sequences
from ..methods.teaching import Lesson, Teacher
from ..models.load import VOCAB_MAP_FOLDER, check_row_length, is_decoder
from ..models.teacher_cache import HEADER, CachedTeacher, Shard, finished_shard, read_header, write_header, write_shard
from ..store import InUse, Lock, lock, sweep
from .batches import counter_torch_generator
from .cached_teacher import check_cacheable, check_form, form_contents, lesson_contents, lesson_of, models_contents
from .config import RunConfig, StageArguments, TeacherArguments
from .log import Progress
from .output import LOCK_FILE, RUN_FILE, refuse_model_folder
from .ranks import Ranks
from .run import PlannedStage, Run, plan_stages
from .signals import SignalFlag

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHARD_BYTES = 256 * 2**20
_MOST_SHARD_ROWS = 65536
# What a header says for people, and what follows from the rest.
_INFORMATIVE = {"teacher", "teacher_revision", "convention"}


@dataclass(frozen=True)
class CacheSummary:
    """What a call of `write_cache` did."""

    shards: int
    rows: int
    tokens: int
    bytes: int
    """Of all shards, those that were there before included."""
    new_rows: int
    new_tokens: int
    seconds: float
    """Spent on the new ones."""


def write_cache(
    config: RunConfig,
    stage: str,
    folder: Path,
    *,
    kind: Kind = "dense",
    k: int = 64,
    dtype: str = "bfloat16",
    shard_rows: int | None = None,
) -> CacheSummary:
    """Write into `folder` what the teacher of `stage` says of every training row, or go on with what is there.

    What `fastkd cache` calls; under torchrun every rank writes the shards that are its turn. The files depend neither on interruptions
    nor on the number of ranks. shard_rows: examples in a shard; None: about 256 MiB of them.
    """
    if shard_rows is not None and shard_rows < 1:
        raise ValueError(f"shard_rows is {shard_rows}; a shard holds at least 1 example.")
    config = _online(config)
    (planned,) = plan_stages(config, stage)
    check_cacheable(planned.spec)
    with (
        Ranks.join(use_cpu=config.use_cpu, timeout_seconds=config.ddp_timeout) as ranks,
        ranks.naming_absentees("fastkd cache"),
        SignalFlag() as flag,
        ranks.on_main(lambda: _held(folder)) or nullcontext(),
    ):
        run = Run(config, Path(config.output_dir), [planned], ranks, flag)
        ranks.main_first(run.check)
        writer, contents = ranks.main_first(lambda: _prepared(run, planned, folder, kind, k, dtype, shard_rows))
        ranks.on_main(lambda: _begin(folder, contents))
        return _write(folder, writer, contents, ranks)


def _prepared(
    run: Run, planned: PlannedStage, folder: Path, kind: Kind, k: int, dtype: str, shard_rows: int | None
) -> tuple[_Writer, dict[str, Any]]:
    """What writes the shards, and what the header will say of them."""
    spec, arguments, options, seed = planned.spec, planned.arguments, planned.options, run.config.seed
    model = run.models.teacher(spec, arguments, run.head(planned))
    assert not isinstance(model, CachedTeacher)
    rows = run.rows(planned, causal=is_decoder(model.model.config))
    check_row_length(model, -(-rows.longest // 8) * 8, "teacher")
    kept = run.models.kept(spec, model, folder / VOCAB_MAP_FOLDER)
    compared = () if spec.check_models is None else spec.check_models(*run.models.skeletons(arguments), options)
    lesson = lesson_of(spec, LessonInputs(options, rows, run.tokenizer, kept, compared))
    form = CacheForm(kind, DTYPES[dtype], k, options.temperature if kind == "topk" else 1.0)
    check_form(form, lesson, options)
    sequences = train_sequences(rows)
    contents = {
        "stage": f"{run.config.method} {spec.name}",
        **models_contents(run.models.teacher_source(spec, arguments), run.tokenizer),
        **lesson_contents(lesson, rows, model, options, seed),
        **form_contents(form),
        "vocabulary": run.models.vocabulary_inputs(),
        "rows": len(sequences.first) - 1,
        "shard_rows": shard_rows or _planned_rows(model, lesson, form, sequences),
    }
    make_batch = batch_maker(rows, model, run.tokenizer, contents["mask_probability"], partial(counter_torch_generator, seed))
    teacher = Teacher(model.to(run.ranks.device), lesson)
    return _Writer(teacher, make_batch, sequences, form, arguments, run.ranks.device, run.flag), contents


def _write(folder: Path, writer: _Writer, contents: dict[str, Any], ranks: Ranks) -> CacheSummary:
    """This rank's shards, then the header with those of all."""
    count, size = contents["rows"], contents["shard_rows"]
    shards: dict[int, dict[str, Any]] = {}
    new_rows = new_tokens = 0
    started = time.perf_counter()
    with Progress(count, description="cache", shown=ranks.is_main) as bar:
        for number in range(ranks.rank, -(-count // size), ranks.world_size):
            examples = np.arange(number * size, min((number + 1) * size, count))
            lengths = writer.lengths(examples)
            shard = finished_shard(folder, number, lengths)
            if shard is None:
                shard = write_shard(folder, number, lengths, writer.tensors(examples))
                new_rows, new_tokens = new_rows + len(examples), new_tokens + shard.tokens
            shards[number] = asdict(shard)
            bar.update(len(examples) * ranks.world_size)
    seconds = time.perf_counter() - started
    everyone = ranks.gather([shards, new_rows, new_tokens, seconds], patient=True)
    # JSON has made texts of the numbers where there are several ranks.
    found = {int(number): Shard(**shard) for theirs, *_ in everyone for number, shard in theirs.items()}
    written = [found[number] for number in sorted(found)]
    ranks.on_main(lambda: write_header(folder, contents, written))
    return CacheSummary(
        shards=len(written),
        rows=count,
        tokens=sum(shard.tokens for shard in written),
        bytes=sum(shard.bytes for shard in written),
        new_rows=sum(rows for _, rows, _, _ in everyone),
        new_tokens=sum(tokens for _, _, tokens, _ in everyone),
        seconds=max(seconds for *_, seconds in everyone),
    )


class _Writer:
    """Runs the teacher over the rows of one shard after the other."""

    def __init__(
        self,
        teacher: Teacher,
        make_batch: MakeBatch,
        sequences: Sequences,
        form: CacheForm,
        arguments: StageArguments,
        device: torch.device,
        flag: SignalFlag,
    ) -> None:
        self.teacher, self.make_batch, self.sequences, self.form = teacher, make_batch, sequences, form
        self.batch_size, self.device, self.flag = arguments.per_device_eval_batch_size, device, flag
        half = torch.bfloat16 if arguments.bf16 else torch.float16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=arguments.bf16 or arguments.fp16)

    def lengths(self, examples: np.ndarray) -> np.ndarray:
        first = self.sequences.first
        return self.sequences.lengths[first[examples[0]] : first[examples[-1] + 1]]

    def tensors(self, examples: np.ndarray) -> dict[str, Tensor]:
        """A shard's tensors. Which rows share a batch depends on the shard alone, so its bytes do too."""
        first = self.sequences.first[examples[0]]
        starts = np.concatenate([[0], self.lengths(examples).cumsum()])
        shard: dict[str, Tensor] = {}
        for batch_examples in self._batches(examples):
            self.flag.poll()
            numbers = self.sequences.behind(batch_examples) - first
            for name, tensor in self._outputs(batch_examples).items():
                per_token = name.startswith("token.")
                if name not in shard:
                    shard[name] = tensor.new_empty(starts[-1] if per_token else len(starts) - 1, *tensor.shape[1:])
                read = 0
                for number in numbers:
                    start, count = (starts[number], starts[number + 1] - starts[number]) if per_token else (number, 1)
                    shard[name][start : start + count] = tensor[read : read + count]
                    read += count
        return shard

    def _batches(self, examples: np.ndarray) -> Iterator[np.ndarray]:
        """Of similar length."""
        first = self.sequences.first
        longest = np.maximum.reduceat(self.sequences.lengths[: first[examples[-1] + 1]], first[examples])
        examples = examples[np.argsort(longest, kind="stable")]
        yield from (examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size))

    def _outputs(self, examples: np.ndarray) -> dict[str, Tensor]:
        batch = self.make_batch(examples.tolist(), torch.Generator()).to(self.device)
        with self.autocast:
            tensors = to_cache(self.teacher(batch), batch.attention_mask, self.form)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool((tensor.isfinite() | (tensor == -torch.inf)).all()):
                raise ValueError(
                    f"The teacher's {name.partition('.')[2]} are not finite in {tensor.dtype} for some of the training rows "
                    f"{examples.tolist()}. Look at them, or take --dtype float32."
                )
        return {name: tensor.cpu() for name, tensor in tensors.items()}


def _online(config: RunConfig) -> RunConfig:
    """The run with its teachers as models."""
    model = TeacherArguments()
    stages = {name: replace(stage, teacher=model) for name, stage in config.stages.items()}
    return replace(config, teacher=model, stages=stages)


def _held(folder: Path) -> Lock:
    """The lock of the folder; what killed processes left half-written is deleted."""
    refuse_model_folder(folder)
    if (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} is the output_dir of a run; name another folder for the teacher cache.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder / LOCK_FILE)
    except InUse as error:
        raise ValueError(f"The teacher cache {error}") from error
    ours = re.compile(rf"{re.escape(HEADER)}|{VOCAB_MAP_FOLDER}|shard-\d{{5}}-[0-9a-f]{{16}}\.safetensors")
    sweep(folder, lambda name: ours.fullmatch(name) is not None)
    return held


def _begin(folder: Path, contents: dict[str, Any]) -> None:
    """Write the header of an unfinished cache, or refuse what the folder holds already."""
    contents = json.loads(json.dumps(contents))
    if not (folder / HEADER).exists():
        if shard := next(folder.glob("shard-*"), None):
            raise ValueError(f"{folder} holds {shard.name} and no {HEADER}, which would say of what; delete it or take another folder.")
        write_header(folder, contents, None)
        return
    found = read_header(folder)["contents"]
    differences = [
        f"{key} is {found.get(key)!r} there and {contents[key]!r} here"
        for key in contents
        if key not in _INFORMATIVE and found.get(key) != contents[key]
    ]
    if differences:
        raise ValueError(f"{folder} is a teacher cache of something else: {'; '.join(differences)}. Delete it or take another folder.")


def _planned_rows(model: Any, lesson: Lesson, form: CacheForm, sequences: Sequences) -> int:
    """Examples in a shard of about 256 MiB."""
    per_token = len(lesson.layers) * model.model.config.get_text_config().hidden_size * form.dtype.itemsize
    if lesson.words is not None:
        width = lesson.words.stop if isinstance(lesson.words, slice) else len(lesson.words)
        per_token += width * form.dtype.itemsize if form.kind == "dense" else form.k * (4 + form.dtype.itemsize) + 4
    examples = len(sequences.first) - 1
    tokens = max(1.0, float(sequences.lengths.sum()) / examples)
    return int(min(_MOST_SHARD_ROWS, max(1, _SHARD_BYTES // max(1, tokens * per_token))))
