"""Load the rows of a task's data set, wherever it is."""

import os
from pathlib import Path
from typing import Any

from fastkd.tasks.sources import matching_files, open_source


def load_examples(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a data set, or its first `max_rows`, as dictionaries.

    `path` is a .jsonl, .json, .parquet or .csv file or a glob of them, a folder that `save_to_disk` wrote, a folder of files,
    or the name of a hub data set. Files, and a saved folder of one data set, are one split by themselves, so `split` picks
    nothing there. `name` is the configuration, where there are several. Raises what `open_source` raises, and ValueError when there
    is no row.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; it must be at least 1, or None for all rows.")
    path = os.fspath(path)
    files = matching_files(path)
    if any(file.suffix == ".txt" for file in files):
        raise ValueError(f"path {path!r} is no .jsonl, .json, .parquet or .csv file; convert it to one of these.")
    is_one_split = files or (Path(path).expanduser() / "state.json").is_file()
    source = open_source(path, files, name=name, split=None if is_one_split else split)
    with source.errors():
        rows: list[dict[str, Any]] = source.dataset.select(range(len(source.dataset))[:max_rows]).to_list()
    if not rows:
        raise ValueError(f"There is no row in {source.description}; at least one is needed.")
    return rows
