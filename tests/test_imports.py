"""What `import fastkd` may pull in, and that imports only go down the floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastkd

PACKAGE = Path(fastkd.__file__).parent
FLOOR = {
    "benchmarks": 6,
    "cli": 6,
    "train": 5,
    "integrations": 5,
    "methods": 4,
    "models": 3,
    "ops": 2,
    "vocab": 2,
    "kernels": 1,
    "tasks": 1,
    "recipes": 5,
}


def test_import_is_light():
    program = "import sys, fastkd; print([m for m in ('transformers', 'datasets', 'triton', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_only_go_down():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in FLOOR:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level >= 2:
                    target = module.split(".")[0]
                elif module.startswith("fastkd."):
                    target = module.split(".")[1]
                else:
                    continue
                assert FLOOR.get(target, 0) <= FLOOR[room], f"{path.name} ({room}) imports up from {target}"
