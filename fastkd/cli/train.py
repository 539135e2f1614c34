"""`fastkd train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes import config_path, recipe_titles
from ..train.config import read_config
from ..train.paths import expand_home
from ..train.schema import load_yaml, to_yaml
from .arguments import Parser
from .next import after_training, say_next
from .process import is_main_process
from .table import print_table
from .train_help import full_help, usual_help

_HELP = {"-h", "--help", "--help-all"}


def main(argv: Sequence[str]) -> int:
    if not argv or _HELP.intersection(argv):
        show = full_help if "--help-all" in argv else usual_help
        print(show(_method(next(iter(argv), "-"))))
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
        say_next(after_training(config, results))
    return 0


def _method(config: str) -> str:
    """What the file or recipe names as its method; nothing where a flag stands in its place."""
    return "" if config.startswith("-") else str(load_yaml(config_path(expand_home(config))).get("method"))


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
