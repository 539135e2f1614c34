"""`fastkd vocab count` and `fastkd vocab prune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import Parser, path, positive, source
from .next import for_model, say_next


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd vocab", description="Vocabulary tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    count = commands.add_parser("count", help="count the token ids of a corpus, resumable")
    count.add_argument("--model", required=True, type=source, help="folder or hub name whose tokenizer counts")
    count.add_argument("--data", required=True, type=source, help="hub name, folder, file or glob, or stdlib")
    count.add_argument("--name", help="configuration of a hub dataset")
    count.add_argument("--split", default="train", help="split to count (default: train)")
    count.add_argument("--text_column", default="text", help="column that holds the text (default: text)")
    count.add_argument(
        "--documents", choices=("file", "paragraph", "line"), default="file", help="what a document of .txt files is (default: file)"
    )
    count.add_argument("--streaming", action="store_true", help="read the corpus as a stream")
    count.add_argument("--max_rows", type=positive, help="count at most this many rows")
    count.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="refuse a row without text, or leave it out")
    count.add_argument("--num_proc", type=positive, default=1, help="processes (default: 1)")
    count.add_argument("--output_dir", required=True, type=path, help="where the counts go; the same command resumes")
    prune = commands.add_parser("prune", help="keep the frequent rows of a model; the result opens with plain transformers")
    prune.add_argument("--model", required=True, type=source, help="folder or hub name of the model")
    prune.add_argument("--counts", required=True, type=source, help="folder written by fastkd vocab count")
    prune.add_argument(
        "--keep", required=True, type=float, help="share of the ids (below 1), or their number; rounded up to --multiple_of"
    )
    prune.add_argument(
        "--multiple_of",
        type=positive,
        default=128,
        help="rows are rounded up to a multiple of it (default: 128); 1 keeps what is asked",
    )
    prune.add_argument("--protected", nargs="*", default=[], help="words that are always kept")
    prune.add_argument("--output_dir", required=True, type=path, help="folder of the pruned model; it must not exist")
    known = parser.parse_args(argv)
    return _count(known) if known.command == "count" else _prune(known)


def _count(known: argparse.Namespace) -> int:
    from ..models.load import load_tokenizer
    from ..tasks.bad_rows import BadRowPolicy
    from ..tasks.corpus import open_corpus
    from ..vocab.count import count_tokens

    corpus = open_corpus(
        known.data,
        name=known.name,
        split=known.split,
        text_column=known.text_column,
        streaming=known.streaming,
        max_rows=known.max_rows,
        bad_rows=BadRowPolicy(known.on_bad_row),
        documents=known.documents,
    )
    counts = count_tokens(corpus, load_tokenizer(known.model), known.output_dir, num_proc=known.num_proc)  # type: ignore[arg-type]
    seen = int((counts.counts > 0).sum())
    print(f"{counts.tokens} tokens in {counts.rows} rows; {seen} of {len(counts.counts)} ids occur. Saved in {known.output_dir}.")
    counted = ["--model", known.model, "--counts", known.output_dir]
    say_next([["vocab", "prune", *counted, "--keep", 0.5, "--output_dir", f"{Path(known.model).name}-pruned"]])
    return 0


def _prune(known: argparse.Namespace) -> int:
    import torch

    from ..models.load import load_config, load_language_model, load_tokenizer
    from ..models.prune import prune_model
    from ..models.student import count_parameters, export_student
    from ..train.config import Vocabulary
    from ..train.vocabulary import build_vocab_map
    from .export import exporting

    keep = int(known.keep) if known.keep >= 1 and known.keep.is_integer() else known.keep
    protected = tuple(known.protected)
    vocabulary = Vocabulary(keep=keep, counts=known.counts, protected=protected, multiple_of=known.multiple_of)
    config: Any = load_config(known.model)
    saved_in = config.dtype or config.get_text_config().dtype or torch.float32
    model, tokenizer = load_language_model(known.model, saved_in), load_tokenizer(known.model)
    pruned = prune_model(model, build_vocab_map(vocabulary, tokenizer, model, None, [], known.output_dir))
    with exporting(known.output_dir) as folder:
        export_student(pruned, tokenizer, folder)
    rows = f"{model.vocabulary} -> {pruned.vocabulary}"
    print(f"{count_parameters(model)} -> {count_parameters(pruned)} parameters, {rows} vocabulary rows. Saved in {known.output_dir}.")
    say_next(for_model(known.output_dir))
    return 0
