"""The one-off check behind `backend="auto"` on a GPU: does a backend give the right numbers on this machine, for this kind of call?

`verdict` answers. A backend is checked once a machine and kind of call; the answer is kept in the cache folder for later processes. The
check runs in a process of its own (`python -m fastkd.ops.probe`), so that a hang or an illegal access ends that process alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from ..store import lock, open_own, write_json_atomic
from .compiled import cache_folder
from .row_call import RowCall
from .row_check import CallKind, check

logger = logging.getLogger("fastkd")

LIMIT = 60.0
"""Seconds that a check may take."""
READY, ANSWER = "ready", "answer "
"""What the process that checks prints once it has the GPU, and before its result."""
_RESERVE = 1 << 28

_verdicts: dict[tuple[str, torch.device, CallKind], str | None] = {}
_demoted: dict[str, str] = {}


class Unavailable(RuntimeError):
    """The check could not begin in a process of its own; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """Why a backend is not taken, or None; and whether that holds for later processes too."""

    why_not: str | None
    is_final: bool = True


def verdict(backend: str, call: RowCall) -> str | None:
    """Why `backend` is not taken for calls like this one on their GPU, in a sentence; None where its check has passed.

    The first such call on a machine waits for the check, some seconds; while a CUDA graph is captured no check can run. Calls on a CPU,
    and those of torch's backend, are not checked. A failed check is told by one warning. No problem with the cache raises anything.
    """
    device = call.student.device
    if device.type != "cuda" or backend == "torch":
        return None
    if backend in _demoted:
        return _demoted[backend]
    kind = CallKind.of(call)
    known = backend, device, kind
    if known not in _verdicts:
        key = {"backend": backend, **_machine(device), **asdict(kind)}
        found = settle(key, lambda: _examine(backend, kind, device), may_examine=not torch.cuda.is_current_stream_capturing())
        if found is None:
            return f"backend={backend!r} has not been checked on this machine: make one such call before the CUDA graph is captured."
        _verdicts[known] = found.why_not and f"backend={backend!r} failed its check on this machine: {found.why_not}"
        if _verdicts[known] is not None:
            _warn(_verdicts[known])
    return _verdicts[known]


def demote(backend: str, error: Exception) -> None:
    """Let `verdict` refuse `backend` for the rest of this process, because a launch ended with `error`."""
    if backend not in _demoted:
        _demoted[backend] = f"backend={backend!r} failed in this process: {type(error).__name__}: {error}"
        _warn(_demoted[backend])


def _warn(sentence: str | None) -> None:
    logger.warning("%s Another backend serves. Run `fastkd doctor`.", sentence)


# What is known of this machine.


def settle(
    key: dict[str, Any], examine: Callable[[], Verdict], *, may_examine: bool = True, patience: float = 2 * LIMIT
) -> Verdict | None:
    """The verdict that is kept under `key`, or else what `examine` finds, which is kept if it is final; None if it may not examine.

    Processes of one node examine one after another, so that what one has found serves the others. One that has waited for `patience`
    seconds, or cannot lock, read or write the cache, examines for itself.
    """
    folder, path = None, None
    with suppress(RuntimeError):  # a user without a home folder
        folder = cache_folder()
        path = folder / f"probe-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    found = _kept(path, key)
    if found is not None or not may_examine:
        return found
    with _turn(folder, patience):
        found = _kept(path, key)
        if found is None:
            found = examine()
            if path is not None and found.is_final:
                with suppress(OSError):
                    write_json_atomic(path, {"key": key, "why_not": found.why_not})
    return found


def _kept(path: Path | None, key: dict[str, Any]) -> Verdict | None:
    """What `path` says of `key`; None where there is no such file, or one that is torn, somebody else's or of another key."""
    if path is None:
        return None
    try:
        with open_own(path, os.O_RDONLY) as file:
            kept = json.loads(file.read()) if os.fstat(file.fileno()).st_uid in (0, os.geteuid()) else {}
        is_whole = kept["key"] == key and isinstance(kept["why_not"], str | None)
        return Verdict(kept["why_not"]) if is_whole else None
    except Exception:  # whatever it holds
        return None


@contextmanager
def _turn(folder: Path | None, patience: float) -> Iterator[None]:
    """Hold this node's lock, if it can be had within `patience` seconds."""
    deadline = time.monotonic() + patience

    def poll() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    turn: Any = nullcontext()
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            turn = lock(folder / f"probe-{socket.gethostname()}.lock", poll=poll)
    with turn:
        yield


@functools.cache
def _machine(device: torch.device) -> dict[str, Any]:
    """What the numbers may depend on beside the kind of the call."""
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        driver = str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton,
        "sources": _fingerprint(),
    }


def _fingerprint() -> str:
    """Changes with the kernels' sources, with how they are launched and with the check itself."""
    from .. import csrc, kernels

    here = Path(__file__)
    sources = [*here.parent.glob("backend_*.py"), here.with_name("row_check.py"), *Path(kernels.__file__).parent.glob("*.py")]
    sources += [path for path in Path(csrc.__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# The check in a process of its own.


def _examine(backend: str, kind: CallKind, device: torch.device) -> Verdict:
    spec = {"backend": backend, "device": str(device), "kind": asdict(kind)}
    try:
        return Verdict(ask_child([sys.executable, "-P", "-m", __name__, json.dumps(spec)], LIMIT))
    except Unavailable as error:
        if backend != "triton":  # its kernel's faults would be this process's
            return Verdict(f"it has to run in a process of its own, and {error}", is_final=False)
    try:
        return Verdict(check(_runner(backend), kind, device))
    except torch.OutOfMemoryError as error:
        return Verdict(f"there is no memory for it: {error}", is_final=False)


def ask_child(command: Sequence[str], limit: float) -> str | None:
    """What the check that `command` runs returns; how the process ended instead, if it gave no answer or did not survive it.

    `Unavailable` where it cannot be started, or did not come to the point at which it has the GPU.
    """
    home = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    try:
        with TemporaryFile() as output, TemporaryFile() as errors:
            code = _run(command, limit, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment)
            said, complained = (_lines(file) for file in (output, errors))
    except OSError as error:
        raise Unavailable(f"no process could be started: {error}.") from error
    last = complained[-1] if complained else "it said nothing"
    if code is None:
        end = f"it did not end within {limit:g} s"
    else:
        end = f"the process ended by {signal.strsignal(-code)}: {last}" if code < 0 else f"the process ended with status {code}: {last}"
    if READY not in said:
        raise Unavailable(f"that one did not get the GPU: {end}.")
    answers = [json.loads(line.removeprefix(ANSWER)) for line in said if line.startswith(ANSWER)]
    if answers and (code == 0 or answers[0] is not None):
        why_not: str | None = answers[0]
        return why_not
    return f"{end}."


def _run(command: Sequence[str], limit: float, **options: Any) -> int | None:
    """The exit status of `command`; None if it had to be killed after `limit` seconds."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds cannot be killed
            process.wait(5)
        return None


def _lines(file: Any) -> list[str]:
    file.seek(0)
    text: str = file.read().decode(errors="replace")
    return text.splitlines()


def _runner(backend: str) -> Callable[[RowCall], None]:
    run: Callable[[RowCall], None] = import_module(f"fastkd.ops.backend_{backend}").run
    return run


def main(spec: str) -> None:
    """Run the check that `spec` names, in JSON, and print its result."""
    asked = json.loads(spec)
    device = torch.device(asked["device"])
    torch.zeros(_RESERVE, dtype=torch.uint8, device=device).sum().item()  # a GPU that is taken, or full, shows here
    print(READY, flush=True)
    why_not = check(_runner(asked["backend"]), CallKind(**asked["kind"]), device)
    print(ANSWER + json.dumps(why_not), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
