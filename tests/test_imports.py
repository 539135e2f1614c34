"""What `import fastkd` may pull in; that imports only go down the rooms, and that no two files import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastkd
from fastkd import csrc, kernels

ROOMS = {
    "cli": 6,
    "train": 5,
    "integrations": 5,
    "recipes": 5,
    "methods": 4,
    "models": 3,
    "ops": 2,
    "vocab": 2,
    "kernels": 1,
    "csrc": 1,
    "tasks": 1,
}
"""What no line names stands below them all: errors, files, and the oracles, which the ops' own check reads."""
FOLDERS = {
    "fastkd": Path(fastkd.__file__).parent,
    "fastkd.kernels": Path(kernels.__file__).parent,
    "fastkd.csrc": Path(csrc.__file__).parent,
}


def modules() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(module: str, *, at_start: bool = False) -> Iterator[str]:
    """The package's modules that `module` imports; at_start: of those outside of functions, which run when it is imported itself."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    late = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    late |= {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if at_start and id(node) in late:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                full = f"{target}.{alias.name}"
                if full in MODULES:
                    yield full
                elif target in MODULES:
                    yield target


def room(module: str) -> int:
    parts = module.split(".")
    return ROOMS.get(parts[1], 0) if len(parts) > 1 else 0


def test_import_is_light():
    program = "import sys, fastkd; print([m for m in ('transformers', 'datasets', 'triton', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_are_seen():
    """Every form that the package uses."""
    assert {"fastkd.ops.backend_torch", "fastkd.ops.probe", "fastkd.ops.options"} <= set(imported("fastkd.ops.backends"))
    assert {"fastkd.csrc", "fastkd.kernels"} <= set(imported("fastkd.ops.probe"))
    assert "fastkd.kernels.rows" in set(imported("fastkd.ops.backend_triton"))
    assert "fastkd.kernels.rows" not in set(imported("fastkd.ops.backend_triton", at_start=True))


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_imports_only_go_down(module):
    for target in imported(module):
        assert room(target) <= room(module), f"{module} imports up from {target}"


def test_no_files_import_each_other():
    graph = {module: {target for target in imported(module, at_start=True) if target != module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())
