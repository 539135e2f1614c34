"""Config dataclasses in and out of YAML, flags, help and docs, with the sentence of every error."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastkd.train import schema
from fastkd.train.schema import ConfigError, apply_flags, docs_table, from_mapping, help_text, load_yaml, to_yaml
from tests.example_config import STUDENT, Models, Optimizer, Run, Stage, flags, problems, read_text

# load_yaml


def test_load_yaml(tmp_path: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nmerged:\n  <<: *base\n  b: 3\nlist: [1, x]\nname: Zürich\n"
    assert read_text(tmp_path, text) == {
        "base": {"a": 1, "b": 2},
        "merged": {"a": 1, "b": 3},
        "list": [1, "x"],
        "name": "Zürich",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", " is empty; write `key: value` lines"),
        ("# only a comment\n", " is empty; write `key: value` lines"),
        ("- a\n- b\n", ' holds ["a", "b"], not a mapping; write `key: value` lines'),
        ("a: 1\nb: [1\nc: 2\n", ", line 3 is not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", ", line 5 is not valid YAML: the key c is there twice"),
        ("a: 1\nb: 2\na: 1\n", ", line 3 is not valid YAML: the key a is there twice"),
        (
            "a: !!python/object:os.system x\n",
            ", line 1 is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
    ],
)
def test_load_yaml_sentences(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path, text)
    assert str(caught.value) == f"{tmp_path / 'config.yaml'}{sentence}"


def test_load_yaml_of_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read \(No such file or directory\); give the path of a YAML"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not valid YAML: "):
        load_yaml(tmp_path / "binary.yaml")


# apply_flags


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--method", "ted"], {"method": "ted"}),
        (["--method=ted", "--method=glmd"], {"method": "glmd"}),
        (["--run_name", "12"], {"run_name": "12"}),
        (["--run-name=a=b"], {"run_name": "a=b"}),
        (["--run_name", "null"], {"run_name": None}),
        (["--model_name_or_path", "null"], {"model_name_or_path": "null"}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "--method", "ted"], {"bf16": True, "method": "ted"}),
        (["--bf16", "False"], {"bf16": False}),
        (["--save_steps", "3"], {"save_steps": 3}),
        (["--save_steps", "1e-1"], {"save_steps": 0.1}),
        (["--optimizer.learning-rate", "-2e-5"], {"optimizer": {"learning_rate": -2e-5}}),
        (["--optimizer.betas", "0.5, 1"], {"optimizer": {"betas": [0.5, 1.0]}}),
        (["--text_columns", "a,b", "--text-columns=c"], {"text_columns": ["a", "b", "c"]}),
        (["--text_columns="], {"text_columns": []}),
        (["--model_kwargs.attn-x", "1e-3", "--model_kwargs.b", "no"], {"model_kwargs": {"attn-x": 1e-3, "b": "no"}}),
        (["--teacher.model_name_or_path", "t"], {"teacher": {"model_name_or_path": "t"}}),
        (["--teacher", "null"], {"teacher": None}),
        (
            ["--stages.fine-tune.optimizer.learning_rate", "1e-4"],
            {"stages": {"pretrain": {}, "fine-tune": {"optimizer": {"learning_rate": 1e-4}}}},
        ),
    ],
)
def test_flags_are_read_by_the_type_of_their_key(argv: list[str], expected: dict[str, Any]) -> None:
    result = flags(*argv)
    assert result == expected
    assert repr(result) == repr(expected)  # 1 == 1.0 == True, but not here


def test_flags_go_over_a_copy_of_the_file() -> None:
    data = {"text_columns": ["a"], "teacher": None, "stages": {"only": {"max_steps": 1}}, "bf16": True}
    result = flags(
        "--text_columns", "b", "--teacher.model_name_or_path=t", "--stages.only.max_steps", "2", "--stages.new.max_steps=3", data=data
    )
    assert result == {
        "text_columns": ["b"],
        "teacher": {"model_name_or_path": "t"},
        "stages": {"only": {"max_steps": 2}, "new": {"max_steps": 3}},
        "bf16": True,
    }
    assert data == {"text_columns": ["a"], "teacher": None, "stages": {"only": {"max_steps": 1}}, "bf16": True}


def test_a_flag_for_one_default_entry_keeps_the_others() -> None:
    run = from_mapping(Run, flags("--stages.fine-tune.max_steps", "3", data=STUDENT))
    assert run.stages == {"pretrain": Stage(100, Optimizer(1e-4)), "fine-tune": Stage(3)}


def test_a_null_between_repeated_lists_starts_over() -> None:
    @dataclass
    class Outer:
        inner: Optimizer | None = None
        """May be absent."""

        names: list[str] | None = None
        """May be absent."""

    argv = ["--inner.betas=1", "--inner=null", "--inner.betas=2", "--names=a", "--names=null", "--names=b", "--names=c"]
    assert apply_flags({}, argv, Outer) == {"inner": {"betas": [2.0]}, "names": ["b", "c"]}
    assert apply_flags({}, argv[:5], Outer) == {"inner": {"betas": [2.0]}, "names": None}


def test_a_flag_that_does_not_fit_is_reported_like_a_file() -> None:
    assert problems(flags("--optimizer.betas", "0.9,x")) == ["optimizer.betas[1] is the text 'x'; it must be float: write a number"]
    assert problems(flags("--teacher", "t"))[0].startswith("teacher is the text 't'; it must be mapping | null: write")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["method"], "method is not a flag; write --key VALUE"),
        (["-m", "ted"], "-m is not a flag; write --key VALUE"),
        (["--methd", "ted"], "--methd is not a known flag; did you mean --method?"),
        (
            ["--stages.new.optimizer.learning-rat=1"],
            "--stages.new.optimizer.learning_rat is not a known flag; did you mean --stages.new.optimizer.learning_rate?",
        ),
        (["--optimizer.zzz", "1"], "--optimizer.zzz is not a known flag; known here: learning_rate, betas"),
        (["--method"], "--method lacks its value; write --method VALUE (glmd | crild | ted)"),
        (["--run_name", "--bf16"], "--run_name lacks its value; write --run_name VALUE (str | null)"),
        (["--method.name", "x"], "--method.name goes below a value; write --method VALUE (glmd | crild | ted)"),
    ],
)
def test_flag_sentences(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags(*argv)
    assert str(caught.value) == sentence


def test_a_flag_below_a_value_of_the_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer is 3; it must be mapping: write"):
        flags("--optimizer.learning_rate", "1", data={"optimizer": 3})


# to_yaml

FULL = Run(
    "a: [strange] # name",
    method="ted",
    bf16=True,
    run_name="12",
    save_steps=2e-05,
    text_columns=["no", "1e5", "0o17", "1:30", "010", "2001-01-01", "~", "<<", "two\nlines", " padded ", ""],
    model_kwargs={"lr": 1e16, "nested": {"deep": [None, 1.0, {}]}, "empty": []},
    optimizer=Optimizer(2e-05, ()),
    teacher=Models("größe" * 60),
    stages={"on": Stage(1), "pretrain": Stage(100, Optimizer(1e-4, (0.5,))), "12": Stage(3, Optimizer(0.0))},
)


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize(
    "run",
    [Run("s"), FULL, Run("null", stages={}), Run("a\n\n b\n", stages={"pretrain": Stage(100, Optimizer())}, run_name="")],
    ids=["defaults", "full", "no-stages", "one-stage"],
)
def test_yaml_round_trip(tmp_path: Path, run: Run, comments: bool, defaults: bool) -> None:
    text = to_yaml(run, comments=comments, defaults=defaults)
    assert from_mapping(Run, read_text(tmp_path, text)) == run


def test_yaml_text() -> None:
    run = Run("student", optimizer=Optimizer(2e-05, ()), stages={"pretrain": Stage(5, Optimizer(1e-4))})
    assert to_yaml(run, defaults=False) == (
        "# The student: a Hub name or a folder.\n"
        "model_name_or_path: student\n"
        "# How the student is updated.\n"
        "optimizer:\n"
        "  # Peak learning rate.\n"
        "  learning_rate: 2.0e-05\n"
        "  # Decay rates of the moments.\n"
        "  betas: []\n"
        "# The stages in their order.\n"
        "stages:\n"
        "  pretrain:\n"
        "    # Optimizer steps of the stage.\n"
        "    max_steps: 5\n"
    )
    assert "# The method, e.g. glmd | ted.\nmethod: glmd\n" in to_yaml(run)
    assert "run_name: null\n" in to_yaml(run)
    assert "#" not in to_yaml(run, comments=False)


def test_yaml_keeps_order_letters_and_lines() -> None:
    text = to_yaml(Run("größe " * 60, model_kwargs={"b": 1, "a": "ü"}), comments=False)
    assert text.startswith(f"model_name_or_path: '{'größe ' * 60}'\n")
    assert "model_kwargs: {b: 1, a: ü}\n" in text


def test_yaml_of_an_all_default_config_is_still_a_mapping(tmp_path: Path) -> None:
    assert to_yaml(Optimizer(), defaults=False) == "{}\n"
    assert read_text(tmp_path, "{}\n") == {}


# help_text, docs_table


def test_help_text() -> None:
    lines = help_text(Run, width=200).splitlines()
    assert lines == [
        "--model_name_or_path str (required)  The student: a Hub name or a folder.",
        "--method glmd | crild | ted (glmd)  The method, e.g. glmd | ted.",
        "--bf16 bool (false)  Train in bfloat16.",
        "--run_name str | null (null)  Name in the logs.",
        "--save_steps int | float (500)  Steps between checkpoints; below 1, a fraction of all.",
        "--text_columns list[str] ([])  Columns that hold text.",
        "--model_kwargs.NAME any ({})  Handed to the model.",
        "--optimizer mapping (...)  How the student is updated.",
        "--optimizer.learning_rate float (5e-05)  Peak learning rate. Reached after `warmup_steps`.",
        "--optimizer.betas list[float] ([0.8, 0.9])  Decay rates of the moments.",
        "--teacher mapping | null (null)  The teacher; none trains alone.",
        "--teacher.model_name_or_path str (required)  The student: a Hub name or a folder.",
        '--stages.NAME mapping ({"pretrain": "...", "fine-tune": "..."})  The stages in their order.',
        "--stages.NAME.max_steps int (required)  Optimizer steps of the stage.",
        "--stages.NAME.optimizer mapping (...)  How the stage updates the student.",
        "--stages.NAME.optimizer.learning_rate float (5e-05)  Peak learning rate. Reached after `warmup_steps`.",
        "--stages.NAME.optimizer.betas list[float] ([0.9, 0.999])  Decay rates of the moments.",
    ]


def test_help_text_wraps() -> None:
    lines = help_text(Run, width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert {line[:2] for line in lines} == {"--", "  "}
    assert "    below 1, a fraction of all." in lines


def test_docs_table() -> None:
    lines = docs_table(Run).splitlines()
    assert lines[:4] == [
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `model_name_or_path` | `str` | `required` | The student: a Hub name or a folder. |",
        r"| `method` | `glmd \| crild \| ted` | `glmd` | The method, e.g. glmd \| ted. |",
    ]
    assert lines[-1] == "| `stages.NAME.optimizer.betas` | `list[float]` | `[0.9, 0.999]` | Decay rates of the moments. |"
    assert len(lines) == 2 + len(help_text(Run, width=1000).splitlines())


def test_the_file_needs_neither_torch_nor_yaml() -> None:
    code = f"import sys; import {schema.__name__}; print(sorted({{'torch', 'yaml'}} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
