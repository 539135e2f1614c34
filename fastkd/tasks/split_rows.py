"""The rows of one split of a labelled data set in the hub's columns, wherever a copy of it is."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.tasks.sources import Source, is_saved_dataset, matching_files, open_source, require_one_of_each_name

_SEPARATED = (".csv", ".tsv")
_SUFFIXES = (".parquet", ".jsonl", ".json", *_SEPARATED)
_HUB_FORMAT = "of the hub's format"


def read_split(
    path: str, config: str | None, split: str, columns: Sequence[str], *, whose: str = _HUB_FORMAT
) -> tuple[list[dict[str, Any]], str]:
    """The rows of `split` with `columns`, and what they were read from, as a part of a sentence.

    Class labels that have names are given by name, so that a copy with another order of its classes cannot mislead. The cells
    of .csv and .tsv files are all text; .tsv files are read as GLUE's own are written, without quoting.

    Args:
        path: A folder that `datasets.DatasetDict.save_to_disk` wrote; a folder with a file `SPLIT.SUFFIX`, or parts
            `SPLIT-*.SUFFIX`, of each split; a folder that has one of these as its subfolder `config`, as copies of the hub's
            repositories do; or the name of a data set on the hub.
        config: The configuration, where the data set has several.
        split: The name of the split.
        columns: What every row must have; checked before the first row is read.
        whose: Who asks for these columns, as a part of a sentence.

    Raises:
        FileNotFoundError: Nothing is there, or no file of that split.
        ValueError: Missing columns, an unknown split, one file instead of a folder, or files that cannot be read.
        OSError: The hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"path={path!r} is one file; name the folder that has a file of each split, such as {split}{folder.suffix}.")
    if not folder.is_dir():
        return _dataset_rows(open_source(path, [], name=config, split=split), columns, whose)
    if config is not None and (folder / config).is_dir():
        folder /= config
    if is_saved_dataset(folder):
        return _dataset_rows(open_source(str(folder), [], split=split), columns, whose)
    files = _split_files(folder, split)
    return _file_rows(str(files[0]) if len(files) == 1 else str(folder), files, columns, whose)


def read_one_split(path: str, columns: Sequence[str], *, whose: str = _HUB_FORMAT) -> tuple[list[dict[str, Any]], str]:
    """Read the rows of what is one split by itself: a file, a glob, or what `datasets.Dataset.save_to_disk` wrote."""
    files = matching_files(path)
    return _file_rows(path, files, columns, whose) if files else _dataset_rows(open_source(path, files), columns, whose)


def _file_rows(path: str, files: list[Path], columns: Sequence[str], whose: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of the files that `path` names, in this order."""
    if all(file.suffix in _SEPARATED for file in files):
        return [row for file in files for row in _separated_rows(file, columns, whose)], " and ".join(map(str, files))
    return _dataset_rows(open_source(path, files), columns, whose)


def _dataset_rows(source: Source, columns: Sequence[str], whose: str) -> tuple[list[dict[str, Any]], str]:
    import datasets

    dataset = source.dataset
    assert isinstance(dataset, datasets.Dataset)
    _require_columns(columns, dataset.column_names, source.description, whose)
    with source.errors():
        rows = dataset.with_format(None).select_columns(list(columns)).to_list()
    for column in columns:
        feature = dataset.features[column]
        if isinstance(feature, getattr(datasets, "Json", ())) and not any(isinstance(row[column], dict | list) for row in rows):
            # `datasets` keeps such cells as JSON, and gives back a number, None or True for the strings "2", "null" and "true".
            raise ValueError(
                f"The column {column!r} of {source.description} mixes kinds of values, such as the number 1 and the string "
                '"negative"; write all of them as strings, or all as numbers.'
            )
        if isinstance(feature, datasets.ClassLabel):
            names = dict(enumerate(feature.names))
            for row in rows:
                # -1 marks a row without a label; no other number may be taken for a class whose order is not the copy's.
                if row[column] is not None and row[column] >= 0:
                    row[column] = names.get(row[column], f"class {row[column]} of {feature.num_classes}")
    return rows, source.description


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted({*folder.glob(f"{split}.*"), *folder.glob(f"{split}-*")})
    files = [file for file in files if file.suffix in _SUFFIXES]
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise ValueError(f"The folder {str(folder)!r} has split {split!r} as {' and '.join(suffixes)}; keep one of them.")
    if not files:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "nothing"
        raise FileNotFoundError(
            f"The folder {str(folder)!r} has no file of split {split!r} ({', '.join(split + suffix for suffix in _SUFFIXES)}), and "
            f"datasets' save_to_disk did not write it. There is: {there}."
        )
    return files


def _separated_rows(file: Path, columns: Sequence[str], whose: str) -> list[dict[str, Any]]:
    # Not by `datasets`, which guesses types: it makes numbers of a text of digits and nothing of the words "NA" and "None".
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {"strict": True}
    rows = []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, **options)
        try:
            names = reader.fieldnames or []
            _require_columns(columns, names, str(file), whose)
            require_one_of_each_name(names, str(file))
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"the row has not the {len(names)} cells that the first line names")
                rows.append({column: row[column] for column in columns})
        except UnicodeDecodeError as error:  # met while the lines of a whole block are decoded
            raise ValueError(f"Cannot read {file}, line {_line_beyond_utf8(file)}: {error}. Save the file as UTF-8.") from error
        except csv.Error as error:
            raise ValueError(
                f"Cannot read {file}, line {reader.reader.line_num}: {error}. Check that it is a whole {file.suffix} file."
            ) from error
    return rows


def _line_beyond_utf8(file: Path) -> int:
    """The number, from 1, of the first line of a file that is not UTF-8."""
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        return next(number for number, line in enumerate(lines, 1) if re.search("[\udc80-\udcff]", line))


def _require_columns(columns: Sequence[str], present: Sequence[str], description: str, whose: str) -> None:
    missing = [column for column in columns if column not in present]
    if missing:
        raise ValueError(
            f"The column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} {whose} "
            f"{'are' if len(missing) > 1 else 'is'} missing in {description}, which has {', '.join(map(repr, present)) or 'none'}."
        )
