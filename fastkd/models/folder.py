"""The folder of a model: the one that is named, or where the files of a hub name lie on this machine; only whole ones are given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..sealed import MANIFEST_FILE, content_sha256, read_json, read_manifest
from ..store import write_json_atomic

VOCAB_MAP_FOLDER = "vocab_map"
SLOT_BIAS_FILE = "slot_bias.safetensors"
MAPPED_MODEL_TYPE = "fastkd_mapped_student_open_it_by_fastkd_export"
"""In the config.json of a model on a kept vocabulary, which plain transformers would feed the teacher's ids."""
RELU_HEAD_MODEL_TYPE = "fastkd_relu_head_open_it_by_fastkd"
"""In the config.json of a `BertWithReLUHead`, whose head plain transformers would draw anew."""
_CLOSED = (MAPPED_MODEL_TYPE, RELU_HEAD_MODEL_TYPE)
_OWN = {"model_type": "mapped_model_type", "vocab_size": "mapped_vocab_size"}
"""Where a closed config.json has these settings. By the model type that stands in their place transformers' Auto classes and pipelines
refuse the model, and by the vocabulary's size, which is no number, all other classes."""
_FILES = "mapped_files"
_FOR_PEOPLE = {"README.md", "fastkd.json", "generation_config.json"}
"""No result is computed from these."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_pinned: dict[str, str] | None = None
"""Within `one_revision`, the revision that every hub name stands for."""
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", f"{VOCAB_MAP_FOLDER}/*", SLOT_BIAS_FILE]


def model_folder(name_or_path: str, needed: str = "config.json", what: str = "a transformers model", *, weights: bool = False) -> Path:
    """The folder of a model or tokenizer: the one that is named, or a hub name's, of which what is missing here is downloaded.

    Args:
        name_or_path: a folder or a hub name.
        needed: the file without which a folder is refused.
        what: that is looked for, as a refusal calls it.
        weights: also the weights, which have to be safetensors.

    Raises:
        ValueError, OSError: there is nothing of the kind, or one of its files is not whole.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / needed).is_file():
            raise ValueError(f"The folder {name_or_path} holds no {needed}, so it is not {what}; give one made by save_pretrained.")
    elif folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise ValueError(f"{name_or_path} does not exist; give a folder made by save_pretrained, or a hub name such as org/model.")
    else:
        folder = _snapshot(name_or_path, weights)
    for file in sorted([*folder.glob("*.json"), *weight_files(folder)]):
        _check_whole(file)
    _check_files(folder, weights)
    if weights and not ((folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file()):
        raise ValueError(_without_safetensors(name_or_path, folder))
    return folder


def close_folder(folder: Path, model_type: str) -> None:
    """Let plain transformers refuse the model in `folder`, and fastkd refuse it without its map or slot bias, or with others.

    model_type: one of those above, by which Auto classes refuse it.
    """
    settings, beside = _opened(read_json(folder / "config.json")), [folder / SLOT_BIAS_FILE, *folder.glob(f"{VOCAB_MAP_FOLDER}/*")]
    files = {file.relative_to(folder).as_posix(): content_sha256(file) for file in beside if file.is_file()}
    write_json_atomic(folder / "config.json", {**_closed(settings, model_type), **dict.fromkeys(_OWN, model_type), _FILES: files})


def closed_by(folder: Path) -> str | None:
    """The model type by which plain transformers refuses the model in `folder`; None where it does not."""
    file = folder / "config.json"
    found = read_json(file).get("model_type") if file.is_file() else None
    return found if found in _CLOSED else None


def own_settings(folder: Path) -> dict[str, Any]:
    """The settings in the config.json of a closed folder, as the model's class reads them."""
    return _opened(read_json(folder / "config.json", _OWN["model_type"]))


def _closed(settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    """`settings`, and those of their parts, with `model_type` in place of what `_OWN` names."""
    parts = {key: _closed(value, model_type) for key, value in settings.items() if isinstance(value, dict)}
    moved = {name: settings[key] for key, name in _OWN.items() if key in settings}
    return {**settings, **parts, **moved, **{key: model_type for key in _OWN if key in settings}}


def _opened(settings: dict[str, Any]) -> dict[str, Any]:
    parts = {key: _opened(value) for key, value in settings.items() if isinstance(value, dict)}
    own = {key: settings[name] for key, name in _OWN.items() if name in settings}
    restored = {**settings, **parts, **own}
    return {key: value for key, value in restored.items() if key not in (*_OWN.values(), _FILES) and value not in _CLOSED}


def _check_files(folder: Path, weights: bool) -> None:
    """Refuse a closed folder without a file that it was saved with and that decides its numbers, or with another one of that name."""
    if closed_by(folder) is None:
        return
    expected = dict(read_json(folder / "config.json").get(_FILES, {}))
    if (folder / MANIFEST_FILE).is_file():
        expected |= {name: entry["sha256"] for name, entry in read_manifest(folder)["files"].items()}
    for name in sorted(expected.keys() - _FOR_PEOPLE):
        if not weights and re.fullmatch(r"model\b.*\.safetensors", name):
            continue  # those of a hub name may not be here yet
        file = folder / name
        if not file.is_file() or content_sha256(file) != expected[name]:
            found = "is another file than" if file.is_file() else "is missing, and is one of those"
            raise ValueError(
                f"{file} {found} the student was saved with, so it would say something else. Copy the student's whole folder again; "
                "plain folders, of which files may be left out, are made by `fastkd export`."
            )


@contextmanager
def one_revision() -> Iterator[None]:
    """Within the block a hub name stands for one revision, whatever is uploaded meanwhile."""
    global _pinned
    before, _pinned = _pinned, {}
    try:
        yield
    finally:
        _pinned = before


def _snapshot(name: str, weights: bool) -> Path:
    """The folder of the hub's newest revision of a model, or of the newest one that is here if the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=(_pinned or {}).get(name), allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{name} is no folder, and no model of that name is on this machine or can be fetched from the hub "
            f"({' '.join(str(error).split()).rstrip('.')}). Give a folder made by save_pretrained, or the name of a model there."
        ) from error
    if _pinned is not None:
        _pinned[name] = folder.name
    if not weights:
        return folder
    files = _indexed(folder) if (folder / _INDEX).is_file() else [_WEIGHTS]
    return Path(snapshot_download(name, revision=folder.name, allow_patterns=files))


def _without_safetensors(name: str, folder: Path) -> str:
    import transformers

    saved = next(iter(read_json(folder / "config.json").get("architectures") or ()), "AutoModel")
    kinds = (saved if hasattr(transformers, saved) else "AutoModel", "AutoTokenizer")
    made = f"{Path(name).name}-safetensors"
    steps = "; ".join(f"{kind}.from_pretrained({name!r}).save_pretrained({made!r})" for kind in kinds)
    return (
        f"The model {name} has no {_WEIGHTS}, and fastkd reads no pickles such as pytorch_model.bin, which can run code. Convert it, "
        f'where you trust it, and give {made}: python -c "from transformers import {", ".join(kinds)}; {steps}"'
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder that transformers reads: those of the index, or the one of its name, or all."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return [folder / name for name in _indexed(folder) if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def _indexed(folder: Path) -> list[str]:
    """The names of a model's shards."""
    return sorted({*read_json(folder / _INDEX, "weight_map")["weight_map"].values()})


def _check_whole(file: Path) -> None:
    """Refuse what stands for a file that was never fetched, and tensors of which a part is missing; no tensor is read."""
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} is a pointer of git-lfs, not the file itself; fetch it by `git lfs pull` there.")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            size = file.stat().st_size
            raise ValueError(f"{file}, of {size} bytes, is no whole safetensors file ({error}); copy or download it again.") from error
