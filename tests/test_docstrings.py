"""What people read of the code: every public name says what it does, and an op says it of every parameter, with shapes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastkd

PACKAGE = Path(fastkd.__file__).parent
ROOMS = ("integrations", "methods", "models", "ops", "vocab")
OPS = [name for name in fastkd.__all__ if inspect.isfunction(op := getattr(fastkd, name)) and op.__module__.startswith("fastkd.ops.")]
# (...), (V_s,), (..., H_s), (B, heads, S, d_s); () of a number in a tensor.
SHAPE = re.compile(r"\(((\.\.\.|heads|[A-Z]\w*|d(_\w)?)(, |,?(?=\))))*\)")


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Functions, classes and their methods, by qualified name; what begins with an underscore is nobody's but its file's."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_a_docstring(room: str) -> None:
    found, missing = 0, []
    for path in sorted((PACKAGE / room).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path.name} does not say what it is for"
        for name, node in public(tree.body):
            found += 1
            if not ast.get_docstring(node):
                missing.append(f"{path.name}:{node.lineno} {name}")
    assert found > 10 and not missing, missing


def arguments(function: object) -> dict[str, str]:
    """What the docstring's Args section says of each parameter."""
    section = re.search(r"\n\nArgs:\n(.*?)(\n\n|$)", inspect.getdoc(function) or "", re.DOTALL)
    assert section, "there is no Args section"
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", section[1], re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


@pytest.mark.parametrize("name", OPS)
def test_an_op_describes_every_parameter(name: str) -> None:
    parameters, described = inspect.signature(getattr(fastkd, name)).parameters, arguments(getattr(fastkd, name))
    assert list(described) == list(parameters)
    tensors = [name for name, parameter in parameters.items() if re.search(r"\bTensor\b", str(parameter.annotation))]
    assert len(tensors) >= 3
    assert [name for name in tensors if not SHAPE.search(described[name])] == []
    doc = inspect.getdoc(getattr(fastkd, name)) or ""
    assert "\n\nReturns:\n" in doc and "\n\nRaises:\n" in doc


def test_the_ops_are_found() -> None:
    assert set(OPS) == set(fastkd.reference.__all__)


@pytest.mark.parametrize(
    ("text", "is_shape"),
    [
        *((text, True) for text in ("(...) bool", "(V_s,) int64", "(..., H_s) or", "(B, heads, S, d_s)", "of shape ()")),
        *((text, False) for text in ("(global token count)", "(Hinton et al., arXiv)", "one value per token")),
    ],
)
def test_what_counts_as_a_shape(text: str, is_shape: bool) -> None:
    assert bool(SHAPE.search(text)) is is_shape
