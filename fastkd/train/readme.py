"""Who can open the folder of a model that a stage has made: told at the end of a run, and in the folder itself."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..models.folder import VOCAB_MAP_FOLDER

README_FILE = "README.md"


def for_whom(folder: Path) -> str:
    """Say who can open a model, and how the others get one that they can."""
    if not (folder / VOCAB_MAP_FOLDER).is_dir():
        return f"{folder} is for fastkd and for plain transformers: AutoTokenizer and AutoModel open it."
    return f"{folder} is for fastkd alone; for plain transformers: {_export(str(folder))}"


def readme(folder: Path, name: str) -> str:
    """The README.md of a model's folder, which is called `name` once it is finished."""
    if not (folder / VOCAB_MAP_FOLDER).is_dir():
        text = "AutoTokenizer and AutoModel of plain transformers open this folder. `fastkd export` copies it with a model card."
    else:
        text = f"""This folder is for fastkd alone: `fastkd train`, `fastkd eval` and `fastkd.models.load.load_language_model` read it.

The model has rows for the part of the vocabulary that it keeps, the tokenizer is its teacher's whole one, and `{VOCAB_MAP_FOLDER}/`
stands between them. Plain transformers would feed the model ids of other tokens, so it refuses this folder by the model type in
`config.json`. A folder for plain transformers, with a tokenizer of the kept tokens and a model card, is made by

```bash
{_export(name)}
```"""
    return f"# A model trained by fastkd\n\n{text}\n"


def _export(folder: str) -> str:
    return f"fastkd export {shlex.quote(folder)} --output_dir {shlex.quote(f'{folder}-exported')}"
