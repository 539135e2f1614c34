"""`fastkd generate`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .arguments import Parser, positive, source

DESCRIPTION = """Continue a prompt with a decoder: an exported student, the student of a run with its vocabulary map, or any other of
transformers. The text is shown as it comes."""


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="fastkd generate", description=DESCRIPTION)
    parser.add_argument("model", type=source, metavar="MODEL", help="folder or hub name of a decoder")
    parser.add_argument("prompt", metavar="PROMPT", help="text that is continued")
    parser.add_argument("--max_new_tokens", type=positive, default=64, help="most tokens behind the prompt (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: 0, the likeliest token each time)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    known = parser.parse_args(argv)
    from ..models.generation import continue_text

    continue_text(
        known.model,
        known.prompt,
        partial(print, end="", flush=True),
        max_new_tokens=known.max_new_tokens,
        temperature=known.temperature,
        seed=known.seed,
        use_cpu=known.use_cpu,
    )
    print()
    return 0
