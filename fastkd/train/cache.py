"""Run the frozen teacher of a stage once over the training rows and write its outputs as a cache. Resumable."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
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
from ..methods.stage_data import MakeBatch, Sequences, batch_maker, largest_id, train_sequences
from ..methods.teaching import Lesson, Teacher
from ..models.filters import reads_last_token
from ..models.folder import VOCAB_MAP_FOLDER, one_revision
from ..models.load import check_padded_vocabulary, check_row_length, known_ids
from ..models.teacher_cache import HEADER, CachedTeacher, Shard, finished_shard, read_header, write_header, write_shard
from ..store import InUse, Lock, lock, sweep
from .batches import counter_torch_generator
from .cached_teacher import (
    AGREE,
    check_cacheable,
    check_form,
    disagreement,
    form_contents,
    lesson_contents,
    lesson_of,
    models_contents,
    reading_settings,
    rows_read,
    settings_contents,
    smallest_kind,
)
from .config import RunConfig, StageArguments, TeacherArguments
from .log import Progress
from .output import LOCK_FILE, RUN_FILE, refuse_model_folder
from .ranks import Ranks
from .run import PlannedStage, Run, plan_stages
from .signals import SignalFlag

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHARD_BYTES = 256 * 2**20
_MOST_SHARD_ROWS = 65536
_SHARD = re.compile(r"shard-(\d{5})-[0-9a-f]{16}\.safetensors")
_DISK_SHARE = 0.25
"""Share of the free disk that a cache may take without being asked for."""
# What a header says for people, and what follows from the rest.
_INFORMATIVE = {"teacher", "teacher_revision", "convention", "data", "read", "rows"}


@dataclass(frozen=True)
class CachePlan:
    """What a call of `write_cache` is about to write, as far as it is not there yet; bytes and seconds follow from one batch."""

    form: CacheForm
    has_words: bool
    """Whether the form says anything: scores of tasks and states are stored in one way."""
    rows: int
    tokens: int
    bytes: int
    seconds: float
    free: int
    """Bytes of the disk."""
    read: int
    """Rows that a run of this configuration reads, on as many processes as write."""
    available: int
    """Training rows that there are."""
    processes: int


@dataclass(frozen=True)
class CacheSummary:
    """What a call of `write_cache` did."""

    shards: int
    rows: int
    tokens: int
    bytes: int
    """What all shards take, those that were there before included."""
    new_rows: int
    new_tokens: int
    seconds: float
    """Spent on the new ones."""


def write_cache(
    config: RunConfig,
    stage: str,
    folder: Path,
    *,
    kind: Kind | None = None,
    k: int = 64,
    dtype: str = "bfloat16",
    shard_rows: int | None = None,
    yes: bool = False,
    show: Callable[[CachePlan], None] = lambda plan: None,
) -> CacheSummary:
    """Write into `folder` what the teacher of `stage` says of the training rows that the run reads, or go on with what is there.

    What `fastkd cache` calls; under torchrun every rank writes the shards that are its turn. Unless they are all, which rows are read
    depends on the number of ranks. The files depend on nothing else of it, nor on interruptions.

    Args:
        kind: None: topk where the stage can use it and has more than `k` words, else dense.
        shard_rows: examples in a shard; None: about 256 MiB of them.
        yes: take more than a quarter of the free disk, if need be.
        show: is told on the first rank what will be written, before that begins.

    Raises:
        ValueError: a stage or options whose answers cannot be cached, a folder of something else, or too little free disk.
    """
    if shard_rows is not None and shard_rows < 1:
        raise ValueError(f"shard_rows is {shard_rows}; a shard holds at least 1 example.")
    config = _online(config)
    (planned,) = plan_stages(config, stage)
    check_cacheable(planned.spec)
    with (
        one_revision(),
        Ranks.join(use_cpu=config.use_cpu, timeout_seconds=config.ddp_timeout) as ranks,
        ranks.naming_absentees("fastkd cache"),
        SignalFlag() as flag,
        ranks.on_main(lambda: _held(folder)) or nullcontext(),
    ):
        run = Run(config, Path(config.output_dir), [planned], ranks, flag)
        ranks.main_first(run.check)
        writer, contents = ranks.main_first(lambda: _prepared(run, planned, folder, kind, k, dtype, shard_rows))
        ranks.on_main(lambda: _begin(folder, writer, contents, ranks.world_size, yes, show))
        return _write(folder, writer, contents, ranks)


def _prepared(
    run: Run, planned: PlannedStage, folder: Path, kind: Kind | None, k: int, dtype: str, shard_rows: int | None
) -> tuple[_Writer, dict[str, Any]]:
    """What writes the shards, and what the header will say of them."""
    spec, arguments, options, seed = planned.spec, planned.arguments, planned.options, run.config.seed
    model = run.models.teacher(spec, arguments, run.head(planned))
    assert not isinstance(model, CachedTeacher)
    rows = run.rows(planned, causal=reads_last_token(model))
    check_padded_vocabulary(model, run.tokenizer, "teacher", largest_id(rows, model, run.tokenizer))
    check_row_length(model, -(-rows.longest // 8) * 8, "teacher")
    kept = run.models.kept(spec, model, folder / VOCAB_MAP_FOLDER)
    compared = () if spec.check_models is None else spec.check_models(*run.models.skeletons(arguments), options)
    lesson = lesson_of(spec, LessonInputs(options, rows, run.tokenizer, kept, known_ids(model, run.tokenizer), compared))
    kind = kind or smallest_kind(lesson, options, k)
    form = CacheForm(kind, DTYPES[dtype], k, options.temperature if kind == "topk" else 1.0)
    check_form(form, lesson, options)
    sequences, processes = train_sequences(rows), run.ranks.world_size
    read = rows_read(rows, arguments, seed, processes)
    is_whole = len(read) == len(sequences.first) - 1
    contents = {
        "stage": f"{run.config.method} {spec.name}",
        **models_contents(run.models.teacher_source(spec, arguments), run.tokenizer),
        **lesson_contents(lesson, rows, model, options, seed),
        **form_contents(form),
        **settings_contents(arguments, planned.data, run.models.vocabulary_inputs()),
        "read": None if is_whole else reading_settings(arguments, seed, processes),
        "rows": len(read),
        "rows_sha256": hashlib.sha256(read.astype("<i8").tobytes()).hexdigest(),
        "shard_rows": shard_rows or _planned_rows(model, lesson, form, sequences.lengths[sequences.of(read)].sum() / len(read)),
    }
    make_batch = batch_maker(rows, model, run.tokenizer, contents["mask_probability"], partial(counter_torch_generator, seed))
    teacher = Teacher(model.to(run.ranks.device), lesson)
    return _Writer(teacher, make_batch, sequences, read, form, arguments, run.ranks.device, run.flag), contents


def _plan(folder: Path, writer: _Writer, contents: Mapping[str, Any], world_size: int) -> CachePlan:
    """Run the teacher over one batch, to see what a token and a row take; nothing where all shards are there."""
    there = {int(found[1]) for path in folder.iterdir() if (found := _SHARD.fullmatch(path.name))}
    missing = [examples for number, examples in enumerate(writer.shards(contents["shard_rows"])) if number not in there]
    lengths = [writer.sequences.lengths[writer.sequences.of(examples)] for examples in missing]
    sequences, tokens = sum(map(len, lengths)), sum(int(each.sum()) for each in lengths)
    written, seconds = 0.0, 0.0
    if missing:
        batches = list(writer.batches(missing[0]))
        batch = batches[len(batches) // 2]
        writer.outputs(batch)  # the first one of a process takes longer
        started = time.perf_counter()
        outputs = writer.outputs(batch)
        of_batch = int(writer.sequences.lengths[writer.sequences.behind(batch)].sum())
        seconds = (time.perf_counter() - started) * tokens / of_batch / world_size
        for name, tensor in outputs.items():
            written += tensor[0].nbytes * (tokens if name.startswith("token.") else sequences)
    return CachePlan(
        form=writer.form,
        has_words=contents["kept_vocabulary"] is not None,
        rows=sum(map(len, missing)),
        tokens=tokens,
        bytes=int(written),
        seconds=seconds,
        free=shutil.disk_usage(folder).free,
        read=len(writer.examples),
        available=len(writer.sequences.first) - 1,
        processes=world_size,
    )


def _check_disk(folder: Path, plan: CachePlan, yes: bool) -> None:
    smaller = "Take --kind topk with a smaller --k, fewer rows (max_rows) or a folder on another disk"
    sizes = (
        f"The teacher cache will take about {plan.bytes / 2**30:.3g} GiB of the {plan.free / 2**30:.3g} GiB that are free at {folder}"
    )
    if plan.bytes > plan.free:
        raise ValueError(f"{sizes}, so it does not fit. {smaller}.")
    if plan.bytes > _DISK_SHARE * plan.free and not yes:
        raise ValueError(f"{sizes}, more than {_DISK_SHARE:.0%} of it. {smaller}, or say that it may by --yes.")


def _write(folder: Path, writer: _Writer, contents: dict[str, Any], ranks: Ranks) -> CacheSummary:
    """This rank's shards, then the header with those of all."""
    count, parts = contents["rows"], writer.shards(contents["shard_rows"])
    shards: dict[int, dict[str, Any]] = {}
    new_rows = new_tokens = 0
    started = time.perf_counter()
    with Progress(count, description="cache", shown=ranks.is_main, unit="rows") as bar:
        for number in range(ranks.rank, len(parts), ranks.world_size):
            examples = parts[number]
            numbers = writer.sequences.of(examples)
            lengths = writer.sequences.lengths[numbers]
            shard = finished_shard(folder, number, lengths)
            if shard is None:
                shard = write_shard(folder, number, numbers, lengths, writer.tensors(examples))
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
        examples: np.ndarray,
        form: CacheForm,
        arguments: StageArguments,
        device: torch.device,
        flag: SignalFlag,
    ) -> None:
        """examples: (n,) int64, rising, the training rows that are written."""
        self.teacher, self.make_batch, self.sequences, self.examples, self.form = teacher, make_batch, sequences, examples, form
        self.batch_size, self.device, self.flag = arguments.per_device_eval_batch_size, device, flag
        half = torch.bfloat16 if arguments.bf16 else torch.float16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=arguments.bf16 or arguments.fp16)

    def shards(self, size: int) -> list[np.ndarray]:
        """The examples of every shard, `size` of them or fewer in the last."""
        return [self.examples[start : start + size] for start in range(0, len(self.examples), size)]

    def tensors(self, examples: np.ndarray) -> dict[str, Tensor]:
        """A shard's tensors. Which rows share a batch depends on the shard alone, so its bytes do too."""
        in_shard = self.sequences.of(examples)
        starts = np.concatenate([[0], self.sequences.lengths[in_shard].cumsum()])
        shard: dict[str, Tensor] = {}
        for batch_examples in self.batches(examples):
            self.flag.poll()
            numbers = np.searchsorted(in_shard, self.sequences.behind(batch_examples))
            for name, tensor in self.outputs(batch_examples).items():
                per_token = name.startswith("token.")
                if name not in shard:
                    shard[name] = tensor.new_empty(starts[-1] if per_token else len(starts) - 1, *tensor.shape[1:])
                read = 0
                for number in numbers:
                    start, count = (starts[number], starts[number + 1] - starts[number]) if per_token else (number, 1)
                    shard[name][start : start + count] = tensor[read : read + count]
                    read += count
        return shard

    def batches(self, examples: np.ndarray) -> Iterator[np.ndarray]:
        """Group rows of similar length into batches."""
        starts = np.concatenate([[0], (self.sequences.first[examples + 1] - self.sequences.first[examples]).cumsum()[:-1]])
        longest = np.maximum.reduceat(self.sequences.lengths[self.sequences.of(examples)], starts)
        examples = examples[np.argsort(longest, kind="stable")]
        yield from (examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size))

    def outputs(self, examples: np.ndarray) -> dict[str, Tensor]:
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
    sweep(folder, lambda name: name in (HEADER, VOCAB_MAP_FOLDER) or _SHARD.fullmatch(name) is not None)
    for path in folder.iterdir():
        if (path.name == HEADER or _SHARD.fullmatch(path.name)) and (path.is_symlink() or not path.is_file()):
            raise ValueError(f"{path} is no regular file, and has the name of one of a teacher cache; move it away.")
    return held


def _begin(
    folder: Path,
    writer: _Writer,
    contents: dict[str, Any],
    world_size: int,
    yes: bool,
    show: Callable[[CachePlan], None],
) -> None:
    """Say what will be written, and write the header of an unfinished cache; refuse what has no room, or is something else's folder."""
    contents = json.loads(json.dumps(contents))
    is_new = not (folder / HEADER).exists()
    if is_new:
        if shard := next(folder.glob("shard-*"), None):
            raise ValueError(f"{folder} holds {shard.name} and no {HEADER}, which would say of what; delete it or take another folder.")
    else:
        _check_same(folder, contents)
    plan = _plan(folder, writer, contents, world_size)
    show(plan)
    _check_disk(folder, plan, yes)
    if is_new:
        write_header(folder, contents, None)


def _check_same(folder: Path, contents: Mapping[str, Any]) -> None:
    found = read_header(folder)["contents"]
    differences = [
        *filter(None, [disagreement(found, contents)]),
        *(
            f"{key} is {found.get(key)!r} there and {contents[key]!r} here"
            for key in contents
            if key not in _INFORMATIVE and key not in AGREE and found.get(key) != contents[key]
        ),
    ]
    if differences:
        raise ValueError(f"{folder} is a teacher cache of something else: {'; '.join(differences)}. Delete it or take another folder.")


def _planned_rows(model: Any, lesson: Lesson, form: CacheForm, tokens: float) -> int:
    """Examples of so many tokens each in a shard of about 256 MiB."""
    per_token = len(lesson.layers) * model.model.config.get_text_config().hidden_size * form.dtype.itemsize
    if lesson.words is not None:
        width = lesson.words.stop if isinstance(lesson.words, slice) else len(lesson.words)
        per_token += width * form.dtype.itemsize if form.kind == "dense" else form.k * (4 + form.dtype.itemsize) + 4
    return int(min(_MOST_SHARD_ROWS, max(1, _SHARD_BYTES // max(1, tokens * per_token))))
