"""The part of a documentation page that a script draws from its JSON file: what stands between two comments that name the script."""

from __future__ import annotations

from pathlib import Path

from fastkd.files import write_bytes_atomic

END = "<!-- end -->"


def write_block(page: Path, script: str, text: str) -> None:
    """Put `text` between the comments of `script`, a module of this folder; ValueError if the page lacks them."""
    opening = f"<!-- written by `python -m fastkd.benchmarks.{script} --write-docs docs/{page.name}` -->"
    before, begin, rest = page.read_text(encoding="utf-8").partition(opening)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the two lines {opening} and {END}, between which the figures go; add them.")
    write_bytes_atomic(page, f"{before}{begin}\n\n{text}\n{end}{after}".encode())
