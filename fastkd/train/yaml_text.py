"""YAML as configurations are written in it: plain scalars by the core schema of YAML 1.2, of bounded size.

PyYAML reads YAML 1.1, in which `1:30` is 90, `010` is 8, `on` is true and `2e-5` is text. In YAML 1.2, as people expect, the first and
third are text, the second is ten and the fourth a number; `true` and `false` are the only truth values.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from .numbers import DECIMAL, NOT_FINITE, WHOLE, decimal_number, whole_number

_PREFIX = "tag:yaml.org,2002:"
MOST_BYTES, MOST_VALUES, MOST_LEVELS = 2**17, 10_000, 40


class _Loader(yaml.SafeLoader):
    # Its own, without those of YAML 1.1, which are added to below.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return node

    def truth(self, node: yaml.ScalarNode) -> bool:
        if (value := node.value.lower()) not in ("true", "false"):
            raise yaml.MarkedYAMLError(problem=f"{node.value!r} is neither true nor false", problem_mark=node.start_mark)
        return bool(value == "true")

    def number(self, node: yaml.ScalarNode) -> int | float:
        try:
            return whole_number(node.value) if node.tag == f"{_PREFIX}int" else decimal_number(node.value)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", WHOLE, [*"-+0123456789"]),
    ("float", f"{DECIMAL}|{NOT_FINITE}", [*"-+.0123456789"]),
    ("merge", r"<<", ["<"]),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"{_PREFIX}{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)
for _kind in ("null", "str", "seq", "map"):
    _Loader.yaml_constructors[f"{_PREFIX}{_kind}"] = yaml.SafeLoader.yaml_constructors[f"{_PREFIX}{_kind}"]
for _kind, _construct in (("bool", _Loader.truth), ("int", _Loader.number), ("float", _Loader.number)):
    _Loader.yaml_constructors[f"{_PREFIX}{_kind}"] = _construct
_Loader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined


def read_yaml(content: bytes) -> Any:
    """The plain data in a YAML document, None in an empty one.

    Raises `yaml.YAMLError` for what is no YAML, names a key twice, has a tag of its own, or is too large: nested deeper than
    `MOST_LEVELS`, or of more than `MOST_VALUES` values with every alias written out.
    """
    if len(content) > MOST_BYTES:
        raise yaml.MarkedYAMLError(problem=f"it has more than {MOST_BYTES} bytes")
    loader = _Loader(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from error
    finally:
        loader.dispose()


def yaml_line(data: Any) -> str:
    """Plain data in YAML's flow style, on one line."""
    text = yaml.dump(data, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return str(text)


def _size(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """The number of values in `node` with its aliases written out, and of levels; known: those of nodes that were looked at."""
    if node not in known:
        known[node] = (0, MOST_LEVELS)  # until it is known: an alias of what it is in has no end
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [_size(part, known) for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        values, levels = 1 + sum(values for values, _ in parts), 1 + max((levels for _, levels in parts), default=0)
        if values > MOST_VALUES or levels > MOST_LEVELS:
            problem = f"with its aliases written out it has more than {MOST_VALUES} values or {MOST_LEVELS} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        known[node] = (values, levels)
    return known[node]
