"""Which keys of a configuration name files and folders, and what may stand there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .schema import ConfigError

PATHS = frozenset(
    {
        *("output_dir", "cache_dir", "path", "eval_path", "counts"),
        *("teacher_model_name_or_path", "model_name_or_path", "tokenizer_name_or_path"),
        *("teacher_filters", "student_filters"),
    }
)
"""Keys that name a file or a folder, or what may be one."""


def is_path(text: str) -> bool:
    """Whether `text` can name a file, a folder or something on the hub: it is neither empty nor beyond what the system can encode."""
    try:
        return bool(text.strip()) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def expand_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that home; ValueError where there is no such home."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path!r} begins with ~, and there is no such home; write the whole path, or ./{path} for what is called so.")
    return expanded


def with_homes(data: Any, where: str = "") -> Any:
    """Plain data with the home folder in place of a leading `~` of every path."""
    if not isinstance(data, Mapping):
        return data
    expanded = {}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in PATHS or not isinstance(value, str):
            expanded[key] = with_homes(value, f"{name}.")
            continue
        try:
            expanded[key] = expand_home(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
    return expanded
