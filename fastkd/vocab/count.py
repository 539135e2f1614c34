"""Count how often every token id occurs in a corpus; pruned vocabularies are chosen by it."""

from __future__ import annotations

import hashlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from fastkd.store import disk_space, lock
from fastkd.tasks.corpus import text_batches
from fastkd.vocab.storage import load_record, record_exists, save_record

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_KIND = "token_counts"
_FULL_DISK = "what was counted so far is kept; free some space, and the same call goes on, or choose another output_dir"


class Corpus(Protocol):
    """Rows of text in a fixed order that can be read again from any row."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean the same rows in the same order."""

    @property
    def description(self) -> str:
        """What people call the corpus; used in messages."""

    def rows(self, start: int = 0) -> Iterator[str]:
        """The rows from number `start` on."""


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """Occurrences of every token id in one corpus under one tokenizer."""

    counts: Tensor
    """(V,) int64, V = the tokenizer's highest id + 1 (its length, unless its ids have holes); never-seen ids count 0."""
    rows: int
    """Rows of the corpus that were counted."""
    corpus_fingerprint: str
    tokenizer_fingerprint: str

    @property
    def tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.counts.sum())

    def coverage(self, kept_ids: Tensor | Sequence[int]) -> float:
        """The share of the corpus' tokens whose id is in `kept_ids`, (V_k,) integers."""
        kept = torch.isin(torch.arange(self.counts.numel()), torch.as_tensor(kept_ids).cpu())
        return int(self.counts[kept].sum()) / self.tokens

    def save(self, directory: str | Path) -> None:
        """Write a finished count, `token_counts.json` and the tensors it names, atomically."""
        _save(self, directory, finished=True)

    @classmethod
    def load(cls, directory: str | Path) -> TokenCounts:
        """Read a finished count.

        Raises:
            FileNotFoundError: there is none in the directory.
            ValueError: an unfinished count or a changed file.
        """
        counts, finished = _load(directory)
        if not finished:
            raise ValueError(
                f"The token count in {directory} is not finished (it stopped after {counts.rows} rows); count again "
                "with this output_dir and it goes on from there."
            )
        return counts


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> str:
    """sha256 of the tokenizer's backend in its JSON form, truncation and padding (traces of its last call) left out."""
    return _sha256(_backend_copy(tokenizer).to_str())


def count_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast | Tokenizer,
    output_dir: str | Path,
    *,
    num_proc: int = 1,
    batch_size: int = 1024,
    save_every: int = 64,
    poll: Callable[[], None] = lambda: None,
) -> TokenCounts:
    """Count the ids of `tokenizer(row, add_special_tokens=False)` over all rows of the corpus.

    The running count is saved in `output_dir` every `save_every` batches of `batch_size` rows. After an interruption
    the same call goes on behind the last saved row, whatever `num_proc`, `batch_size` and `save_every` are now, and
    gives the counts of an uninterrupted one; once finished, it returns the saved counts. Of several processes that count
    the same at once one does, and the others wait for it.

    Args:
        corpus: rows in a fixed order, with a fingerprint.
        tokenizer: a fast one; its truncation and padding are not used.
        output_dir: where the running count is, and the finished one will be.
        num_proc: processes that tokenize. 1: this process, on the tokenizer's own threads; more: that many spawned
            processes of one thread each.
        batch_size: the most rows that are tokenized at once; of long ones it takes fewer.
        save_every: batches from one save to the next.
        poll: called after every batch, and while another process is waited for. What it raises ends the call; all is saved before.

    Returns:
        The finished count; its `counts` are (V,) int64.

    Raises:
        ValueError: a corpus without tokens, or an `output_dir` that holds the count of another corpus or tokenizer.
        TypeError: a tokenizer without a `tokenizers` backend.
        RuntimeError: a process that tokenized was killed.
        OSError: `output_dir` cannot be written to, or its disk is full.
    """
    for name, number in (("num_proc", num_proc), ("batch_size", batch_size), ("save_every", save_every)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    backend = _backend_copy(tokenizer)
    tokenizer_json = backend.to_str()
    vocab_size = max(backend.get_vocab().values()) + 1

    new = TokenCounts(torch.zeros(vocab_size, dtype=torch.int64), 0, corpus.fingerprint, _sha256(tokenizer_json))
    state, finished = _saved_or(new, output_dir)
    if not finished:
        folder = Path(output_dir)
        with disk_space(folder, _FULL_DISK):
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder / f"{_KIND}.lock", poll=poll):
                state, finished = _saved_or(new, output_dir)  # another process may have held the lock to count
                if not finished:
                    results = _counted(text_batches(corpus.rows(state.rows), batch_size), tokenizer_json, vocab_size, num_proc)
                    state = _count(state, results, corpus, output_dir, save_every, poll)
    return state


def _saved_or(new: TokenCounts, output_dir: str | Path) -> tuple[TokenCounts, bool]:
    """(the count in `output_dir`, or `new` if there is none, whether it is finished); refuses one of another corpus or tokenizer."""
    if not record_exists(output_dir, _KIND):
        return new, False
    state, finished = _load(output_dir)
    _require_same("corpus", state.corpus_fingerprint, new.corpus_fingerprint, output_dir)
    _require_same("tokenizer", state.tokenizer_fingerprint, new.tokenizer_fingerprint, output_dir)
    return state, finished


def _count(
    state: TokenCounts,
    results: Iterator[tuple[int, np.ndarray]],
    corpus: Corpus,
    output_dir: str | Path,
    save_every: int,
    poll: Callable[[], None],
) -> TokenCounts:
    """Add to `state` the (rows, (V,) int64 counts) of all remaining batches, saving it now and then."""
    _save(state, output_dir, finished=False)  # an output_dir that cannot be written to fails here, before the work
    for number, (rows, counts) in enumerate(results, start=1):
        state = replace(state, counts=state.counts + torch.from_numpy(counts), rows=state.rows + rows)
        if number % save_every == 0:
            _save(state, output_dir, finished=False)
        try:
            poll()
        except BaseException:
            _save(state, output_dir, finished=False)
            raise
    if state.tokens == 0:
        raise ValueError(f"The corpus {corpus.description} has {state.rows} rows and no tokens; check its path, split and column.")
    state.save(output_dir)
    return state


class _BatchCounter:
    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer_json)
        self._vocab_size = vocab_size

    def __call__(self, batch: list[str]) -> tuple[int, np.ndarray]:
        """(rows, (V,) int64 counts) of a batch."""
        encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype=np.int64)
        return len(batch), np.bincount(ids, minlength=self._vocab_size)


_worker_counter: _BatchCounter  # exists in worker processes only


def _start_worker(tokenizer_json: str, vocab_size: int) -> None:
    global _worker_counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_counter = _BatchCounter(tokenizer_json, vocab_size)


def _count_in_worker(batch: list[str]) -> tuple[int, np.ndarray]:
    return _worker_counter(batch)


def _counted(batches: Iterator[list[str]], tokenizer_json: str, vocab_size: int, num_proc: int) -> Iterator[tuple[int, np.ndarray]]:
    """Count the batches; results come in the order of the corpus, so that a saved state always ends at a row."""
    if num_proc == 1:
        yield from map(_BatchCounter(tokenizer_json, vocab_size), batches)
        return
    pool = ProcessPoolExecutor(
        num_proc, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer_json, vocab_size)
    )
    try:
        pending: deque[Future[tuple[int, np.ndarray]]] = deque()  # bounded: Executor.map would read the whole corpus
        for batch in batches:
            with _interrupts_held():
                pending.append(pool.submit(_count_in_worker, batch))
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
    except BrokenExecutor as error:
        raise RuntimeError(
            "A process that counted tokens ended before its work did: it was killed, perhaps for want of memory, or failed in a way it "
            "could not report. Count again with a lower num_proc: it goes on behind the last saved row."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back in the block, and for good from processes that are started in it: they need not tell of it too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _backend_copy(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> Tokenizer:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"tokenizer must be a fast tokenizer (one with a `tokenizers` backend), got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer, or convert it to a tokenizer.json first."
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _require_same(what: str, saved: str, given: str, output_dir: str | Path) -> None:
    if saved != given:
        raise ValueError(
            f"output_dir {output_dir} holds the token count of another {what}: its {what} fingerprint is {saved}, this "
            f"{what}'s is {given}. Choose another output_dir, or delete that count to start over."
        )


def _save(counts: TokenCounts, directory: str | Path, *, finished: bool) -> None:
    metadata = {
        "finished": finished,
        "rows": counts.rows,
        "tokens": counts.tokens,
        "corpus_fingerprint": counts.corpus_fingerprint,
        "tokenizer_fingerprint": counts.tokenizer_fingerprint,
    }
    save_record(directory, _KIND, {"counts": counts.counts}, metadata)


def _load(directory: str | Path) -> tuple[TokenCounts, bool]:
    """(the counts so far, whether the corpus was counted to its end)."""
    tensors, metadata = load_record(directory, _KIND)
    counts = TokenCounts(tensors["counts"], metadata["rows"], metadata["corpus_fingerprint"], metadata["tokenizer_fingerprint"])
    return counts, metadata["finished"]
