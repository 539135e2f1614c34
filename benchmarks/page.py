"""The parts of a documentation page that a script draws from its JSON files: what stands between two comments that name the script."""

from __future__ import annotations

import re
from pathlib import Path

from fastkd.store import write_bytes_atomic

END = "<!-- end -->"
_OPENING = re.compile(r"<!-- written by `python -m fastkd\.benchmarks\.(.+) --write-docs \S+` -->")


def write_block(page: Path, script: str, text: str) -> None:
    """Put `text` between the comments of `script`: a module of this folder, and its arguments. ValueError if the page lacks them."""
    old = page.read_text(encoding="utf-8")
    start = next((opening.end() for opening in _OPENING.finditer(old) if opening[1] == script), None)
    end = -1 if start is None else old.find(END, start)
    if end < 0:
        raise ValueError(
            f"{page} lacks the two lines <!-- written by `python -m fastkd.benchmarks.{script} --write-docs docs/{page.name}` --> and "
            f"{END}, between which the figures go; add them."
        )
    write_bytes_atomic(page, f"{old[:start]}\n\n{text}\n{old[end:]}".encode())


def scripts(page: Path) -> list[str]:
    """The scripts that write parts of this page, each with its arguments."""
    return [opening[1] for opening in _OPENING.finditer(page.read_text(encoding="utf-8"))]
