"""The wheel as a stranger gets it: the files in it, and that it works away from the checkout on a machine without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="the wheel is built without fetching its build backend")
ROOT = Path(__file__).parents[1]
INSTALLED = {"fastkd": "fastkd", "kernels": "fastkd/kernels", "csrc": "fastkd/csrc", "benchmarks": "fastkd/benchmarks"}
"""Folders of the repository, and where they are in the wheel."""
DATA = {".yaml", ".cpp", ".cu", ".h", ".typed"}
SNIPPET = """
import fastkd, torch

hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
teacher_hidden, teacher_weight = torch.randn(4, 6, 32), torch.randn(100, 32)
mask = torch.arange(6) < torch.tensor([[6], [3], [1], [6]])
loss = fastkd.linear_kl_div(hidden, weight, teacher_hidden, teacher_weight, temperature=2.0, mask=mask)
loss.backward()
exact = fastkd.reference.linear_kl_div(
    hidden.double(), weight.double(), teacher_hidden.double(), teacher_weight.double(), temperature=2.0, mask=mask
)
torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
assert weight.grad.norm() > 0 and (hidden.grad[~mask] == 0).all()

from fastkd.ops import backend_cpp
from fastkd.kernels import rows

assert not backend_cpp.is_built()
print(fastkd.__file__, backend_cpp._sources()[0], rows.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy: what an earlier build has left beside the sources must not get into it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in INSTALLED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(built), str(source)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = built.glob("fastkd-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def away(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """This Python in an empty folder, with the wheel's files first, nothing on PATH, and nothing compiled by others."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    own = {"PYTHONPATH": str(folder), "PATH": "", "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=home, env={**own, **variables}, capture_output=True, text=True)


def test_the_wheel_has_every_file_that_is_installed_and_no_other(wheel: Path):
    expected = {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in INSTALLED.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in DATA | {".py"} or (folder != "benchmarks" and (file.name == "README.md" or file.suffix in {".gz", ".json"}))
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"fastkd/py.typed", "fastkd/csrc/cpu/rows.cpp", "fastkd/recipes/ted/rte.yaml", "fastkd/kernels/rows.py"} <= names
    assert {name.split("/")[0] for name in names} == {"fastkd"}, "a top-level `kernels` or `benchmarks` belongs to somebody else"


def test_the_command_of_the_wheel_leaves_as_a_rank_has_to(unpacked: Path):
    """One of several processes ends without taking its interpreter down, however it was started."""
    (folder,) = unpacked.glob("*.dist-info")
    scripts = ConfigParser()
    scripts.read(folder / "entry_points.txt")
    module, _, function = scripts["console_scripts"]["fastkd"].partition(":")
    program = f"import atexit; atexit.register(print, 'taken down'); from {module} import {function}; {function}()"
    alone, rank = (away(unpacked, "-c", program, "--version", WORLD_SIZE=size) for size in ("1", "2"))
    version, *others = alone.stdout.splitlines()
    assert f"Version: {version}\n" in (folder / "METADATA").read_text(encoding="utf-8") and others == ["taken down"]
    assert rank.stdout.splitlines() == [version] and (alone.returncode, rank.returncode) == (0, 0), alone.stderr + rank.stderr


def test_the_loss_works_away_from_the_checkout_without_a_compiler(unpacked: Path):
    shown = away(unpacked, "-c", SNIPPET)
    assert shown.returncode == 0, shown.stderr
    paths = [Path(line) for line in shown.stdout.splitlines()]
    assert len(paths) == 3 and all(path.is_file() and path.is_relative_to(unpacked) for path in paths)


def test_help_and_recipes_away_from_the_checkout(unpacked: Path):
    helped = away(unpacked, "-m", "fastkd", "doctor", "--help")
    assert helped.returncode == 0 and "usage: fastkd doctor" in helped.stdout, helped.stderr
    listed = away(unpacked, "-m", "fastkd", "train", "--list")
    recipes = sorted(f"{file.parent.name}/{file.stem}" for file in ROOT.glob("fastkd/recipes/*/*.yaml"))
    assert [line.split()[0] for line in listed.stdout.splitlines()[2:]] == recipes, listed.stderr
    printed = away(unpacked, "-m", "fastkd", "train", "ted/rte", "--print_config")
    assert printed.returncode == 0 and "method: ted" in printed.stdout, printed.stderr


def test_compiling_without_a_compiler_is_one_sentence(unpacked: Path):
    tried = away(unpacked, "-m", "fastkd.ops.backend_cpp")
    assert tried.returncode == 1 and tried.stdout == ""
    sentence = "fastkd: The C++ kernels could not be compiled: there is no c++ here."
    assert tried.stderr.startswith(sentence) and len(tried.stderr.splitlines()) == 1
