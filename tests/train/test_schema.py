"""Config dataclasses from mappings: field docstrings, types, defaults, and the sentence of every error."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from fastkd.train.schema import ConfigError, apply_flags, field_docs, from_mapping
from tests.example_config import STUDENT, Models, Optimizer, Run, Stage, problems

# field_docs


def test_field_docs_are_one_line_and_inherited() -> None:
    docs = field_docs(Run)
    assert docs["model_name_or_path"] == "The student: a Hub name or a folder."
    assert docs["bf16"] == "Train in bfloat16."
    assert field_docs(Optimizer)["betas"] == "Decay rates of the moments."


def test_a_redeclared_field_inherits_its_docstring() -> None:
    @dataclass
    class Child(Models):
        model_name_or_path: str = "small"

    @dataclass
    class Grandchild(Child):
        model_name_or_path: str = "large"
        """Its own."""

    assert field_docs(Child) == field_docs(Models)
    assert field_docs(Grandchild) == {"model_name_or_path": "Its own."}


def test_a_field_without_docstring_is_named() -> None:
    @dataclass
    class Bare:
        first: int = 0
        """Has one."""
        second: int = 0

    with pytest.raises(TypeError, match=r"^Bare\.second has no docstring; write a string literal right below the field$"):
        field_docs(Bare)


# from_mapping


def test_defaults_and_nested_values() -> None:
    run = from_mapping(
        Run,
        {
            **STUDENT,
            "optimizer": {"learning_rate": 1},
            "teacher": {"model_name_or_path": "teacher"},
            "text_columns": ["a", "b"],
            "save_steps": 0.5,
            "model_kwargs": {"depth": [1, {"x": None}]},
        },
    )
    assert run == Run(
        "student",
        optimizer=Optimizer(1.0, (0.8, 0.9)),
        teacher=Models("teacher"),
        text_columns=["a", "b"],
        save_steps=0.5,
        model_kwargs={"depth": [1, {"x": None}]},
    )
    assert type(run.optimizer.learning_rate) is float
    assert type(from_mapping(Run, {**STUDENT, "save_steps": 5}).save_steps) is int


def test_sequences_take_the_type_of_their_field() -> None:
    optimizer = from_mapping(Optimizer, {"betas": [0, 1]})
    assert optimizer.betas == (0.0, 1.0)
    assert [type(beta) for beta in optimizer.betas] == [float, float]


def test_entries_of_a_mapping_are_those_given_each_over_its_default() -> None:
    run = from_mapping(Run, {**STUDENT, "stages": {"pretrain": {"max_steps": 7}, "new": {"max_steps": 1}}})
    assert run.stages == {"pretrain": Stage(7, Optimizer(1e-4)), "new": Stage(1)}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"methd": "ted"}, "methd is not a known key; did you mean method?"),
        (
            {"optimizer": {"learning_rat": 1.0}},
            "optimizer.learning_rat is not a known key; did you mean optimizer.learning_rate?",
        ),
        ({"optimizer": {"zzz": 1}}, "optimizer.zzz is not a known key; known here: learning_rate, betas"),
        ({"optimizer": {True: 1}}, "optimizer.True is not a known key; known here: learning_rate, betas"),
        (
            {"optimizer": {"learning_rate": "2e-5"}},
            "optimizer.learning_rate is the text '2e-5'; it must be float: write a number",
        ),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate is nan; it must be a finite number"),
        ({"save_steps": float("-inf")}, "save_steps is -inf; it must be a finite number"),
        ({"model_kwargs": {"a": [{"b": float("inf")}]}}, "model_kwargs.a[0].b is inf; it must be a finite number"),
        ({"optimizer": {"learning_rate": 10**400}}, "optimizer.learning_rate is a number beyond 64 bits; write a smaller one"),
        ({"save_steps": 2**63}, "save_steps is a number beyond 64 bits; write a smaller one"),
        (
            {"optimizer": {"learning_rate": "fast"}},
            "optimizer.learning_rate is the text 'fast'; it must be float: write a number",
        ),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate is true; it must be float: write a number"),
        ({"optimizer": {"betas": [0.9, None]}}, "optimizer.betas[1] is null; it must be float: write a number"),
        ({"bf16": 1}, "bf16 is 1; it must be bool: write true or false"),
        ({"save_steps": False}, "save_steps is false; it must be int | float: write a whole number"),
        (
            {"stages": {"fine-tune": {"max_steps": 1.0}}},
            "stages.fine-tune.max_steps is 1.0; it must be int: write a whole number",
        ),
        ({"run_name": 12}, "run_name is 12; it must be str | null: put it in quotes"),
        ({"model_name_or_path": None}, "model_name_or_path is null; it must be str: put it in quotes"),
        ({"method": "kd"}, "method is the text 'kd'; it must be glmd | crild | ted: write one of these"),
        ({"text_columns": "a"}, "text_columns is the text 'a'; it must be list[str]: write [a, b]"),
        ({"text_columns": {"a": 1}}, "text_columns is a mapping; it must be list[str]: write [a, b]"),
        (
            {"teacher": [1, 2]},
            "teacher is [1, 2]; it must be mapping | null: write `key: value` lines, or flags with dotted keys",
        ),
        (
            {"stages": {"pretrain": None}},
            "stages.pretrain is null; it must be mapping: write `key: value` lines, or flags with dotted keys",
        ),
        ({"model_kwargs": {1: 2}}, "a name in model_kwargs is 1; it must be str: put it in quotes"),
        ({"teacher": {}}, "teacher.model_name_or_path is missing (str); it has no default, so set it"),
        ({"stages": {"new": {}}}, "stages.new.max_steps is missing (int); it has no default, so set it"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate is -1.0; it must be at least 0"),
        (
            {"stages": {"pretrain": {"optimizer": {"betas": [1, 2, 3]}}}},
            "stages.pretrain.optimizer: there are more than two betas",
        ),
    ],
)
def test_problem_sentences(data: dict[str, Any], sentence: str) -> None:
    assert problems(data) == [sentence]


def test_all_problems_are_collected() -> None:
    found = problems({"bf16": 1, "nonsense": 2, "optimizer": {"learning_rate": "2e-5", "betas": 3}})
    assert [re.split(r" is ", sentence)[0] for sentence in found] == [
        "nonsense",
        "bf16",
        "optimizer.learning_rate",
        "optimizer.betas",
    ]


def test_where_is_the_prefix_of_every_key() -> None:
    assert problems({"bf16": 1}, where="a.b") == ["a.b.bf16 is 1; it must be bool: write true or false"]


def test_a_config_that_is_no_mapping_or_fails_its_own_check() -> None:
    with pytest.raises(ConfigError, match=r"^the config is \[1\]; it must be mapping: write"):
        from_mapping(Run, [1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^there are more than two betas$"):
        from_mapping(Optimizer, {"betas": [1, 2, 3]})


def test_a_choice_is_of_its_own_type() -> None:
    @dataclass
    class Choice:
        level: Literal[1, 2] = 1
        """The level."""

    assert from_mapping(Choice, apply_flags({}, ["--level", "2"], Choice)) == Choice(2)
    with pytest.raises(ConfigError, match=r"^level is true; it must be 1 \| 2: write one of these$"):
        from_mapping(Choice, {"level": True})


def test_a_type_outside_the_schema_is_refused() -> None:
    @dataclass
    class Odd:
        number: complex = 0j
        """Not a config type."""

    with pytest.raises(TypeError, match=r"a config field cannot have the type <class 'complex'>"):
        from_mapping(Odd, {"number": 1})
