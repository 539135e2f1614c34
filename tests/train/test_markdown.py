"""Names as text, code, literals and tables of Markdown; whole cards of hostile names are in test_model_card.py."""

import ast

import pytest

from fastkd.train.markdown import code_span, escaped, fenced, python_literal, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("bert-base_uncased/v1.0", "bert-base_uncased/v1.0"),
        ("_a_ *b*", r"\_a\_ \*b\*"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("a|b", "a&#124;b"),
        ("[a](b)", r"\[a\](b)"),
        (" two\n lines\u2028\x00", "two lines"),
        (12, "12"),
    ],
)
def test_text_is_shown_as_it_is(value, text):
    assert escaped(value) == text


def test_code_is_code_where_it_can_be():
    assert code_span("org/model-2.b") == "`org/model-2.b`" and code_span("data/*.jsonl") == "`data/*.jsonl`"
    assert code_span("a`b") == r"a\`b" and code_span("a|b") == "a&#124;b" and code_span("") == "" and code_span("a\n") == "a"


@pytest.mark.parametrize("text", ["plain", 'a"b', "a\\b", "a\nb", "\u2028", "ünï\U0001f600", "\x00\x7f"])
def test_literals_are_read_back(text):
    assert ast.literal_eval(python_literal(text)) == text and python_literal(text).startswith('"')


def test_nothing_in_a_block_ends_it():
    assert fenced("text", "a") == "```text\na\n```"
    assert fenced("text", "a\n````\nb") == "`````text\na\n````\nb\n`````"


def test_tables_have_a_line_a_row():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
