"""README, CONTRIBUTING and docs/, and the fenced blocks in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BEGIN = re.compile(r"(?P<indent> *)```(?P<language>\S*)|(?P<setup><!-- setup)$|<!-- setup from (?P<file>\S+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block, or the Python of a `<!-- setup` comment, or that of the file which `<!-- setup from FILE -->` names."""

    page: str
    line: int
    """Number of its first line of code, from 1."""
    language: str
    """ "setup" of a comment."""
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def split_blocks(text: str, page: str) -> list[Block]:
    """The blocks of a page from top to bottom; ValueError for one that never ends."""
    blocks = []
    lines = iter(enumerate(text.splitlines(), start=1))
    for first, line in lines:
        begin = _BEGIN.match(line)
        if begin is None:
            continue
        if begin["file"]:
            blocks.append(Block(page, first, "setup", (ROOT / begin["file"]).read_text(encoding="utf-8")))
            continue
        end = "-->" if begin["setup"] else f"{begin['indent']}```"
        code = []
        for _, inside in lines:
            if inside == end:
                break
            code.append(inside)
        else:
            raise ValueError(f"{page}:{first}: the block that begins here has no end.")
        language = "setup" if begin["setup"] else begin["language"]
        blocks.append(Block(page, first + 1, language, textwrap.dedent("\n".join(code)) + "\n"))
    return blocks


def blocks_of(*languages: str) -> list[Block]:
    """Every block in one of these languages, page by page."""
    found = [block for page in PAGES for block in split_blocks(page.read_text(encoding="utf-8"), name_of(page))]
    return [block for block in found if block.language in languages]
