"""Every code block of README, CONTRIBUTING and docs/ is run or read, according to its language.

python      the blocks of a page from top to bottom in one module, in an empty folder; `<!-- setup` comments run where they stand
yaml        read as a configuration of `fastkd train`, and its stages planned; a part of one is read over what every run needs
console     lines that begin with `$ `: `fastkd` by the parsers of its commands, `make` by the targets of the Makefile
bash        parsed by bash
text        output and formulas
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli.main import main
from fastkd.recipes import recipe_titles
from fastkd.train.config import RunConfig, read_config
from fastkd.train.run import plan_stages
from fastkd.train.schema import ConfigError, load_yaml
from tests.docs.pages import PAGES, ROOT, Block, blocks_of, name_of, split_blocks

LANGUAGES = {"python", "setup", "yaml", "console", "bash", "text"}
NEEDED = {"method": "kd", "output_dir": "run", "student": {"num_hidden_layers": 1}}
"""What every run needs."""
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language(page: Path) -> None:
    blocks = split_blocks(page.read_text(encoding="utf-8"), name_of(page))
    assert [f"{block}: {block.language}" for block in blocks if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in blocks_of("python")))
def test_python(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python([block for block in blocks_of("python", "setup") if block.page == page], monkeypatch)
    assert not torch.distributed.is_initialized(), f"{page} leaves its process group behind; end it in a setup comment."


def run_python(blocks: Sequence[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            # Lines are counted as in the page, so that a traceback shows the line that failed.
            exec(compile("\n" * (block.line - 1) + block.code, ROOT / block.page, "exec"), module.__dict__)


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=str)
def test_yaml(block: Block, tmp_path: Path) -> None:
    check_yaml(block.code, tmp_path)


def check_yaml(code: str, folder: Path) -> None:
    (folder / "config.yaml").write_text(code, encoding="utf-8")
    given = load_yaml(folder / "config.yaml")
    config = read_config({**NEEDED, **given})
    if given.keys() >= {"method", "output_dir"}:
        plan_stages(config, None)


@pytest.mark.parametrize("block", blocks_of("console"), ids=str)
def test_console(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(commands(block.code))
    assert found, f"{block} has no command; the lines of one begin with `$ `."
    for words in found:
        check_command(words, monkeypatch)


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command after a `$ `, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            for command in re.split(r" && | \| ", line[2:]):
                yield shlex.split(command, comments=True)


class Parsed(BaseException):
    """A command has read its flags, and would begin to work."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    while words and re.fullmatch(r"\w+=.*", words[0]):  # a variable of the environment
        words = words[1:]
    unknown = [extra for word in words for found in re.findall(r"\[([\w,]+)\]$", word) for extra in found.split(",")]
    assert words[0] != "pip" or {*unknown} <= EXTRAS, f"{shlex.join(words)}: there are the extras {EXTRAS}."
    if words[0] == "make":
        missing = {word for word in words[1:] if "=" not in word} - TARGETS
        assert not missing, f"{shlex.join(words)}: the Makefile has no {missing}."
    elif words[0] == "fastkd":
        check_fastkd(words[1:], monkeypatch)
    elif "-m" in words and words[words.index("-m") + 1] == "fastkd":  # python or torchrun
        check_fastkd(words[words.index("-m") + 2 :], monkeypatch)


def check_fastkd(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command parse these words, and no more; of a run's flags, also their keys and values."""
    parse = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")}

    def stopping_after(name: str) -> Any:
        def parse_and_stop(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
            with monkeypatch.context() as original:
                for each, function in parse.items():
                    original.setattr(argparse.ArgumentParser, each, function)
                raise Parsed(parse[name](parser, arguments))

        return parse_and_stop

    with monkeypatch.context() as patched:
        for name in parse:
            patched.setattr(argparse.ArgumentParser, name, stopping_after(name))
        try:
            code = main(words)
        except Parsed as parsed:
            (found,) = parsed.args
        else:
            assert code == 0, f"fastkd {shlex.join(words)} exits with {code}."
            return
    if isinstance(found, tuple):  # train and cache
        check_flags(*found)


def check_flags(known: argparse.Namespace, flags: list[str]) -> None:
    if known.config in recipe_titles():
        plan_stages(read_config(load_yaml(ROOT / "fastkd" / "recipes" / f"{known.config}.yaml"), flags), known.stage)
    else:
        assert Path(known.config).suffix == ".yaml", f"{known.config} is no recipe, and does not end as a YAML file does."
        assert isinstance(read_config(NEEDED, flags), RunConfig)


@pytest.mark.parametrize("block", blocks_of("bash"), ids=str)
def test_bash(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


def test_blocks_are_found_with_their_lines() -> None:
    text = "# Title\n\n<!-- setup\nx = 1\n-->\n- item\n\n  ```python\n  if x:\n      y = x\n  ```\n```text\nout\n```\n"
    setup, python, output = split_blocks(text, "page.md")
    assert setup == Block("page.md", 4, "setup", "x = 1\n")
    assert python == Block("page.md", 9, "python", "if x:\n    y = x\n")
    assert (output.language, str(output)) == ("text", "page.md:13")
    with pytest.raises(ValueError, match=r"page\.md:1: the block that begins here has no end"):
        split_blocks("```python\nx = 1\n", "page.md")


def test_blocks_of_a_page_share_their_names_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, python = Block("README.md", 3, "setup", "x = 1\n"), Block("README.md", 7, "python", "assert x == 1\n")
    run_python([setup, python], monkeypatch)
    with pytest.raises(NameError):
        run_python([python], monkeypatch)
    with pytest.raises(AssertionError) as failed:
        run_python([setup, Block("README.md", 7, "python", "\nassert x == 2\n")], monkeypatch)
    last = failed.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(ROOT / "README.md"), 8)


@pytest.mark.parametrize(
    "wrong",
    [
        "learning_rat: 1.0e-4",
        "learning_rate: fast",
        "options: {temperature: 1}\nmethod: ted\noutput_dir: run\nstudent: {}\ndataset: {task: glue/rte}\nmodel_name_or_path: m",
        "method: glmd\noutput_dir: run",
    ],
)
def test_a_wrong_configuration_is_refused(wrong: str, tmp_path: Path) -> None:
    check_yaml("learning_rate: 1.0e-4", tmp_path)
    with pytest.raises(ConfigError):
        check_yaml(wrong, tmp_path)


@pytest.mark.parametrize(
    "right",
    [
        "fastkd doctor --vocabulary 100",
        "fastkd train config.yaml --learning_rate 1.0e-4 --stages.pretrain.max_steps 10",
        "fastkd train glmd/rte --stage task_words",
        "fastkd train --list",
        "fastkd vocab count --model m --data d --output_dir o",
        "fastkd bench report",
        "HF_HUB_OFFLINE=1 torchrun --nproc-per-node 8 -m fastkd train config.yaml --fsdp true",
        "make quickstart METHOD=ted",
        "pip install 'fastkd[hf,plots]'",
    ],
)
def test_right_commands_pass(right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(shlex.split(right), monkeypatch)


@pytest.mark.parametrize(
    "wrong",
    [
        "fastkd distil",
        "fastkd doctor --vocab_rows 100",
        "fastkd eval",
        "fastkd train config.yaml --learning_rat 1.0e-4",
        "fastkd train config.yaml --learning_rate fast",
        "fastkd train glmd/rte --stage words",
        "fastkd train glmd/no_task",
        "fastkd vocab count --model m --data d --output_dir o --keep 0.5",
        "fastkd bench report --pages docs",
        "torchrun --nproc-per-node 8 -m fastkd train config.yaml --fsd true",
        "make quickstrat",
        "pip install 'fastkd[hf,plot]'",
    ],
)
def test_wrong_commands_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, ConfigError, AssertionError)):
        check_command(shlex.split(wrong), monkeypatch)


def test_commands_go_on_after_a_backslash_and_end_at_a_comment() -> None:
    code = "$ fastkd export a \\\n    --output_dir b  # opens anywhere\nExported to b\n$ make docs && make site\n"
    assert list(commands(code)) == [["fastkd", "export", "a", "--output_dir", "b"], ["make", "docs"], ["make", "site"]]
