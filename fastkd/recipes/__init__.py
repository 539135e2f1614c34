"""Recipes: the authors' settings of every method and task, as YAML files that `fastkd train` knows by name.

A recipe is METHOD/TASK.yaml in this folder. The first line of its comment says what is distilled, the next ones say where its figures
are from.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import nearest

FOLDER = Path(__file__).parent


def recipe_titles() -> dict[str, str]:
    """METHOD/TASK of every recipe, sorted, and the first line of its comment."""
    files = sorted((f"{file.parent.name}/{file.stem}", file) for file in FOLDER.glob("*/*.yaml"))
    return {name: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, file in files}


def config_path(name: str) -> Path:
    """The file that `name` means: the one at this path if there is one, else the recipe of this name.

    What ends as a YAML file does is a path even if nothing is there. Raises ValueError, with all recipes, for any other name.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    recipes = list(recipe_titles())
    if name in recipes:
        return FOLDER / f"{name}.yaml"
    near = nearest(name, recipes)
    hint = "." if near is None else f", did you mean {near}?"
    raise ValueError(f"{name!r} is neither a file nor a recipe{hint} The recipes are {', '.join(recipes)}.")


def label_words(method: str) -> tuple[str, ...]:
    """The label words of all tasks that a method has recipes for, sorted."""
    import yaml

    recipes = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in FOLDER.glob(f"{method}/*.yaml"))
    return tuple(sorted({word for recipe in recipes for word in recipe.get("task", {}).get("cloze", {}).get("label_words", ())}))
