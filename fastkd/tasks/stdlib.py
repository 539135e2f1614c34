"""The Python standard library's own sources and documentation as a corpus.

Real text of about 9 MB that every machine already has: no network, no download, no licence question.
"""

import hashlib
import io
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "dev", "test")
CHUNK_CHARS = 2_000
MAX_CHUNK_CHARS = 8_000

# Installed packages, tests (Debian ships few, and the corpus should be much the same there) and generated tables.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "__phello__"),
}
_SKIPPED_FILES = {"html/entities.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def stdlib_files(split: str) -> list[Path]:
    """The .py files of one split, in a stable order.

    A file belongs to the split that the SHA-256 of its path relative to the library names (modulo 100: below 5 test,
    below 10 dev, else train), so no text of one file is in two splits and a file stays in its split between versions.

    Raises:
        ValueError: ``split`` is not one of ``SPLITS``, or this Python has no standard library sources on disk.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split of the standard library corpus: use one of {', '.join(SPLITS)}.")
    root = _root()
    return [root / name for name in _relative_names(root) if _split_of(name) == split]


def stdlib_rows(split: str) -> Iterator[str]:
    """The texts of ``stdlib_files(split)`` in pieces (see ``source_pieces``)."""
    for path in stdlib_files(split):
        yield from source_pieces(path)


def source_pieces(path: Path) -> list[str]:
    """The text of a file in pieces of about ``CHUNK_CHARS`` characters (see ``split_source``); none if it is not valid UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    return list(split_source(text))


def split_source(text: str) -> Iterator[str]:
    """Cut Python source into pieces whose concatenation is the text, blank pieces left out; no line is ever split.

    A piece that has half of ``CHUNK_CHARS`` ends where a blank line is followed by an unindented one (a top-level
    definition), one that has all of it at any blank line, and every one before the line that would take it past
    ``MAX_CHUNK_CHARS``. A single line longer than that, which no hand-written source has, is dropped.
    """
    piece: list[str] = []
    size = 0
    after_blank = False
    for line in io.StringIO(text):
        if len(line) > MAX_CHUNK_CHARS:
            continue
        blank = not line.strip()
        enough = CHUNK_CHARS if line[0].isspace() else CHUNK_CHARS // 2
        if (after_blank and not blank and size >= enough) or size + len(line) > MAX_CHUNK_CHARS:
            yield from _unless_blank(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
        after_blank = blank
    yield from _unless_blank(piece)


def _unless_blank(piece: list[str]) -> Iterator[str]:
    text = "".join(piece)
    if text.strip():
        yield text


def _root() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise ValueError(
            f"The 'stdlib' corpus needs the standard library's .py files, and {root} has none "
            "(a zipped or stripped Python): use a regular Python installation, or give a text file as the corpus."
        )
    return root


def _relative_names(root: Path) -> list[str]:
    """Relative POSIX paths of the library's sources, sorted."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        names += [
            (Path(folder) / file).relative_to(root).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith(_SKIPPED_PREFIXES)
        ]
    return sorted(set(names) - _SKIPPED_FILES)


def _split_of(name: str) -> str:
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 5 else "dev" if bucket < 10 else "train"
