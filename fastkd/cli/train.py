"""`fastkd train`."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipes import config_path, recipe_titles
from ..train.config import RunConfig, read_config
from ..train.paths import expand_home
from ..train.schema import help_text, load_yaml, to_yaml
from .arguments import Parser
from .process import is_main_process
from .table import print_table

DESCRIPTION = """usage: fastkd train CONFIG [--stage NAME] [--print_config] [--any_key value]
       torchrun --nproc-per-node N -m fastkd train CONFIG ...
       fastkd train --list

CONFIG is a YAML file, or a recipe by its name, such as ted/rte; --list shows them. Runs every stage of it that is not finished, or
goes on from the newest checkpoint. Keys at the top of the file hold for every stage; --key value overrides every stage,
--stages.NAME.key value one of them.

"""


def main(argv: Sequence[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(DESCRIPTION + help_text(RunConfig))
        return 0 if argv else 2
    if list(argv) == ["--list"]:
        print_table(["recipe", "what it distils"], list(recipe_titles().items()))
        return 0
    parser = Parser(prog="fastkd train", add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--stage")
    parser.add_argument("--print_config", action="store_true")
    known, flags = parser.parse_known_args(argv)
    config = read_config(load_yaml(config_path(expand_home(known.config))), flags)
    if known.print_config:
        print(to_yaml(config), end="")
        return 0
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
                ", ".join(f"{k} {v:.4g}" for k, v in result["scores"].items()) or "not measured",
                f"{result['seconds']:.1f}",
                next(result[key] for key in ("student_dir", "teacher_dir", "filters_dir") if key in result),
            ]
            for name, result in results.items()
        ],
    )
    return 0
