"""Compiled libraries: kept whole, opened only if nobody else can have written them, and whatever is wrong with one breaks no op."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastkd.ops import backend_cpp, compiled
from fastkd.ops.compiled import CompiledLibrary

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0
SOMEBODY = 54321
"""A user whom no machine knows."""


@pytest.fixture(autouse=True)
def backend() -> None:
    """Override the common fixture: no kernel runs here but in processes of their own."""


# What the class does, with a library of a few bytes.


def library(content: bytes | None = b"machine code", load: Any = Path.read_bytes) -> CompiledLibrary:
    """One that is as a new process would find it. None: it cannot be compiled."""

    def compiles() -> bytes:
        if content is None:
            raise RuntimeError("There is no compiler.")
        return content

    return CompiledLibrary("tiny kernels", "tiny", stem=lambda: "tiny_0123", compile_=compiles, load=load)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are kept, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastkd"


@pytest.fixture
def kept(folder: Path) -> Path:
    library().get(build=True)
    (file,) = folder.iterdir()
    return file


def test_a_library_is_found_again_under_the_hash_of_its_content(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert library().get(build=False) is None
    made = library()
    assert made.get(build=True) == b"machine code" and made.is_kept
    assert [file.name for file in folder.iterdir()] == [f"tiny_0123-{hashlib.sha256(b'machine code').hexdigest()}.so"]
    again = library(None)
    assert again.get(build=False) == b"machine code" == again.get(build=True) and again.is_kept
    assert not caplog.records


def test_others_cannot_write_to_it_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        library().get(build=True)
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, file)] == [0o755, 0o644]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def link_out(file: Path) -> None:
    shutil.move(file, file.parents[1] / "elsewhere")
    file.symlink_to(file.parents[1] / "elsewhere")


def open_folder(file: Path) -> None:
    file.parent.chmod(0o777)


def open_file(file: Path) -> None:
    file.chmod(0o664)


def give_away_file(file: Path) -> None:
    os.chown(file, SOMEBODY, SOMEBODY)


def give_away_folder(file: Path) -> None:
    os.chown(file.parent, SOMEBODY, SOMEBODY)


def link_folder_by_another(file: Path) -> None:
    file.parent.rename(file.parents[1] / "mine")
    file.parent.symlink_to(file.parents[1] / "mine")
    os.chown(file.parent, SOMEBODY, SOMEBODY, follow_symlinks=False)


def file_in_the_place_of_the_folder(file: Path) -> None:
    shutil.rmtree(file.parent)
    file.parent.touch()


needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
WRONG = [
    pytest.param(truncate, "is damaged: its content is not what was compiled", id="truncated"),
    pytest.param(link_out, "symbolic link", id="link"),
    pytest.param(open_folder, "others may write to {folder}, and their code is not run: chmod go-w {folder}", id="open folder"),
    pytest.param(open_file, "others may write to {file}", id="open file"),
    pytest.param(give_away_file, "{file} belongs to another user", id="foreign file", marks=needs_root),
    pytest.param(give_away_folder, "{folder} belongs to another user", id="foreign folder", marks=needs_root),
    pytest.param(link_folder_by_another, "{folder} belongs to another user", id="foreign link", marks=needs_root),
    pytest.param(file_in_the_place_of_the_folder, "Not a directory: '{folder}'", id="no folder"),
]


@pytest.mark.parametrize(("harm", "cause"), WRONG)
def test_what_cannot_be_trusted_is_not_opened_and_one_warning_says_why(kept: Path, caplog, harm, cause) -> None:
    harm(kept)
    opened: list[Path] = []
    found = library(load=opened.append)
    assert found.get(build=False) is None and found.get(build=False) is None and not opened
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    words = record.getMessage().replace(str(kept), "{file}").replace(str(kept.parent), "{folder}")
    assert cause in words
    assert words.startswith("The compiled tiny kernels are not used, and torch's serve") and "`python -m tiny`" in words


@pytest.mark.parametrize(("harm", "cause"), WRONG)
def test_asked_for_by_name_it_is_compiled_anew(kept: Path, caplog, harm, cause) -> None:
    """Into its place if that can be trusted, else for the process alone, which one warning says."""
    harm(kept)
    made = library(b"other code")
    assert made.get(build=True) == b"other code"
    repaired = harm in (truncate, link_out, open_file, give_away_file)
    assert made.is_kept == repaired and len(caplog.records) == (not repaired)
    assert library().get(build=False) == (b"other code" if repaired else None)


def test_a_damaged_library_is_replaced_by_a_whole_one(kept: Path) -> None:
    truncate(kept)
    assert library().get(build=True) == b"machine code" and kept.read_bytes() == b"machine code"


def test_what_cannot_be_opened_or_compiled_is_said(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A library of another machine, say, as a home folder on the network has it."""

    def refuses(path: Path) -> None:
        raise ImportError(f"{path}: invalid ELF header")

    found = library(load=refuses)
    assert found.get(build=False) is None
    assert f"{kept}: invalid ELF header. Mend that" in caplog.text
    with pytest.raises(
        RuntimeError, match=r"The tiny kernels were compiled and cannot be used: .*invalid ELF header\. Use backend='torch'"
    ):
        found.get(build=True)
    truncate(kept)
    with pytest.raises(RuntimeError, match="There is no compiler"):
        library(None).get(build=True)


def test_what_was_checked_is_what_is_opened(kept: Path) -> None:
    """Whoever may write to the folder's own folder can put another in its place, at any instant."""
    seen = []

    def swaps(path: Path) -> None:
        shutil.move(kept.parent, kept.parents[1] / "away")
        kept.parent.mkdir()
        kept.write_bytes(b"planted")
        seen.append(path.read_bytes())

    library(load=swaps).get(build=False)
    assert seen == [b"machine code"] or not Path("/proc/self/fd").exists()


# What the ops do, in processes of their own.

PROGRAM = """
import json, logging, os, sys

class Warned(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            warned.append(record.getMessage())

def work():
    student, weight, teacher, head = torch.randn(5, 8), torch.randn(11, 8), torch.randn(5, 6), torch.randn(11, 6)
    student.requires_grad_()
    top, ids = (teacher @ head.T).log_softmax(-1).topk(3)
    q, k, teacher_q, teacher_k = (torch.randn(2, 3, 4, 8) for _ in range(4))
    q.requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        s, w, t, h = (x.to(dtype) for x in (student, weight, teacher, head))
        for backend in ("torch", "auto"):
            fastkd.linear_kl_div(s, w, t, h, backend=backend).backward()
            fastkd.kl_div(s @ w.T, t @ h.T, backend=backend).backward()
            fastkd.topk_kl_div(s, w, ids, top, torch.log1p(-top.exp().sum(-1)), backend=backend).backward()
            fastkd.relation_kl(*(x.to(dtype) for x in (q, k, teacher_q, teacher_k)), backend=backend).backward()
        fastkd.projected_mse(s, w[:6], t, None).backward()

def case(environment, user):
    os.environ.clear()
    os.environ.update(environment)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    work()
    os.write(results, (json.dumps({"warnings": warned, "is_built": backend_cpp.is_built()}) + "\\n").encode())

warned = []
import torch, fastkd
import torch._dynamo   # and all that a first call may import: another user may have no access to this Python's files
from fastkd.ops import backend_cpp
logging.getLogger("fastkd").addHandler(Warned())
cases, results = json.loads(sys.argv[1]), os.dup(1)
for environment, user in cases:
    child = os.fork()
    if child == 0:
        try:
            case(environment, user)
        except BaseException as error:
            os.write(results, (json.dumps({"raised": f"{type(error).__name__}: {error}"}) + "\\n").encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        os.write(results, (json.dumps({"killed by": os.waitstatus_to_exitcode(status)}) + "\\n").encode())
"""


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, tuple[dict[str, str], int | None]]]:
    """Environments that processes find themselves in, and as whom; on folders that every user may pass."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    backend_cpp.extension(build=True)
    good = next(file for file in compiled.cache_folder().iterdir() if file.name.startswith(backend_cpp._stem()))
    other = SOMEBODY if IS_ROOT else None
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        base.chmod(0o755)

        def cache(name: str, content: bytes | None = None) -> tuple[dict[str, str], None]:
            place = base / name / "fastkd"
            place.mkdir(parents=True)
            content = good.read_bytes() if content is None else content
            (place / good.name).write_bytes(content)
            return {"XDG_CACHE_HOME": str(base / name)}, None

        def garbage(name: str) -> tuple[dict[str, str], None]:
            content = b"\0" * 4096
            found = cache(name, content)
            file = base / name / "fastkd" / good.name
            file.rename(file.with_name(f"{backend_cpp._stem()}-{hashlib.sha256(content).hexdigest()}.so"))
            return found

        def planted(name: str) -> tuple[dict[str, str], None]:
            (base / "planted.cpp").write_text(
                f'#include <fcntl.h>\n__attribute__((constructor)) void run() {{ creat("{base / "ran"}", 0600); }}\n'
            )
            subprocess.run(["c++", "-shared", "-fPIC", base / "planted.cpp", "-o", base / "planted.so"], check=True)
            content = (base / "planted.so").read_bytes()
            found = cache(name, content)
            file = base / name / "fastkd" / good.name
            file.rename(file.with_name(f"{backend_cpp._stem()}-{hashlib.sha256(content).hexdigest()}.so"))
            (base / name / "fastkd").chmod(0o777)
            return found

        closed, unwritable = base / "closed", base / "unwritable"
        closed.mkdir(mode=0o700 if IS_ROOT else 0)
        unwritable.mkdir(mode=0o555)
        unwritable.chmod(0o555)
        yield {
            "whole": cache("whole"),
            "truncated": cache("truncated", good.read_bytes()[: good.stat().st_size // 3]),
            "garbage": garbage("garbage"),
            "planted": planted("planted"),
            "a home of somebody else's": ({"HOME": str(closed)}, other),
            "no home": ({}, other),
            "a home that cannot be written to": ({"HOME": str(unwritable)}, other),
            "ran": ({"ran": str(base / "ran")}, None),
        }
        closed.chmod(0o700)


@pytest.fixture(scope="module")
def seen(places) -> dict[str, dict[str, Any]]:
    """What the ops did in every place."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    program = [sys.executable, "-c", PROGRAM, json.dumps([places[name] for name in CAUSES])]
    done = subprocess.run(program, env=own, cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CAUSES), done.stderr
    return dict(zip(CAUSES, found, strict=True))


CAUSES = {
    "whole": None,
    "truncated": "is damaged: its content is not what was compiled",
    "garbage": "invalid ELF header",
    "planted": "others may write to",
    "a home of somebody else's": "Permission denied",
    "no home": "home directory",
    "a home that cannot be written to": None,  # as where nothing was compiled
}


@pytest.mark.parametrize("place", CAUSES)
def test_no_op_breaks_where_the_library_is_sought(seen, places, place: str) -> None:
    if place == "no home" and not IS_ROOT:
        pytest.skip("only root can become a user whom nobody knows")
    found, cause = seen[place], CAUSES[place]
    assert found.get("is_built") == (place == "whole"), found
    assert len(found["warnings"]) == (cause is not None), found
    if cause is not None:
        assert cause in found["warnings"][0]
    assert not Path(places["ran"][0]["ran"]).exists(), "what was planted ran"
