"""Read a `tokenizer.json`, the backend of a Hugging Face fast tokenizer, and renumber it.

Everything fastkd knows about that format is here; `tokenizer.py` decides what to keep.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spec = dict[str, Any]  # a tokenizer.json, or one entry of it


def read_spec(tokenizer: PreTrainedTokenizerBase) -> Spec:
    """The content of the tokenizer's `tokenizer.json`, refused if it cannot be pruned.

    Raises:
        TypeError: the tokenizer has no backend of the `tokenizers` library.
        ValueError: the model is of an unknown kind, or has no unknown token where it needs one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which has no `tokenizers` backend to prune; convert it to a "
            "fast tokenizer first, or keep the full vocabulary."
        )
    spec: Spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise ValueError(f"The tokenizer's model is of type {model['type']!r}; BPE, WordPiece, Unigram and WordLevel can be pruned.")
    if model["type"] != "BPE" and unk_id(model) is None:
        raise ValueError(
            f"The tokenizer's {model['type']} model has no unknown token in its vocabulary, so text made of dropped "
            "tokens would have no ids; give it an unk_token before pruning."
        )
    return spec


def model_tokens(model: Spec) -> list[str]:
    """Every token of the model's own vocabulary, which need not hold the added tokens."""
    return [piece for piece, _ in model["vocab"]] if model["type"] == "Unigram" else list(model["vocab"])


def unk_id(model: Spec) -> int | None:
    """Id of the model's unknown token, if it has one."""
    number: int | None = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])
    return number


def id_fields(spec: Spec) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every id written outside of the model: added tokens, and those of `inserted_id_fields`."""
    yield from ((token, "id") for token in spec["added_tokens"])
    yield from inserted_id_fields(spec)


def inserted_id_fields(spec: Spec) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every id that the padding or the post-processor inserts.

    Raises:
        ValueError: the post-processor is of an unknown kind.
    """
    if spec["padding"] is not None:
        yield spec["padding"], "pad_id"
    yield from _post_processor_id_fields(spec["post_processor"])


def _post_processor_id_fields(processor: Spec | None) -> Iterator[tuple[Any, Any]]:
    match processor:
        case None | {"type": "ByteLevel"}:
            return
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": cls, "sep": sep}:  # each [token, id]
            yield from ((cls, 1), (sep, 1))
        case {"type": "TemplateProcessing", "special_tokens": special_tokens}:
            for entry in special_tokens.values():
                yield from ((entry["ids"], position) for position in range(len(entry["ids"])))
        case {"type": "Sequence", "processors": processors}:
            for part in processors:
                yield from _post_processor_id_fields(part)
        case _:
            raise ValueError(
                f"The tokenizer's post-processor {processor['type']!r} is unknown, so its ids cannot be renumbered; "
                "replace it by a TemplateProcessing that inserts the same special tokens."
            )


def restrict_model(model: Spec, tokens: Mapping[int, str]) -> None:
    """Rewrite `model` in place so that it knows exactly `tokens`, token by id, the one at position s with the id s."""
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        lowest = min(scores)
        model["unk_id"] = list(tokens).index(model["unk_id"])
        # An added token that the model did not know gets the lowest score, which leaves the unknown penalty in its place.
        model["vocab"] = [[token, scores[number] if number < len(scores) else lowest] for number, token in tokens.items()]
        return
    model["vocab"] = vocab = {token: slot for slot, token in enumerate(tokens.values())}
    if model["type"] == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in vocab and right in vocab and _merge_product(model, left, right) in vocab
        ]


def merge_parents(model: Spec) -> dict[int, tuple[int, ...]]:
    """Id of each token that BPE builds -> ids of the two tokens it merges last on that token's own text.

    A token may be the product of several merges: BPE trained on text has some, models converted from SentencePiece list
    every split of every piece. All the ranks inside the token decide which one is executed, so BPE is run on such a token;
    where it can be read as two texts (see `_readings`), the parents of both are listed. Empty for the other models.
    """
    if model["type"] != "BPE":
        return {}
    vocab = model["vocab"]
    rank = {(left, right): position for position, (left, right) in enumerate(model["merges"])}
    merges_of: dict[str, list[tuple[str, ...]]] = {}
    for left, right in rank:
        merges_of.setdefault(_merge_product(model, left, right), []).append((left, right))

    parents = {}
    for token, merges in merges_of.items():
        if len(merges) > 1:
            merges = [_last_merge(symbols, model, rank) for symbols in _readings(token, model)]
        if ids := dict.fromkeys(vocab[parent] for merge in merges for parent in merge):
            parents[vocab[token]] = tuple(ids)
    return parents


def _merge_product(model: Spec, left: str, right: str) -> str:
    # The right token loses its mark of being inside a word; the left one says where the product is.
    return left + right[len(model["continuing_subword_prefix"] or "") :]


def _last_merge(symbols: list[str], model: Spec, rank: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """The last pair that BPE merges to make one token of `symbols`; () if it needs no merge or ends in several tokens."""
    last: tuple[str, ...] = ()
    while len(symbols) > 1:
        best, at = min((rank.get(pair, len(rank)), position) for position, pair in enumerate(pairwise(symbols)))
        if best == len(rank):
            return ()
        last = left, right = symbols[at], symbols[at + 1]
        symbols[at : at + 2] = [_merge_product(model, left, right)]
    return last


def _readings(token: str, model: Spec) -> Iterator[list[str]]:
    """The symbols BPE may start from to build `token`: characters, marked inside a word (prefix) and at its end (suffix).

    A token that seems to begin or to end with such a mark may also be made of text that just looks like it.
    """
    prefix = model["continuing_subword_prefix"] or ""
    suffix = model["end_of_word_suffix"] or ""
    for first in {"", prefix} if token.startswith(prefix) else {""}:
        for last in {"", suffix} if token.endswith(suffix) else {""}:
            characters = token[len(first) : len(token) - len(last)]
            symbols = [(prefix if position else first) + character for position, character in enumerate(characters)]
            if symbols:
                symbols[-1] += last
                yield symbols
