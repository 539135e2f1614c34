"""README can be read in a few minutes: its length, its prose and its sentences are counted."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

LINES, WORDS, WORDS_OF_A_SENTENCE = 120, 900, 30


def prose(text: str) -> str:
    """What is left without code, comments, pictures and the addresses of links; cells of tables and list items are sentences."""
    text = re.sub(r"<!--.*?-->|^```.*?^```$|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"^(#+ .*|- .*|.*\|.*)$", r"\1.", text, flags=re.MULTILINE)


def sentences(text: str) -> list[list[str]]:
    parts = re.split(r"[.!?:;](?=\s|$)|\|", prose(text))
    return [words for part in parts if (words := re.findall(r"[\w`'/=<>*().-]*\w[\w`'/=<>*().-]*", part))]


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = sentences(text)
    assert len(text.splitlines()) <= LINES
    assert sum(map(len, found)) <= WORDS
    assert [" ".join(words) for words in found if len(words) > WORDS_OF_A_SENTENCE] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two. Three\nfour five.\n", [2, 3]),
        ("[a link](docs/x.md) `x.y` ends. Next", [4, 1]),
        ("```python\nnot prose\n```\n<!-- nor\nthis -->\n| a b | c |\n- item one\n- item two\n", [2, 1, 2, 2]),
    ],
)
def test_words_are_counted(text: str, expected: list[int]) -> None:
    assert [len(words) for words in sentences(text)] == expected
