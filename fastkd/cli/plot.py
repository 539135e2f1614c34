"""`fastkd plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import doing
from .arguments import Parser, path, source


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd plot", description="Draw what the logs of several runs say, over steps, into one PNG.")
    parser.add_argument(
        "run", nargs="+", type=source, metavar="RUN", help="output_dir of a run, folder of one of its stages, or a log.jsonl"
    )
    parser.add_argument("--key", default="loss", help="what is drawn, such as eval_perplexity or grad_norm (default: loss)")
    parser.add_argument("--output", type=path, help="the PNG (default: KEY.png)")
    known = parser.parse_args(argv)
    from ..train.curves import plot_logs

    with doing(f"drawing {known.key} of {', '.join(known.run)}"):
        plot = plot_logs(known.run, known.key, known.output or Path(f"{known.key}.png"))
    if plot is None:  # the log has said why
        return 2
    print(plot)
    return 0
