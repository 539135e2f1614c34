"""Tokenise a corpus once, cache it on disk and read it by index (exact resume is a row number)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from fastkd.sealed import Damaged, read_manifest, remove_sealed, verify
from fastkd.store import disk_space, lock, sweep
from fastkd.tasks.corpus import Corpus, text_batches
from fastkd.tasks.token_rows import num_ids, require_fast
from fastkd.tasks.token_writing import IDS, OFFSETS, UnfinishedCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("fastkd")

Layout = Literal["packed", "rows"]
_FORMAT = 2
_FULL_DISK = "what was tokenised so far is kept; free some space, and the same call goes on, or choose another cache_dir"


class TokenRows:
    """Rows of token ids in a cache folder, memory-mapped. It is pickled as its folder's path.

    Attributes:
        ids: All rows' ids one after another, (num_tokens,) int32.
        lengths: Ids per row, (len(self),) int64.
        vocab_size: The tokenizer's ``num_ids``; every id is below it.
        fingerprint: Hex digest of the corpus, the tokenizer and the options.
        truncated_rows: Texts of more than ``max_length`` ids: cut, or cut into several rows if ``split_long``.
        dropped_rows: Texts without a single id of their own, which have no row.
    """

    def __init__(self, folder: str | os.PathLike[str], check_hashes: bool = True) -> None:
        """Open a cache folder; ``ValueError`` if it is not whole.

        check_hashes: Read all of it once and compare the hashes.
        """
        self.folder = Path(folder)
        try:
            manifest = verify(self.folder) if check_hashes else read_manifest(self.folder)
            if manifest.get("format") != _FORMAT:
                raise Damaged(f"it has format {manifest.get('format')}, and this fastkd reads format {_FORMAT}")
        except (Damaged, FileNotFoundError, NotADirectoryError) as error:
            raise Damaged(f"{self.folder} is not a whole token cache ({error}). Delete it and tokenise again.") from error
        self._offsets = _open_array(self.folder / OFFSETS)
        self.ids = _open_array(self.folder / IDS)[: self.num_tokens]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.truncated_rows: int = manifest["truncated_rows"]
        self.dropped_rows: int = manifest["dropped_rows"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Row ``index`` as a read-only int32 view of the file; ``ValueError`` if an id in it is none of the tokenizer's."""
        row = range(len(self))[index]
        ids = self.ids[self._offsets[row] : self._offsets[row + 1]]
        if not 0 <= ids.min() <= ids.max() < self.vocab_size:  # a GPU would only say so by a failed assertion, somewhere later
            raise ValueError(
                f"Row {row} of {self.folder} holds ids from {ids.min()} to {ids.max()}, and the tokenizer has {self.vocab_size}: the "
                "files were changed since they were written. Delete the folder and tokenise again."
            )
        return ids

    def __reduce__(self) -> tuple[type[TokenRows], tuple[Path, bool]]:
        return TokenRows, (self.folder, False)

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets)

    @cached_property
    def largest_id(self) -> int:
        return int(self.ids.max())


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    layout: Layout,
    cache_dir: str | os.PathLike[str],
    split_long: bool = False,
    batch_size: int = 1_000,
    save_every: int = 64,
    poll: Callable[[], None] = lambda: None,
) -> TokenRows:
    """Tokenise ``corpus`` into ``cache_dir``, or open what an earlier call with the same arguments wrote there.

    A cache appears under its name only when it is whole, with its hashes, and a second process waits for the first one's. A whole one
    is only read. A damaged one is written anew, beside whatever in it is not provably fastkd's. After an interruption the same call
    goes on behind the last saved text and writes the bytes of an uninterrupted one. The corpus is never in memory:
    ``batch_size`` texts are.

    Args:
        max_length: The most ids of a row.
        layout: ``packed``: the texts without special tokens, each followed by the tokenizer's end-of-sequence id (else
            its separator id, else nothing), as one sequence cut into rows of exactly ``max_length`` ids; a shorter last
            row is kept if it has at least 2. ``rows``: one row per text with the tokenizer's special tokens, cut to
            ``max_length`` on the tokenizer's ``truncation_side``.
        split_long: With ``rows``: a longer text becomes several rows, each with special tokens, and nothing is lost.
        batch_size: The most texts per call of the tokenizer, which spreads them over its threads; of long ones it takes fewer.
        save_every: Batches between two savings of how far it is.
        poll: Called after every batch, and while another process is waited for. What it raises ends the call; all is saved before.

    Raises:
        ValueError: An argument does not fit, the corpus has no ids, or an id is none of the tokenizer's.
        TypeError: The tokenizer is not a fast one.
        OSError: ``cache_dir`` cannot be written to, or its disk is full.
    """
    options = _Options(layout, max_length, split_long)
    _check_arguments(tokenizer, options)
    folder = Path(cache_dir)
    fingerprint = _fingerprint(corpus, tokenizer, options)
    rows = _whole_cache(folder, fingerprint)
    if rows is None:
        with disk_space(folder, _FULL_DISK):
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder / f"{fingerprint}.lock", poll=poll):
                rows = _whole_cache(folder, fingerprint)  # another process may have held the lock to write it
                if rows is None:
                    rows = _write_cache(folder, fingerprint, corpus, tokenizer, options, batch_size, save_every, poll)
    return rows


@dataclass(frozen=True)
class _Options:
    layout: Layout
    max_length: int
    split_long: bool


def _check_arguments(tokenizer: PreTrainedTokenizerFast, options: _Options) -> None:
    require_fast(tokenizer)
    if options.layout not in get_args(Layout):
        raise ValueError(f"layout={options.layout!r} is unknown: use one of {', '.join(map(repr, get_args(Layout)))}.")
    if options.layout == "packed" and options.split_long:
        raise ValueError("split_long=True is for layout='rows': layout='packed' keeps every id of a long text anyway.")
    least = 2 if options.layout == "packed" else tokenizer.num_special_tokens_to_add(pair=False) + 1
    if options.max_length < least:
        raise ValueError(f"max_length={options.max_length} is too short: this tokenizer and layout need at least {least}.")


def _fingerprint(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, options: _Options) -> str:
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["truncation"] = definition["padding"] = None  # left over from the tokenizer's latest call
    settings = [_separator(tokenizer), tokenizer.truncation_side, tokenizer.split_special_tokens]
    identity = json.dumps([_FORMAT, corpus.fingerprint, definition, settings, asdict(options)])
    return hashlib.sha256(identity.encode()).hexdigest()


def _names(folder: Path, fingerprint: str) -> Iterator[Path]:
    """Where a cache may be: under its fingerprint, or behind what stands there and is neither whole nor fastkd's to delete."""
    return (folder / (fingerprint if number == 1 else f"{fingerprint}-{number}") for number in count(1))


def _whole_cache(folder: Path, fingerprint: str) -> TokenRows | None:
    for path in takewhile(os.path.lexists, _names(folder, fingerprint)):
        try:
            rows = TokenRows(path)
        except Damaged as error:
            logger.warning("%s It is not used.", error)
            continue
        if rows.fingerprint == fingerprint:
            return rows
    return None


def _make_free(path: Path, fingerprint: str) -> bool:
    """Delete the damaged cache at ``path``, as far as its manifest says that it is one; whether nothing is there now."""
    with suppress(Damaged, FileNotFoundError, NotADirectoryError):
        if read_manifest(path).get("fingerprint") == fingerprint:
            remove_sealed(path)
    return not os.path.lexists(path)


def _write_cache(
    folder: Path,
    fingerprint: str,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    options: _Options,
    batch_size: int,
    save_every: int,
    poll: Callable[[], None],
) -> TokenRows:
    """Write the cache beside its place and rename it; the caller holds the lock."""
    sweep(folder, lambda name: name.startswith(fingerprint))
    vocab_size = num_ids(tokenizer)
    with UnfinishedCache(folder / f"{fingerprint}.unfinished") as cache:
        progress = cache.progress
        try:
            for number, texts in enumerate(text_batches(corpus.rows(progress.texts, progress.bookmark), batch_size), start=1):
                _append(texts, cache, corpus, tokenizer, options, vocab_size)
                if number % save_every == 0:
                    cache.save()
                try:
                    poll()
                except BaseException:
                    cache.save()
                    raise
            if options.layout == "packed":
                cache.offsets.append(_block_ends(cache.ids.size, options.max_length))
            if cache.offsets.size == 1:
                raise ValueError(
                    f"None of the {progress.texts} texts of {corpus.description} gives a row of token ids: are they empty?"
                )
        except (TypeError, ValueError):  # the data's fault: what is written is of no use to a corrected corpus
            cache.discard()
            raise
        cache.ids.sync()
        cache.offsets.sync()

    about = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "corpus": corpus.description,
        **asdict(options),
        "vocab_size": vocab_size,
        "truncated_rows": progress.truncated,
        "dropped_rows": progress.dropped,
    }
    place = next(path for path in _names(folder, fingerprint) if _make_free(path, fingerprint))
    cache.finish(place, about)
    rows = TokenRows(place, check_hashes=False)
    logger.info(
        "Tokenised %s: %d texts, %d rows, %d ids; %d texts of more than %d ids were %s, %d empty texts dropped.",
        *(corpus.description, progress.texts, len(rows), rows.num_tokens, progress.truncated, options.max_length),
        *("cut into several rows" if options.split_long else "cut", progress.dropped),
    )
    return rows


def _append(
    texts: list[str], cache: UnfinishedCache, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, options: _Options, vocab_size: int
) -> None:
    batch = _encode(texts, tokenizer, options)
    lengths = np.fromiter(map(len, batch.rows), np.int64, len(batch.rows))
    flat = np.fromiter(chain.from_iterable(batch.rows), np.int32, lengths.sum())
    if flat.max(initial=0) >= vocab_size:
        raise ValueError(
            f"The tokenizer gave the id {flat.max()} for {corpus.description}, and its vocabulary ends before that: it is another's."
        )
    if options.layout == "rows":
        cache.offsets.append(cache.ids.size + lengths.cumsum())
    cache.ids.append(flat)
    cache.progress.texts += len(texts)
    cache.progress.truncated += batch.truncated
    cache.progress.dropped += batch.dropped


class _Batch(NamedTuple):
    rows: list[list[int]]
    truncated: int
    dropped: int


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, options: _Options) -> _Batch:
    only_ids = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    if options.layout == "packed":
        separator = _separator(tokenizer)
        ending = [] if separator is None else [separator]
        encoded = tokenizer(texts, add_special_tokens=False, **only_ids)
        rows = [ids + ending for ids in encoded["input_ids"] if ids]
        return _Batch(rows, truncated=0, dropped=len(texts) - len(rows))

    encoded = tokenizer(texts, truncation=True, max_length=options.max_length, return_overflowing_tokens=True, **only_ids)
    num_special = tokenizer.num_special_tokens_to_add(pair=False)
    text_of_piece = np.array(encoded["overflow_to_sample_mapping"])
    is_first = np.diff(text_of_piece, prepend=-1) > 0
    pieces = [piece for piece, first in zip(encoded["input_ids"], is_first, strict=True) if first or options.split_long]
    rows = [piece for piece in pieces if len(piece) > num_special]
    truncated = int((np.bincount(text_of_piece) > 1).sum())
    return _Batch(rows, truncated, dropped=len(pieces) - len(rows))


def _separator(tokenizer: PreTrainedTokenizerFast) -> int | None:
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _block_ends(num_ids: int, max_length: int) -> np.ndarray:
    ends = np.arange(max_length, num_ids + 1, max_length)
    return np.append(ends, num_ids) if num_ids % max_length >= 2 else ends


def _open_array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
