"""`fastkd plot`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd plot", description="Draw what the logs of several runs say, over steps, into one PNG."
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="output_dir of a run, folder of one of its stages, or a log.jsonl")
    parser.add_argument("--key", default="loss", help="what is drawn, such as eval_perplexity or grad_norm (default: loss)")
    parser.add_argument("--output", type=Path, help="the PNG (default: KEY.png)")
    known = parser.parse_args(argv)
    from ..train.curves import plot_logs

    path = plot_logs(known.run, known.key, known.output or Path(f"{known.key}.png"))
    if path is None:  # the log has said why
        return 2
    print(path)
    return 0
