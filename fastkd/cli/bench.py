"""`fastkd bench`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from .arguments import Parser
from .next import say_next


def main(argv: Sequence[str]) -> int:
    from ..benchmarks import CLAIMS, claim

    if argv[:1] == ["report"]:
        from ..benchmarks import report

        return report.main(argv[1:])
    listed = "\n".join(
        textwrap.fill(sentence, 78, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16) for name, sentence in CLAIMS.items()
    )
    parser = Parser(
        prog="fastkd bench",
        usage="fastkd bench [CLAIM ...] [options]    |    fastkd bench report [options]",
        description=f"Measure what fastkd claims, beside every peer that is installed\n(pip install 'fastkd[bench]').\n\n{listed}",
        epilog="`fastkd bench report` draws the documentation's tables and plots from the JSON.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="default: all; grad_filter only with --pair")
    claim.add_arguments(parser)
    known = parser.parse_args(argv)
    unknown = [name for name in known.claims if name not in CLAIMS]
    if unknown:
        raise ValueError(f"There is no claim {unknown[0]!r}; there are {', '.join(CLAIMS)}, and `fastkd bench report`.")
    settings = claim.read_settings(known)
    claim.run_claims(known.claims or claim.default_claims(settings), settings)
    if not settings.smoke:
        say_next([["bench", "report", "--results", settings.output]])
    return 0
