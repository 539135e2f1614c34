"""`fastkd`: one command for people. Bad input ends with one sentence and exit code 2; a run that was asked to stop, with 143."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

COMMANDS = {
    "quickstart": "distil a small language model on Python's own library, in minutes, without a network",
    "train": "run all stages of a method from a YAML file; the same command resumes",
    "vocab": "count a corpus's tokens; prune a model to the frequent ones",
    "export": "rewrite a student so that plain transformers opens it",
    "cache": "write down once what a stage's teacher says of its training rows",
    "eval": "judge a model on a task or on text, beside its teacher and baselines",
    "plot": "draw the logs of several runs into one plot",
    "doctor": "which backends are live, whether every op is right here, and what a pair would need",
    "bench": "measure what fastkd claims beside every peer, and draw the tables and plots",
}
"""Each is the `main` of the module of its name, imported when it is asked for."""
USAGE = "usage: fastkd COMMAND [options]     (fastkd COMMAND --help for the options)\n\n" + "\n".join(
    f"  {name:<12}{what}" for name, what in COMMANDS.items()
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
        for bars in ("HF_HUB", "HF_DATASETS"):  # the hub's are transformers' too
            os.environ.setdefault(f"{bars}_DISABLE_PROGRESS_BARS", "1")
    # Torch's allocator on Linux: large tensors in large pages, which takes a tenth off a training step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one tells what all do
    logging.getLogger("fastkd").setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        code: int = import_module(f".{name}", __package__).main(rest)
        return code
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
