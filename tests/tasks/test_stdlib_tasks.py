"""The tasks made of the standard library: on the real one their size, balance and splits; on a made-up one what is asked."""

import hashlib
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fastkd.tasks import stdlib
from fastkd.tasks.labelled import TaskDataset
from fastkd.tasks.stdlib_tasks import MASK, SPLITS, STDLIB_TASKS, docstring_matches, which_docstring, which_module


@pytest.fixture(scope="module", params=list(STDLIB_TASKS))
def task(request: pytest.FixtureRequest) -> TaskDataset:
    return STDLIB_TASKS[request.param](seed=0)


def test_thousands_of_examples_in_three_splits(task: TaskDataset) -> None:
    sizes = {split: len(task.split(split)) for split in SPLITS}
    assert list(task.splits) == ["train", "validation", "test"]
    assert sum(sizes.values()) > 2_000 and sizes["train"] > 1_500
    assert min(sizes.values()) > 200


def test_no_file_and_no_function_is_in_two_splits(task: TaskDataset) -> None:
    files = {split: {row.group for row in task.split(split)} for split in SPLITS}
    texts = {split: {row.text for row in task.split(split)} for split in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert files[first].isdisjoint(files[second])
        # Two functions of `which_module` may become one by masking.
        assert len(texts[first] & texts[second]) <= 0.02 * len(texts[second])
    root = Path(sysconfig.get_path("stdlib"))
    assert all((root / file).is_file() for named in files.values() for file in named)


@pytest.mark.parametrize("name", ["stdlib/docstring", "stdlib/which_docstring"])
def test_test_files_are_the_corpus_held_out_ones(name: str) -> None:
    task, root = STDLIB_TASKS[name](), Path(sysconfig.get_path("stdlib"))
    held_out = {path.relative_to(root).as_posix() for split in ("dev", "test") for path in stdlib.stdlib_files(split)}
    assert {row.group for row in task.split("test")} <= held_out
    assert not held_out & {row.group for split in ("train", "validation") for row in task.split(split)}


def test_a_seed_is_the_task(task: TaskDataset) -> None:
    make = STDLIB_TASKS[task.name]
    assert make(seed=0).fingerprint == task.fingerprint != make(seed=1).fingerprint
    assert {row.group for row in make(seed=1).split("test")} == {row.group for row in task.split("test")}


def test_modules_are_balanced_and_their_names_masked() -> None:
    task = which_module()
    assert len(task.label_names) == 8 and {"asyncio", "email", "multiprocessing"} <= set(task.label_names)
    assert list(task.label_names) == sorted(task.label_names)
    for split in SPLITS:
        counts = Counter(row.label for row in task.split(split))
        assert len(counts) == 8 and max(counts.values()) <= 2 * min(counts.values())
        assert min(counts.values()) >= 10
    for row in task.split("train"):
        assert task.label_names[int(row.label or 0)] == row.group.split("/")[0]
        words = "".join(character if character.isalnum() else " " for character in row.text.lower()).split()
        assert set(words).isdisjoint(task.label_names)
        assert Path(row.group).stem not in words
    assert sum(MASK in row.text for row in task.split("train")) > 200
    assert len(which_module(3).label_names) == 3
    for num_modules in (1, 100):
        with pytest.raises(ValueError, match=f"num_modules is {num_modules}; this Python's library has packages enough for 2 to"):
            which_module(num_modules)


def test_a_docstring_alone_tells_nothing_about_a_match() -> None:
    for rows in docstring_matches().splits.values():
        uses: dict[tuple[str, str | None], list[int | float | None]] = defaultdict(list)
        functions: dict[tuple[str, str], list[int | float | None]] = defaultdict(list)
        for row in rows:
            uses[row.group, row.second_text].append(row.label)
            functions[row.group, row.text].append(row.label)
        assert all(sorted(map(int, labels)) == [0, 1] for labels in (*uses.values(), *functions.values()))  # type: ignore[arg-type]


def test_docstring_choices_are_even() -> None:
    task = which_docstring()
    for rows in task.splits.values():
        right, all_uses = Counter(), Counter()  # type: ignore[var-annotated]
        for row in rows:
            assert len(set(row.choices)) == 4
            right[row.group, row.choices[int(row.label or 0)]] += 1
            all_uses.update((row.group, choice) for choice in row.choices)
        assert set(right.values()) == {1} and set(all_uses.values()) == {4}
        places = Counter(row.label for row in rows)
        assert all(abs(places[place] - len(rows) / 4) < 4 * (len(rows) * 3 / 16) ** 0.5 for place in range(4))


def test_a_constant_answer_is_at_chance() -> None:
    task = docstring_matches()
    assert task.score("test", [1] * len(task.split("test"))) == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})


SOURCE = '''
import functools


class Reader:
    @functools.cache
    def read_line(self, size):
        """Read one
        line of text.

        Not more than size characters.
        """
        # kept
        line = self.readline(size)
        return line

    async def close(self):
        """Close the reader for ever."""
        await self.flush()

        def inner():
            """Never asked about by itself."""
            return 1, 2, 3

        return inner


if True:
    def short(a):
        """Too short without this docstring."""
        return a

def plain(a):
    a += 1
    return a

def on_one_line(a): "Shares its line."; return a

def brief(a):
    """Two words."""
    a += 2
    return a

def third(a):
    """A third one to ask about."""
    a += 3
    return a

def fourth(a):
    """The fourth one to ask about."""
    a += 4
    return a

def again(a):
    """The fourth one to ask about."""
    a += 5
    return a

class Copy:
    def third(a):
        """Other words about the same code."""
        a += 3
        return a
'''


def named(split: str, prefix: str = "m") -> str:
    """A file name that is in `split`."""
    ranges = {"test": range(10), "validation": range(10, 20), "train": range(20, 100)}
    names = (f"{prefix}{number}.py" for number in range(1_000))
    return next(name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 in ranges[split])


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library with a file in each split; the train file is `SOURCE`."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "os.py").write_text("")
    (tmp_path / named("train")).write_text(SOURCE)
    for split in ("validation", "test"):
        text = "".join(f'def f{n}(a):\n    """Number {n} of {split}."""\n    a += {n}\n    return "{split}"\n' for n in range(4))
        (tmp_path / named(split)).write_text(text)
    return tmp_path


def test_what_is_asked_about_a_function(library: Path) -> None:
    right = {row.second_text: row.text for row in docstring_matches().split("train") if row.label == 1}
    assert set(right) == {
        "Read one line of text.",
        "Close the reader for ever.",
        "A third one to ask about.",
        "The fourth one to ask about.",
    }
    assert right["Read one line of text."] == (
        "@functools.cache\ndef read_line(self, size):\n    # kept\n    line = self.readline(size)\n    return line"
    )
    assert right["Close the reader for ever."].startswith("async def close(self):\n    await self.flush()\n\n    def inner():")
    assert 'Never asked about by itself."""' in right["Close the reader for ever."]
    wrong = {row.text: row.second_text for row in docstring_matches().split("train") if row.label == 0}
    assert set(wrong) == set(right.values()) and set(wrong.values()) == set(right)
    assert all(right[docstring] != code for code, docstring in wrong.items())


def test_files_that_cannot_be_read_are_left_out(library: Path) -> None:
    before = docstring_matches().fingerprint
    (library / named("train", "broken")).write_text("def f(:\n")
    (library / named("train", "latin")).write_bytes(b"# \xff\n" + SOURCE.encode())
    (library / "distutils").mkdir()
    (library / "distutils" / "gone.py").write_text(SOURCE.replace("+= ", "-= "))
    assert docstring_matches().fingerprint == before


def test_a_change_of_the_library_changes_the_fingerprint(library: Path) -> None:
    before = docstring_matches().fingerprint
    path = library / named("train")
    path.write_text(SOURCE.replace("Read one", "Read every"))
    assert docstring_matches().fingerprint != before


def test_modules_are_dealt_by_file_and_masked_by_name(library: Path) -> None:
    for package in ("alpha", "beta"):
        (library / package).mkdir()
        for number, functions in enumerate((40, 10, 10, 2)):
            text = "".join(
                f"def f{n}(a):\n    import {package}.part{number}\n    return Alpha_x, alphabet, {number * n}\n"
                for n in range(functions)
            )
            (library / package / f"part{number}.py").write_text(text.replace("return", f"{package}_{number} = 1\n    return"))
    task = which_module(2)
    assert task.label_names == ("alpha", "beta")
    files = {split: Counter(row.group for row in task.split(split)) for split in SPLITS}
    for package in ("alpha", "beta"):
        assert [sum(count for file, count in files[split].items() if file.startswith(package)) for split in SPLITS] == [42, 10, 10]
    row = next(row for row in task.split("train") if row.group == "beta/part0.py" and "def f7(" in row.text)
    assert row.text == f"def f7(a):\n    import {MASK}.{MASK}\n    {MASK}_0 = 1\n    return {MASK}_x, alphabet, 0"
    with pytest.raises(ValueError, match="packages enough for 2 to 2"):
        which_module()
