"""`fastkd cache`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..recipes import config_path
from ..train.config import read_config
from ..train.paths import expand_home
from ..train.schema import load_yaml
from .arguments import Parser, path, positive
from .next import say_next
from .process import is_main_process

if TYPE_CHECKING:
    from ..train.cache import CachePlan

DESCRIPTION = """Run the teacher of one stage once over the training rows that the run reads, and write what it says into a folder, from
which a run of the same CONFIG learns with --teacher.kind cache --teacher.path DIR. The same command goes on where it was stopped; under
torchrun all processes write. What will be written is shown before; more than a quarter of the free disk has to be allowed by --yes.
Further --key value are those of `fastkd train`."""


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd cache", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="YAML file or recipe of the run that will use the cache")
    parser.add_argument("--stage", required=True, help="stage whose teacher is run")
    parser.add_argument("--output", required=True, type=path, help="folder of the cache")
    parser.add_argument(
        "--kind", choices=("dense", "topk"), help="words: all logits, or the largest (default: topk where the stage can use it)"
    )
    parser.add_argument("--k", type=positive, default=64, help="topk: how many of a token (default: 64)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of logits and states (default: bfloat16)"
    )
    parser.add_argument("--shard_rows", type=positive, help="examples in a shard (default: about 256 MiB of them)")
    parser.add_argument("--yes", action="store_true", help="take more than a quarter of the free disk, if need be")
    known, flags = parser.parse_known_args(argv)
    config = read_config(load_yaml(config_path(expand_home(known.config))), flags)
    from ..train.cache import write_cache

    done = write_cache(
        config,
        known.stage,
        known.output,
        kind=known.kind,
        k=known.k,
        dtype=known.dtype,
        shard_rows=known.shard_rows,
        yes=known.yes,
        show=partial(_show, known.output, known.kind is None),
    )
    if not is_main_process():
        return 0
    size = f"{done.rows} rows, {done.tokens} tokens, {done.bytes / 2**20:.1f} MiB in {done.shards} shards"
    print(f"{known.output}: {size}, {done.bytes / max(1, done.tokens):.1f} bytes a token.")
    if done.new_rows:
        rates = f"{done.new_rows / done.seconds:.1f} rows/s, {done.new_tokens / done.seconds:.1f} tokens/s"
        print(f"Written now: {done.new_rows} rows in {done.seconds:.1f} s, {rates}.")
    teacher = f"--stages.{known.stage}.teacher" if config.stages else "--teacher"
    say_next([["train", known.config, *flags, f"{teacher}.kind", "cache", f"{teacher}.path", known.output]])
    return 0


def _show(folder: Path, is_default: bool, plan: CachePlan) -> None:
    """Print what is about to be written; is_default: its kind was not asked for."""
    if not plan.rows:
        return
    kind = f"topk, k {plan.form.k}" if plan.form.kind == "topk" else "dense"
    form = f" as {kind}, {str(plan.form.dtype).removeprefix('torch.')}" if plan.has_words else ""
    needed = f"{plan.bytes / 2**20:.1f} MiB of {plan.free / 2**30:.1f} GiB of free disk, and {plan.seconds:.0f} s"
    print(f"{folder}: {plan.rows} rows, {plan.tokens} tokens{form}: about {needed}.")
    if plan.has_words and plan.form.kind == "topk" and is_default:
        print("Its loss is that of the largest log-probabilities and one event for the others; --kind dense has the whole one.")
    if plan.read < plan.available:
        processes = f"{plan.processes} process{'es' if plan.processes > 1 else ''}"
        print(f"A run of this configuration reads {plan.read} of {plan.available} rows on {processes}; --max_steps -1 writes all.")
    sys.stdout.flush()
