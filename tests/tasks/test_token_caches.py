"""Token caches on a disk: damaged ones, foreign files, links, a full disk, and several writers."""

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from fastkd import sealed
from fastkd.sealed import MANIFEST_FILE
from fastkd.tasks import token_writing, tokenized
from fastkd.tasks.corpus import open_corpus
from fastkd.tasks.tokenized import TokenRows, tokenize_corpus
from tests.tasks.test_tokenized import CLS, SEP, TEXTS, Stopped, Texts, as_lists, content, make_tokenizer, word_ids


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["shorter", "missing", "flipped"])
def test_damaged_cache_is_refused_and_written_anew(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    texts, tokenizer = Texts(), make_tokenizer()
    options: dict[str, Any] = {"max_length": 10, "layout": "rows", "cache_dir": tmp_path}
    rows = tokenize_corpus(texts.corpus, tokenizer, **options)
    expected, file = as_lists(rows), rows.folder / name
    if damage == "missing":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-4] if damage == "shorter" else data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    with pytest.raises(ValueError, match=f"{rows.fingerprint}.*elete it and tokenise again"):
        TokenRows(rows.folder)
    for _ in range(2):
        assert as_lists(tokenize_corpus(texts.corpus, tokenizer, **options)) == expected
    assert texts.times_read == 2
    assert f"{rows.folder} is not a whole token cache" in caplog.text


@pytest.mark.parametrize("name", ["ids.npy", MANIFEST_FILE])
def test_what_fastkd_did_not_write_outlives_a_damaged_cache(tmp_path: Path, name: str) -> None:
    texts, tokenizer = Texts(), make_tokenizer()
    options: dict[str, Any] = {"max_length": 10, "layout": "rows", "cache_dir": tmp_path}
    rows = tokenize_corpus(texts.corpus, tokenizer, **options)
    (rows.folder / "notes.txt").write_text("mine")
    data = (rows.folder / name).read_bytes()
    (rows.folder / name).write_bytes(data[:-4] + bytes(4))
    again = tokenize_corpus(texts.corpus, tokenizer, **options)
    assert as_lists(again) == as_lists(tokenize_corpus(texts.corpus, tokenizer, **options)) and texts.times_read == 2
    assert (rows.folder / "notes.txt").read_text() == "mine" and again.fingerprint == rows.fingerprint


def test_what_fastkd_did_not_write_outlives_an_unfinished_cache(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_length": 10, "layout": "rows", "cache_dir": tmp_path, "batch_size": 1}
    bad = Texts(["w1", cast(str, None)])
    with pytest.raises(TypeError):
        tokenize_corpus(bad.corpus, make_tokenizer(), **options, poll=lambda: note(tmp_path))
    assert [path.name for path in tmp_path.glob("*.unfinished/*")] == ["notes.txt"]
    rows = tokenize_corpus(Texts(["w1", "w2"]).corpus, make_tokenizer(), **options)  # of the same fingerprint
    assert len(rows) == 2 and sorted(content(rows.folder)) == [MANIFEST_FILE, "ids.npy", "offsets.npy"]
    assert [path.read_text() for path in tmp_path.glob("*.unfinished/*")] == ["mine"]


def note(cache_dir: Path) -> None:
    [folder] = cache_dir.glob("*.unfinished")
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("name", ["lock", "unfinished", "unfinished/ids.npy"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"max_length": 6, "layout": "rows"}
    fingerprint = tokenize_corpus(Texts().corpus, make_tokenizer(), cache_dir=tmp_path / "elsewhere", **options).fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ids.npy").write_text("mine")
    link = tmp_path / "cache" / f"{fingerprint}.{name}"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "mine" if name == "unfinished" else tmp_path / "mine" / "ids.npy")
    with pytest.raises(OSError, match=f"{link}"):
        tokenize_corpus(Texts().corpus, make_tokenizer(), cache_dir=tmp_path / "cache", **options)
    assert content(tmp_path / "mine") == {"ids.npy": b"mine"}


@pytest.mark.parametrize("damaged", [b"{}", b"null", b"", b'{"bookmark": {}, "pages": 3}'])
def test_a_record_of_progress_that_says_nothing_is_begun_anew(tmp_path: Path, damaged: bytes) -> None:
    def poll() -> None:
        raise Stopped

    options: dict[str, Any] = {"max_length": 6, "layout": "rows", "cache_dir": tmp_path}
    with pytest.raises(Stopped):
        tokenize_corpus(Texts().corpus, make_tokenizer(), poll=poll, **options)
    [progress] = tmp_path.glob("*.unfinished/progress.json")
    progress.write_bytes(damaged)
    assert len(tokenize_corpus(Texts().corpus, make_tokenizer(), **options)) == sum(map(bool, TEXTS))


@pytest.mark.parametrize("moment", ["sync", "append"])
def test_a_full_disk_is_told_with_its_folder_and_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    original, calls = getattr(token_writing.ArrayWriter, moment), []

    def full(*arguments: Any) -> None:
        calls.append(moment)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    options: dict[str, Any] = {"max_length": 6, "layout": "rows", "cache_dir": tmp_path, "batch_size": 2, "save_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(token_writing.ArrayWriter, moment, full)
        with pytest.raises(OSError, match=rf"No space left on device: .*free some space.*another cache_dir.*{tmp_path}") as raised:
            tokenize_corpus(Texts().corpus, make_tokenizer(), **options)
    assert raised.value.errno == errno.ENOSPC
    texts = Texts()
    assert len(tokenize_corpus(texts.corpus, make_tokenizer(), **options)) == sum(map(bool, TEXTS)) and texts.starts == [2]


def test_a_whole_cache_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it may be on a disk that this user cannot write to; and a worker that unpickles the rows reads no more than they."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    rows = tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=6, layout="rows", cache_dir=tmp_path)
    (tmp_path / f"{rows.fingerprint}.lock").unlink()
    entries = content(rows.folder)
    monkeypatch.setattr(tokenized, "lock", refused)
    again = tokenize_corpus(Texts().corpus, make_tokenizer(), max_length=6, layout="rows", cache_dir=tmp_path)
    assert content(rows.folder) == entries and list(tmp_path.iterdir()) == [rows.folder]
    monkeypatch.setattr(sealed, "file_sha256", refused)
    assert as_lists(pickle.loads(pickle.dumps(again))) == as_lists(rows)


def test_two_files_of_one_name_size_and_time_have_two_caches(tmp_path: Path) -> None:
    made = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "train.txt"
        file.write_text("w1 w2\n" if folder == "a" else "w3 w4\n")
        os.utime(file, ns=(0, 0))
        made.append(tokenize_corpus(open_corpus(file), make_tokenizer(), max_length=6, layout="rows", cache_dir=tmp_path / "cache"))
    assert [as_lists(rows) for rows in made] == [[[CLS, *word_ids(text), SEP]] for text in ("w1 w2", "w3 w4")]


def test_two_writers_at_once_end_with_one_cache(tmp_path: Path) -> None:
    texts = Texts()

    def tokenize(_: int) -> list[list[int]]:
        return as_lists(tokenize_corpus(texts.corpus, make_tokenizer(), max_length=10, layout="rows", cache_dir=tmp_path))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(tokenize, range(4)))
    assert all(result == results[0] for result in results)
    assert texts.times_read == 1
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 1
