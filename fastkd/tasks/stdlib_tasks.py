"""Three real labelled tasks made from the Python standard library's own sources, for use without a network.

* `which_module`: from which package of the library does this function come? (classification)
* `docstring_matches`: does this docstring belong to this function, or to another one of the same file? (binary pairs)
* `which_docstring`: which of four docstrings of the same file is this function's? (multiple choice)

No file is in two splits of a task. In the two docstring tasks a file's split follows from its path alone, so that it stays there
between versions of Python, and `test` is made of the files of the `stdlib` corpus' test and dev splits, which no model trained
on that corpus has read. The library differs between versions and distributions of Python: `TaskDataset.fingerprint` tells
whether two runs had the same task.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from fastkd.tasks import stdlib
from fastkd.tasks.labelled import LabelledExample, TaskDataset
from fastkd.tasks.seeded import draw, shuffled

SPLITS = ("train", "validation", "test")
MASK = "MODULE"
"""What stands for every package's and file's name in the functions of `which_module`."""

_MIN_LINES = 3
_MIN_DOCSTRING_WORDS = 3
_MAX_DOCSTRING_CHARS = 300
_MIN_OF_MODULE = 10  # in every split
_SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
"""Shares of each package's functions that the splits of `which_module` have."""
# Gone from Python 3.12 or 3.13: left out everywhere, that the tasks be much the same.
_REMOVED_PACKAGES = {"distutils", "lib2to3", "msilib"}


@dataclass(frozen=True, slots=True)
class _Function:
    """A function or method of the library, not one inside another function."""

    file: str
    """POSIX path relative to the library."""
    source: str
    """The whole of it, unindented."""
    code: str
    """`source` without its docstring."""
    docstring: str
    """The docstring's first paragraph in one line; empty if there is none fit to be asked about."""

    @property
    def package(self) -> str:
        """The top-level package that the file is in; empty for a file that is a module by itself."""
        return PurePosixPath(self.file).parts[0] if "/" in self.file else ""


def which_module(num_modules: int = 8, *, seed: int = 0) -> TaskDataset:
    """Each function's label is its top-level package, one of the `num_modules` that have the most functions.

    The names of these packages and of all their files are masked in all functions alike (as whole parts of identifiers, whatever
    their case). No package has more than twice the functions of the smallest one in a split; which of them stay follows from
    `seed`. The files of each package are dealt to the splits by size, because most packages have too few to be left to chance.
    """
    packages = {name: members for name, members in _grouped(_functions(), lambda function: function.package) if name}
    dealt = {name: _dealt(members) for name, members in packages.items()}
    eligible = [name for name, splits in dealt.items() if min(map(len, splits.values())) >= _MIN_OF_MODULE]
    if not 2 <= num_modules <= len(eligible):
        raise ValueError(f"num_modules is {num_modules}; this Python's library has packages enough for 2 to {len(eligible)}.")
    names = sorted(sorted(eligible, key=lambda name: -len(packages[name]))[:num_modules])
    masked = _masker([function.file for name in names for function in packages[name]])
    splits: dict[str, list[LabelledExample]] = {}
    for split in SPLITS:
        most = 2 * min(len(dealt[name][split]) for name in names)
        splits[split] = [
            LabelledExample(masked(function.source), label=label, group=function.file)
            for label, name in enumerate(names)
            for function in shuffled(dealt[name][split], "which_module", seed, name)[:most]
        ]
    return TaskDataset("stdlib/module", "classification", splits, ("accuracy", "f1_macro"), tuple(names))


def docstring_matches(*, seed: int = 0) -> TaskDataset:
    """Each function twice: with its own docstring (label 1, "yes"), and with that of another function of its file (0, "no").

    Every docstring is right once and wrong once, so that neither it nor the function alone tells the label. `seed` pairs them.
    """

    def examples(functions: Sequence[_Function]) -> Iterator[LabelledExample]:
        for function, other in zip(functions, [*functions[1:], functions[0]], strict=True):
            yield LabelledExample(function.code, other.docstring, 0, group=function.file)
            yield LabelledExample(function.code, function.docstring, 1, group=function.file)

    splits = _documented_splits(2, examples, "docstring_matches", seed)
    return TaskDataset("stdlib/docstring", "classification", splits, ("accuracy", "f1"), ("no", "yes"))


def which_docstring(*, seed: int = 0) -> TaskDataset:
    """Each function with four docstrings of its file, one of them its own, in random places.

    Every docstring is right once and wrong three times, so that the docstrings alone tell nothing. `seed` draws companions and
    places.
    """

    def examples(functions: Sequence[_Function]) -> Iterator[LabelledExample]:
        for index, function in enumerate(functions):
            choices = [functions[(index + step) % len(functions)].docstring for step in (1, 2, 3)]
            label = int(4 * draw("which_docstring", seed, function.file, index))
            choices.insert(label, function.docstring)
            yield LabelledExample(function.code, label=label, choices=tuple(choices), group=function.file)

    splits = _documented_splits(4, examples, "which_docstring", seed)
    return TaskDataset("stdlib/which_docstring", "multiple_choice", splits, ("accuracy",))


STDLIB_TASKS: dict[str, Callable[..., TaskDataset]] = {
    "stdlib/module": which_module,
    "stdlib/docstring": docstring_matches,
    "stdlib/which_docstring": which_docstring,
}
"""The tasks by name; each takes `seed`."""


def training_pairs() -> list[LabelledExample]:
    """Every documented function of the docstring tasks' training files with its own docstring, without a label."""
    return [
        LabelledExample(function.code, function.docstring, group=function.file)
        for function in _functions()
        if function.docstring and _split_of(function.file) == "train"
    ]


def _documented_splits(
    fewest: int, examples: Callable[[Sequence[_Function]], Iterator[LabelledExample]], *key: int | str
) -> dict[str, list[LabelledExample]]:
    """The `examples` of every file that has at least `fewest` functions with docstrings, which are handed over shuffled."""
    splits: dict[str, list[LabelledExample]] = {split: [] for split in SPLITS}
    for file, members in _grouped(_functions(), lambda function: function.file):
        documented = list({function.docstring: function for function in members if function.docstring}.values())
        if len(documented) >= fewest:
            splits[_split_of(file)].extend(examples(shuffled(documented, *key, file)))
    return splits


def _grouped(functions: Sequence[_Function], key: Callable[[_Function], str]) -> list[tuple[str, list[_Function]]]:
    return [(value, list(members)) for value, members in groupby(sorted(functions, key=key), key)]


def _split_of(file: str) -> str:
    """By the digest that sorts the corpus' files, too (`stdlib.stdlib_files`), whose test and dev splits are its first tenth."""
    bucket = int(hashlib.sha256(file.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 10 else "validation" if bucket < 20 else "train"


def _dealt(functions: Sequence[_Function]) -> dict[str, list[_Function]]:
    """A package's functions in splits: file by file, the largest first, to the split that lacks most of its share."""
    splits: dict[str, list[_Function]] = {split: [] for split in SPLITS}
    for _, members in sorted(_grouped(functions, lambda function: function.file), key=lambda file: -len(file[1])):
        lacking = max(SPLITS, key=lambda split: _SHARES[split] * len(functions) - len(splits[split]))
        splits[lacking] += members
    return splits


def _masker(files: Sequence[str]) -> Callable[[str], str]:
    """Puts `MASK` for the names of the files, and of the folders above them, wherever they are whole parts of an identifier."""
    parts = {part for file in files for part in PurePosixPath(file).with_suffix("").parts} - {"__init__", "__main__"}
    names = "|".join(map(re.escape, sorted(parts, key=lambda name: (-len(name), name))))
    pattern = re.compile(rf"(?<![a-z0-9])(?:{names})(?![a-z0-9])", re.IGNORECASE)

    @functools.cache
    def masked(identifier: str) -> str:
        return pattern.sub(MASK, identifier)

    return lambda text: re.sub(r"\w+", lambda found: masked(found[0]), text)


def _functions() -> tuple[_Function, ...]:
    """The library's functions in the order of their files and lines; of those with the same text, only the first."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for split in stdlib.SPLITS for path in stdlib.stdlib_files(split)]
    return _read_functions(root, tuple(sorted((path.relative_to(root).as_posix(), path.stat().st_mtime_ns) for path in paths)))


@functools.lru_cache(maxsize=1)
def _read_functions(root: Path, files: tuple[tuple[str, int], ...]) -> tuple[_Function, ...]:
    """Read the functions of `files`, each with the time of its last change: a changed library is read again."""
    unique: dict[str, _Function] = {}
    for file, _ in files:
        if PurePosixPath(file).parts[0] in _REMOVED_PACKAGES:
            continue
        try:
            text = (root / file).read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):  # of escapes and operators in old code
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):  # few files, and none of them this Python's own code
            continue
        lines = io.StringIO(text).readlines()
        for node in _definitions(tree):
            function = _read_function(file, node, lines)
            if function is not None:
                unique.setdefault(function.code, function)
    return tuple(unique.values())


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child)


def _read_function(file: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> _Function | None:
    """None if the function is too short without its docstring, or if that has not its lines for itself."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno or node.lineno
    source = code = _unindented(lines[first - 1 : last])
    docstring = ast.get_docstring(node)
    if docstring is not None:
        stated, *rest = node.body
        end = stated.end_lineno or stated.lineno
        before = lines[stated.lineno - 1][: stated.col_offset]
        if before.strip() or not rest or rest[0].lineno == end:
            return None
        code = _unindented(lines[first - 1 : stated.lineno - 1] + lines[end:last])
    if sum(bool(line.strip()) for line in code.splitlines()) < _MIN_LINES:
        return None
    summary = " ".join(re.split(r"\n\s*\n", (docstring or "").strip(), maxsplit=1)[0].split())
    fit = len(summary.split()) >= _MIN_DOCSTRING_WORDS and len(summary) <= _MAX_DOCSTRING_CHARS
    return _Function(file, source, code, summary if fit else "")


def _unindented(lines: list[str]) -> str:
    return textwrap.dedent("".join(lines)).strip("\n")
