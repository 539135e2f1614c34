"""Rows of a cloze task: those that cannot be used are left out and counted where that is asked for, and columns lose punctuation."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastkd.recipes import config_path
from fastkd.tasks.bad_rows import BadRowPolicy
from fastkd.tasks.cloze import encode_examples
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.train.config import read_config
from fastkd.train.schema import load_yaml
from tests import tiny

VERBALIZER = ClozeTask(kind="verbalizer", template="{text} so {mask}", label_words=("if", "for"))
CHOICES = ClozeTask(kind="choices", template="{text} so {choice}", choices_column="endings", max_length=12)
GOOD: dict[str, Any] = {"text": "return", "endings": ["if", "for"], "label": 1}
BAD = {
    "text": (VERBALIZER, {"text": None}),
    "nan": (VERBALIZER, {"text": float("nan")}),
    "unknown label": (VERBALIZER, {"label": "maybe"}),
    "label beyond": (VERBALIZER, {"label": 2}),
    "empty candidate": (CHOICES, {"endings": ["if", " "]}),
    "no candidate": (CHOICES, {"endings": []}),
    "absent candidate": (CHOICES, {"endings": ["if", None]}),
    "candidate without a token": (CHOICES, {"endings": ["if", "\x00"]}),
    "candidate that is too long": (CHOICES, {"endings": ["if", "return " * 20]}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_left_out_counted_and_said(case: str, caplog: pytest.LogCaptureFixture) -> None:
    task, change = BAD[case]
    rows = [GOOD, {**GOOD, **change}, GOOD, {**GOOD, **change}]
    with pytest.raises(ValueError, match=r"Row 1 \(the first is 0\) of mine: .*on_bad_row: skip leaves such rows out"):
        encode_examples(task, rows, tiny.wordpiece(), causal=False, description="mine")
    with caplog.at_level(logging.WARNING):
        left = encode_examples(task, rows, tiny.wordpiece(), causal=False, bad_rows=BadRowPolicy("skip", 2), description="mine")
    expected = encode_examples(task, [GOOD], tiny.wordpiece(), causal=False)[0]
    assert [[ids.tolist() for ids in example.sequences] for example in left] == 2 * [[ids.tolist() for ids in expected.sequences]]
    assert "2 rows of mine cannot be used and were left out" in caplog.text and "The first: Row 1 " in caplog.text
    with pytest.raises(ValueError, match=r"More than max_bad_rows=1 rows of mine cannot be used\. The first of them: Row 1 "):
        encode_examples(task, rows, tiny.wordpiece(), causal=False, bad_rows=BadRowPolicy("skip", 1), description="mine")
    with pytest.raises(ValueError, match=r"None of the 2 rows of mine can be used\. Row 0 "):
        encode_examples(task, rows[1::2], tiny.wordpiece(), causal=False, bad_rows=BadRowPolicy("skip"), description="mine")


def read_text(task: ClozeTask, row: dict[str, Any]) -> list[str]:
    tokenizer = tiny.wordpiece()
    (example,) = encode_examples(task, [row], tokenizer, causal=False)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in example.sequences]


def test_a_column_is_read_without_the_punctuation_at_its_end() -> None:
    task = ClozeTask(kind="verbalizer", template='"{a}"? {mask}. {b}', label_words=("if", "for"), strip=("a",))
    with_end, without_end = ({"a": f"return a.b{end}", "b": "self.", "label": 0} for end in ("?!. ", ""))
    assert read_text(task, with_end) == read_text(task, without_end)
    assert read_text(task, {**without_end, "b": "self"}) != read_text(task, without_end)


@pytest.mark.parametrize("kind", ["column", "columns"])
def test_candidates_are_read_without_the_punctuation_at_their_ends(kind: str) -> None:
    of = {"choices_column": "list", "strip": ["list"]} if kind == "column" else {"choice_columns": ["x", "y"], "strip": ["y", "x"]}
    task = ClozeTask(kind="choices", template="{text} so {choice}", **of)  # type: ignore[arg-type]
    with_end = {"text": "self.", "list": ["if.", "for!"], "x": "if.", "y": "for!", "label": 0}
    assert read_text(task, with_end) == read_text(task, {**with_end, "list": ["if", "for"], "x": "if", "y": "for"})
    with pytest.raises(ValueError, match=r"holds the empty candidate '\?!'"):
        read_text(task, {**with_end, "list": ["?!", "if"], "x": "?!"})


@pytest.mark.parametrize(
    ("recipe", "columns"),
    [("rte", ("hypothesis",)), ("cb", ("hypothesis",)), ("copa", ("choice1", "choice2")), ("multirc", ("paragraph", "question"))],
)
def test_recipes_strip_what_glms_patterns_strip(recipe: str, columns: tuple[str, ...]) -> None:
    data = read_config(load_yaml(config_path(f"glmd/{recipe}"))).task
    assert data is not None and data.cloze.strip == columns
