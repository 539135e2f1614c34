"""YAML of configurations: the core schema of YAML 1.2, and a bound on what a document may become."""

import math
from typing import Any

import pytest
import yaml

from fastkd.train.yaml_text import MOST_BYTES, read_yaml, yaml_line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("010", 10),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("2e-5", 2e-5),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("True", True),
        ("2001-01-01", "2001-01-01"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("-.INF", -math.inf),
        ("!!str 12", "12"),
        ("!!float 1", 1.0),
    ],
)
def test_plain_scalars(text: str, value: Any) -> None:
    found = read_yaml(f"key: {text}".encode())
    assert found == {"key": value} and type(found["key"]) is type(value)


@pytest.mark.parametrize("text", ["1:30", "010", "0o17", "2e-5", "on", "yes", "null", "2001-01-01", "<<", "1_000", ".nan", ""])
def test_a_text_that_either_yaml_would_take_for_something_else_is_quoted(text: str) -> None:
    line = yaml_line([text])
    assert read_yaml(line.encode()) == [text] == yaml.safe_load(line)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TOWER = "".join(f"a{i}: &a{i} [[[[[[*a{i - 1}]]]]]]\n" if i else "a0: &a0 x\n" for i in range(10))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "with its aliases written out it has more than 10000 values"),
        (MERGES, "with its aliases written out it has more than 10000 values"),
        (TOWER, "or 40 levels"),
        ("a: &a [*a]", "or 40 levels"),
        ("a: " + "[" * 50 + "]" * 50, "or 40 levels"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " + "x" * MOST_BYTES, f"more than {MOST_BYTES} bytes"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!bool maybe", "'maybe' is neither true nor false"),
        ("a: !!int x", "'x' is no whole number"),
        ("a: " + "9" * 5000, "is no whole number"),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        read_yaml(text.encode())
    assert problem in str(caught.value.problem)
