"""`fastkd`: one command for people. Bad input ends with one sentence and exit code 2; a run that was asked to stop, with 143."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from . import bench, cache, doctor, export, plot, quickstart, train, vocab
from . import eval as evaluation

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "quickstart": (quickstart.main, "distil a small language model on Python's own library, in minutes, without a network"),
    "train": (train.main, "run all stages of a method from a YAML file; the same command resumes"),
    "vocab": (vocab.main, "count a corpus's tokens; prune a model to the frequent ones"),
    "export": (export.main, "rewrite a student so that plain transformers opens it"),
    "cache": (cache.main, "write down once what a stage's teacher says of its training rows"),
    "eval": (evaluation.main, "judge a model on a task or on text, beside its teacher and baselines"),
    "plot": (plot.main, "draw the logs of several runs into one plot"),
    "doctor": (doctor.main, "which backends are live, whether every op is right here, and what a pair would need"),
    "bench": (bench.main, "measure what fastkd claims beside every peer, and draw the tables and plots"),
}
USAGE = "usage: fastkd COMMAND [options]     (fastkd COMMAND --help for the options)\n\n" + "\n".join(
    f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()
)
BAD_INPUT, PREEMPTED = 2, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"fastkd: there is no command {name!r}; it has {', '.join(COMMANDS)}.", file=sys.stderr)
        return BAD_INPUT
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one tells what all do
    logging.getLogger("fastkd").setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        return COMMANDS[name][0](rest)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"fastkd {name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        # Named, not imported, so that --help needs no torch.
        if type(error).__name__ == "Preempted":
            print(f"fastkd {name}: {error}", file=sys.stderr)
            return PREEMPTED
        if type(error).__name__ in ("NonFiniteError", "RankError"):
            print(f"fastkd {name}: {error}", file=sys.stderr)
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
