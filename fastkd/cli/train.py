"""`fastkd train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes import config_path, recipe_titles
from ..train.config import RunConfig, read_config
from ..train.paths import expand_home
from ..train.schema import help_text, load_yaml, to_yaml
from .arguments import Parser
from .process import is_main_process
from .table import print_table

DESCRIPTION = """usage: fastkd train CONFIG [--stage NAME] [--any_key value]
       fastkd train CONFIG --print_config [--all] [--any_key value]
       fastkd train --list [RECIPE]
       torchrun --nproc-per-node N -m fastkd train CONFIG ...

CONFIG is a YAML file, or a recipe by its name, such as ted/rte; --list shows them, or one as it is written. Runs every stage of it that
is not finished, or goes on from the newest checkpoint. Keys at the top of the file hold for every stage; --key value overrides every
stage, --stages.NAME.key value one of them. --print_config prints what differs from the defaults, with --all every key.

"""


def main(argv: Sequence[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(DESCRIPTION + help_text(RunConfig))
        return 0 if argv else 2
    if argv[0] == "--list" and len(argv) <= 2:
        _list(argv[1:])
        return 0
    parser = Parser(prog="fastkd train", add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--stage")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--all", action="store_true")
    known, flags = parser.parse_known_args(argv)
    config = read_config(load_yaml(config_path(expand_home(known.config))), flags)
    if known.print_config:
        print(to_yaml(config, defaults=known.all, inherited=not known.all), end="")
        return 0
    if known.all:
        raise ValueError("--all is of --print_config, which is not given; leave it out, or add --print_config.")
    from ..train.readme import for_whom
    from ..train.run import distill

    results = distill(config, only_stage=known.stage)
    if not is_main_process():
        return 0
    print_table(
        ["stage", "steps", "score", "seconds", "made"],
        [
            [
                name,
                result["steps"],
                _scores(result),
                f"{result['seconds']:.1f}",
                next(result[key] for key in ("student_dir", "teacher_dir", "filters_dir") if key in result),
            ]
            for name, result in results.items()
        ],
    )
    students = [result["student_dir"] for result in results.values() if "student_dir" in result]
    if students:
        print(f"\n{for_whom(Path(students[-1]))}")
    return 0


def _list(names: Sequence[str]) -> None:
    """Print the names of all recipes, or the text of the one that is named."""
    if names:
        print(config_path(names[0]).read_text(encoding="utf-8"), end="")
    else:
        print_table(["recipe", "what it distils"], list(recipe_titles().items()))


def _scores(result: Mapping[str, Any]) -> str:
    """The scores of a stage, and what a perplexity among them is over."""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in result["scores"].items()) or "not measured"
    return f"{scores} over {result['events']}" if result.get("events") and result["scores"] else scores
