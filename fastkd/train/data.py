"""The rows of a stage: corpora tokenised once and cached, task examples encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks.cloze import Example, encode_examples
from ..tasks.corpus import Corpus, open_corpus
from ..tasks.examples import load_examples
from ..tasks.tokenized import TokenRows, tokenize_corpus
from .config import TaskData, TextData


@dataclass(frozen=True)
class TextRows:
    train: TokenRows
    eval: TokenRows | None


def longest_row(rows: TokenRows | Sequence[Example]) -> int:
    """Positions that the longest row takes in a batch, which is padded to a multiple of 8."""
    lengths = rows.lengths if isinstance(rows, TokenRows) else [len(ids) for example in rows for ids in example.sequences]
    return -(-int(max(lengths)) // 8) * 8


def train_corpus(text: TextData) -> Corpus:
    return open_corpus(
        text.path,
        name=text.name,
        split=text.train_split,
        text_column=text.text_column,
        streaming=text.streaming,
        max_rows=text.max_rows,
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
    )


def text_rows(text: TextData, tokenizer: Any, cache_dir: Path, *, causal: bool) -> TextRows:
    """Tokenise (or open from the cache) the training and evaluation rows."""
    layout = text.layout if text.layout != "auto" else ("packed" if causal else "rows")

    def tokenized(corpus: Corpus) -> TokenRows:
        return tokenize_corpus(
            corpus,
            tokenizer,
            max_length=text.max_length,
            layout=layout,
            cache_dir=cache_dir / "tokens",
            split_long=layout == "rows",
        )

    judged = eval_corpus(text)
    return TextRows(tokenized(train_corpus(text)), None if judged is None else tokenized(judged))


def task_rows(data: TaskData, tokenizer: Any, *, causal: bool) -> tuple[list[Example], list[Example]]:
    """Training and evaluation examples."""
    if data.eval_path is None and Path(data.path).is_file():
        raise ValueError(
            f"task.path {data.path!r} is one file, so training and evaluation would share its rows; name the evaluation rows by "
            "task.eval_path."
        )
    split = data.eval_split if data.eval_path is None else "train"
    train = load_examples(data.path, name=data.name, split=data.train_split, max_rows=data.max_rows)
    judged = load_examples(data.eval_path or data.path, name=data.name, split=split, max_rows=data.max_eval_rows)
    eval_rows = encode_examples(data.cloze, judged, tokenizer, causal=causal)
    if any(example.label < 0 for example in eval_rows):
        raise ValueError(f"Some evaluation rows have no {data.cloze.label_column}; labels are needed there to select the best weights.")
    return encode_examples(data.cloze, train, tokenizer, causal=causal), eval_rows
