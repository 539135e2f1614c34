"""The rows of a stage: corpora tokenised once and cached, task examples encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..methods.stage_data import ClozeRows, DatasetRows, TextRows
from ..tasks.bad_rows import BadRowPolicy
from ..tasks.cloze import encode_examples
from ..tasks.corpus import Corpus, open_corpus
from ..tasks.encoded import encode_task
from ..tasks.examples import load_examples
from ..tasks.glue import load_task
from ..tasks.labelled import TaskDataset
from ..tasks.pairs import load_pairs, stdlib_pairs
from ..tasks.stdlib_tasks import STDLIB_TASKS
from ..tasks.tokenized import TokenRows, tokenize_corpus
from .config import DatasetArguments, TaskData, TextData


def train_corpus(text: TextData) -> Corpus:
    return open_corpus(
        text.path,
        name=text.name,
        split=text.train_split,
        text_column=text.text_column,
        streaming=text.streaming,
        max_rows=text.max_rows,
        bad_rows=_bad_rows(text),
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
    )


def text_rows(text: TextData, tokenizer: Any, cache_dir: Path, *, causal: bool, poll: Callable[[], None] = lambda: None) -> TextRows:
    """Tokenise (or open from the cache) the training and evaluation rows; what `poll` raises ends it, and the next call goes on."""
    train = tokenized(train_corpus(text), text, tokenizer, cache_dir, causal=causal, poll=poll)
    judged = eval_corpus(text)
    return TextRows(train, None if judged is None else tokenized(judged, text, tokenizer, cache_dir, causal=causal, poll=poll))


def tokenized(
    corpus: Corpus, text: TextData, tokenizer: Any, cache_dir: Path, *, causal: bool, poll: Callable[[], None] = lambda: None
) -> TokenRows:
    """The rows of one of the text's corpora, in the layout that it has for decoders or encoders."""
    layout = text.layout if text.layout != "auto" else ("packed" if causal else "rows")
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

    def loaded(path: str, split: str, max_rows: int | None) -> list[dict[str, Any]]:
        text_columns, bad_rows = data.cloze.columns, _bad_rows(data)
        return load_examples(path, name=data.name, split=split, max_rows=max_rows, text_columns=text_columns, bad_rows=bad_rows)

    train = loaded(data.path, data.train_split, data.max_rows)
    judged = loaded(data.eval_path or data.path, split, data.max_eval_rows)
    eval_rows = encode_examples(data.cloze, judged, tokenizer, causal=causal)
    if any(example.label < 0 for example in eval_rows):
        raise ValueError(f"Some evaluation rows have no {data.cloze.label_column}; labels are needed there to select the best weights.")
    return ClozeRows(data.cloze, encode_examples(data.cloze, train, tokenizer, causal=causal), eval_rows)


def load_dataset(arguments: DatasetArguments) -> TaskDataset:
    """The task's examples, with few or noisy training labels if that is asked for."""
    made_here = {**STDLIB_TASKS, "stdlib/pairs": stdlib_pairs}
    if arguments.task in made_here:
        if arguments.path is not None:
            raise ValueError(
                f"dataset.path is {arguments.path!r}, but {arguments.task} is made from Python's own library; leave path out."
            )
        dataset = made_here[arguments.task]()
    elif arguments.task == "pairs":
        if arguments.path is None:
            raise ValueError("dataset.path is not set, and task pairs are the rows found there; name a file, folder or hub data set.")
        dataset = load_pairs(
            arguments.path,
            text_column=arguments.text_columns[0],
            second_text_column=next(iter(arguments.text_columns[1:]), None),
            bad_rows=_bad_rows(arguments),
        )
    else:
        dataset = load_task(arguments.task, arguments.path, bad_rows=_bad_rows(arguments))
    if arguments.few_sample is not None:
        dataset = dataset.few_sample(arguments.few_sample, arguments.sample_seed)
    if arguments.label_noise:
        dataset = dataset.label_noise(arguments.label_noise, arguments.sample_seed)
    return dataset


def dataset_rows(arguments: DatasetArguments, dataset: TaskDataset, tokenizer: Any) -> DatasetRows:
    """The examples as token rows; a dataset without a labelled split to judge by has none to evaluate on."""
    splits = [split for split in dataset.splits if split != "train" and dataset.is_labelled(split)]
    eval_split = arguments.eval_split or next(iter(splits), None)
    if eval_split is not None and arguments.max_eval_rows is not None:
        dataset = dataset.limited(eval_split, arguments.max_eval_rows)

    def encoded(split: str) -> Any:
        return encode_task(
            dataset,
            split,
            tokenizer,
            max_length=arguments.max_length,
            doc_stride=arguments.doc_stride,
            max_answer_length=arguments.max_answer_length,
        )

    return DatasetRows(dataset, encoded("train"), eval_split, None if eval_split is None else encoded(eval_split))


def _bad_rows(data: TextData | TaskData | DatasetArguments) -> BadRowPolicy:
    return BadRowPolicy(data.on_bad_row, data.max_bad_rows)
