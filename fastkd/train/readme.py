"""Who can open the folder of a model that a stage has made: told at the end of a run, and in the folder itself."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..models.folder import MAPPED_MODEL_TYPE, RELU_HEAD_MODEL_TYPE, SLOT_BIAS_FILE, VOCAB_MAP_FOLDER, closed_by

README_FILE = "README.md"
_NO_CLASS = "no class of transformers has the head that relu_head gives it"


def for_whom(folder: Path) -> str:
    """Say who can open a model, and how the others get one that they can."""
    told = {
        None: "and for plain transformers: AutoTokenizer and AutoModel open it",
        RELU_HEAD_MODEL_TYPE: f"alone; {_NO_CLASS}",
        MAPPED_MODEL_TYPE: "alone; `fastkd export` makes one for plain transformers of it",
    }
    return f"{folder} is for fastkd {told[closed_by(folder)]}."


def readme(folder: Path, name: str) -> str:
    """The README.md of a model's folder, which is called `name` once it is finished."""
    closed = closed_by(folder)
    if closed is None:
        text = "AutoTokenizer and AutoModel of plain transformers open this folder. `fastkd export` copies it with a model card."
    elif closed == RELU_HEAD_MODEL_TYPE:
        text = f"""This folder is for fastkd alone: {_NO_CLASS}.

Plain transformers would draw another head at random, so it refuses this folder: Auto classes and pipelines by the model type in
`config.json`, all other classes by its `vocab_size`. Train with `relu_head: false` for a model that it opens."""
    else:
        text = f"""This folder is for fastkd alone: `fastkd train`, `fastkd eval` and `fastkd.models.load.load_language_model` read it.

The model has rows for the part of the vocabulary that it keeps, the tokenizer is its teacher's whole one, and `{VOCAB_MAP_FOLDER}/`
stands between them; `{SLOT_BIAS_FILE}`, if there is one, is a part of its logits. The files belong together, and fastkd refuses the
folder if one is missing or is not the one that was saved. Plain transformers would feed the model ids of other tokens, so it refuses
this folder: Auto classes and pipelines by the model type in `config.json`, all other classes by its `vocab_size`. A folder for plain
transformers, with a tokenizer of the kept tokens and a model card, is made by

```bash
fastkd export {shlex.quote(name)} --output_dir {shlex.quote(f"{name}-exported")}
```"""
    return f"# A model trained by fastkd\n\n{text}\n"
