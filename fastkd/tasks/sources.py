"""Floor 1, rows: finds what a path names, be it files, a folder or a hub dataset, and opens it with ``datasets``."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import datasets

AnyDataset: TypeAlias = "datasets.Dataset | datasets.IterableDataset"
_LOADER_OF_SUFFIX = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
_CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}  # an empty cell is null; "NA", "None" and "nan" are words
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """One split of a dataset, opened.

    Attributes:
        dataset: The rows; an ``IterableDataset`` if opened with ``streaming``.
        description: What it is, as a part of a sentence.
        content: Another string for another content.
        errors: Makes the context to read rows in, which turns what goes wrong into a sentence.
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
    return _open_builder(path, name, split or "train", streaming)


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


def _open_saved_folder(path: str, folder: Path, split: str | None) -> Source:
    import datasets

    with _file_errors(f"the folder {path!r}"):
        loaded = datasets.load_from_disk(folder)
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    require_one_of("split", split, splits, f"the folder {path!r}")
    description = f"split {split!r} of the folder {path!r}"
    return Source(splits[split], description, splits[split]._fingerprint, partial(_file_errors, description))


def _open_files(path: str, files: list[Path], split: str | None, streaming: bool) -> Source:
    import datasets

    loader = _loader_of(path, files)
    counted = "" if files == [Path(path).expanduser()] else f" ({len(files)} files in the order of their names)"
    description = f"{path!r}{counted}"
    require_one_of("split", split or "train", ["train"], description)
    errors = partial(_file_errors, description)
    dataset: AnyDataset = datasets.Dataset.from_dict({})
    filled = [glob.escape(str(file)) for file in files if file.stat().st_size]  # the JSON loader fails on an empty file
    if filled:
        with errors():
            options = _CSV_OPTIONS if loader == "csv" else {}
            builder = datasets.load_dataset_builder(loader, data_files={"train": filled}, **options)
            dataset = _build(builder, "train", streaming)
    content = json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    return Source(dataset, description, content, errors)


def _loader_of(path: str, files: list[Path]) -> str:
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise ValueError(f"path={path!r} matches files of several kinds ({', '.join(suffixes)}): match one kind.")
    require_one_of("the suffix of path", suffixes[0], _LOADER_OF_SUFFIX, f"the kinds of file that can be read, for {path!r}")
    return _LOADER_OF_SUFFIX[suffixes[0]]


def _open_builder(path: str, name: str | None, split: str, streaming: bool) -> Source:
    """A hub dataset, or a folder of files, which ``datasets`` opens in the same way."""
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    place = Path(path).expanduser()
    configured = f"(configuration {name or 'default'!r}, split {split!r})"
    if place.is_dir():
        description = f"the folder of files {path!r} {configured}"
        errors = partial(_file_errors, description)
    else:
        if not _HUB_NAME.fullmatch(path) or Path(path).suffix in _LOADER_OF_SUFFIX:
            raise FileNotFoundError(
                f"path={path!r} is no file, no folder and no glob that matches a file, seen from {os.getcwd()}, and not a "
                "hub dataset's name ('name' or 'organisation/name') either: correct the path."
            )
        description = f"the hub dataset {path!r} {configured}"
        errors = partial(_hub_errors, description)
    with errors():
        builder = datasets.load_dataset_builder(str(place), name)
        if isinstance(builder.config, CsvConfig):  # known only now that its files were looked at
            builder = datasets.load_dataset_builder(str(place), name, **_CSV_OPTIONS)
    known_splits = builder.info.splits or builder.config.data_files
    if known_splits:
        whole_split = re.split(r"[\[+]", split)[0]
        require_one_of("split", whole_split, [str(known) for known in known_splits], description)
    with errors():
        dataset = _build(builder, split, streaming)
    return Source(dataset, description, json.dumps([path, name, builder.hash]), errors)


def _build(builder: datasets.DatasetBuilder, split: str, streaming: bool) -> AnyDataset:
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


@contextmanager
def _file_errors(description: str) -> Iterator[None]:
    with _logged_faults() as faults:
        try:
            yield
        except Exception as error:
            found = faults[-1] if faults else str(error.__cause__ or error)
            raise ValueError(
                f"Cannot read {description}: {found.rstrip('.')}. Check that the data are whole and of the kind that the name says."
            ) from error


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
