"""`fastkd`: one command for people, in which every failure is a sentence.

Exit codes: 2 for bad input, 1 for any other failure, 143 for a run that was asked to stop, and 128 and its number for another signal.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from .. import __version__
from ..errors import nearest
from ..store import with_final_names
from .failures import BAD_INPUT, explained
from .process import Stopped, is_main_process, stdout_is_closed, stopping_cleanly

COMMANDS = {
    "quickstart": "distil a small model on Python's own library, without a network",
    "train": "run all stages of a method; the same command resumes",
    "vocab": "count a corpus's tokens; prune a model to the frequent ones",
    "generate": "continue a prompt with a student, or with any decoder",
    "export": "rewrite a student so that plain transformers opens it",
    "cache": "write down once what a teacher says of the training rows",
    "eval": "judge a model on a task or text, beside teacher and baselines",
    "plot": "draw the logs of several runs into one plot",
    "doctor": "whether every op is right here, and what a run would need",
    "bench": "measure what fastkd claims beside its peers; draw tables and plots",
}
"""Each is the `main` of the module of its name, imported when it is asked for."""
USAGE = "\n".join(
    [
        "usage: fastkd COMMAND [options]     (fastkd COMMAND --help for the options)\n",
        *(f"  {name:<12}{what}" for name, what in COMMANDS.items()),
        "\nFASTKD_TRACEBACK=1 in the environment shows where in the code one failed.",
    ]
)
CLOSED_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["fastkd", *(name for name in arguments[:1] if name in COMMANDS)])
    try:
        with stopping_cleanly():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except Stopped as stopped:
        _tell(f"{command}: stopped by {stopped.signal}.")
        return stopped.exit_code
    except SystemExit as end:  # of --help, or of a run that a second signal ends
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            return CLOSED_PIPE
        if os.environ.get("FASTKD_TRACEBACK", "0") not in ("", "0"):
            raise
        sentence, code = explained(error)
        _tell(f"{command}: {sentence}")
        return code


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        meant = nearest(name, COMMANDS)
        remedy = f"did you mean {meant}?" if meant else f"it has {', '.join(COMMANDS)}."
        raise ValueError(f"there is no command {name!r}; {remedy}")
    if not sys.stderr.isatty():
        for bars in ("HF_HUB", "HF_DATASETS"):  # the hub's are transformers' too
            os.environ.setdefault(f"{bars}_DISABLE_PROGRESS_BARS", "1")
    # Torch's allocator on Linux: large tensors in large pages, which takes a tenth off a training step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Torch's C++ warnings: DDP's, that no parameter was unused this once, would come from every rank.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastkd").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    code: int = import_module(f".{name}", __package__).main(rest)
    return code


def _tell(sentence: str) -> None:
    with suppress(OSError):  # nobody may be reading
        print(with_final_names(sentence), file=sys.stderr)
