"""`--help` of every command: without torch, within 80 columns, and of `fastkd train` the keys that matter and the method's options."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkd.cli.main import COMMANDS, main
from fastkd.cli.train_help import GROUPS
from fastkd.methods.registry import METHODS
from fastkd.recipes import recipe_titles
from fastkd.train.config import RunConfig
from fastkd.train.schema import field_docs, key_rows

CALLS = [
    *([name] for name in COMMANDS),
    *(["vocab", "count"], ["vocab", "prune"], ["bench", "report"]),
    *(["train", recipe] for recipe in ("glmd/rte", "crild/rte", "ted/rte")),
]
IMPORTED = """
import sys
from fastkd.cli.main import main
for command in {calls}:
    try: code = main(command)
    except SystemExit as end: code = end.code
    heavy = {{'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'}} & sys.modules.keys()
    assert code == 0 and not heavy, f'fastkd {{command}}: code {{code}}, imports {{heavy}}'
"""


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_no_help_imports_torch() -> None:
    calls = [["--help"], *([*call, "--help"] for call in CALLS), ["train", "--help-all"], ["train", "ted/rte", "--help-all"]]
    done = subprocess.run([sys.executable, "-c", IMPORTED.format(calls=calls)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: fastkd") == len(calls)


@pytest.mark.parametrize("call", [[], *CALLS], ids=" ".join)
def test_help_is_less_than_80_lines_of_80_columns(
    call: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, *call, "--help").splitlines()
    assert 5 < len(lines) < 80 and max(map(len, lines)) <= 80


def test_the_overview_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.findall(r"^  (\w+) ", shown(capsys, "--help"), re.MULTILINE) == list(COMMANDS)


def test_help_of_train_has_its_keys_by_group_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "train", "--help")
    defaults = {key: default for key, _, default, _ in key_rows(RunConfig)}
    for title, keys in GROUPS.items():
        (group,) = re.findall(rf"^{re.escape(title)}:\n((?:  .*\n)+)", text, re.MULTILINE)
        assert [line.split()[:2] for line in group.splitlines()] == [[f"--{key}", defaults[key]] for key in keys]
    assert "  --learning_rate 0.0005            Peak learning rate of AdamW\n" in text
    assert "fastkd train CONFIG --help" in text and "options of method" not in text and text == shown(capsys, "train", "-h")


@pytest.mark.parametrize("method", ["glmd", "crild", "ted"])
def test_help_of_a_configuration_has_the_options_of_its_method(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "train", f"{method}/rte", "--max_steps", "3", "--help")
    options = text.partition(f"options of method {method}, as --options.KEY value:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in options.splitlines()] == list(field_docs(METHODS[method].options))
    (tmp_path / "run.yaml").write_text(f"method: {method}\n")
    assert shown(capsys, "train", str(tmp_path / "run.yaml"), "--help") == text


def test_a_line_of_help_is_cut_where_a_clause_ends(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "train", "ted/rte", "--help").splitlines()
    assert (
        "  kl_alpha 20.0              Weight of the divergence of predictions" in lines
    )  # its sentence goes on: "; the authors use 5 to 20"
    assert "  layerwise ted              ted | lwd | none" in lines  # which its meaning explains, one by one
    assert next(line for line in lines if "Rows (examples, in task stages)" in line).endswith(" in a ...")


@pytest.mark.parametrize("method", [None, *METHODS])
def test_all_of_the_help_has_every_key_and_option_with_its_meaning(
    method: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"method: {method}\n")
    text = shown(capsys, "train", *([] if method is None else [str(tmp_path / "run.yaml")]), "--help-all")
    assert max(map(len, text.splitlines())) <= 80
    found = re.findall(r"^--(\S+)", text, re.MULTILINE)
    options = [key for name in METHODS if method in (None, name) for key in field_docs(METHODS[name].options)]
    assert found == [*(key for key, *_ in key_rows(RunConfig)), *(f"options.{key}" for key in options)]
    words = " ".join(text.split())
    assert all(" ".join(doc.split()) in words for doc in field_docs(RunConfig).values())
    assert "--learning_rate float (0.0005) Peak learning rate of AdamW." in words


def test_every_recipe_is_of_a_method_whose_options_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    for name in recipe_titles():
        assert f"options of method {name.partition('/')[0]}" in shown(capsys, "train", name, "--help")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "/run.yaml cannot be read"),
        ("- method", 'holds ["method"], not a mapping'),
    ],
)
def test_help_of_what_is_no_configuration(text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["train", str(file), "--help"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("fastkd train: ") and sentence in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.parametrize("values", [{}, {"method": "tde"}, {"method": ["ted"]}, {"method": None}])
def test_help_of_a_configuration_without_a_known_method_is_the_usual_one(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    for flag in ("--help", "--help-all"):
        assert shown(capsys, "train", str(tmp_path / "run.yaml"), flag) == shown(capsys, "train", flag)
