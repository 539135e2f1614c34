"""Turn config dataclasses into YAML, flags, help and documentation, whatever the config; no tensors here.

A config is a dataclass whose fields each carry a docstring, a string literal right below the field. That docstring, the
annotation and the default are the only source of everything a person reads or types. Annotations may be built from `bool`,
`int`, `float`, `str`, `None`, `Any`, `Literal`, unions, `list[X]`, `tuple[X, ...]`, `dict[str, X]` and other configs; lists
of configs are not among them (name the entries in a `dict[str, Config]`). `__post_init__` validates and derives nothing, so
that reading back what was written gives an equal config. `faults_of(data)`, where a config has it, names faults of plain data
whose types alone would not tell what is wrong.
"""

import ast
import copy
import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import nearest
from .numbers import decimal_number, whole_number

Config = TypeVar("Config")
Row = tuple[str, str, str, str]
"""Key, type, default and meaning, as text."""

_TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "str", NoneType: "null", Any: "any"}
_REMEDIES = {
    bool: "write true or false",
    int: "write a whole number",
    float: "write a number",
    str: "put it in quotes",
    list: "write [a, b]",
    tuple: "write [a, b]",
    Literal: "write one of these",
}
_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: whole_number,
    float: decimal_number,
    NoneType: lambda text: {"null": None, "none": None}[text.lower()],
}


class ConfigError(ValueError):
    """A config cannot be read; the message is one sentence per problem, each on its line."""


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Every field's docstring on one line, base dataclasses included; `TypeError` names a field that has none."""
    docs: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    for name in _keys(cls):
        if not docs.get(name):
            raise TypeError(f"{cls.__name__}.{name} has no docstring; write a string literal right below the field")
    return docs


def _keys(cls: Any, base: Any = MISSING) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of every key; a config `base`, the default of the whole, has the say over the defaults."""
    hints, keys = get_type_hints(cls), {}
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        keys[field.name] = hints[field.name], getattr(base, field.name) if isinstance(base, cls) else default
    return keys


def _entry(base: Any, name: str) -> Any:
    """The default entry of a mapping whose default is `base`."""
    return base.get(name, MISSING) if isinstance(base, Mapping) else MISSING


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _holder(kind: Any) -> Any:
    """The member of `kind` that has keys below it, a config or a `dict`; None where there is none."""
    return next((member for member in _members(kind) if is_dataclass(member) or get_origin(member) is dict), None)


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is Literal:
        return " | ".join(map(_show, arguments))
    if origin in (list, tuple):
        return f"list[{_type_name(arguments[0])}]"
    return _TYPE_NAMES.get(kind, "mapping")


def _show(value: Any) -> str:
    """A value as people read it: text bare, everything else nearly as in YAML's flow style."""
    if value is MISSING:
        return "required"
    if is_dataclass(value):
        return "..."
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, default=lambda entry: "..." if is_dataclass(entry) else str(entry))


def from_mapping(cls: type[Config], data: Mapping[str, Any], *, where: str = "") -> Config:
    """Build `cls`, nested configs included, from plain data such as `load_yaml` returns.

    Keys left out keep their default. Where a nested config is given in part, the rest comes from the default of the field
    that holds it; a mapping of configs has just the entries it names, each over the default entry of the same name.

    Raises `ConfigError` with all problems, each with its full dotted key (`where` is the prefix).
    """
    problems: list[str] = []
    config = _read(data, cls, where, MISSING, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _read(value: Any, kind: Any, where: str, base: Any, problems: list[str]) -> Any:
    """`value` as the first member of `kind` whose shape it has; meaningless where that adds to `problems`."""
    member = next((member for member in _members(kind) if _fits(value, member)), None)
    origin = get_origin(member)
    if member is None:
        problems.append(_mismatch(where, value, kind))
    elif is_dataclass(member):
        return _read_config(value, member, where, base, problems)
    elif origin in (list, tuple):
        item = get_args(member)[0]
        return origin(_read(entry, item, f"{where}[{i}]", MISSING, problems) for i, entry in enumerate(value))
    elif origin is dict:
        item = get_args(member)[1]
        names = [_read(name, str, f"a name in {where}", MISSING, problems) for name in value]
        return {name: _read(value[name], item, _dotted(where, name), _entry(base, name), problems) for name in names}
    elif odd := next(_odd_numbers(value, where), None):
        problems.append(odd)
        return None
    return float(value) if member is float else value


def _odd_numbers(value: Any, where: str) -> Iterator[str]:
    """A sentence for every number in plain data that is not finite, or an integer beyond 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}; it must be a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{where} is a number beyond 64 bits; write a smaller one"
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _odd_numbers(entry, _dotted(where, name))
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from _odd_numbers(entry, f"{where}[{i}]")


def _read_config(data: Mapping[str, Any], cls: Any, where: str, base: Any, problems: list[str]) -> Any:
    found = len(problems)
    keys = _keys(cls, base)
    problems += [_unknown("key", where, str(name), cls, keys) for name in data if name not in keys]
    problems += [_dotted(where, fault) for fault in getattr(cls, "faults_of", lambda data: ())(data)]
    values = {}
    for name, (kind, default) in keys.items():
        values[name] = _read(data[name], kind, _dotted(where, name), default, problems) if name in data else default
        if values[name] is MISSING:
            problems.append(f"{_dotted(where, name)} is missing ({_type_name(kind)}); it has no default, so set it")
    if len(problems) > found:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        names_a_key = re.split(r"\W", str(error), maxsplit=1)[0] in keys
        problems.append(_dotted(where, error) if names_a_key or not where else f"{where}: {error}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` has the outer shape of `kind`, which is no union."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if is_dataclass(kind) or origin is dict:
        return isinstance(value, Mapping)
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    if kind not in _TYPE_NAMES:
        raise TypeError(f"a config field cannot have the type {kind}")
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def _mismatch(where: str, value: Any, kind: Any) -> str:
    where = where or "the config"
    members = _members(kind)
    given = f"the text {value!r}" if isinstance(value, str) else "a mapping" if isinstance(value, Mapping) else _show(value)
    remedies = (_REMEDIES.get(get_origin(member) or member) for member in members)
    remedy = next(filter(None, remedies), "write `key: value` lines, or flags with dotted keys")
    return f"{where} is {given}; it must be {_type_name(kind)}: {remedy}"


def _unknown(what: str, where: str, name: str, cls: Any, known: Collection[str]) -> str:
    """Tell which key of `cls`, or of a config inside it, was meant by `name`; all of its own where none is near."""
    inside = [key for key, *_ in key_rows(cls) if "NAME" not in key]
    near = nearest(name, dict.fromkeys(key.rpartition(".")[2] for key in [*known, *inside]))
    meant = [near] if near in known else [key for key in inside if key.rpartition(".")[2] == near]
    remedy = f"did you mean {' or '.join(_dotted(where, key) for key in meant)}?" if meant else f"known here: {', '.join(known)}"
    return f"{_dotted(where, name)} is not a known {what}; {remedy}"


def _dotted(where: str, name: object) -> str:
    """A key below `where`: a key ("" at the top) or a flag ("--" at the top)."""
    return f"{where}.{name}" if where.strip("-") else f"{where}{name}"


def load_yaml(path: str | PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; raises `ConfigError` where there is none, or where a key is written twice."""
    import yaml

    from .yaml_text import MOST_BYTES, read_yaml

    try:
        with Path(path).open("rb") as file:
            data = read_yaml(file.read(MOST_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{path}{line} is not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds {_show(data)[:80]}, not a mapping"
        raise ConfigError(f"{path} {held}; write `key: value` lines")
    return data


def apply_flags(data: Mapping[str, Any], argv: Sequence[str], cls: type) -> dict[str, Any]:
    """A copy of `data` with the flags in `argv` set over it; `from_mapping` then judges their values as it does a file's.

    `--key value`, `--key=value`, `--key` alone for true, `--config.key value`, `--mapping.NAME value`; lists as `a,b` or by
    repeating the flag. A text is read by its key's type and stays text where it does not fit. Dashes in keys are underscores.
    Raises `ConfigError` at a flag that is unknown or lacks its value.
    """
    result = copy.deepcopy(dict(data))
    seen = set()
    arguments = list(reversed(argv))
    while arguments:
        flag, equals, text = arguments.pop().partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag} is not a flag; write --key VALUE")
        mapping, key, kind = _find(result, cls, MISSING, "--", flag[2:].split("."))
        if not equals:
            if arguments and not arguments[-1].startswith("--"):
                text = arguments.pop()
            elif bool in _members(kind):
                text = "true"
            else:
                raise ConfigError(f"{flag} lacks its value; write {flag} VALUE ({_type_name(kind)})")
        value = _parse(text, kind)
        repeated = isinstance(value, list) and (id(mapping), key) in seen
        mapping[key] = [*(mapping.get(key) or ()), *value] if repeated else value
        seen.add((id(mapping), key))
    return result


def _find(data: dict[str, Any], kind: Any, base: Any, where: str, path: list[str]) -> tuple[dict[str, Any], str, Any]:
    """The mapping in `data` that a flag writes to, its key there and the key's type; mappings on the way are made."""
    key, *below = path
    holder = _holder(kind)
    if holder is None:
        raise ConfigError(f"{_dotted(where, key)} goes below a value; write {where} VALUE ({_type_name(kind)})")
    if is_dataclass(holder):
        keys = _keys(holder, base)
        key = key.replace("-", "_")
        if key not in keys:
            raise ConfigError(_unknown("flag", where, key, holder, keys))
        kind, base = keys[key]
    else:
        kind, base = get_args(holder)[1], _entry(base, key)
    if not below:
        return data, key, kind
    where = _dotted(where, key)
    if data.get(key) is None:  # its default entries stay: a flag for one entry drops none of the others
        entries = base.items() if isinstance(base, Mapping) else ()
        data[key] = {name: {} if is_dataclass(entry) else entry for name, entry in entries}
    elif not isinstance(data[key], dict):
        raise ConfigError(_mismatch(where[2:], data[key], kind))
    return _find(data[key], kind, base, where, below)


def _parse(text: str, kind: Any) -> Any:
    """What a flag's text says in the type `kind`; text where it says nothing else."""
    members = _members(bool | int | float | str | None if kind is Any else kind)
    for member in sorted(members, key=lambda member: get_origin(member) in (list, tuple)):  # these take any text: last
        origin, arguments = get_origin(member), get_args(member)
        if origin in (list, tuple):
            entries = [_parse(entry.strip(), arguments[0]) for entry in text.split(",") if entry.strip()]
            if str not in members or all(any(_fits(entry, item) for item in _members(arguments[0])) for entry in entries):
                return entries
            continue
        choices = {_show(choice): choice for choice in arguments} if origin is Literal else {}
        with suppress(ValueError, KeyError):
            return choices[text] if choices else _PARSERS[member](text)
    return text


def to_yaml(config: Any, *, comments: bool = True, defaults: bool = True, inherited: bool = False) -> str:
    """YAML that `load_yaml` and `from_mapping` read back to an equal config.

    comments: the first sentence of its docstring above each key.
    defaults: also the keys that have their default value.
    inherited: the values of `config` itself are the defaults of the configs below it, in mappings, whose class it extends.
    """
    from .yaml_text import yaml_line

    def line(name: str, value: Any) -> str:
        return yaml_line({name: value})[1:-2] + "\n"  # without the braces

    def inherits(below: Any) -> bool:
        return inherited and isinstance(config, type(below))

    def entry(name: str, value: Any, base: Any) -> str:
        if is_dataclass(value):
            body = keys(value, base)
        elif isinstance(value, dict) and any(map(is_dataclass, value.values())):
            body = "".join(entry(key, below, config if inherits(below) else _entry(base, key)) for key, below in value.items())
        else:
            return line(name, value)
        head = line(name, {})
        return head.removesuffix(" {}\n") + "\n" + textwrap.indent(body, "  ") if body else head

    def keys(config: Any, base: Any) -> str:
        text = ""
        cls: Any = type(config)
        for name, (_, default) in _keys(cls, base).items():
            value = getattr(config, name)
            if defaults or value != default:
                text += f"# {first_sentence(field_docs(cls)[name])}\n" * comments + entry(name, value, default)
        return text

    return keys(config, MISSING) or "{}\n"


def help_text(cls: type, *, width: int = 80) -> str:
    """Every flag of `cls` as `--key type (default)  docstring`, wrapped to `width`; nested keys are dotted."""
    return wrapped(key_rows(cls), width=width)


def wrapped(rows: Iterable[Row], *, width: int) -> str:
    """The flags of these rows, as `help_text` shows them."""
    wrap = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"--{key} {kind} ({default})  {doc}") for key, kind, default, doc in rows)


def first_sentence(doc: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", doc, maxsplit=1)[0]


def docs_table(cls: type) -> str:
    """A Markdown table of every key of `cls`: key, type, default, meaning."""
    rows = [("key", "type", "default", "meaning"), ("---",) * 4]
    rows += [(f"`{key}`", f"`{kind}`", f"`{default}`", doc) for key, kind, default, doc in key_rows(cls)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def key_rows(cls: Any, prefix: str = "", base: Any = MISSING) -> Iterator[Row]:
    """(key, type, default, meaning), a nested config right before its keys; NAME stands for a mapping's free names."""
    docs = field_docs(cls)
    for name, (kind, default) in _keys(cls, base).items():
        key, holder = prefix + name, _holder(kind)
        if get_origin(holder) is dict:
            key, kind = f"{key}.NAME", get_args(holder)[1]
            holder = _holder(kind)
        yield key, _type_name(kind), _show(default), docs[name]
        if is_dataclass(holder):
            yield from key_rows(holder, f"{key}.", default)
