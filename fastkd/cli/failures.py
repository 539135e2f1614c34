"""The sentence and the exit code that an exception becomes."""

from __future__ import annotations

import dis
import os
from collections.abc import Iterator
from types import TracebackType

from ..errors import what_was_done

FAILED, BAD_INPUT = 1, 2
_LONGEST = 500
_REST = "FASTKD_TRACEBACK=1 in the environment shows where."


def explained(error: Exception) -> tuple[str, int]:
    """What a person is told of `error`, and the exit code: 2 for what they can correct in their input, 1 for the rest.

    The message of what fastkd raises is a sentence already, and a system's error is told with its file. What a library raises is told
    with what was being done. Anything else is a fault of fastkd's own, and called that.
    """
    where = what_was_done(error)
    if isinstance(error, OSError) and error.strerror:
        places = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        doing = where or ("" if places else f"in {_place(error)}")
        return f"{': '.join(filter(None, [doing, ' -> '.join(places), error.strerror]))}.", BAD_INPUT
    if _is_sentence(error):
        is_input = isinstance(error, ValueError | TypeError | OSError | MemoryError)
        return str(error), getattr(error, "exit_code", BAD_INPUT if is_input else FAILED)
    said = _told(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("fastkd"):
        return f"The package {error.name} is missing ({said}); install it.", FAILED
    if isinstance(error, MemoryError) or "can't allocate memory" in said:
        return f"There is not enough memory{'' if where is None else f' for {where}'} ({said}). {_REST}", FAILED
    if where is not None:
        return f"{where} failed: {said}. {_REST}", FAILED
    return f"This is a bug in fastkd, or input that nobody has tried: {said}, in {_place(error)}. {_REST} Please report it.", FAILED


def _is_sentence(error: Exception) -> bool:
    """Whether a `raise` statement of fastkd has made the exception, rather than an operation that failed, or a library."""
    *_, last = _steps(error)
    code = last.tb_frame.f_code.co_code
    return _is_ours(last) and code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _steps(error: Exception) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _is_ours(step: TracebackType) -> bool:
    return str(step.tb_frame.f_globals.get("__name__")).split(".")[0] == "fastkd"


def _place(error: Exception) -> str:
    """The innermost line of fastkd that the exception has passed."""
    *_, last = filter(_is_ours, _steps(error))
    return f"{last.tb_frame.f_globals['__name__']}, line {last.tb_lineno}"


def _told(error: Exception) -> str:
    """The type and the message of an exception on one line."""
    message = " ".join(str(error).split())
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]}..."
    return f"{type(error).__name__}: {message.rstrip('.')}" if message else type(error).__name__
