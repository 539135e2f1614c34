"""Find what a path names, be it files, a folder or a hub dataset, and open it with ``datasets``.

What is on disk is known by its content: the hashes of its files in their order. Their names, places and times decide nothing, and rows
come from the content that was hashed or not at all.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from fastkd.sealed import content_sha256, read_json

if TYPE_CHECKING:
    import datasets

AnyDataset: TypeAlias = "datasets.Dataset | datasets.IterableDataset"
_LOADER_OF_SUFFIX = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
# An empty cell is null; "NA", "None" and "nan" are words. Without `index_col` pandas makes an index of a first row's extra cell.
_CSV_OPTIONS = {"keep_default_na": False, "na_values": [""], "index_col": False}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class HashedFile:
    """A file, the SHA-256 of its content, and by what it would show that the content has changed since."""

    path: Path
    sha256: str
    _identity: tuple[int, ...]

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """Hash the file, or take its hash from an earlier call if nothing was written to it since."""
        identity = _times_of(path)  # before the content is read: a change in between shows
        return cls(Path(path), content_sha256(path), identity)

    def require_unchanged(self) -> None:
        """Raise ``ValueError`` if the file was changed or replaced since it was hashed."""
        if not self.path.exists() or _times_of(self.path) != self._identity:
            raise ValueError(
                f"{self.path} was changed while it was read, so its rows cannot be trusted: run again when it stays as it is."
            )

    @property
    def size(self) -> int:
        """In bytes."""
        return self._identity[2]

    @property
    def state(self) -> list[str | int]:
        """The content's hash with the file's size and times: equal only as long as nothing was written to the file."""
        return [self.sha256, *self._identity[2:]]


def _times_of(path: str | Path) -> tuple[int, ...]:
    """Where the file lies, its size, and when its content and its entry were last changed."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True)
class Source:
    """One split of a dataset, opened.

    Attributes:
        dataset: The rows; an ``IterableDataset`` if opened with ``streaming``.
        description: What it is, as a part of a sentence.
        content: The same string for the same rows, wherever they are; another one for others.
        errors: Makes the context to read rows in. It turns what goes wrong into a sentence, and refuses files that were
            changed meanwhile.
    """

    dataset: AnyDataset
    description: str
    content: str
    errors: Callable[[], AbstractContextManager[None]]


def open_source(path: str, files: list[Path], *, name: str | None = None, split: str | None = None, streaming: bool = False) -> Source:
    """Open what ``path`` names.

    Args:
        path: Files; a folder, written by ``datasets``' ``save_to_disk`` or of files that ``datasets`` sorts into splits
            by their names; or a dataset's name on the Hugging Face hub. What exists on disk goes before the hub.
        files: What ``matching_files`` finds at ``path``.
        name: The configuration; files and saved folders have none.
        split: The split, for a hub dataset or a folder of files also a slice of one (``train[:90%]``). Files have
            ``train`` only. ``None``: the only split of a saved folder that has one, otherwise ``train``.
        streaming: Read files and hub datasets as they come instead of converting them to Arrow on disk first.

    Raises:
        FileNotFoundError: Nothing is at ``path``, here or on the hub.
        ValueError: Unknown split or kind of file, or files that cannot be read.
        OSError: The hub cannot be reached, or a download was interrupted.
    """
    place = Path(path).expanduser()
    if is_saved_dataset(place):
        return _open_saved_folder(path, place, split)
    if files:
        return _open_files(path, files, split, streaming)
    if place.is_dir():
        return _open_folder(path, place, name, split or "train", streaming)
    return _open_hub(path, name, split or "train", streaming)


def matching_files(path: str) -> list[Path]:
    """The file at ``path``, or the files that ``path`` matches as a glob, in the order of their names; none for a folder."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        return []
    return [Path(match) for match in sorted(glob.glob(str(place), recursive=True)) if Path(match).is_file()]


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets``' ``save_to_disk`` wrote ``folder``."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def require_one_of(argument: str, value: str, present: Collection[str], where: str) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the names present."""
    if value not in present:
        raise ValueError(f"{argument}={value!r} is not in {where}: use one of {', '.join(map(repr, present))}.")


def require_one_of_each_name(columns: Iterable[str], where: str) -> None:
    """Raise ``ValueError`` if two columns of a table have one name; several may have none."""
    if several := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise ValueError(f"{where} has several columns called {', '.join(map(repr, several))}; give each a name of its own.")


def loader_of(path: str, files: list[Path]) -> str:
    """The loader for ``files``, which ``path`` matches: one of ``json``, ``parquet``, ``text`` and ``csv``.

    Raises ``ValueError`` for files of several kinds and of one that cannot be read.
    """
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise ValueError(f"path={path!r} matches files of several kinds ({', '.join(suffixes)}): match one kind.")
    require_one_of("the suffix of path", suffixes[0], _LOADER_OF_SUFFIX, f"the kinds of file that can be read, for {path!r}")
    return _LOADER_OF_SUFFIX[suffixes[0]]


def describe_files(path: str, files: list[Path]) -> str:
    """What ``files``, which ``path`` matches, are called in a sentence."""
    return repr(path) if files == [Path(path).expanduser()] else f"{path!r} ({len(files)} files in the order of their names)"


def _open_saved_folder(path: str, folder: Path, split: str | None) -> Source:
    import datasets

    with _file_errors(f"the folder {path!r}"):
        loaded = datasets.load_from_disk(folder)
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    require_one_of("split", split, splits, f"the folder {path!r}")
    description = f"split {split!r} of the folder {path!r}"
    if isinstance(loaded, datasets.DatasetDict):
        folder /= split
    files = [HashedFile.of(folder / entry["filename"]) for entry in read_json(folder / "state.json", "_data_files")["_data_files"]]
    errors = partial(_file_errors, description, files)
    with errors():
        dataset = datasets.load_from_disk(folder)  # again: what was opened above may not be what was hashed
    return Source(dataset, description, content_of("arrow", files), errors)


def _open_files(path: str, files: list[Path], split: str | None, streaming: bool) -> Source:
    import datasets

    loader, description = loader_of(path, files), describe_files(path, files)
    require_one_of("split", split or "train", ["train"], description)
    hashed = [HashedFile.of(file) for file in files]
    filled = [file for file in hashed if file.size]  # the JSON loader fails on an empty file
    if not filled:
        return Source(datasets.Dataset.from_dict({}), description, content_of(loader, hashed), partial(_file_errors, description))
    if loader == "csv":
        _check_first_rows(filled, ",")
    load = partial(datasets.load_dataset_builder, loader, data_files={"train": [glob.escape(str(file.path)) for file in filled]})
    dataset, errors = _build_from(filled, load, loader == "csv", description, "train", streaming)
    return Source(dataset, description, content_of(loader, hashed), errors)


def _build_from(
    files: Sequence[HashedFile],
    load: Callable[..., datasets.DatasetBuilder],
    is_csv: bool,
    description: str,
    split: str,
    streaming: bool,
) -> tuple[AnyDataset, Callable[[], AbstractContextManager[None]]]:
    """The dataset of a builder that reads ``files``, and the context to read it in."""
    errors = partial(_file_errors, description, files)
    with errors():
        builder = load(cache_dir=None if streaming else _arrow_cache(files), **(_CSV_OPTIONS if is_csv else {}))
        dataset = _build(builder, split, streaming)
    return dataset, errors if streaming else partial(_file_errors, description)  # what is converted is read from the conversion alone


def content_of(kind: str, files: Iterable[HashedFile], *more: str) -> str:
    """The ``Source.content`` of files of one kind, read in this order; ``more`` is what else decides their rows."""
    return json.dumps([kind, *(file.sha256 for file in files), *more])


def _arrow_cache(files: Iterable[HashedFile]) -> str:
    """The folder for ``datasets``' conversion of ``files`` as they are now.

    Its own key for them is path, size and time of the last change, which another content may have too. The hash alone would not do:
    what is converted in spite of a change meanwhile has to be found by nobody again.
    """
    import datasets

    key = hashlib.sha256(json.dumps([file.state for file in files]).encode()).hexdigest()
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "fastkd" / key[:32])


def _check_first_rows(files: Iterable[HashedFile], separator: str) -> None:
    """Raise ``ValueError`` if a first row has more cells than its header, or a header one name twice.

    Pandas refuses any other such row, and cuts this one; of columns of one name it renames the later ones.
    """
    import pandas

    for file in files:
        try:  # as if the header were a row too
            top = pandas.read_csv(file.path, sep=separator, header=None, nrows=2, dtype=str, encoding_errors="replace")
        except pandas.errors.ParserError as error:
            raise ValueError(
                f"Cannot read {str(file.path)!r}: {str(error).strip()}. A row has no more cells than the header; put one that holds "
                f"{separator!r} in quotes."
            ) from error
        require_one_of_each_name([name for name in top.iloc[0] if isinstance(name, str)], repr(str(file.path)))


def _open_folder(path: str, folder: Path, name: str | None, split: str, streaming: bool) -> Source:
    """A folder of files, which ``datasets`` sorts into splits."""
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    description = f"the folder of files {path!r} (configuration {name or 'default'!r}, split {split!r})"
    load = partial(datasets.load_dataset_builder, str(folder), name)
    with _file_errors(description):
        found = load()
    _require_split(split, found, description)
    files = {str(known): [HashedFile.of(file) for file in names] for known, names in found.config.data_files.items()}
    everything = list(chain.from_iterable(files.values()))  # all splits are converted at once
    is_csv = isinstance(found.config, CsvConfig)
    if is_csv:
        _check_first_rows(everything, found.config.sep)
    dataset, errors = _build_from(everything, load, is_csv, description, split, streaming)
    read = [file for part in split.split("+") for file in files.get(part.partition("[")[0].strip(), [])]
    content = content_of(type(found.config).__name__, read, *([] if split in files else [split]))  # a part of it, or several
    return Source(dataset, description, content, errors)


def _open_hub(path: str, name: str | None, split: str, streaming: bool) -> Source:
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    if not _HUB_NAME.fullmatch(path) or Path(path).suffix in _LOADER_OF_SUFFIX:
        raise FileNotFoundError(
            f"path={path!r} is no file, no folder and no glob that matches a file, seen from {os.getcwd()}, and not a "
            "hub dataset's name ('name' or 'organisation/name') either: correct the path."
        )
    description = f"the hub dataset {path!r} (configuration {name or 'default'!r}, split {split!r})"
    errors = partial(_hub_errors, description)
    with errors():
        builder = datasets.load_dataset_builder(path, name)
        if isinstance(builder.config, CsvConfig):  # known only now that its files were looked at
            builder = datasets.load_dataset_builder(path, name, **_CSV_OPTIONS)
    _require_split(split, builder, description)
    with errors():
        dataset = _build(builder, split, streaming)
    return Source(dataset, description, json.dumps([path, name, builder.hash, split]), errors)


def _require_split(split: str, builder: datasets.DatasetBuilder, description: str) -> None:
    if known := builder.info.splits or builder.config.data_files:
        require_one_of("split", re.split(r"[\[+]", split)[0], list(map(str, known)), description)


def _build(builder: datasets.DatasetBuilder, split: str, streaming: bool) -> AnyDataset:
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


@contextmanager
def _file_errors(description: str, files: Iterable[HashedFile] = ()) -> Iterator[None]:
    with _logged_faults() as faults:
        try:
            yield
        except Exception as error:
            found = faults[-1] if faults else str(error.__cause__ or error)
            raise ValueError(
                f"Cannot read {description}: {found.rstrip('.')}. Check that the data are whole and of the kind that the name says."
            ) from error
    for file in files:
        file.require_unchanged()


@contextmanager
def _logged_faults() -> Iterator[list[str]]:
    """What `datasets` says of files that it cannot read: which of many it was is in its log, not in what it raises."""
    faults: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: faults.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("datasets.packaged_modules")
    logger.addHandler(handler)
    try:
        yield faults
    finally:
        logger.removeHandler(handler)


@contextmanager
def _hub_errors(description: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file or folder of that name, and {description} cannot be found either: {error}"
        ) from error
    except ValueError:  # datasets' own sentences: an unknown configuration or split
        raise
    except Exception as error:
        raise ConnectionError(
            f"Reading {description} stopped: {error.__cause__ or error}. It was taken for a hub dataset because no file or "
            "folder has that name. If the connection was lost, run the same command again: it resumes with the files "
            "already downloaded (a streamed corpus is read again from its first row). The corpus 'stdlib' needs no network."
        ) from error
