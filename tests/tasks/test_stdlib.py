"""The standard library corpus: disjoint stable splits, and pieces that are the files' text again."""

import hashlib
import sysconfig
from pathlib import Path

import pytest

from fastkd.tasks import stdlib

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def files() -> dict[str, list[Path]]:
    return {split: stdlib.stdlib_files(split) for split in SPLITS}


def test_splits_are_disjoint_stable_and_of_the_promised_shares(files: dict[str, list[Path]]) -> None:
    everything = [path for split in SPLITS for path in files[split]]
    assert len(everything) == len(set(everything)) > 300
    assert {split: stdlib.stdlib_files(split) for split in SPLITS} == files
    assert all(paths == sorted(paths) for paths in files.values())
    for split, share in (("train", 0.90), ("dev", 0.05), ("test", 0.05)):
        assert abs(len(files[split]) / len(everything) - share) < 0.03, split


def test_tests_packages_and_tables_are_left_out(files: dict[str, list[Path]]) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for paths in files.values() for path in paths}
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})
    assert "html/entities.py" not in names
    assert not any("_sysconfigdata" in name for name in names)
    assert {"os.py", "pydoc_data/topics.py", "json/decoder.py"} <= names


def test_rows_are_bounded_and_enough() -> None:
    sizes = [len(row) for row in stdlib.stdlib_rows("train")]
    assert max(sizes) <= stdlib.MAX_CHUNK_CHARS
    assert 1_000 < sum(sizes) / len(sizes) < 3_000
    assert sum(sizes) > 7_000_000
    assert list(stdlib.stdlib_rows("dev")) == list(stdlib.stdlib_rows("dev"))


def test_pieces_are_the_text_again(files: dict[str, list[Path]]) -> None:
    for path in files["dev"]:
        text = path.read_text(encoding="utf-8")
        assert "".join(stdlib.split_source(text)) == text or not text.strip()


def test_pieces_end_at_definitions_then_blank_lines_then_anywhere() -> None:
    short = "def f():\n    return 1\n\n\n"
    definition = "def g():\n" + "    x = 1\n" * 110 + "\n\n"  # 1,111 characters: half of CHUNK_CHARS
    assert list(stdlib.split_source(short + definition + short)) == [short + definition, short]

    paragraph = "    x = 1\n" * 60 + "\n"  # no unindented line: only whole pieces of CHUNK_CHARS end
    assert list(stdlib.split_source(paragraph * 5)) == [paragraph * 4, paragraph]

    lines = "    x = 1\n" * 1_000  # no blank line either: MAX_CHUNK_CHARS ends a piece, between two lines
    assert list(map(len, stdlib.split_source(lines))) == [8_000, 2_000]


def test_blank_text_and_overlong_lines_give_no_piece() -> None:
    assert list(stdlib.split_source(" \n\n")) == []
    assert list(stdlib.split_source("a = 1\n" + "x" * (stdlib.MAX_CHUNK_CHARS + 1) + "\nb = 2\n")) == ["a = 1\nb = 2\n"]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of two files, both of them in the train split."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "os.py").write_text("import sys\n")
    (tmp_path / "typing.py").write_text("import os\n")
    return tmp_path


def test_a_file_is_in_the_split_its_path_hashes_to(library: Path) -> None:
    buckets: dict[str, set[int]] = {split: set() for split in SPLITS}
    for number in range(1_000):
        (library / f"m{number}.py").touch()
    for split in SPLITS:
        for path in stdlib.stdlib_files(split):
            buckets[split].add(int.from_bytes(hashlib.sha256(path.name.encode()).digest()) % 100)
    assert buckets == {"test": set(range(5)), "dev": set(range(5, 10)), "train": set(range(10, 100))}


def test_undecodable_file_is_left_out(library: Path) -> None:
    assert list(stdlib.stdlib_rows("train")) == ["import sys\n", "import os\n"]
    (library / "os.py").write_bytes(b"# \xff\xfe\n")
    assert list(stdlib.stdlib_rows("train")) == ["import os\n"]


def test_unknown_split_and_missing_sources_are_refused(library: Path) -> None:
    with pytest.raises(ValueError, match=r"split='validation'.*train, dev, test"):
        stdlib.stdlib_files("validation")
    (library / "os.py").unlink()
    with pytest.raises(ValueError, match=r"has none .* regular Python installation"):
        stdlib.stdlib_files("train")
