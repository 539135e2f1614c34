"""Markdown of names and values that may hold anything: none of them becomes markup of its own."""

import html
import json
import re
from collections.abc import Sequence

# An underscore between letters is no emphasis.
_MARKUP = re.compile(r"[\\`*\[\]#~$]|(?<![^\W_])_|_(?![^\W_])")
_CODE = re.compile(r"[\w./:@+*{},=-]+( [\w./:@+*{},=-]+)*")


def escaped(value: object) -> str:
    """Escape a value as text for a line, or for a cell of a table; what does not print is a space."""
    printed = "".join(character if character.isprintable() else " " for character in str(value))
    line = html.escape(" ".join(printed.split()), quote=False)
    return _MARKUP.sub(r"\\\g<0>", line).replace("|", "&#124;")


def code_span(name: str) -> str:
    """Show a name as code, or as text where it has characters that code would show, or end, differently."""
    return f"`{name}`" if _CODE.fullmatch(name) else escaped(name)


def python_literal(text: str) -> str:
    """Write a string as Python reads it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def fenced(language: str, content: str) -> str:
    """Put code into a block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", content)), 0)
    return f"{fence}{language}\n{content}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells, which are Markdown already, as a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
