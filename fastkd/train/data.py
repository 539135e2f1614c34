"""The rows of a stage: corpora tokenised once and cached, task examples encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..methods.stage_data import ClozeRows, DatasetRows, TextRows
from ..tasks.bad_rows import BadRowPolicy
from ..tasks.cloze import Example, encode_examples
from ..tasks.corpus import Corpus, open_corpus
from ..tasks.encoded import encode_task
from ..tasks.examples import load_examples
from ..tasks.glue import TASKS, load_task, require_task
from ..tasks.labelled import TaskDataset
from ..tasks.own_task import OwnKind, OwnRows
from ..tasks.pairs import load_pairs, stdlib_pairs
from ..tasks.stdlib_tasks import STDLIB_TASKS
from ..tasks.tokenized import Layout, TokenRows, tokenize_corpus
from .config import DatasetArguments, TaskData, TextData

_MADE_HERE = {**STDLIB_TASKS, "stdlib/pairs": stdlib_pairs}
"""The tasks that are made from Python's own library."""


def train_corpus(text: TextData) -> Corpus:
    return open_corpus(
        text.path,
        name=text.name,
        split=text.train_split,
        text_column=text.text_column,
        streaming=text.streaming,
        max_rows=text.max_rows,
        bad_rows=_bad_rows(text),
        documents=text.documents,
    )


def eval_corpus(text: TextData) -> Corpus | None:
    if text.eval_split is None and text.eval_path is None:
        return None
    return open_corpus(
        text.eval_path or text.path,
        name=text.name if text.eval_path is None else None,
        split=text.eval_split or "train",
        text_column=text.text_column,
        streaming=text.streaming,
        max_rows=text.max_eval_rows,
        bad_rows=_bad_rows(text),
        documents=text.documents,
    )


def text_rows(text: TextData, tokenizer: Any, cache_dir: Path, *, causal: bool, poll: Callable[[], None] = lambda: None) -> TextRows:
    """Tokenise (or open from the cache) the training and evaluation rows; what `poll` raises ends it, and the next call goes on."""
    train = tokenized(train_corpus(text), text, tokenizer, cache_dir, causal=causal, poll=poll)
    judged = eval_corpus(text)
    return TextRows(train, None if judged is None else tokenized(judged, text, tokenizer, cache_dir, causal=causal, poll=poll))


def layout_of(text: TextData, *, causal: bool) -> Layout:
    """The layout of the text's rows, as a decoder (causal) or an encoder reads them."""
    return text.layout if text.layout != "auto" else "packed" if causal else "rows"


def tokenized(
    corpus: Corpus, text: TextData, tokenizer: Any, cache_dir: Path, *, causal: bool, poll: Callable[[], None] = lambda: None
) -> TokenRows:
    """The rows of one of the text's corpora, in the layout that it has for decoders or encoders."""
    layout = layout_of(text, causal=causal)
    return tokenize_corpus(
        corpus,
        tokenizer,
        max_length=text.max_length,
        layout=layout,
        cache_dir=cache_dir / "tokens",
        split_long=layout == "rows",
        poll=poll,
    )


def cloze_rows(data: TaskData, tokenizer: Any, *, causal: bool) -> ClozeRows:
    """Training and evaluation examples in the task's template."""
    if data.eval_path is None and Path(data.path).is_file():
        raise ValueError(
            f"task.path {data.path!r} is one file, so training and evaluation would share its rows; name the evaluation rows by "
            "task.eval_path."
        )
    split = data.eval_split if data.eval_path is None else "train"

    def encoded(path: str, split: str, max_rows: int | None) -> list[Example]:
        rows, whose = load_examples(path, name=data.name, split=split, max_rows=max_rows), f"split {split!r} of {path!r}"
        return encode_examples(data.cloze, rows, tokenizer, causal=causal, bad_rows=_bad_rows(data), description=whose)

    train_rows = encoded(data.path, data.train_split, data.max_rows)
    eval_rows = encoded(data.eval_path or data.path, split, data.max_eval_rows)
    if any(example.label < 0 for example in eval_rows):
        raise ValueError(f"Some evaluation rows have no {data.cloze.label_column}; labels are needed there to select the best weights.")
    return ClozeRows(data.cloze, train_rows, eval_rows)


def load_dataset(arguments: DatasetArguments) -> TaskDataset:
    """The task's examples to train on, with few or noisy labels if that is asked for, and those to evaluate on."""
    task, path, bad_rows = arguments.task, arguments.path, _bad_rows(arguments)
    if task is not None:
        require_task(task, (*TASKS, *_MADE_HERE, "pairs"))
    if task in _MADE_HERE:
        if path is not None:
            raise ValueError(f"dataset.path is {path!r}, but {task} is made from Python's own library; leave path out.")
        dataset = _MADE_HERE[task]()
    elif task in TASKS:
        dataset = load_task(task, path, splits=tuple(dict.fromkeys(("train", _eval_split(arguments)))), bad_rows=bad_rows)
    elif path is None:
        raise ValueError("dataset.path is not set, and task pairs are the rows found there; name a file, folder or hub data set.")
    elif task == "pairs":
        first, *second = arguments.text_columns
        dataset = load_pairs(path, text_column=first, second_text_column=next(iter(second), None), bad_rows=bad_rows)
    else:
        own = OwnRows(arguments.text_columns, arguments.label_column, bad_rows)
        dataset = own.load(path, eval_path=arguments.eval_path, eval_split=arguments.eval_split, kind=arguments.kind)
    if arguments.few_sample is not None:
        dataset = dataset.few_sample(arguments.few_sample, arguments.sample_seed)
    if arguments.label_noise:
        dataset = dataset.label_noise(arguments.label_noise, arguments.sample_seed)
    return dataset


def load_evaluated(arguments: DatasetArguments, own_kind: OwnKind, own_classes: tuple[str, ...]) -> TaskDataset:
    """The task's examples to evaluate a model on; of a task that is made here, those to train on too.

    own_kind, own_classes: what the model predicts, by which labelled rows of one's own are read.
    """
    bad_rows = _bad_rows(arguments)
    if arguments.task in TASKS:
        return load_task(arguments.task, arguments.path, splits=(_eval_split(arguments),), bad_rows=bad_rows)
    if arguments.task is not None:
        return load_dataset(arguments)
    path = arguments.eval_path or arguments.path
    assert path is not None
    own = OwnRows(arguments.text_columns, arguments.label_column, bad_rows)
    return own.load_split(path, arguments.eval_split, own_kind, own_classes)


def _eval_split(arguments: DatasetArguments) -> str:
    """The split of a benchmark's task that is evaluated on."""
    assert arguments.task is not None
    return arguments.eval_split or TASKS[arguments.task].validation[0]


def dataset_rows(arguments: DatasetArguments, dataset: TaskDataset, tokenizer: Any) -> DatasetRows:
    """The examples as token rows; a dataset without a labelled split to judge by has none to evaluate on."""
    splits = [split for split in dataset.splits if split != "train" and dataset.is_labelled(split)]
    eval_split = (arguments.eval_split if arguments.eval_path is None else None) or next(iter(splits), None)
    if eval_split is not None and arguments.max_eval_rows is not None:
        dataset = dataset.limited(eval_split, arguments.max_eval_rows)

    def encoded(split: str) -> Any:
        return encode_task(
            dataset,
            split,
            tokenizer,
            max_length=arguments.max_length,
            pad_to_max_length=arguments.pad_to_max_length,
            doc_stride=arguments.doc_stride,
            max_answer_length=arguments.max_answer_length,
        )

    return DatasetRows(dataset, encoded("train"), eval_split, None if eval_split is None else encoded(eval_split))


def _bad_rows(data: TextData | TaskData | DatasetArguments) -> BadRowPolicy:
    return BadRowPolicy(data.on_bad_row, data.max_bad_rows)
