"""Cut plain text files into documents, without holding a large file in memory."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import Literal

from fastkd.sealed import open_regular
from fastkd.tasks.sources import HashedFile

Documents = Literal["file", "paragraph", "line"]
LONGEST = 2**20
"""Characters of the longest document; one of more becomes several, which end where a line does if one ends in time."""
_BLOCK_BYTES = 2**20


def text_documents(file: HashedFile, documents: Documents) -> Iterator[str]:
    """Yield the documents of a UTF-8 text file; CR, LF and CRLF end a line and become LF, and a byte order mark is left out.

    Args:
        file: The file, whose content is not to change meanwhile.
        documents: ``file``: all of it, with its line ends and blank lines. ``paragraph``: the lines between two blank ones, without
            the last one's end. ``line``: each line, without its end. What is blank is no document.

    Raises:
        ValueError: The file is not UTF-8, holds a NUL byte, or was changed since it was hashed.
    """
    held: list[str] = []
    size = 0
    for line in _lines(file):
        is_blank = not line.strip()
        is_end = documents == "line" or (documents == "paragraph" and is_blank) or size + len(line) > LONGEST
        if held and is_end:
            yield from _document(held, documents)
            held, size = [], 0
        if documents == "file" or not is_blank:
            held.append(line)
            size += len(line)
    yield from _document(held, documents)


def _document(lines: list[str], documents: Documents) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text if documents == "file" else text.removesuffix("\n")


def _lines(file: HashedFile) -> Iterator[str]:
    """Yield the lines with their ends, and one of more than ``LONGEST`` characters in parts."""
    begun = ""
    for block in _blocks(file):
        *whole, begun = (begun + block).split("\n")
        for line in whole:
            yield from _parts(f"{line}\n")
        *full, begun = _parts(begun) or [""]
        yield from full
    if begun:
        yield begun


def _parts(line: str) -> list[str]:
    return [line[start : start + LONGEST] for start in range(0, len(line), LONGEST)]


def _blocks(file: HashedFile) -> Iterator[str]:
    """Yield the text a block of bytes at a time, with LF as its only line end."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    offset = 0
    with open_regular(file.path) as raw:
        while True:
            block: bytes = raw.read(_BLOCK_BYTES)
            file.require_unchanged()
            faults = [] if (nul := block.find(b"\0")) < 0 else [nul]
            try:
                text = decoder.decode(block.removeprefix(codecs.BOM_UTF8) if offset == 0 else block, final=not block)
            except UnicodeDecodeError as error:  # its object may begin with what the block before has left
                faults.append(error.start + len(block) - len(error.object))
            if faults:
                place = offset + min(faults)
                raw.seek(place)
                raise ValueError(
                    f"{file.path} is not text in UTF-8: its byte {place} (the first is 0) is {raw.read(1)[0]:#04x}. "
                    "Convert it to UTF-8, or mend it."
                )
            yield text
            offset += len(block)
            if not block:
                return
