import errno
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastkd.store import lock, temporary_path
from fastkd.vocab import storage
from fastkd.vocab.count import TokenCounts, count_tokens, tokenizer_fingerprint

WORDS = ["[UNK]", "[CLS]", "[PAD]", *(f"w{i}" for i in range(30)), "never"]


class ListCorpus:
    """Rows from a list; optionally breaks off before row `fail_at`. `starts` lists the rows that reading began at."""

    def __init__(self, rows: list[str], fingerprint: str = "corpus-a", fail_at: int | None = None) -> None:
        self.fingerprint = fingerprint
        self.description = "list of test rows"
        self.starts: list[int] = []
        self._rows = rows
        self._fail_at = fail_at

    def rows(self, start: int = 0) -> Iterator[str]:
        self.starts.append(start)
        for number in range(start, len(self._rows)):
            if number == self._fail_at:
                raise ConnectionError("the power went out")
            yield self._rows[number]


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", pad_token="[PAD]")


def make_rows(count: int = 203) -> list[str]:
    generator = random.Random(0)
    words = [f"w{i}" for i in range(30)] + ["out-of-vocabulary"]
    rows = [" ".join(generator.choices(words, range(31, 0, -1), k=generator.randrange(12))) for _ in range(count)]
    return [*rows, ""]


def expected_counts(rows: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    counter = Counter(i for row in rows for i in tokenizer(row, add_special_tokens=False)["input_ids"])
    return torch.tensor([counter[i] for i in range(len(tokenizer))])


def test_counts_every_token_of_every_row(tmp_path: Path) -> None:
    rows, tokenizer = make_rows(), make_tokenizer()
    counts = count_tokens(ListCorpus(rows), tokenizer, tmp_path, batch_size=10)
    expected = expected_counts(rows, tokenizer)
    assert counts.counts.dtype == torch.int64
    assert torch.equal(counts.counts, expected)
    assert counts.rows == len(rows)
    assert counts.tokens == sum(len(row.split()) for row in rows)
    assert counts.counts[WORDS.index("never")] == 0 and counts.counts[WORDS.index("[CLS]")] == 0
    assert counts.counts[WORDS.index("[UNK]")] > 0
    assert counts.corpus_fingerprint == "corpus-a"
    assert counts.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)


def test_a_bare_backend_counts_the_same(tmp_path: Path) -> None:
    rows, tokenizer = make_rows(), make_tokenizer()
    counts = count_tokens(ListCorpus(rows), tokenizer.backend_tokenizer, tmp_path)
    assert torch.equal(counts.counts, expected_counts(rows, tokenizer))


def test_truncation_and_padding_of_an_earlier_call_do_not_matter(tmp_path: Path) -> None:
    rows, tokenizer = make_rows(), make_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    tokenizer(rows, truncation=True, max_length=3, padding="max_length")
    assert '"max_length":3' in tokenizer.backend_tokenizer.to_str().replace(" ", "")
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert count_tokens(ListCorpus(rows), tokenizer, tmp_path).tokens == sum(len(row.split()) for row in rows)


def test_ids_beyond_a_hole_are_counted(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "low": 1, "high": 9}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    counts = count_tokens(ListCorpus(["low high high"]), backend, tmp_path)
    assert counts.counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_processes_count_the_same(tmp_path: Path) -> None:
    rows, tokenizer = make_rows(), make_tokenizer()
    one = count_tokens(ListCorpus(rows), tokenizer, tmp_path / "one", num_proc=1, batch_size=7, save_every=3)
    two = count_tokens(ListCorpus(rows), tokenizer, tmp_path / "two", num_proc=2, batch_size=7, save_every=3)
    assert torch.equal(one.counts, two.counts)
    assert one.rows == two.rows == len(rows)


@pytest.mark.parametrize(("num_proc", "resumed_at"), [(1, 80), (2, 40)])
def test_an_interrupted_count_resumes_at_the_saved_row(tmp_path: Path, num_proc: int, resumed_at: int) -> None:
    # Batches of 10 rows, saved every 4; with 2 processes up to 4 batches are still under way when the corpus fails.
    rows, tokenizer = make_rows(), make_tokenizer()
    with pytest.raises(ConnectionError):
        count_tokens(ListCorpus(rows, fail_at=117), tokenizer, tmp_path, num_proc=num_proc, batch_size=10, save_every=4)
    with pytest.raises(ValueError, match=f"not finished.*{resumed_at} rows.*count again"):
        TokenCounts.load(tmp_path)
    corpus = ListCorpus(rows)
    counts = count_tokens(corpus, tokenizer, tmp_path, batch_size=13)
    assert corpus.starts == [resumed_at]
    assert counts.rows == len(rows)
    assert torch.equal(counts.counts, expected_counts(rows, tokenizer))


def test_a_finished_count_is_returned_without_reading(tmp_path: Path) -> None:
    rows, tokenizer = make_rows(), make_tokenizer()
    first = count_tokens(ListCorpus(rows), tokenizer, tmp_path)
    corpus = ListCorpus(rows, fail_at=0)
    again = count_tokens(corpus, tokenizer, tmp_path)
    assert corpus.starts == []
    assert torch.equal(first.counts, again.counts)


@pytest.mark.parametrize("fail_at", [None, 50])
def test_another_corpus_or_tokenizer_is_refused(tmp_path: Path, fail_at: int | None) -> None:
    rows, tokenizer = make_rows(), make_tokenizer()
    try:
        count_tokens(ListCorpus(rows, fail_at=fail_at), tokenizer, tmp_path, batch_size=10, save_every=1)
    except ConnectionError:
        assert fail_at is not None
    with pytest.raises(ValueError, match=r"another corpus.*corpus-a.*corpus-b.*another output_dir, or delete"):
        count_tokens(ListCorpus(rows, "corpus-b"), tokenizer, tmp_path)
    other = make_tokenizer([*WORDS, "new"])
    with pytest.raises(ValueError, match="another tokenizer") as refusal:
        count_tokens(ListCorpus(rows), other, tmp_path)
    assert tokenizer_fingerprint(tokenizer) in str(refusal.value) and tokenizer_fingerprint(other) in str(refusal.value)


@pytest.mark.parametrize("rows", [[], ["", " "]])
def test_a_corpus_without_tokens_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(ValueError, match=f"list of test rows has {len(rows)} rows and no tokens"):
        count_tokens(ListCorpus(rows), make_tokenizer(), tmp_path)


@pytest.mark.parametrize("name", ["num_proc", "batch_size", "save_every"])
def test_sizes_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        count_tokens(ListCorpus(["w1"]), make_tokenizer(), tmp_path, **{name: 0})


def test_a_tokenizer_without_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"fast tokenizer.*got str"):
        count_tokens(ListCorpus(["w1"]), "bert-base-uncased", tmp_path)


def test_coverage() -> None:
    counts = TokenCounts(torch.tensor([50, 0, 30, 20]), 7, "c", "t")
    assert counts.coverage([0, 3]) == 0.7
    assert counts.coverage(torch.tensor([2, 2])) == 0.3  # named twice, counted once
    assert counts.coverage(range(6)) == 1.0  # a padded teacher's ids never occur
    assert counts.coverage([]) == 0.0


def test_save_and_load(tmp_path: Path) -> None:
    counts = TokenCounts(torch.tensor([50, 0, 2**40]), 7, "corpus", "tokenizer")
    counts.save(tmp_path)
    loaded = TokenCounts.load(tmp_path)
    assert torch.equal(loaded.counts, counts.counts) and loaded.counts.dtype == torch.int64
    assert (loaded.rows, loaded.corpus_fingerprint, loaded.tokenizer_fingerprint) == (7, "corpus", "tokenizer")
    [tensors_file] = tmp_path.glob("*.safetensors")
    manifest = json.loads((tmp_path / "token_counts.json").read_text())
    assert manifest["tensors_sha256"] == hashlib.sha256(tensors_file.read_bytes()).hexdigest()


def test_changed_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no token_counts in .*token_counts\.json is missing"):
        TokenCounts.load(tmp_path)
    TokenCounts(torch.tensor([50, 0, 30]), 7, "c", "t").save(tmp_path)
    manifest_file, [tensors_file] = tmp_path / "token_counts.json", tmp_path.glob("*.safetensors")
    manifest, data = manifest_file.read_text(), tensors_file.read_bytes()

    tensors_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{tensors_file.name} was changed after it was written"):
        TokenCounts.load(tmp_path)
    tensors_file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tensors_file.name}, which is missing"):
        TokenCounts.load(tmp_path)
    tensors_file.write_bytes(data)
    manifest_file.write_text(manifest.replace('"rows": 7', '"rows": 8'))
    with pytest.raises(ValueError, match=r"token_counts\.json was changed after it was written"):
        TokenCounts.load(tmp_path)
    manifest_file.write_text(manifest[:40])
    with pytest.raises(ValueError, match="not a readable token_counts manifest"):
        TokenCounts.load(tmp_path)
    manifest_file.write_text(manifest)
    assert TokenCounts.load(tmp_path).rows == 7


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_a_save_cut_short_leaves_the_previous_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rename: int) -> None:
    TokenCounts(torch.tensor([1, 2]), 1, "c", "t").save(tmp_path)
    renames = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames == failing_rename:
            raise OSError("disk full")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="disk full"):
            TokenCounts(torch.tensor([3, 4]), 2, "c", "t").save(tmp_path)
    assert TokenCounts.load(tmp_path).counts.tolist() == [1, 2]

    for name in ("token_counts.json", f"token_counts-{'0' * 16}.safetensors"):
        left_by_a_killed_process(tmp_path / name)
    TokenCounts(torch.tensor([5, 6]), 3, "c", "t").save(tmp_path)
    assert TokenCounts.load(tmp_path).counts.tolist() == [5, 6]
    assert len(list(tmp_path.iterdir())) == 2, "files of replaced or cut-short saves are cleared away"


def left_by_a_killed_process(path: Path) -> None:
    """Write the file that a save of `path` leaves if it is killed in its middle."""
    name = re.sub(r"tmp-(\d+)-(\d+)", lambda found: f"tmp-{found[1]}-{int(found[2]) + 1}", temporary_path(path).name)
    path.with_name(name).write_bytes(b"half")


def test_a_save_deletes_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    TokenCounts(torch.tensor([1, 2]), 1, "c", "t").save(tmp_path)
    [stale] = tmp_path.glob("*.safetensors")
    orphan = b"of a save that was killed before its manifest"
    (tmp_path / f"token_counts-{hashlib.sha256(orphan).hexdigest()[:16]}.safetensors").write_bytes(orphan)
    foreign = {
        "token_counts-notes.safetensors": b"mine",
        f"token_counts-{'0' * 16}.safetensors": b"of another content than its name says",
        "token_counts.json.tmp-1": b"mine too",
    }
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    linked = tmp_path / f"token_counts-{hashlib.sha256(b'mine').hexdigest()[:16]}.safetensors"
    linked.symlink_to(tmp_path / "token_counts-notes.safetensors")
    TokenCounts(torch.tensor([3, 4]), 2, "c", "t").save(tmp_path)
    assert all((tmp_path / name).read_bytes() == data for name, data in foreign.items()) and linked.is_symlink()
    assert not stale.exists() and len(list(tmp_path.iterdir())) == len(foreign) + 3


def test_several_that_count_at_once_end_with_one_count(tmp_path: Path) -> None:
    rows, tokenizer, polls = make_rows(), make_tokenizer(), []
    corpora = [ListCorpus(rows) for _ in range(4)]

    def count(corpus: ListCorpus) -> torch.Tensor:
        return count_tokens(corpus, tokenizer, tmp_path, batch_size=1, save_every=1, poll=lambda: polls.append(None)).counts

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(count, corpora))
    assert all(torch.equal(counts, expected_counts(rows, tokenizer)) for counts in results)
    assert sorted(corpus.starts for corpus in corpora) == [[], [], [], [0]]
    assert len(polls) > len(rows), "who waits is polled too"


def test_who_waits_for_another_count_can_be_stopped(tmp_path: Path) -> None:
    def poll() -> None:
        raise KeyboardInterrupt

    with lock(tmp_path / "token_counts.lock"), pytest.raises(KeyboardInterrupt):
        count_tokens(ListCorpus(make_rows()), make_tokenizer(), tmp_path, poll=poll)
    assert [path.name for path in tmp_path.iterdir()] == ["token_counts.lock"], "nothing was counted"


def test_a_record_replaced_while_it_is_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TokenCounts(torch.tensor([1, 2]), 1, "c", "t").save(tmp_path)
    original = storage.read_bytes

    def replaced_before(path: Path) -> bytes:
        monkeypatch.setattr(storage, "read_bytes", original)
        TokenCounts(torch.tensor([3, 4]), 2, "c", "t").save(tmp_path)
        return original(path)

    monkeypatch.setattr(storage, "read_bytes", replaced_before)
    assert TokenCounts.load(tmp_path).counts.tolist() == [3, 4]


def test_a_full_disk_is_told_with_its_folder_and_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokenizer, writes, original = make_rows(), make_tokenizer(), [], storage.write_bytes_atomic

    def full(*arguments: Any) -> None:
        writes.append(None)
        if len(writes) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes_atomic", full)
        with pytest.raises(OSError, match=rf"No space left on device: .*free some space.*another output_dir.*{tmp_path}"):
            count_tokens(ListCorpus(rows), tokenizer, tmp_path, batch_size=10, save_every=1)
    corpus = ListCorpus(rows)
    assert torch.equal(count_tokens(corpus, tokenizer, tmp_path).counts, expected_counts(rows, tokenizer))
    assert corpus.starts == [30]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_poll_that_raises_stops_the_count_and_loses_nothing(tmp_path: Path, num_proc: int) -> None:
    rows, tokenizer, polls = make_rows(), make_tokenizer(), []

    def poll() -> None:
        polls.append(None)
        if len(polls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_tokens(ListCorpus(rows), tokenizer, tmp_path, num_proc=num_proc, batch_size=10, poll=poll)
    corpus = ListCorpus(rows)
    counts = count_tokens(corpus, tokenizer, tmp_path, batch_size=10, poll=poll)
    assert corpus.starts == [30] and counts.rows == len(rows)
    assert torch.equal(counts.counts, expected_counts(rows, tokenizer))
